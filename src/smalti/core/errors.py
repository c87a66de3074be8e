"""Exceptions whose message is meant for the user, and the checks of configs that raise them."""

import dataclasses
import math
from typing import Any


def printable(text: str) -> str:
    """Returns a text on one line in which control characters are escaped.

    Names and attributes come from files that anyone may have written; a terminal obeys the escape sequences in them.
    """
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode() for character in text
    )


class UserError(ValueError):
    """An error that the caller can fix. The message is one line: what is wrong, the offending value, and what to do.

    Commands print it and exit with status 2; any other exception is a bug and keeps its traceback.
    """

    def __str__(self) -> str:
        return printable(super().__str__())


def require_at_least_one(config: object, *names: str) -> None:
    """Refuses a config in which one of the named numbers is below 1.

    Raises:
        UserError: naming the first such number.
    """
    for name in names:
        if getattr(config, name) < 1:
            raise UserError(f"{name} must be at least 1, not {getattr(config, name)}")


def require_finite(config: Any) -> None:
    """Refuses a config, or one nested in it, in which a number is infinite or not a number (NaN).

    Raises:
        UserError: naming the first such number.
    """
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            require_finite(value)
        for number in value if isinstance(value, tuple) else (value,):
            if isinstance(number, float) and not math.isfinite(number):
                raise UserError(f"--{field.name.replace('_', '-')} must be a finite number, not {number}")


class OneProcessError(UserError):
    """A `UserError` that may occur in only some processes of a run, such as full memory. Each of them prints it."""
