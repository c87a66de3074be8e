"""Atomic writes, and the checks of outputs that commands make before they start.

Files and folders are written under a temporary name, synced to the disk, then renamed. A file or folder written this
way is either complete or absent, also after a kill.
"""

import errno
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from smalti.core.errors import UserError

PARTIAL = ".partial"


def sync(path: Path) -> None:
    """Flushes a file's bytes, or a folder's entries, to the disk (fsync).

    Folders are skipped on Windows, which cannot open them.
    """
    if os.name == "nt" and path.is_dir():
        return
    descriptor = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)  # Windows syncs only what it may write
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yields a temporary path to write to, which becomes `path` if the block succeeds; otherwise `path` is kept."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = _partial(path)
    try:
        yield partial
        sync(partial)
        partial.replace(path)
        sync(path.parent)
    except OSError as error:
        error.filename = error.filename or str(path)  # errors from write(), unlike open(), do not name the file
        raise
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """Yields a temporary folder to fill, which becomes `path` if the block succeeds. `path` must not exist before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = _partial(path)
    shutil.rmtree(partial, ignore_errors=True)  # left by a kill
    try:
        partial.mkdir()
        yield partial
        for file in partial.iterdir():
            sync(file)
        sync(partial)
        partial.rename(path)
        sync(path.parent)
    except OSError as error:
        error.filename = error.filename or str(path)  # errors from write(), unlike open(), do not name the file
        raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write_json(path: Path, value: Any) -> None:
    """Writes indented JSON atomically."""
    with whole_file(path) as partial:
        partial.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def require_outputs(
    outputs: Iterable[Path],
    *,
    inputs: Iterable[Path] = (),
    overwrite: bool = False,
    is_own: Callable[[Path], bool] = lambda path: False,
    flag: str = "--out",
) -> None:
    """Checks, before any work, that a command may write its outputs and that it can.

    Call it with every file that the command will write and every file or folder that it reads. It leaves nothing
    behind: folders that it makes to test writing are removed again.

    `Path.is_dir` and `Path.exists` would raise for names that are too long; `os.path` returns False.

    Args:
        outputs: the files, or folders, that will be written.
        inputs: files and folders that the command reads. Nothing may be written over a file or inside a folder.
        overwrite: replace existing files, whatever made them. Folders are replaced only if they are the command's own.
        is_own: returns whether an existing output was made by this command from the same input and may be replaced.
        flag: the flag that sets the outputs, for messages.

    Raises:
        UserError: if an output is an input (by another spelling, a symbolic or a hard link too), if two outputs are one
            file, if an output exists that is not the command's own, or if one cannot be written.
    """
    outputs = list(outputs)
    _require_distinct(outputs, flag)
    _require_no_input(outputs, list(inputs), flag)
    for output in outputs:
        if os.path.isdir(output) and not is_own(output):
            raise UserError(f"{flag} {output} is a folder; give another name")
        if os.path.lexists(output) and not overwrite and not is_own(output):
            raise UserError(
                f"{flag} {output} exists and this command did not make it from the same input; give another name, "
                "or pass --overwrite to replace it"
            )
    longest_names: dict[Path, Path] = {}
    for output in outputs:
        longest_names[output.parent] = max(longest_names.get(output.parent, output), output, key=lambda x: len(x.name))
    for output in longest_names.values():
        _require_writable(output, flag)


def _require_distinct(outputs: list[Path], flag: str) -> None:
    """Refuses outputs that are one file. Case is ignored on macOS and Windows, whose file systems ignore it."""
    names: dict[str, Path] = {}
    for output in outputs:
        name = _real(output) if sys.platform == "linux" else _real(output).casefold()
        if (other := names.setdefault(name, output)) is not output:
            raise UserError(f"{flag}: {other} and {output} would overwrite each other; rename one of the inputs")


def _require_no_input(outputs: list[Path], inputs: list[Path], flag: str) -> None:
    """Refuses outputs that are inputs, by their real path or their inode, or that lie in a folder of inputs."""
    by_identity = {identity: path for path in inputs for identity in _identities(path)}
    folders = [(_real(path) + os.sep, path) for path in inputs if os.path.isdir(path)]
    for output in outputs:
        for identity in _identities(output):
            if identity in by_identity:
                raise UserError(
                    f"{flag} {output} would overwrite an input ({by_identity[identity]}); give another name"
                )
        for prefix, folder in folders:
            if _real(output).startswith(prefix):
                raise UserError(f"{flag} {output} lies inside the input folder {folder}; give a name outside it")


def _real(path: Path) -> str:
    return os.path.realpath(path)


def _identities(path: Path) -> list[object]:
    """Returns what two paths of one file share: the real path and, if the file exists, its device and inode."""
    identities: list[object] = [_real(path)]
    with suppress(OSError):
        status = path.stat()
        identities.append((status.st_dev, status.st_ino))
    return identities


def _require_writable(output: Path, flag: str) -> None:
    """Checks that a file can be written beside `output` under its temporary name, which is longer than its own."""
    made: list[Path] = []
    try:
        folder = output.parent
        while not os.path.exists(folder):
            made.append(folder)
            folder = folder.parent
        output.parent.mkdir(parents=True, exist_ok=True)
        probe = _partial(output)
        try:
            probe.write_bytes(b"\0")
        finally:
            with suppress(OSError):
                probe.unlink(missing_ok=True)
    except OSError as error:
        reasons = {
            errno.ENAMETOOLONG: f"the name is too long ({len(output.name)} characters)",
            errno.ENOTDIR: "a part of its path is a file",
            errno.EEXIST: "a part of its path is a file",
        }
        reason = reasons.get(error.errno or 0, error.strerror or str(error))
        shown = f"{str(output)[:60]}..." if error.errno == errno.ENAMETOOLONG else output
        raise UserError(f"{flag} {shown} cannot be written: {reason}; give another name") from error
    finally:
        for folder in made:
            with suppress(OSError):
                folder.rmdir()


def _partial(path: Path) -> Path:
    return path.with_name(f".{path.name}{PARTIAL}")


def file_digest(path: Path) -> str:
    """Returns the SHA-256 of a file's bytes in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
