"""Turns a command line into a config and a call. A mistake of the user's is one line; a traceback is for bugs."""

import dataclasses
import errno
import io
import os
import re
import signal
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext, redirect_stderr
from itertools import dropwhile, takewhile
from pathlib import Path
from types import TracebackType
from typing import Annotated, Any, Literal, NoReturn, TypeVar, cast, get_args, get_origin

from smalti.core.errors import OneProcessError, UserError, as_invoked, program_name, require_finite, unreadable
from smalti.core.files import import_from_here
from smalti.core.malloc import keep_freed_memory, wait_without_spinning
from smalti.flags import checked_arguments, expanded, field_names, require_ranges, with_flags
from smalti.training.signals import Interrupted, Stopped, unwound_by_signals

wait_without_spinning()  # here, because commands import this file before anything that imports torch

C = TypeVar("C")

_DESCRIBED_DEFAULT = re.compile(r"\s*\[default: ([^\]]*)\]")
_DISK_ERRORS = {
    errno.ENOSPC: "the disk is full; make room or give another --out",
    errno.EFBIG: "it is larger than a file may be here; give another --out",
    errno.EDQUOT: "the disk quota is used up; make room or give another --out",
    errno.EROFS: "the disk is read-only; give another --out",
    errno.EACCES: "permission denied; give another --out",
    errno.ENOTEMPTY: "it is a folder with files; give another --out",
    errno.EISDIR: "it is a folder; give another --out",
    errno.EEXIST: "it is a file, not a folder; give another --out",
    errno.ENOTDIR: "a part of its path is a file; give another --out",
    errno.ENAMETOOLONG: "its name is too long; give a shorter --out",
}
OWN_MODULES = "SMALTI_IMPORT"
"""Variable with the names of the user's modules that register kinds of their own; every command imports them."""
_LAUNCHED = {"TORCHELASTIC_RUN_ID", "ACCELERATE_MIXED_PRECISION"}
"""Variables that torchrun and `accelerate launch` set for the processes that they start."""
_MOST_SECONDS_LATER = 20.0
_SECONDS_OF_MAIN_PROCESS = 8.0
"""Time in which a launcher ends the other processes if the main one has failed too."""
_ONE_OR_SEVERAL = re.compile(r"\b(\w+)\|\{\[\1 \[\1 \.\.\.\]\]\}")
"""tyro's name of the values of a flag that takes one number, or several."""
_ABSENT = re.compile(r"'None', |, 'None'")
"""The choice of an optional flag that tyro's errors list beside those that the flag takes."""
_NO_COMPILER = "No working C++ compiler found"
"""Part of torch's message, whose exception is a `RuntimeError`; importing its class would import the compiler."""
_NO_MEMORY = re.compile(
    "can't allocate memory|out of memory|integer multiplication overflow|calculation overflowed", re.I
)
"""Texts in torch's errors of type RuntimeError for tensors that are too large."""
_PROCESS_ENDED = re.compile(r"gloo.*(closed by peer|reset by peer|broken pipe)", re.I)
"""Texts in torch's errors of type RuntimeError for a process that waits for one that has ended."""


