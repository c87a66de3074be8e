"""Tests of configs: flattening to flags, and reading them back from JSON."""

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Generic, TypeVar

import pytest
from hypothesis import given
from hypothesis import strategies as st

from smalti.core.config import added, added_values, config_from_json, flatten, renamed
from smalti.core.errors import UserError
from smalti.core.models import digest

S = TypeVar("S")
PATHS = st.lists(st.text("abc.é ", min_size=1), min_size=1).map("/".join).map(Path)


@dataclass(frozen=True)
class Sampling:
    steps: int
    temperature: tuple[float, float]


@dataclass(frozen=True)
class Plain:
    name: str
    sizes: tuple[int, ...]
    pairs: tuple[tuple[int, float], ...]
    perhaps: tuple[int, ...] | None


@dataclass(frozen=True)
class Outer(Generic[S]):
    sampling: S
    several: tuple[S, ...]
    plain: Plain
    out: Path
    maybe_path: Path | None = None
    maybe_sampling: S | None = None
    settings: dict[str, int] = field(default_factory=dict)


SAMPLINGS = st.builds(Sampling, st.integers(), st.tuples(*[st.floats(allow_nan=False)] * 2))
PLAINS = st.builds(
    Plain,
    st.text(),
    st.lists(st.integers()).map(tuple),
    st.lists(st.tuples(st.integers(), st.floats(allow_nan=False))).map(tuple),
    st.none() | st.just(()) | st.just((1, 2)),
)


@given(
    st.builds(
        Outer,
        SAMPLINGS,
        st.lists(SAMPLINGS, max_size=3).map(tuple),
        PLAINS,
        PATHS,
        st.none() | PATHS,
        st.none() | SAMPLINGS,
        st.dictionaries(st.text(), st.integers(), max_size=2),
    )
)
def test_nested_generic_config_round_trips_through_json(config):
    fields = json.loads(json.dumps(dataclasses.asdict(config), default=str))
    assert config_from_json(Outer[Sampling], fields, "result.json") == config


@given(PLAINS)
def test_plain_config_round_trips_through_json(config):
    assert config_from_json(Plain, json.loads(json.dumps(dataclasses.asdict(config))), "config.json") == config


def test_missing_unknown_and_wrong_fields_are_refused_by_name():
    sampling = {"steps": 3, "temperature": [1.0, 0.5]}
    plain = {"name": "", "sizes": [], "pairs": [], "perhaps": None}
    outer = {"sampling": sampling, "several": [], "plain": plain, "out": "x"}
    outer |= {"maybe_path": None, "maybe_sampling": None, "settings": {}}
    for fields, message in [
        ({name: value for name, value in outer.items() if name != "out"}, "result.json lacks out; another version"),
        ({**outer, "sampling": {"steps": 3}}, "result.json lacks temperature"),
        (
            {**outer, "colour": 1},
            "result.json has unknown fields: colour; another version of smalti may have written it",
        ),
        ({**outer, "plain": 7}, "result.json has 7 where it should have the fields of Plain"),
    ]:
        with pytest.raises(UserError, match=message):
            config_from_json(Outer[Sampling], fields, "result.json")


def test_flatten_returns_the_names_of_flags():
    @dataclass(frozen=True)
    class Inner:
        rate: float = 0.5

    @dataclass(frozen=True)
    class Nested:
        inner: Inner = field(default_factory=Inner)
        seed: int = 3

    assert flatten(Nested()) == {"rate": 0.5, "seed": 3}


@dataclass(frozen=True)
class Grown:
    word: str = renamed("new", {"old": "new", "older": "new"})
    later: float = added(0.5)
    better: bool = added(off=False, default=True)


@dataclass(frozen=True)
class Older:
    word: str = renamed("new", {"old": "new", "older": "new"})


@dataclass(frozen=True)
class Nesting:
    grown: Grown
    size: int
    levels: tuple[int, ...] = added(())


@pytest.mark.parametrize(("stored", "read"), [("old", "new"), ("older", "new"), ("new", "new"), ("other", "other")])
def test_renamed_values_are_read_by_their_old_names(stored, read):
    assert config_from_json(Grown, {"word": stored}, "config.json") == Grown(read, 0.5, better=False)


def test_wrong_types_of_renamed_fields_are_refused():
    with pytest.raises(UserError, match="word is 3, which is not str"):
        config_from_json(Grown, {"word": 3}, "config.json")
    with pytest.raises(UserError, match="word is"):
        config_from_json(Grown, {"word": ["old"]}, "config.json")


def test_off_values_of_added_fields_do_not_depend_on_what_is_set():
    assert added_values(Nesting(Grown("other", 3.0), 2, (4,))) == {"later": 0.5, "better": False, "levels": ()}


def test_digests_leave_out_added_fields_at_their_off_value_alone():
    """An older checkpoint keeps its digest, although new ones have another default."""
    old, new = Grown(later=0.5, better=False), Grown()
    assert digest("kind", old, {}) == digest("kind", Older("new"), {}) != digest("kind", new, {})
