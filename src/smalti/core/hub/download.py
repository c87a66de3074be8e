"""Downloads from the hub into its cache, with the token of the environment or of the usual login."""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import HfApi, snapshot_download

from smalti.core.errors import UserError
from smalti.core.hub.ids import HubId, RepoType
from smalti.core.hub.problems import HUB_ERRORS, describe_problem

MOST_NAMES = 8
"""Names of files or folders in an error."""


def download(hub_id: HubId, names: Sequence[str], kind: RepoType = "model") -> Path:
    """Downloads files of a folder on the hub; returns the local folder, which may lack some of them.

    Files in the cache are not downloaded again, and without a network the newest ones in the cache are returned.

    Args:
        hub_id: the repository, revision and folder.
        names: paths in that folder, in which `*` stands for any characters.
        kind: the type of the repository.

    Raises:
        UserError: with the reason, if they cannot be downloaded.
    """
    patterns = [hub_id.within(name) for name in names]
    try:
        with quiet_hub():
            root = snapshot_download(hub_id.repo, repo_type=kind, revision=hub_id.revision, allow_patterns=patterns)
    except HUB_ERRORS as error:
        raise UserError(describe_problem(error, hub_id, kind)) from error
    return Path(root) / hub_id.folder


def list_files(hub_id: HubId) -> list[str]:
    """Returns the paths of all files of a model's repository; none if it cannot be listed, as for a cached copy."""
    try:
        return sorted(HfApi().list_repo_files(hub_id.repo, revision=hub_id.revision))
    except HUB_ERRORS:
        return []


def describe_missing(hub_id: HubId, needed: Sequence[str]) -> str:
    """Returns why files of a model are missing, and which folders of the repository have all of them."""
    files = list_files(hub_id)
    folders = {file.rpartition("/")[0] for file in files}
    complete = sorted(
        folder for folder in folders if all(f"{folder}/{name}".removeprefix("/") in files for name in needed)
    )
    exists = any(folder == hub_id.folder or folder.startswith(f"{hub_id.folder}/") for folder in folders)
    if hub_id.folder and files and not exists:
        reason = f"{hub_id.repo} has no folder {hub_id.folder}"
    else:
        reason = f"{hub_id} is not smalti's: it lacks {' or '.join(needed)}"
    others = [str(HubId(hub_id.repo, hub_id.revision, folder)) for folder in complete[:MOST_NAMES]]
    return f"{reason}; give {' or '.join(others)}" if others else f"{reason}; check the name"


@contextmanager
def quiet_hub() -> Iterator[None]:
    """Leaves out warnings of `huggingface_hub`, such as that it tries again: the error that follows is enough."""
    logger = logging.getLogger("huggingface_hub")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)
