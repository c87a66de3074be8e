"""Reads and writes configs: frozen dataclasses as flat settings and as JSON, with strict field checks."""

import dataclasses
from typing import Any, TypeVar, cast

from smalti.core.errors import UserError


def flatten(config: Any) -> dict[str, Any]:
    """A nested config dataclass as one flat dictionary of settings: the names of its flags."""
    flat: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        flat.update(flatten(value) if dataclasses.is_dataclass(value) else {field.name: value})
    return flat


ADDED = "added"


T = TypeVar("T")


def added(off: T) -> T:
    """A field of a config for a setting that a kind came to have after models of it were kept, whose value `off` is how
    they behave: a checkpoint that does not say it has that, and while it is that, digests are what they were."""
    return cast(T, dataclasses.field(default=off, metadata={ADDED: True}))


def config_from_json(config_class: type, fields: dict[str, Any], where: str) -> Any:
    """Rebuilds a frozen dataclass from JSON, which has lists where a frozen dataclass has tuples.

    Raises:
        UserError: if a field is missing or unknown: a default of today must not stand in for what a checkpoint did not
            say, but of fields that were `added`.
    """
    expected = dataclasses.fields(config_class)
    if missing := {field.name for field in expected if ADDED not in field.metadata} - set(fields):
        raise UserError(f"{where} lacks {', '.join(sorted(missing))}")
    if unknown := set(fields) - {field.name for field in expected}:
        raise UserError(f"{where} has unknown fields: {', '.join(sorted(unknown))}")
    return config_class(**{name: _tuples(value) for name, value in fields.items()})


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value
