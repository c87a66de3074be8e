"""Hub ids: names of repositories on the Hugging Face hub, with a revision and a folder in them."""

import re
from dataclasses import dataclass
from typing import Literal, TypeAlias
from urllib.parse import quote, unquote

from smalti.core.errors import UserError

RepoType: TypeAlias = Literal["model", "dataset"]
FORMS = "owner/name, owner/name@revision or owner/name/folder"

_NAME = r"\w(?:[\w.-]*\w)?"
_HUB_ID = re.compile(
    rf"(?P<repo>{_NAME}/{_NAME})(?:@(?P<revision>refs/pr/\d+|[^/@\s]+))?(?:/(?P<folder>[^@]+))?", re.ASCII
)
_PULL_REQUEST = re.compile(r"refs/pr/\d+")
_UNSAFE_PART = re.compile(r"\.{0,2}|.*[*?\[\]\\].*")
"""Parts of a folder's name that would lead out of it, or that stand for several names."""
LONGEST_ID = 500
OWN_FOLDERS = "runs/"
"""The folder that commands write to by default. A name below it is always local, and says nothing of the machine."""


@dataclass(frozen=True)
class HubId:
    """A place on the hub.

    Attributes:
        repo: `owner/name`.
        revision: a branch, a tag or a commit; None for the default branch.
        folder: a folder of the repository; empty for its root. Of a data set, a file.
    """

    repo: str
    revision: str | None = None
    folder: str = ""

    def __str__(self) -> str:
        plain = self.revision is None or _PULL_REQUEST.fullmatch(self.revision)
        revision = self.revision if plain else quote(str(self.revision), safe="")
        return self.repo + (f"@{revision}" if self.revision else "") + (f"/{self.folder}" if self.folder else "")

    def within(self, name: str) -> str:
        """Returns the path, in the repository, of a file in the folder."""
        return f"{self.folder}/{name}" if self.folder else name

    @property
    def title(self) -> str:
        """The last part of the folder's name, or of the repository's."""
        return (self.folder or self.repo).rpartition("/")[2]


def find_hub_id(text: str) -> HubId | None:
    """Parses `owner/name`, `owner/name@revision` and `owner/name@revision/folder`; returns None for any other text,
    and for names below `runs/`.

    A slash in a revision is written `%2F`, except in `refs/pr/N`.
    """
    match = _HUB_ID.fullmatch(text) if len(text) <= LONGEST_ID and not text.startswith(OWN_FOLDERS) else None
    if match is None or "--" in match["repo"] or ".." in match["repo"] or match["repo"].endswith(".git"):
        return None
    folder = (match["folder"] or "").rstrip("/")
    if folder and (not folder.isprintable() or any(map(_UNSAFE_PART.fullmatch, folder.split("/")))):
        return None
    return HubId(match["repo"], unquote(match["revision"]) if match["revision"] else None, folder)


def parse_target(text: str, revision: str | None = None) -> HubId:
    """Returns the place to upload to; `revision` is a branch, which may also be part of the id.

    Raises:
        UserError: if the text is not a hub id, or names another branch than `revision`.
    """
    target = find_hub_id(text)
    if target is None:
        raise UserError(f"{text} is not a hub id; give {FORMS}")
    if revision is not None and target.revision not in (None, revision):
        raise UserError(f"{text} and the revision {revision} are two branches; give one")
    return HubId(target.repo, revision or target.revision, target.folder)
