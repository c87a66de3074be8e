"""Turns a command line into a config and a call. A mistake of the person's is one line; a traceback is for bugs."""

import dataclasses
import errno
import io
import os
import re
import signal
import sys
from collections.abc import Callable, Collection, Iterator
from contextlib import redirect_stderr
from itertools import dropwhile, takewhile
from types import TracebackType
from typing import Annotated, Any, NoReturn, TypeVar, cast, get_args, get_origin, get_type_hints

from smalti.core.errors import OneProcessError, UserError, as_invoked, program_name, require_finite, unreadable
from smalti.core.malloc import keep_freed_memory, wait_without_spinning
from smalti.training.signals import Interrupted

wait_without_spinning()  # here, because commands import this file before anything that imports torch

C = TypeVar("C")

_DESCRIBED_DEFAULT = re.compile(r"\s*\[default: ([^\]]*)\]")
_DISK_ERRORS = {
    errno.ENOSPC: "the disk is full; make room or give another --out",
    errno.EFBIG: "it is larger than a file may be here; give another --out",
    errno.EDQUOT: "the disk quota is used up; make room or give another --out",
    errno.EROFS: "the disk is read-only; give another --out",
    errno.EACCES: "permission denied; give another --out",
    errno.EISDIR: "it is a folder; give another --out",
    errno.ENOTDIR: "a part of its path is a file; give another --out",
    errno.ENAMETOOLONG: "its name is too long; give a shorter --out",
}
_NO_MEMORY = re.compile(
    "can't allocate memory|out of memory|integer multiplication overflow|calculation overflowed", re.I
)
"""Texts in torch's errors of type RuntimeError for tensors that are too large."""

LONGEST_NAME_BYTES, LONGEST_PATH_BYTES = 255, 4095
"""Limits of file systems."""
ANY_COUNT = (0, 10**9)
"""Smallest and largest integer of every flag that `RANGES` does not name."""
RANGES: dict[str, tuple[int, int]] = {
    "seed": (-(2**63), 2**63 - 1),
    "port": (0, 2**16 - 1),
    **dict.fromkeys(("batch_size", "prior_batch_size", "layer_batch_sizes", "height", "width"), (1, 2**16)),
    **dict.fromkeys(
        ("workers", "accumulation", "depth", "layers", "levels", "stages", "heads", "particles"), (0, 2**10)
    ),
    **dict.fromkeys(
        ("residual_blocks", "dense_layers", "flow_layers", "discriminator_layers", "particles"), (0, 2**10)
    ),
    **dict.fromkeys(("widths", "model_width", "code_width", "latent_width", "channels", "growth"), (0, 2**16)),
    **dict.fromkeys(("latent_channels", "flow_width", "discriminator_width", "image_channels"), (0, 2**16)),
    **dict.fromkeys(("hourglass_width", "pixelcnn_width", "kernel", "mixtures"), (0, 2**16)),
}
"""Smallest and largest integers of flags, by field name, that any command may use. Commands have narrower ranges."""


def run(
    command: Callable[[C], Any], config_class: Callable[[], type[C] | tuple[type[C], C]] | type[C], *, about: str
) -> None:
    """Parses the command line into `config_class` (or what it returns), calls `command`, exits with its status.

    Flags are the config's fields, without the names of the dataclasses they are nested in. The exit status is 2 for a
    mistake that the person can correct, and 128 plus the signal's number if a signal stopped the command.

    Args:
        command: called with the config.
        config_class: a dataclass; or a function that returns one, alone or with an instance that holds the defaults.
        about: the first text of `--help`: what the command does, with examples.
    """
    keep_freed_memory()
    flags: set[str] = set()
    try:
        arguments = checked_arguments(sys.argv[1:])
        chosen_class = (
            config_class if dataclasses.is_dataclass(config_class) else cast(Callable[[], Any], config_class)()
        )
        cls, defaults = (
            (chosen_class[0], {"default": chosen_class[1]}) if isinstance(chosen_class, tuple) else (chosen_class, {})
        )
        flags |= set(_field_names(cls))
        config = _parse(cls, arguments, as_invoked(about), defaults)
        require_finite(config)
        _require_ranges(config)
        command(config)
    except UserError as error:
        message = with_flags(as_invoked(str(error)), flags)
        _leave(f"error: {message}", 2, every_process=isinstance(error, OneProcessError))
    except Interrupted as stopped:
        _leave(f"\n{stopped}", 128 + stopped.signal_number)
    except KeyboardInterrupt:
        _leave("\nstopped", 128 + signal.SIGINT)
    except BrokenPipeError:
        if not _output_is_closed():
            raise
        sys.exit(128 + signal.SIGPIPE)
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not _NO_MEMORY.search(str(error)):
            raise
        reason = f" ({str(error).splitlines()[0][:200]})" if str(error) else ""
        _leave(f"error: the memory does not suffice{reason}; lower --batch-size or the sizes that were given", 2)
    except OSError as error:
        if error.errno not in _DISK_ERRORS:
            raise
        if error.errno == errno.EACCES and os.path.exists(error.filename) and not os.access(error.filename, os.R_OK):
            _leave(f"error: {unreadable(error.filename, error)}", 2)
        _leave(f"error: {error.filename or 'a file'} cannot be written: {_DISK_ERRORS[error.errno]}", 2)


