"""From a command line to a config and a call. Errors of the person are one line and exit status 2; a traceback is for bugs."""

import errno
import os
import sys
from collections.abc import Callable
from typing import Any, TypeVar

import tyro

from smalti.errors import UserError
from smalti.fit import Interrupted

C = TypeVar("C")

_OF_THE_DISK = {errno.ENOSPC: "the disk is full", errno.EDQUOT: "the disk quota is used up", errno.EROFS: "the disk is read-only", errno.EACCES: "permission denied"}


def run(command: Callable[[C], Any], config_class: Callable[[], type[C]] | type[C], *, about: str) -> None:
    """Parses the command line into `config_class` (or what it returns), calls `command`, and exits with the right status.

    Flags are the config's fields, without the names of the dataclasses they are nested in.

    Args:
        about: what `--help` says first: what the command does, with examples.
    """
    try:
        cls = config_class if isinstance(config_class, type) or hasattr(config_class, "__origin__") else config_class()
        command(tyro.cli(cls, description=about, config=(tyro.conf.OmitArgPrefixes,)))
    except UserError as error:
        sys.exit(_complain(str(error)))
    except Interrupted as stopped:
        print(f"\n{stopped}", file=sys.stderr)
        sys.exit(128 + stopped.signal_number)
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        sys.exit(130)
    except OSError as error:
        if error.errno not in _OF_THE_DISK:
            raise
        sys.exit(_complain(f"{error.filename or 'a file'} cannot be written: {_OF_THE_DISK[error.errno]}; make room or give another --out"))


def chosen(flag: str, default: str) -> str:
    """The value of `--flag` on the command line, before it is parsed: the kind, which decides what other flags there are."""
    arguments = sys.argv[1:]
    for index, argument in enumerate(arguments):
        if argument == flag and index + 1 < len(arguments):
            return arguments[index + 1]
        if argument.startswith(f"{flag}="):
            return argument.removeprefix(f"{flag}=")
    return default


def _complain(message: str) -> int:
    """One line on standard error, from one process only."""
    if os.environ.get("RANK", "0") == "0":
        print(f"error: {message}", file=sys.stderr)
    return 2
