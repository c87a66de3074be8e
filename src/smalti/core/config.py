"""Reads and writes configs: frozen dataclasses as flat settings and from JSON, with strict checks of fields and types.

JSON from files that anyone may have written is parsed by `parse_json`, which bounds its size before it is parsed.
"""

import collections.abc
import dataclasses
import json
import math
import types
from collections.abc import Collection, Mapping
from functools import cache
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from smalti.core.errors import UserError
from smalti.core.files import as_name, open_regular


def flatten(config: Any) -> dict[str, Any]:
    """Returns a nested config dataclass as one flat dictionary of settings, named as its flags are."""
    flat: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        flat.update(flatten(value) if dataclasses.is_dataclass(value) else {field.name: value})
    return flat


def require_choice(name: str, value: object, choices: Any) -> None:
    """Refuses a value that a `Literal` type does not have; otherwise a mistyped one would be read as one of the others.

    Command lines are checked where they are parsed, the arguments of programs are not.

    Raises:
        UserError: naming the choices.
    """
    if value not in get_args(choices):
        raise UserError(f"{name} must be one of {', '.join(map(str, get_args(choices)))}, not {value!r}")


def require_choices(config: Any) -> None:
    """Checks every field of a config dataclass whose type is a `Literal`; see `require_choice`.

    Raises:
        UserError: naming the first field with another value.
    """
    for name, choices in _literals(type(config)).items():
        require_choice(name, getattr(config, name), choices)


@cache
def _literals(cls: type) -> dict[str, Any]:
    """Returns the types of the fields that are `Literal`s."""
    return {name: hint for name, hint in get_type_hints(cls).items() if get_origin(hint) is Literal}


def store_paths(config: Any, *, names: Collection[str] = (), paths: Collection[str] = ()) -> None:
    """Stores fields of a frozen config in their types, so that programs can give texts and `Path`s alike; None stays.

    Args:
        config: the config, while it is initialized.
        names: fields of texts: names of models or images, or paths of them.
        paths: fields of `Path`s.

    Raises:
        UserError: for an empty text.
    """
    for field in (*names, *paths):
        if (value := getattr(config, field)) is not None:
            name = as_name(value, field)
            object.__setattr__(config, field, name if field in names else Path(value))


LARGEST_JSON_BYTES = 1 << 24
MOST_JSON_VALUES = 1 << 20
DEEPEST_JSON = 32


def read_json(path: Path) -> Any:
    """Reads a JSON file that anyone may have written.

    Raises:
        UserError: if it is not a regular file, or the user may not read it.
        FileNotFoundError: if there is none.
        ValueError: as `parse_json` does.
    """
    with open_regular(path) as file:
        return parse_json(file.read(LARGEST_JSON_BYTES + 1))


def parse_json(text: str | bytes) -> Any:
    """Parses JSON from an untrusted file. Its size is checked before the parser allocates anything.

    Raises:
        ValueError: if it is not JSON, is larger or deeper than any file that smalti writes, or contains NaN, infinity,
            an integer that does not fit 64 bits, or text that cannot be encoded.
    """
    if len(text) > LARGEST_JSON_BYTES:
        raise ValueError(f"{len(text)} bytes of JSON are more than the {LARGEST_JSON_BYTES} that are read")
    text = text.decode() if isinstance(text, bytes) else text
    values = count_json_values(text)
    if values > MOST_JSON_VALUES:
        raise ValueError(f"{values} values of JSON are more than the {MOST_JSON_VALUES} that are read")
    try:
        value = json.loads(text, parse_int=_integer, parse_float=_number, parse_constant=_number)
    except RecursionError as error:
        raise ValueError(f"JSON is nested deeper than {DEEPEST_JSON} levels") from error
    level, depth = [value], 0
    while level:
        nested = [each.values() if isinstance(each, dict) else each for each in level if isinstance(each, dict | list)]
        level, depth = [child for children in nested for child in children], depth + 1
        if depth > DEEPEST_JSON:
            raise ValueError(f"JSON is nested deeper than {DEEPEST_JSON} levels")
    if "\\u" in text:
        json.dumps(value, ensure_ascii=False).encode()  # refuses lone surrogates, which cannot be printed
    return value


def count_json_values(text: str) -> int:
    """Returns an upper bound of the number of values in JSON, for `MOST_JSON_VALUES`, without parsing it."""
    return text.count(",") + text.count("[") + text.count("{")


