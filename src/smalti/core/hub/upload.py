"""Uploads to the hub: all files in one commit, or into a local folder to look at first."""

import shutil
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import TypeAlias

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token

from smalti.core.errors import UserError
from smalti.core.files import whole_file
from smalti.core.hub.ids import HubId, RepoType
from smalti.core.hub.problems import HUB_ERRORS, LOG_IN, describe_problem
from smalti.core.progress import print_note

Files: TypeAlias = Mapping[str, Path | bytes]
"""The files to upload: the path in the target's folder, and the file that is uploaded as it is, or its contents."""

FindFormer: TypeAlias = Callable[[Files, Collection[str], Callable[[str], bytes]], set[str]]
"""Returns which files in the target's folder are left from an earlier upload of the same kind, and are deleted.

It receives the files to upload, the names of those in the folder, and a function that reads one of these.
"""


def upload(
    files: Files,
    target: HubId,
    kind: RepoType = "model",
    *,
    find_former: FindFormer,
    private: bool = False,
    message: str | None = None,
) -> str:
    """Uploads files in one commit, and creates the repository and the branch if needed; returns the page's address.

    The same commit deletes files of an earlier upload, which would be read or shown with the new ones.

    A failure leaves the repository as it was, though perhaps new and empty.

    Args:
        files: what to upload.
        target: the repository, branch and folder.
        kind: the type of the repository.
        find_former: see `FindFormer`.
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
        place = {"repo_type": kind, "revision": target.revision}
        folder = target.within("")
        names = [
            name.removeprefix(folder) for name in api.list_repo_files(target.repo, **place) if name.startswith(folder)
        ]

        def read(name: str) -> bytes:
            commit = api.repo_info(target.repo, **place).sha  # names of branches may have slashes
            path = api.hf_hub_download(target.repo, target.within(name), repo_type=kind, revision=commit)
            return Path(path).read_bytes()

        former = find_former(files, names, read)
        api.create_commit(
            target.repo,
            [
                *(CommitOperationAdd(target.within(name), contents) for name, contents in files.items()),
                *(CommitOperationDelete(target.within(name)) for name in sorted(former)),
            ],
            repo_type=kind,
            revision=target.revision,
            commit_message=message or f"Upload {target.title} with smalti",
        )
        _print_deleted(former)
    except UserError:
        raise
    except HUB_ERRORS as error:
        problem = describe_problem(error, target, kind)
        raise UserError(f"nothing was uploaded to {target}: {problem}") from error
    return f"{address}/tree/{target.revision}" if target.revision else address


def former_files(files: Files, folder: Path, find_former: FindFormer) -> list[Path]:
    """Returns the files that `upload` would delete if a local folder were its target."""
    names = [path.name for path in folder.iterdir() if path.is_file()] if folder.is_dir() else []
    return [folder / name for name in sorted(find_former(files, names, lambda name: (folder / name).read_bytes()))]


def write_files(files: Files, folder: Path, former: Collection[Path]) -> None:
    """Writes what `upload` would upload into a local folder, then deletes the files of an earlier call."""
    for name, contents in files.items():
        with whole_file(folder / name) as partial:
            if isinstance(contents, bytes):
                partial.write_bytes(contents)
            else:
                shutil.copyfile(contents, partial)
    for path in former:
        path.unlink()
    _print_deleted({path.name for path in former})


def _print_deleted(names: Collection[str]) -> None:
    if names:
        print_note(f"deleted, as left from an earlier push: {', '.join(sorted(names))}")


def size_of(contents: Path | bytes) -> int:
    """Returns the bytes of a file to upload."""
    return len(contents) if isinstance(contents, bytes) else contents.stat().st_size