def run(
    command: Callable[[C], Any], config_class: Callable[[], type[C] | tuple[type[C], C]] | type[C], *, about: str
) -> None:
    """Parses the command line into `config_class` (or what it returns), calls `command`, exits with its status.

    Flags are the config's fields, without the names of the dataclasses they are nested in. The exit status is 2 for a
    mistake that the user can correct, and 128 plus the signal's number if a signal stopped the command.

    Args:
        command: called with the config.
        config_class: a dataclass; or a function that returns one, alone or with an instance that holds the defaults.
        about: the first text of `--help`: what the command does, with examples.
    """
    keep_freed_memory()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # names that the terminal's encoding does not have
    flags: set[str] = set()
    try:
        for module in os.environ.get(OWN_MODULES, "").replace(",", " ").split():
            import_from_here(module, f"{OWN_MODULES}={module}")
        arguments = checked_arguments(sys.argv[1:])
        chosen_class = (
            config_class if dataclasses.is_dataclass(config_class) else cast(Callable[[], Any], config_class)()
        )
        cls, defaults = (
            (chosen_class[0], {"default": chosen_class[1]}) if isinstance(chosen_class, tuple) else (chosen_class, {})
        )
        flags |= set(field_names(cls))
        config = _parse(cls, arguments, as_invoked(about), defaults)
        require_finite(config)
        require_ranges(config)
        launched = bool(_LAUNCHED & os.environ.keys())  # such processes wait for each other where no handler is called
        with nullcontext() if launched else unwound_by_signals():
            command(config)
    except UserError as error:
        message = with_flags(as_invoked(str(error)), flags)
        _leave(f"error: {message}", 2, every_process=isinstance(error, OneProcessError))
    except Interrupted as stopped:
        _leave(f"\n{stopped}", 128 + stopped.signal_number, after_launcher=True)
    except Stopped as stopped:
        _leave(f"\n{stopped}", 128 + stopped.signal_number)
    except KeyboardInterrupt:
        _leave("\nstopped", 128 + signal.SIGINT)
    except BrokenPipeError:
        if not _output_is_closed():
            raise
        sys.exit(128 + signal.SIGPIPE)
    except (MemoryError, RuntimeError) as error:
        if _NO_COMPILER in str(error):
            _leave("error: --compile needs a C++ compiler, and none was found: install g++, or leave --compile out", 2)
        if _PROCESS_ENDED.search(str(error)):
            _leave("error: another process has ended, so this one stops too; the same command resumes the work", 1)
        if isinstance(error, RuntimeError) and not _NO_MEMORY.search(str(error)):
            raise
        found = re.search("cuda|mps|cpu", "cpu" if isinstance(error, MemoryError) else str(error), re.I)
        where = f" on {found[0].lower()}" if found else ""
        reason = f" ({str(error).splitlines()[0][:200]})" if str(error) else ""
        _leave(f"error: out of memory{where}{reason}; lower --batch-size or the sizes that were given", 2)
    except OSError as error:
        if error.errno not in _DISK_ERRORS:
            raise
        name = error.filename or "a file"  # some libraries do not say which
        if error.errno == errno.EACCES and os.path.exists(name) and not os.access(name, os.R_OK):
            _leave(f"error: {unreadable(name, error)}", 2)
        _leave(f"error: {name} cannot be written: {_DISK_ERRORS[error.errno]}", 2)


def chosen(flag: str, default: str) -> str:
    """Returns the last value of `--flag` before the command line is parsed: it names a kind, which decides what other
    flags there are."""
    value, follows = default, False
    for argument in map(expanded, sys.argv[1:]):
        if argument.startswith("-"):
            name, _, inline = argument.partition("=")
            follows = name == flag
            value = inline if follows and inline else value
        elif follows:
            value = argument
    return value


def _parse(cls: Any, arguments: list[str], about: str, defaults: dict[str, Any]) -> Any:
    """Parses the command line; a mistake becomes one line instead of the box that tyro draws."""
    import tyro  # here, where Ctrl-C is caught

    output = io.StringIO()
    try:
        with redirect_stderr(output):
            return tyro.cli(
                cls,
                args=arguments,
                prog=program_name(),
                description=about,
                config=(tyro.conf.OmitArgPrefixes,),
                registry=_help_registry(),
                **defaults,
            )
    except SystemExit as exit_:
        if not exit_.code:  # --help
            sys.stdout.flush()
            raise
        lines = [line if line.startswith("╭") else line.strip("│ ") for line in output.getvalue().splitlines()]
        after_title = dropwhile(lambda line: not _is_rule(line), lines)
        message = " ".join(takewhile(lambda line: not _is_rule(line), [*after_title][1:])).strip().rstrip(".")
        message = message.partition(" Got errors:")[0]  # of each type that was tried
        message = _ABSENT.sub("", _ONE_OR_SEVERAL.sub(r"\1 [\1 ...]", message))
        suggests = any(phrase in output.getvalue() for phrase in ("Perhaps you meant", "similar to"))
        flags = [line.split()[0] for line in lines if line.startswith("--") and not _is_rule(line)]
        similar = flags if suggests else []
        advice = f"did you mean {' or '.join(similar)}?" if similar else "--help lists the flags"
        raise UserError(f"{message or ' '.join(output.getvalue().split())}; {advice}") from exit_


def _is_rule(line: str) -> bool:
    """Returns whether a line of tyro's errors is drawn: the edge of a box, or a rule, which follows the title."""
    return line.startswith("╭") or (bool(line) and not line.strip("─-╰╯ "))


