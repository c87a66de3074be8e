"""Atomic writes, the checks of outputs that commands make before they start, and the names and reading of inputs.

Files and folders are written under a temporary name, synced to the disk, then renamed. A file or folder written this
way is either complete or absent, also after a kill.
"""

import errno
import hashlib
import json
import os
import shutil
import stat
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from importlib import import_module
from io import BufferedReader
from itertools import chain, count
from pathlib import Path
from types import ModuleType
from typing import Any

from smalti.core.errors import UserError, unreadable
from smalti.core.progress import print_note

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
        with _reporting_failed_write(path):
            yield partial
            sync(partial)
            partial.replace(path)
            sync(path.parent)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def _reporting_failed_write(path: Path) -> Iterator[None]:
    """Raises the OSError of a failed write, which names `path`, in place of a library's error in handling it."""
    try:
        yield
    except (OSError, ValueError, AttributeError, RuntimeError) as error:
        if isinstance(error, UserError) or (failed := _failed_write(error)) is None:
            raise
        failed.filename = failed.filename or str(path)  # errors from write(), unlike open(), do not name the file
        raise failed from None


def _failed_write(error: BaseException | None) -> OSError | None:
    """Returns the OSError that an error is, or that a library handled when it failed with another one."""
    while error is not None and not isinstance(error, OSError):
        error = error.__cause__ or error.__context__
    return error


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """Yields a temporary folder to fill, which becomes `path` if the block succeeds. `path` must not exist before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = _partial(path)
    shutil.rmtree(partial, ignore_errors=True)  # left by a kill
    try:
        with _reporting_failed_write(path):
            partial.mkdir()
            yield partial
            for file in partial.iterdir():
                sync(file)
            sync(partial)
            partial.rename(path)
            sync(path.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write_json(path: Path, value: Any) -> None:
    """Writes indented JSON atomically."""
    with whole_file(path) as partial:
        partial.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def require_outputs(outputs: Iterable[Path], *, inputs: Iterable[Path] = (), flag: str = "--out") -> None:
    """Checks, before any work, that outputs are distinct, are no inputs, and can be written.

    Nothing is left behind: folders that are made to test writing are removed again. `locks.claim` also locks the
    outputs and checks what they would replace.

    Args:
        outputs: the files, or folders, that will be written.
        inputs: files and folders that are read. Nothing may be written over a file or inside a folder: there, an output
            would become an image and its folder a class.
        flag: the flag that sets the outputs, for messages.

    Raises:
        UserError: if an output is an input (by another spelling, a symbolic or a hard link too) or lies inside one, if
            two outputs are one file, or if one cannot be written.
    """
    outputs = list(outputs)
    _require_distinct(outputs, flag)
    require_no_input(outputs, inputs, flag)
    longest_names: dict[Path, Path] = {}
    for output in outputs:
        longest_names[output.parent] = max(longest_names.get(output.parent, output), output, key=lambda x: len(x.name))
    for output in longest_names.values():
        _require_writable(output, flag)


def require_replaceable(
    outputs: Iterable[Path],
    *,
    overwrite: bool | None = None,
    is_own: Callable[[Path], bool] | None = lambda path: False,
    flag: str = "--out",
) -> None:
    """Checks that outputs do not exist or may be replaced.

    `Path.is_dir` and `Path.exists` would raise for names that are too long; `os.path` returns False.

    Args:
        outputs: the files, or folders, that will be written.
        overwrite: replace existing files, whatever made them; None if the command has no such flag. Folders are
            replaced only if they are the command's own.
        is_own: returns whether an existing output was made by this command from the same input and may be replaced;
            None if the command cannot tell.
        flag: the flag that sets the outputs, for messages.

    Raises:
        UserError: if an output exists that may not be replaced.
    """
    for output in outputs:
        if os.path.isdir(output) and not (is_own and is_own(output)):
            raise UserError(f"{flag} {output} is a folder; give another name")
        if os.path.lexists(output) and not overwrite and not (is_own and is_own(output)):
            advice = "remove it first" if overwrite is None else "pass --overwrite to replace it"
            reason = " and this command did not make it from the same input" if is_own else ""
            raise UserError(f"{flag} {output} exists{reason}; give another name, or {advice}")


def free_name(path: Path, outputs: Callable[[Path], Iterable[Path]], is_own: Callable[[Path], bool]) -> Path:
    """Returns a default name, numbered (-2, -3, ...) until none of its outputs exists but the command's own.

    Args:
        path: the default name.
        outputs: returns all files that a command writes whose output has a name.
        is_own: see `require_replaceable`.
    """
    names = chain([path], (path.with_stem(f"{path.stem}-{number}") for number in count(2)))
    return next(name for name in names if all(not os.path.lexists(each) or is_own(each) for each in outputs(name)))


def print_left_over(folder: Path, pattern: str, written: Iterable[Path], is_own: Callable[[Path], bool]) -> None:
    """Prints a note on a command's own files beside those that it has written, such as those of a larger `--num`.

    Args:
        folder: where the files were written.
        pattern: a glob of their names.
        written: the files.
        is_own: see `require_replaceable`.
    """
    if left := sorted(filter(is_own, set(folder.glob(pattern)) - set(written))):
        named = f"{left[0]} and {len(left) - 1} more" if len(left) > 1 else left[0]
        print_note(f"note: {named} of an earlier run stayed beside the new files; delete what you do not need")


@contextmanager
def made_folders(folder: Path) -> Iterator[None]:
    """Creates a folder with its parents for a block, and afterwards removes those that it created and are empty."""
    missing = [folder, *folder.parents]
    missing = missing[: next((number for number, each in enumerate(missing) if os.path.exists(each)), None)]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    finally:
        for each in missing:
            with suppress(OSError):  # it is not empty
                each.rmdir()


def _require_distinct(outputs: list[Path], flag: str) -> None:
    """Refuses outputs that are one file. Case is ignored on macOS and Windows, whose file systems ignore it."""
    names: dict[str, Path] = {}
    for output in outputs:
        name = _real(output) if sys.platform == "linux" else _real(output).casefold()
        if (other := names.setdefault(name, output)) is not output:
            raise UserError(f"{flag}: {other} and {output} would overwrite each other; rename one of the inputs")


def as_name(source: str | Path | float, what: str = "the source") -> str:
    """Returns a source as a text, as command lines have it. That of a `Path` is a path, never a name in the package.

    Raises:
        UserError: for an empty text or what is no name, called `what`; for a name that is longer than any file's.
    """
    if not isinstance(source, str | Path | float | int):
        given = type(source).__name__
        raise UserError(f"{what} is named by a text or a Path, not by {given}; store it, and give the file's name")
    if source == "":
        raise UserError(f"{what} is empty; give a value, or leave it out for its default")
    try:
        os.lstat(str(source))
    except (OSError, ValueError) as error:  # the latter for a zero byte
        if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG and "://" not in str(source):
            raise unreadable(source, error) from None
    return os.path.join(os.curdir, source) if isinstance(source, Path) and source.parent == Path() else str(source)


def from_here(path: Path) -> Path:
    """Returns an absolute path as a relative one, for messages, if it is below the working directory."""
    here = Path.cwd()
    return path.relative_to(here) if path.is_relative_to(here) else path


def import_from_here(name: str, requested: str) -> ModuleType:
    """Imports a module of the user's; those of the current folder are found, as with `python -m`.

    Raises:
        UserError: if there is no such module, or none that it imports; the line begins with `requested`.
    """
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        raise UserError(
            f"{requested}: there is no module {error.name!r}; run the command in its folder, or install it"
        ) from error


def require_no_input(outputs: Iterable[Path], inputs: Iterable[Path], flag: str = "--out") -> None:
    """Refuses outputs that are inputs, by their real path or their inode, or that lie in a folder of inputs.

    Raises:
        UserError: naming the output and the input.
    """
    inputs = list(inputs)
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
    """Checks that an existing folder can be written into, or a file beside `output` under its temporary name.

    That name is longer than the output's own.
    """
    try:
        with made_folders(output.parent):
            probe = output / f".output{PARTIAL}" if os.path.isdir(output) else _partial(output)
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


def _partial(path: Path) -> Path:
    return path.with_name(f".{path.name}{PARTIAL}")


def open_regular(path: Path) -> BufferedReader:
    """Opens an input. Named pipes are refused, since opening one may never return, and devices, which may never end.

    Raises:
        UserError: if it is not a regular file, or the user may not read it.
        FileNotFoundError: if there is none.
    """
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            what = "is a folder" if path.is_dir() else "is not a regular file"
            raise UserError(f"{path} {what}; put the file itself there")
        return path.open("rb")
    except FileNotFoundError:
        raise
    except OSError as error:
        raise unreadable(path, error) from error


def file_digest(path: Path) -> str:
    """Returns the SHA-256 of a file's bytes in hexadecimal.

    Raises:
        OSError: if it cannot be read.
        UserError: if it is not a regular file.
    """
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def input_digest(path: Path) -> str:
    """Returns the `file_digest` of an input, which the user may replace.

    Raises:
        UserError: if it cannot be read.
    """
    try:
        return file_digest(path)
    except OSError as error:
        raise unreadable(path, error) from error