def _integer(digits: str) -> int:
    if len(digits) > 20 or not -(2**63) <= int(digits) < 2**63:
        raise ValueError(f"the integer {digits[:20]}... of {len(digits)} digits does not fit 64 bits")
    return int(digits)


def _number(text: str) -> float:
    if not math.isfinite(number := float(text)):
        raise ValueError(f"{text[:20]} is not a finite number")
    return number


ADDED = "added"
"""Key in the metadata of the fields that `added` makes."""

T = TypeVar("T")


def added(off: T, default: T | None = None) -> T:
    """Marks a config field added after the first release. Checkpoints without it load with `off`.

    While a field has the value `off`, a model's digest leaves it out, so that digests of older checkpoints stay valid.

    Args:
        off: the value that older checkpoints have.
        default: that of new ones [default: `off`].
    """
    return cast(T, dataclasses.field(default=off if default is None else default, metadata={ADDED: off}))


SWITCH = "switch"
"""Key in the metadata of the fields that `replacing` makes."""


class FormerSwitch(NamedTuple):
    """The former name of a config field that replaces a switch, and the field's values for the switch on and off."""

    former: str
    values: dict[bool, Any]


def replacing(former: str, *, on: T, off: T, default: T) -> T:
    """Marks a config field that replaces a switch. Checkpoints and runs with the switch load with its present value.

    While a field has a value that the switch had, a model's digest has the switch instead, so that digests of older
    checkpoints stay valid.

    Args:
        former: the switch's name.
        on: the field's value for the switch on.
        off: the field's value for the switch off.
        default: the field's default.
    """
    return cast(T, dataclasses.field(default=default, metadata={SWITCH: FormerSwitch(former, {True: on, False: off})}))


def former_switches(config: Any) -> dict[str, FormerSwitch]:
    """Returns the switches that fields of a dataclass replace, by the fields' names."""
    return {each.name: each.metadata[SWITCH] for each in dataclasses.fields(config) if SWITCH in each.metadata}


def without_switches(settings: dict[str, Any], switches: Mapping[str, FormerSwitch]) -> dict[str, Any]:
    """Returns settings of any version with every switch replaced by the field that is there now."""
    settings = dict(settings)
    for name, (former, values) in switches.items():
        if name not in settings and isinstance(settings.get(former), bool):
            settings[name] = values[settings.pop(former)]
    return settings


def with_switches(settings: dict[str, Any], switches: Mapping[str, FormerSwitch]) -> dict[str, Any]:
    """Returns settings as older versions wrote them: a field that replaced a switch becomes the switch again.

    A field whose value the switch could not have stays.
    """
    settings = dict(settings)
    for name, (former, values) in switches.items():
        for switch, value in values.items():
            if name in settings and settings[name] == value:
                del settings[name]
                settings[former] = switch
    return settings


def added_values(config: Any) -> dict[str, Any]:
    """Returns the `off` values of the fields of a nested config dataclass that were `added`, by name."""
    values: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            values |= added_values(value)
        elif ADDED in field.metadata:
            values[field.name] = field.metadata[ADDED]
    return values


RENAMED = "renamed"
"""Key in the metadata of the fields that `renamed` makes."""


def renamed(default: T, old_values: dict[Any, T]) -> T:
    """Marks a config field of which some values had other names in older versions, as in their checkpoints.

    Reading replaces an old value by the new one. Digests use the old ones, so that those of older checkpoints stay
    valid.

    Args:
        default: the field's default.
        old_values: the new value of each old one.
    """
    return cast(T, dataclasses.field(default=default, metadata={RENAMED: old_values}))


_OTHER_VERSION = "another version of smalti may have written it; use that version, or make it again with this one"