def _help_registry() -> Any:
    """Returns tyro's rule for our help texts: each field's docstring as one paragraph, each default once.

    tyro (1.0) keeps the line breaks of docstrings that are indented in the source. `[default: ...]` in a docstring
    replaces tyro's `(default: None)`.
    """
    from tyro.constructors import ConstructorRegistry, StructConstructorSpec, StructTypeInfo

    registry, running = ConstructorRegistry(), []

    @registry.struct_rule
    def whole_paragraphs(info: StructTypeInfo) -> StructConstructorSpec | None:
        if running or not dataclasses.is_dataclass(info.type):
            return None  # the call from below, so that tyro's own rule for dataclasses is next
        running.append(info)
        try:
            spec = ConstructorRegistry.get_struct_spec(info)
        finally:
            running.pop()
        assert isinstance(spec, StructConstructorSpec)
        return dataclasses.replace(spec, fields=tuple(_one_paragraph(field) for field in spec.fields))

    return registry


def _one_paragraph(field: Any) -> Any:
    """Returns a tyro field whose help is one paragraph, read from the source only when `--help` asks for it."""
    from tyro.conf import arg

    def text() -> str:
        docstring = field.helptext() if callable(field.helptext) else field.helptext
        return as_invoked(" ".join(str(docstring or "").split()))

    def default_hint(default: str) -> str:
        described = _DESCRIBED_DEFAULT.search(text())
        shown = "none" if default in ("", "None") else default
        return f"(default: {described[1] if described else shown})"

    nested = dataclasses.is_dataclass(get_origin(field.type) or field.type)
    kind = (
        field.type
        if nested
        else Annotated[field.type, arg(help_behavior_hint=default_hint, metavar=_metavar(field.type))]
    )
    return dataclasses.replace(field, type=kind, helptext=lambda: _DESCRIBED_DEFAULT.sub("", text()) or None)


def _metavar(field_type: Any) -> str | None:
    """Returns `PATH` for `Path | None`, `{a,b}` for `Literal["a", "b"] | None`, and so on, where tyro writes None among
    the values; None leaves it to tyro."""
    others = [kind for kind in get_args(field_type) if kind is not type(None)]
    if len(others) == 2 and others[1] == tuple[others[0], ...]:  # one number, or several
        return f"{others[0].__name__.upper()} [{others[0].__name__.upper()} ...]"
    if len(others) != 1 or len(get_args(field_type)) != 2:
        return None
    if get_origin(others[0]) is Literal:
        return f"{{{','.join(map(str, get_args(others[0])))}}}"
    return others[0].__name__.upper() if others[0] in (int, float, str, Path) else None


def _output_is_closed() -> bool:
    """Returns whether standard output goes to a program that has ended, as in `| head`; if so, discards the rest."""
    try:
        print(flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return True
    return False


def _quiet_interrupts(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Replaces Python's handler of uncaught exceptions, so that Ctrl-C prints one line and keeps its exit status."""
    if issubclass(kind, KeyboardInterrupt):
        print("\nstopped", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)


# Commands import this module first, and then for seconds what they need: Ctrl-C during that time is no bug either.
sys.excepthook = _quiet_interrupts


def _leave(message: str, status: int, *, every_process: bool = False, after_launcher: bool = False) -> NoReturn:
    """Exits with a message on standard error, printed by the main process only unless `every_process` is set.

    An error of another process alone, such as a disk that only the main process sees, is printed a little later: the
    launcher ends the others at once if the main process failed too, which then has printed the same error.
    With `after_launcher` the message comes after what a launcher, such as `accelerate launch`, prints at its own end.
    """
    rank = os.environ.get("RANK", "0")
    shown = every_process or rank == "0"
    if not shown and status == 2 and _LAUNCHED & os.environ.keys():
        time.sleep(_SECONDS_OF_MAIN_PROCESS)
        shown, message = True, f"{message} (in process {int(rank) + 1} of {os.environ.get('WORLD_SIZE', '?')})"
    if shown and not (after_launcher and _LAUNCHED & os.environ.keys() and _print_later(message)):
        print(message, file=sys.stderr)
    sys.exit(status)


def _print_later(message: str) -> bool:
    """Forks a process that prints a message when this one's parent has ended, such as a launcher that Ctrl-C stops
    too. Returns whether it could; a launcher that goes on is not waited for longer than `_MOST_SECONDS_LATER`."""
    launcher = os.getppid()
    if not hasattr(os, "fork") or os.fork():
        return hasattr(os, "fork")
    try:
        os.setsid()  # launchers end the process groups of their processes
        end = time.monotonic() + _MOST_SECONDS_LATER
        while time.monotonic() < end and _runs(launcher):
            time.sleep(0.05)
        os.write(2, f"{message}\n".encode(errors="replace"))
    finally:
        os._exit(0)


def _runs(process: int) -> bool:
    """Returns whether a process exists and has not ended; where `/proc` is missing, whether it exists."""
    try:
        os.kill(process, 0)
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except ProcessLookupError:
        return False
    except OSError:
        return True