def chosen(flag: str, default: str) -> str:
    """Returns the last value of `--flag` before the command line is parsed: it names a kind, which decides what other
    flags there are."""
    value, follows = default, False
    for argument in map(_expanded, sys.argv[1:]):
        if argument.startswith("-"):
            name, _, inline = argument.partition("=")
            follows = name == flag
            value = inline if follows and inline else value
        elif follows:
            value = argument
    return value


def checked_arguments(arguments: list[str]) -> list[str]:
    """Returns the command line with `~` replaced by the home folder, which shells leave in `--out=~/x`.

    Raises:
        UserError: if a value is empty, has a zero byte, or is longer than any file name.
    """
    flag = "an argument"
    for argument in arguments:
        name, _, value = argument.partition("=") if argument.startswith("--") else (flag, "", argument)
        flag = name
        if argument.startswith("--") and "=" not in argument:
            continue
        if not value:
            raise UserError(f"{flag} is empty; give a value, or leave the flag out for its default")
        if "\0" in value:
            raise UserError(f"{flag} has a zero byte, which no name may have: {value[:60]!r}")
        encoded = os.fsencode(value)
        if max(map(len, encoded.split(os.fsencode(os.sep)))) > LONGEST_NAME_BYTES or len(encoded) > LONGEST_PATH_BYTES:
            raise UserError(
                f"{flag} {value[:60]}... is too long ({len(value)} characters); names have at most "
                f"{LONGEST_NAME_BYTES} bytes, and paths {LONGEST_PATH_BYTES}"
            )
    return [_expanded(argument) for argument in arguments]


def _expanded(argument: str) -> str:
    name, equals, value = argument.partition("=") if argument.startswith("--") else ("", "", argument)
    return f"{name}{equals}{os.path.expanduser(value)}"


def _field_names(cls: Any) -> Iterator[str]:
    """Yields the names of the fields of a dataclass and of those nested in it."""
    plain = get_origin(cls) or cls
    parameters: dict[Any, Any] = dict(zip(getattr(plain, "__parameters__", ()), get_args(cls), strict=False))
    for name, hint in get_type_hints(plain).items():
        yield name
        nested = parameters.get(hint, hint) if isinstance(hint, TypeVar) else hint
        if dataclasses.is_dataclass(get_origin(nested) or nested):
            yield from _field_names(nested)


def with_flags(message: str, fields: Collection[str]) -> str:
    """Returns an error's message with the names of fields as flags: `report_steps` as `--report-steps`.

    Names without an underscore are words of the language too. They become flags only where a config's own check begins
    with them, which tyro reports as `Error parsing fit: steps must ...`.
    """
    message, parsed = re.subn(r"^Error parsing (?!--)[^:]*: ", "", message)
    if parsed and (first := re.match(r"\w+", message)) and first[0] in fields and "_" not in first[0]:
        message = f"--{message}"
    long_names = "|".join(re.escape(name) for name in fields if "_" in name)
    pattern = rf"(?<![\w/.-])({long_names})(?![\w/.])"
    return re.sub(pattern, lambda match: f"--{match[0]}".replace("_", "-"), message) if long_names else message


def _require_ranges(config: Any) -> None:
    """Refuses integers that no command can use, before anything of that size is made.

    Raises:
        UserError: naming the flag.
    """
    for field in dataclasses.fields(config):
        low, high = RANGES.get(field.name, ANY_COUNT)
        pending = [getattr(config, field.name)]
        while pending:
            value = pending.pop()
            if isinstance(value, tuple):
                pending += value
            elif dataclasses.is_dataclass(value):
                _require_ranges(value)
            elif type(value) is int and not low <= value <= high:
                raise UserError(f"--{field.name.replace('_', '-')} must be from {low} to {high}, not {value}")


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
        suggests = any(phrase in output.getvalue() for phrase in ("Perhaps you meant", "similar to"))
        similar = [line.split()[0] for line in lines if line.startswith("--")] if suggests else []
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
        return " ".join(str(docstring or "").split())

    def default_hint(default: str) -> str:
        described = _DESCRIBED_DEFAULT.search(text())
        return f"(default: {described[1] if described else default or 'none'})"

    nested = dataclasses.is_dataclass(get_origin(field.type) or field.type)
    kind = field.type if nested else Annotated[field.type, arg(help_behavior_hint=default_hint)]
    return dataclasses.replace(field, type=kind, helptext=lambda: _DESCRIBED_DEFAULT.sub("", text()) or None)


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


def _leave(message: str, status: int, *, every_process: bool = False) -> NoReturn:
    """Exits with a message on standard error, printed by the main process only unless `every_process` is set."""
    if every_process or os.environ.get("RANK", "0") == "0":
        print(message, file=sys.stderr)
    sys.exit(status)
