"""Checks of command lines: lengths of names, ranges of numbers, and flags in the texts of errors."""

import dataclasses
import os
import re
from collections.abc import Collection, Iterator
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from smalti.core.errors import UserError

LONGEST_NAME_BYTES, LONGEST_PATH_BYTES = 255, 4095
"""Limits of file systems."""
ANY_COUNT = (0, 10**9)
"""Smallest and largest integer of every flag that `RANGES` does not name."""
RANGES: dict[str, tuple[int, int]] = {
    "seed": (-(2**63), 2**63 - 1),
    "most_pixels": (1, 2**40),
    **dict.fromkeys(("batch_size", "prior_batch_size", "layer_batch_sizes", "height", "width"), (1, 2**16)),
    **dict.fromkeys(
        ("workers", "accumulation", "depth", "layers", "levels", "stages", "heads", "particles"), (0, 2**10)
    ),
    **dict.fromkeys(("residual_blocks", "dense_layers", "flow_layers", "discriminator_layers"), (0, 2**10)),
    **dict.fromkeys(("widths", "model_width", "code_width", "latent_width", "channels", "growth"), (0, 2**16)),
    **dict.fromkeys(("latent_channels", "flow_width", "discriminator_width", "image_channels"), (0, 2**16)),
    **dict.fromkeys(("hourglass_width", "pixelcnn_width", "kernel", "mixtures"), (0, 2**16)),
}
"""Smallest and largest integers of flags, by field name, that any command may use. Commands have narrower ranges."""


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
    return [expanded(argument) for argument in arguments]


def expanded(argument: str) -> str:
    """Returns an argument, or a flag's value after `=`, with `~` replaced by the home folder."""
    name, equals, value = argument.partition("=") if argument.startswith("--") else ("", "", argument)
    return f"{name}{equals}{os.path.expanduser(value)}"


def field_names(cls: Any) -> Iterator[str]:
    """Yields the names of the fields of a dataclass and of those nested in it."""
    plain = get_origin(cls) or cls
    parameters: dict[Any, Any] = dict(zip(getattr(plain, "__parameters__", ()), get_args(cls), strict=False))
    for name, hint in get_type_hints(plain).items():
        yield name
        nested = parameters.get(hint, hint) if isinstance(hint, TypeVar) else hint
        if dataclasses.is_dataclass(get_origin(nested) or nested):
            yield from field_names(nested)


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


def require_ranges(config: Any) -> None:
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
                require_ranges(value)
            elif type(value) is int and not low <= value <= high:
                raise UserError(f"--{field.name.replace('_', '-')} must be from {low} to {high}, not {value}")
