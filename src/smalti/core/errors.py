"""Exceptions whose message is meant for the user, checks of configs that raise them, and the commands in such texts.

It imports nothing large, so that help texts and errors are fast.
"""

import dataclasses
import math
import operator
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, SupportsIndex, cast, get_type_hints

PROGRAM = "smalti"
SCRIPTS = (
    *("app", "benchmark", "build_latents", "compress", "convert", "convert_latents", "demo", "evaluate", "inpaint"),
    *("inspect_latents", "push", "reproduce", "sample", "train_prior", "train_tokenizer"),
)
_SCRIPT = re.compile(
    r"(?:(?P<launch>accelerate launch(?: --?\w+(?: \d+)?)*) |python )scripts/(?P<name>\w+)\.py"
    rf"|(?<![\w./-])(?P<bare>{'|'.join(SCRIPTS)})\.py\b"
)


def printable(text: str) -> str:
    """Returns a text on one line in which control characters are escaped.

    Names and attributes come from files that anyone may have written; a terminal obeys the escape sequences in them.
    """
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode() for character in text
    )


def one_line(problem: object) -> str:
    """Returns the message of another library's error on one line, or the name of the error if it has no message."""
    return " ".join(str(problem).split()) or type(problem).__name__


LONGEST_MESSAGE = 1_000
"""Most characters of an error's message: names of many thousand characters would bury what to do."""


class UserError(ValueError):
    """An error that the caller can fix. The message is one line: what is wrong, the offending value, and what to do.

    Commands print it and exit with status 2; any other exception is a bug and keeps its traceback. The middle of a
    message that is too long is left out.
    """

    def __str__(self) -> str:
        message = printable(super().__str__())
        half = LONGEST_MESSAGE // 2
        return message if len(message) <= LONGEST_MESSAGE else f"{message[:half]} ... {message[-half:]}"


def unreadable(path: object, error: OSError) -> UserError:
    """Returns the error for a file that the system does not let the user read. It is not called damaged."""
    advice = "give yourself permission to read it" if isinstance(error, PermissionError) else "check its name and disk"
    return UserError(f"{path} cannot be read: {error.strerror or error}; {advice}")


def require_at_least_one(config: object | Mapping[str, int], *fields: str) -> None:
    """Refuses numbers that are not whole or below 1.

    Args:
        config: a config, of which some fields are checked and named as flags; or the numbers by their names.
        fields: the config's fields to check.

    Raises:
        UserError: naming the first such number.
    """
    flags = {f"--{field.replace('_', '-')}": getattr(config, field) for field in fields}
    for name, number in (config if isinstance(config, Mapping) else flags).items():
        if whole_number(name, number) < 1:
            raise UserError(f"{name} must be at least 1, not {number}")


def whole_number(name: str, value: object) -> int:
    """Returns a whole number of any library as Python's `int`: a scalar of numpy or torch, too.

    Raises:
        UserError: if it is something else, such as a float, a text or None; with the number's `name`.
    """
    try:
        return operator.index(cast(SupportsIndex, value))
    except TypeError:
        raise UserError(f"{name} must be a whole number, not {value!r}") from None


def require_numbers(config: Any) -> None:
    """Refuses a config in which a field of type `int`, `float` or `tuple[float, float]` has a value of another type, or
    one that is not finite.

    Command lines are checked where they are parsed, the arguments of programs are not. Numbers of any library fit.

    Raises:
        UserError: naming the first such field.
    """
    for name, hint in get_type_hints(type(config)).items():
        value = getattr(config, name)
        if hint is int:
            whole_number(name, value)
        elif hint is float and not _is_number(value):
            raise UserError(f"{name} must be a number, not {value!r}")
        elif hint == tuple[float, float]:
            pair = isinstance(value, tuple | list) and len(value) == 2
            if not pair or not all(map(_is_number, value)):
                example = (value, value) if _is_number(value) else (1.0, 0.5)
                raise UserError(f"{name} must be two numbers, such as {example}, not {value!r}")
    require_finite(config)


def _is_number(value: Any) -> bool:
    """Returns whether a value is a number of any library; texts are none, though `float` parses them."""
    try:
        float(value)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        return False
    return not isinstance(value, str | bytes)


def require_finite(config: Any) -> None:
    """Refuses a config, or one nested in it, in which a number is infinite or not a number (NaN).

    Raises:
        UserError: naming the first such number.
    """
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            require_finite(value)
            continue
        for number in value if isinstance(value, tuple | list) else (value,):
            if _is_number(number) and not math.isfinite(float(number)):
                raise UserError(f"--{field.name.replace('_', '-')} must be a finite number, not {number}")


class OneProcessError(UserError):
    """A `UserError` that may occur in only some processes of a run, such as full memory. Each of them prints it."""


def program_name() -> str:
    """Returns the program's name for help texts: a script's path as typed, `smalti COMMAND` or `python -m PACKAGE`."""
    package = getattr(getattr(sys.modules["__main__"], "__spec__", None), "parent", "")
    if package and Path(sys.argv[0]).name == "__main__.py":
        return f"python -m {package}"
    return sys.argv[0] if sys.argv[0].startswith(f"{PROGRAM} ") else Path(sys.argv[0]).as_posix()


def as_invoked(text: str) -> str:
    """Returns a text with its commands in the form in which this one was typed.

    Texts name `python scripts/train_prior.py` or `train_prior.py`; started as `smalti ...`, a user reads
    `smalti train-prior`.
    """
    if not program_name().startswith(f"{PROGRAM} "):
        return text

    def installed(match: re.Match[str]) -> str:
        launch = f"{match['launch']} -m " if match["launch"] else ""
        return f"{launch}{PROGRAM} {(match['name'] or match['bare']).replace('_', '-')}"

    return _SCRIPT.sub(installed, text)
