"""Locks of outputs: two commands that write to one file or folder at once would mix their results.

The system releases a lock when its process ends, also after `kill -9`. Within one process a lock may be taken again.
"""

import errno
import os
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from filelock import FileLock, SoftFileLock, Timeout

from smalti.core.errors import UserError

LOCK_NAME = ".lock"
RETRY_SECONDS = 0.2
"""Time for which a lock is tried: a command that ends removes its lock file, perhaps the one that was just opened."""
_UNSUPPORTED = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}
"""Errors of file systems without locks. On these an output is written without one."""

_held: dict[Path, tuple[FileLock, int]] = {}
"""The locks of this process by their files, and the process that took each: a forked worker must not remove one."""
_holders: Counter[Path] = Counter()


@contextmanager
def writing(path: Path, *, folder: bool = False) -> Iterator[None]:
    """Locks an output while a block writes it.

    Args:
        path: The file or folder to write. Its parent folders are created.
        folder: Whether it is a folder that stays in place and is written into. It is created, and the lock file is in
            it; otherwise the lock file is beside it.

    Raises:
        UserError: if another process writes it.
    """
    created = folder and not path.exists()
    (path if folder else path.parent).mkdir(parents=True, exist_ok=True)
    target = path.resolve()
    lock_path = target / LOCK_NAME if folder else target.with_name(f".{target.name}{LOCK_NAME}")
    _take(lock_path, path)
    try:
        yield
    finally:
        _release(lock_path)
        if created:
            with suppress(OSError):  # it is not empty
                path.rmdir()


def hold(path: Path, *, folder: bool = False) -> ExitStack:
    """Locks an output as `writing` does, until the returned stack is closed or collected.

    Raises:
        UserError: if another process writes it.
    """
    stack = ExitStack()
    stack.enter_context(writing(path, folder=folder))
    return stack


def _take(lock_path: Path, path: Path) -> None:
    if not _holders[lock_path]:
        lock = FileLock(lock_path)
        try:
            lock.acquire(timeout=RETRY_SECONDS, poll_interval=RETRY_SECONDS / 4)
        except Timeout as error:
            raise UserError(
                f"{path} is being written by another process; wait until it is done, or give another --out"
            ) from error
        except (OSError, NotImplementedError) as error:  # the latter is older versions of filelock's
            if isinstance(error, OSError) and error.errno not in _UNSUPPORTED:
                raise
        else:
            if isinstance(lock, SoftFileLock):  # filelock's fallback, which a killed process would leave behind
                lock.release(force=True)
            else:
                _held[lock_path] = (lock, os.getpid())
    _holders[lock_path] += 1


def _release(lock_path: Path) -> None:
    _holders[lock_path] -= 1
    if not _holders[lock_path]:
        del _holders[lock_path]
        lock, owner = _held.pop(lock_path, (None, 0))
        if lock and owner == os.getpid():
            with suppress(OSError):  # Windows does not remove open files
                lock_path.unlink(missing_ok=True)
            lock.release(force=True)
