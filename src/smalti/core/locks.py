"""Locks of outputs: two commands that write to one file or folder at once would mix their results.

Commands `claim` their outputs, which also makes the checks of `files.py`. Training holds its folder's lock.

The system releases a lock when its process ends, also after `kill -9`. Within one process a lock may be taken again.
"""

import errno
import math
import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from filelock import FileLock, SoftFileLock, Timeout

from smalti.core.errors import UserError
from smalti.core.files import made_folders, require_outputs, require_replaceable

LOCK_NAME = ".lock"
RETRY_SECONDS = 0.2
"""Time for which a lock is tried: a command that ends removes its lock file, perhaps the one that was just opened."""
MOST_LOCKS = 256
"""Number of outputs that a command locks at most. Each lock is an open file, and systems allow about a thousand."""
_UNSUPPORTED = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}
"""Errors of file systems without locks. On these an output is written without one."""

_held: dict[Path, tuple[FileLock, int]] = {}
"""The locks of this process by their files, and the process that took each: a forked worker must not remove one."""
_holders: Counter[Path] = Counter()


@contextmanager
def claim(
    outputs: Iterable[Path],
    *,
    folder: Path | None = None,
    inputs: Iterable[Path] = (),
    overwrite: bool | None = None,
    is_own: Callable[[Path], bool] | None = lambda path: False,
    required: bool = False,
    flag: str = "--out",
) -> Iterator[None]:
    """Checks, before any work, that a command may write its outputs and that it can; locks them while a block does.

    Args:
        outputs: every file, or folder, that the command will write. Each is locked, up to `MOST_LOCKS` of them, unless
            it lies in `folder`.
        folder: the folder that the command fills with outputs, which is locked as a whole.
        inputs: see `files.require_outputs`.
        overwrite: see `files.require_replaceable`.
        is_own: see `files.require_replaceable`.
        required: see `writing`.
        flag: the flag that sets the outputs, for messages.

    Raises:
        UserError: if an output is an input or lies inside one, cannot be written, is being written by another process,
            or exists and is not the command's own.
    """
    outputs = list(outputs)
    require_outputs(outputs, inputs=inputs, flag=flag)
    with ExitStack() as stack:
        if folder is not None:
            stack.enter_context(writing(folder, folder=True))
        for path in [path for path in outputs if folder is None or folder not in path.parents][:MOST_LOCKS]:
            stack.enter_context(writing(path, required=required))
        require_replaceable(outputs, overwrite=overwrite, is_own=is_own, flag=flag)
        yield


@contextmanager
def writing(path: Path, *, folder: bool = False, required: bool = False, wait: bool = False) -> Iterator[None]:
    """Locks an output while a block writes it.

    Args:
        path: The file or folder to write. Its parent folders are created, and removed again if they stay empty.
        folder: Whether it is a folder that stays in place and is written into. It is created, and the lock file is in
            it; otherwise the lock file is beside it.
        required: Whether to refuse a disk without locks, on which an output is otherwise written without one.
        wait: Whether to wait while another process writes it, instead of refusing.

    Raises:
        UserError: if another process writes it, or if it cannot be locked and must be.
    """
    with made_folders(path if folder else path.parent):
        target = path.resolve()
        lock_path = target / LOCK_NAME if folder else target.with_name(f".{target.name}{LOCK_NAME}")
        _take(lock_path, path, required, math.inf if wait else RETRY_SECONDS)
        try:
            yield
        finally:
            _release(lock_path)


def hold(path: Path, *, folder: bool = False, required: bool = False) -> ExitStack:
    """Locks an output as `writing` does, until the returned stack is closed or collected.

    Raises:
        UserError: as `writing` does.
    """
    stack = ExitStack()
    stack.enter_context(writing(path, folder=folder, required=required))
    return stack


def _take(lock_path: Path, path: Path, required: bool, seconds: float) -> None:
    if not _holders[lock_path]:
        lock = FileLock(lock_path)
        try:
            _acquire(lock, lock_path, seconds)
        except Timeout as error:
            raise UserError(
                f"{path} is being written by another process; wait until it is done, or give another --out"
            ) from error
        except (OSError, NotImplementedError) as error:  # the latter is older versions of filelock's
            if required:
                reason = getattr(error, "strerror", None) or str(error)
                raise UserError(f"{path} cannot be locked ({reason}); give --out on another disk") from error
            if isinstance(error, OSError) and error.errno not in _UNSUPPORTED:
                raise
        else:
            _held[lock_path] = (lock, os.getpid())
    _holders[lock_path] += 1


def _acquire(lock: FileLock, lock_path: Path, seconds: float) -> None:
    """Locks a file that still exists afterwards: the holder before removes it.

    Raises:
        Timeout: if another process holds it for so many seconds.
        OSError: if the disk has no locks.
    """
    end = time.monotonic() + seconds
    while True:
        lock.acquire(timeout=seconds, poll_interval=RETRY_SECONDS / 4)
        if isinstance(lock, SoftFileLock):  # filelock's fallback, which a killed process would leave behind
            lock.release(force=True)
            raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
        if lock_path.exists():
            return
        lock.release(force=True)
        if time.monotonic() > end:
            raise Timeout(str(lock_path))


def _release(lock_path: Path) -> None:
    _holders[lock_path] -= 1
    if not _holders[lock_path]:
        del _holders[lock_path]
        lock, owner = _held.pop(lock_path, (None, 0))
        if lock and owner == os.getpid():
            with suppress(OSError):  # Windows does not remove open files
                lock_path.unlink(missing_ok=True)
            lock.release(force=True)
