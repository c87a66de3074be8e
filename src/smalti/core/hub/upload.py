"""Uploads to the hub: all files in one commit, or into a local folder to look at first."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TypeAlias

from huggingface_hub import CommitOperationAdd, HfApi, get_token

from smalti.core.errors import UserError
from smalti.core.files import whole_file
from smalti.core.hub.ids import HubId, RepoType
from smalti.core.hub.problems import HUB_ERRORS, LOG_IN, describe_problem

Files: TypeAlias = Mapping[str, Path | bytes]
"""The files to upload: the path in the target's folder, and the file that is uploaded as it is, or its contents."""


def upload(
    files: Files, target: HubId, kind: RepoType = "model", *, private: bool = False, message: str | None = None
) -> str:
    """Uploads files in one commit, and creates the repository and the branch if needed; returns the page's address.

    A failure leaves the repository as it was, though perhaps new and empty.

    Args:
        files: what to upload.
        target: the repository, branch and folder.
        kind: the type of the repository.
        private: create a private repository; otherwise the account's default decides.
        message: the commit's message.

    Raises:
        UserError: if the repository exists and is public although `private` is set, or with the reason of a failure.
    """
    api = HfApi()
    try:
        if get_token() is None:
            raise UserError(f"nothing was uploaded to {target}: no token is set; {LOG_IN}")
        address = str(api.create_repo(target.repo, repo_type=kind, private=private or None, exist_ok=True))
        if private and not api.repo_info(target.repo, repo_type=kind).private:
            raise UserError(
                f"nothing was uploaded: {target.repo} exists and is public; make it private on its page, or give "
                "another name"
            )
        if target.revision:
            api.create_branch(target.repo, branch=target.revision, repo_type=kind, exist_ok=True)
        api.create_commit(
            target.repo,
            [CommitOperationAdd(target.within(name), contents) for name, contents in files.items()],
            repo_type=kind,
            revision=target.revision,
            commit_message=message or f"Upload {target.title} with smalti",
        )
    except UserError:
        raise
    except HUB_ERRORS as error:
        problem = describe_problem(error, target, kind)
        raise UserError(f"nothing was uploaded to {target}: {problem}") from error
    return f"{address}/tree/{target.revision}" if target.revision else address


def write_files(files: Files, folder: Path) -> None:
    """Writes what `upload` would upload into a local folder."""
    for name, contents in files.items():
        with whole_file(folder / name) as partial:
            if isinstance(contents, bytes):
                partial.write_bytes(contents)
            else:
                shutil.copyfile(contents, partial)


def size_of(contents: Path | bytes) -> int:
    """Returns the bytes of a file to upload."""
    return len(contents) if isinstance(contents, bytes) else contents.stat().st_size
