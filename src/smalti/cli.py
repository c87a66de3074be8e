"""From a command line to a config and a call. What the person can mend is one line; a traceback is for bugs."""

import dataclasses
import errno
import io
import os
import signal
import sys
from collections.abc import Callable
from contextlib import redirect_stderr
from itertools import takewhile
from types import TracebackType
from typing import Any, NoReturn, TypeVar, cast

from smalti.core.errors import OneProcessError, UserError
from smalti.core.malloc import keep_freed_memory, wait_without_spinning
from smalti.training.signals import Interrupted

wait_without_spinning()  # here, as commands import this file before what imports torch

C = TypeVar("C")

_OF_THE_DISK = {
    errno.ENOSPC: "the disk is full; make room or give another --out",
    errno.EFBIG: "it is larger than a file may be here; give another --out",
    errno.EDQUOT: "the disk quota is used up; make room or give another --out",
    errno.EROFS: "the disk is read-only; give another --out",
    errno.EACCES: "permission denied; give another --out",
    errno.EISDIR: "it is a folder; give another --out",
    errno.ENOTDIR: "a part of its path is a file; give another --out",
}


def run(
    command: Callable[[C], Any], config_class: Callable[[], type[C] | tuple[type[C], C]] | type[C], *, about: str
) -> None:
    """Parses the command line into `config_class` (or what it returns), calls `command`, exits with its status.

    Flags are the config's fields, without the names of the dataclasses they are nested in. Exits with 2 for what the
    person can mend, and with 128 plus the signal's number where one stopped it.

    Args:
        command: what to do with the config.
        config_class: a dataclass, or a function that finds it, perhaps with an instance that holds the defaults.
        about: what `--help` says first: what the command does, with examples.
    """
    keep_freed_memory()
    try:
        found = config_class if dataclasses.is_dataclass(config_class) else cast(Callable[[], Any], config_class)()
        cls, defaults = (found[0], {"default": found[1]}) if isinstance(found, tuple) else (found, {})
        command(_parse(cls, about, defaults))
    except UserError as error:
        _leave(f"error: {error}", 2, everywhere=isinstance(error, OneProcessError))
    except Interrupted as stopped:
        _leave(f"\n{stopped}", 128 + stopped.signal_number)
    except KeyboardInterrupt:
        _leave("\nstopped", 128 + signal.SIGINT)
    except BrokenPipeError:
        if not _nobody_reads():
            raise
        sys.exit(128 + signal.SIGPIPE)
    except OSError as error:
        if error.errno not in _OF_THE_DISK:
            raise
        _leave(f"error: {error.filename or 'a file'} cannot be written: {_OF_THE_DISK[error.errno]}", 2)


def _parse(cls: Any, about: str, defaults: dict[str, Any]) -> Any:
    """The command line as a config; of what is wrong with it, one line in place of the box that tyro draws."""
    import tyro  # here, where Ctrl-C is caught

    said = io.StringIO()
    try:
        with redirect_stderr(said):
            return tyro.cli(cls, description=about, config=(tyro.conf.OmitArgPrefixes,), **defaults)
    except SystemExit as left:
        if not left.code:  # --help
            sys.stdout.flush()
            raise
        lines = [line.strip("│ ") for line in said.getvalue().splitlines() if line.startswith("│")]
        message = " ".join(takewhile(lambda line: line.strip("─"), lines)).rstrip(".")
        suggests = any(phrase in said.getvalue() for phrase in ("Perhaps you meant", "similar to"))
        similar = [line.split()[0] for line in lines if line.startswith("--")] if suggests else []
        advice = f"did you mean {' or '.join(similar)}?" if similar else "--help lists the flags"
        raise UserError(f"{message or said.getvalue()}; {advice}") from left


def _nobody_reads() -> bool:
    """Whether standard output goes to what has left, as `| head` does; the rest of it then goes nowhere."""
    try:
        print(flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return True
    return False


def chosen(flag: str, default: str) -> str:
    """The last value of `--flag` on the command line, before that is parsed: a kind, which decides what flags there
    are."""
    found, follows = default, False
    for argument in sys.argv[1:]:
        if argument.startswith("-"):
            name, _, value = argument.partition("=")
            follows = name == flag
            found = value if follows and value else found
        elif follows:
            found = argument
    return found


def _quiet_interrupts(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Python's own handler of what nobody caught, but for Ctrl-C: one line, and Python's exit status for it."""
    if issubclass(kind, KeyboardInterrupt):
        print("\nstopped", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)


# The commands import this module first, and then for seconds what they need: Ctrl-C in that time is no bug either.
sys.excepthook = _quiet_interrupts


def _leave(message: str, status: int, *, everywhere: bool = False) -> NoReturn:
    """Exits; the message goes to standard error, from one process only if it is not `everywhere`."""
    if everywhere or os.environ.get("RANK", "0") == "0":
        print(message, file=sys.stderr)
    sys.exit(status)
