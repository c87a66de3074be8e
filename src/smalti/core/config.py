"""Reads and writes configs: frozen dataclasses as flat settings and from JSON, with strict field checks."""

import dataclasses
import types
from pathlib import Path
from typing import Any, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from smalti.core.errors import UserError


def flatten(config: Any) -> dict[str, Any]:
    """Returns a nested config dataclass as one flat dictionary of settings, named as its flags are."""
    flat: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        flat.update(flatten(value) if dataclasses.is_dataclass(value) else {field.name: value})
    return flat


ADDED = "added"
"""Key in the metadata of the fields that `added` makes."""

T = TypeVar("T")


def added(off: T) -> T:
    """Marks a config field added after the first release. Checkpoints without it load with `off`.

    While a field has the value `off`, a model's digest leaves it out, so that digests of older checkpoints stay valid.
    """
    return cast(T, dataclasses.field(default=off, metadata={ADDED: True}))


def config_from_json(config_class: Any, fields: dict[str, Any], source: str) -> Any:
    """Rebuilds a frozen dataclass from the JSON of its `dataclasses.asdict`.

    Fields may be dataclasses themselves, and paths. JSON's lists become tuples.

    Args:
        config_class: a dataclass, or a generic one with its type parameters, such as `PriorEvaluation[MaskedSampling]`.
        fields: values by field name.
        source: the name of the file, for error messages.

    Raises:
        UserError: if a field is missing or unknown. A default of this version must not replace a value that the file
            lacks, except for fields that were `added`.
    """
    plain = get_origin(config_class) or config_class
    expected = dataclasses.fields(plain)
    if missing := {field.name for field in expected if ADDED not in field.metadata} - set(fields):
        raise UserError(f"{source} lacks {', '.join(sorted(missing))}")
    if unknown := set(fields) - {field.name for field in expected}:
        raise UserError(f"{source} has unknown fields: {', '.join(sorted(unknown))}")
    parameters = dict(zip(getattr(plain, "__parameters__", ()), get_args(config_class), strict=True))
    hints = get_type_hints(plain)
    return config_class(
        **{name: _from_json(_substituted(hints[name], parameters), value, source) for name, value in fields.items()}
    )


def _substituted(hint: Any, parameters: dict[Any, Any]) -> Any:
    """Returns the type with its type variables replaced by what they stand for."""
    if isinstance(hint, TypeVar):
        return parameters[hint]
    variables = getattr(hint, "__parameters__", ()) if get_origin(hint) else ()
    return hint[tuple(parameters[variable] for variable in variables)] if variables else hint


def _from_json(hint: Any, value: Any, source: str) -> Any:
    """Converts one JSON value to the type of its field."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):  # of unions, only those with None are converted
        members = [member for member in arguments if member is not types.NoneType]
        return None if value is None else _from_json(members[0] if len(members) == 1 else None, value, source)
    if dataclasses.is_dataclass(origin or hint):
        if not isinstance(value, dict):
            raise UserError(f"{source} has {value!r} where it should have the fields of {(origin or hint).__name__}")
        return config_from_json(hint, value, source)
    if hint is Path:
        return Path(value)
    if isinstance(value, list):
        one_by_one = origin is tuple and len(arguments) == len(value) and ... not in arguments
        kinds = arguments if one_by_one else (arguments[:1] or (None,)) * len(value)
        return tuple(_from_json(kind, item, source) for kind, item in zip(kinds, value, strict=True))
    return value