def config_from_json(config_class: Any, fields: dict[str, Any], source: str) -> Any:
    """Rebuilds a frozen dataclass from the JSON of its `dataclasses.asdict`.

    Fields may be dataclasses themselves, and paths. JSON's lists become tuples. Values are checked, not converted: an
    integer stays an integer in a field of type float, so that digests of configs stay the same.

    Args:
        config_class: a dataclass, or a generic one with its type parameters, such as `PriorEvaluation[MaskedSampling]`.
        fields: values by field name.
        source: the name of the file, for error messages.

    Raises:
        UserError: if a field is missing or unknown, or a value has another type than its field. A default of this
            version must not replace a value that the file lacks, except for fields that were `added`.
    """
    plain = get_origin(config_class) or config_class
    expected, fields = dataclasses.fields(plain), without_switches(fields, former_switches(plain))
    if missing := {field.name for field in expected if ADDED not in field.metadata} - set(fields):
        raise UserError(f"{source} lacks {', '.join(sorted(missing))}; {_OTHER_VERSION}")
    if unknown := set(fields) - {field.name for field in expected}:
        raise UserError(f"{source} has unknown fields: {', '.join(sorted(unknown))}; {_OTHER_VERSION}")
    parameters = dict(zip(getattr(plain, "__parameters__", ()), get_args(config_class), strict=True))
    hints = get_type_hints(plain)
    off = {field.name: field.metadata[ADDED] for field in expected if ADDED in field.metadata}
    values = {
        field.name: _from_json(
            _substituted(hints[field.name], parameters), _renamed(field, fields[field.name]), source, field.name
        )
        for field in expected
        if field.name in fields
    }
    return config_class(**{**off, **values})


def _renamed(field: dataclasses.Field[Any], value: Any) -> Any:
    """Returns the value of a field that was `renamed`; any other value as it is."""
    old_values = field.metadata.get(RENAMED, {})
    return old_values.get(value, value) if isinstance(value, str) else value


def _substituted(hint: Any, parameters: dict[Any, Any]) -> Any:
    """Returns the type with its type variables replaced by what they stand for."""
    if isinstance(hint, TypeVar):
        return parameters[hint]
    variables = getattr(hint, "__parameters__", ()) if get_origin(hint) else ()
    return hint[tuple(parameters[variable] for variable in variables)] if variables else hint


def _from_json(hint: Any, value: Any, source: str, name: str) -> Any:
    """Converts one JSON value to the type of its field."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        members = [member for member in arguments if member is not types.NoneType]
        if value is None and len(members) < len(arguments):
            return None
        fitting = members if len(members) == 1 else [member for member in members if _has_type(value, member)]
        if fitting:
            return _from_json(fitting[0], value, source, name)
    if dataclasses.is_dataclass(origin or hint):
        if not isinstance(value, dict):
            has = f"{source} has {_short(value)}"
            raise UserError(f"{has} where it should have the fields of {(origin or hint).__name__}")
        return config_from_json(hint, value, source)
    if isinstance(value, list):
        one_by_one = origin is tuple and len(arguments) == len(value) and ... not in arguments
        kinds = arguments if one_by_one else (arguments[:1] or (None,)) * len(value)
        if origin is tuple and arguments and ... not in arguments and not one_by_one:
            raise UserError(f"{source}: {name} has {len(value)} values, not {len(arguments)}")
        if origin is tuple or hint in (None, tuple):
            return tuple(_from_json(kind, item, source, name) for kind, item in zip(kinds, value, strict=True))
        if origin is list:
            return [_from_json(kind, item, source, name) for kind, item in zip(kinds, value, strict=True)]
    if not _has_type(value, hint):
        raise UserError(f"{source}: {name} is {_short(value)}, which is not {_type_name(hint)}")
    return Path(cast(str, value)) if hint is Path else value


_OF_JSON: dict[Any, tuple[type, ...]] = {Path: (str,), float: (int, float), tuple: (list,)}
"""The Python types that JSON gives for the types of fields, where they differ."""


def _has_type(value: Any, hint: Any) -> bool:
    """Returns whether a JSON value, as parsed, has the type of a field."""
    origin, arguments = get_origin(hint), get_args(hint)
    if hint in (None, Any) or isinstance(hint, TypeVar):
        return True
    if origin in (Union, types.UnionType):
        return any(_has_type(value, member) for member in arguments)
    if origin is Literal:
        return any(value == each and type(value) is type(each) for each in arguments)
    if origin is dict or origin is collections.abc.Mapping:
        return isinstance(value, dict) and all(_has_type(item, arguments[1]) for item in value.values())
    if origin in (tuple, list):
        members = arguments[:1] * len(value) if isinstance(value, list) else ()
        return isinstance(value, list) and all(_has_type(*pair) for pair in zip(value, members, strict=True))
    if not isinstance(hint, type):
        return True
    if isinstance(value, bool):  # which Python counts as an integer
        return hint is bool
    return isinstance(value, _OF_JSON.get(hint, (hint,)))


def _type_name(hint: Any) -> str:
    return hint.__name__ if isinstance(hint, type) else str(hint)


def _short(value: Any, longest: int = 60) -> str:
    text = repr(value)
    return text if len(text) <= longest else f"{text[:longest]}..."
