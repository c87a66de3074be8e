"""Tests of codes against plain Python arithmetic, and of what levels and layouts refuse."""

import json
import math

import jaxtyping
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from smalti.core.codes import LARGEST_CODEBOOK_SIZE, Layout, Level, chosen_digits, row_numbers
from smalti.core.errors import UserError
from smalti.latentsets.hdf5.format import layout_from_json

RADICES = st.lists(st.integers(2, 40), min_size=1, max_size=5).map(tuple).filter(lambda r: math.prod(r) < 2**31)


def digits_of(code: int, radices: tuple[int, ...]) -> list[int]:
    """Long division, least significant digit first."""
    digits = []
    for radix in reversed(radices):
        code, digit = divmod(code, radix)
        digits.append(digit)
    return digits[::-1]


@given(RADICES, st.data())
def test_digits_and_prefixes_match_long_division(radices, data):
    level = Level(1, 1, radices)
    numbers = data.draw(st.lists(st.integers(0, level.codebook_size - 1), min_size=1, max_size=8))
    codes = torch.tensor(numbers)
    expected = [digits_of(number, radices) for number in numbers]
    assert level.split(codes).tolist() == expected
    assert level.join(level.split(codes)).tolist() == numbers
    for index in range(len(radices)):
        assert level.digit(codes, index).tolist() == [digits[index] for digits in expected]
    for count in range(len(radices) + 1):
        node_radices = radices[:count]
        prefixes = level.prefix(codes, count).tolist()
        assert [digits_of(prefix, node_radices) for prefix in prefixes] == [digits[:count] for digits in expected]


@given(st.lists(st.integers(2, 5), min_size=1, max_size=4).map(tuple), st.data())
def test_counts_of_prefixes_are_those_of_the_prefixes_of_all_codes(radices, data):
    level = Level(1, 1, radices)
    codes = torch.tensor(data.draw(st.lists(st.integers(0, level.codebook_size - 1), max_size=50)), dtype=torch.int64)
    counts = torch.bincount(codes, minlength=level.codebook_size)
    for digits in range(len(radices) + 1):
        prefixes = level.prefix(codes, digits).tolist()
        expected = [prefixes.count(prefix) for prefix in range(math.prod(radices[:digits]))]
        assert level.prefix_counts(counts, digits).tolist() == expected


@given(st.integers(2, 5), st.integers(1, 4), st.integers(0, 2**16))
def test_prefix_of_linked_layers_is_division_by_a_power(branching, depth, seed):
    codes = torch.randint(branching**depth, (2, 3, 4), generator=torch.Generator().manual_seed(seed))
    level = Level(3, 4, (branching,) * depth)
    for first in range(1, depth + 1):
        assert torch.equal(level.prefix(codes, first), codes // branching ** (depth - first))


@given(st.integers(1, 6), st.integers(-2, 8), st.none() | st.integers(-6, 8))
def test_chosen_digits_are_those_of_pythons_slices(count, start, stop):
    """A number is the first digits. Digits that codes do not have, or none at all, are refused."""
    if 1 <= start <= count:
        assert list(chosen_digits(start, count)) == list(range(count))[:start]
    else:
        with pytest.raises(UserError, match=f"give a number from 1 to {count}"):
            chosen_digits(start, count)
    expected = list(range(count))[start:stop]
    if expected and (stop or 0) <= count:
        assert list(chosen_digits(slice(start, stop), count)) == expected
    else:
        with pytest.raises(
            UserError,
            match=f"these codes have {count} digits?; give a number from 1 to {count}, or a slice within them",
        ):
            chosen_digits(slice(start, stop), count)
    assert list(chosen_digits(None, count)) == list(range(count))


def test_split_keeps_shape_and_adds_digits_last():
    codes = torch.arange(24).view(2, 3, 4)
    level = Level(3, 4, (2, 3, 4))
    assert level.split(codes).shape == (2, 3, 4, 3)
    assert level.split(codes)[1, 2, 3].tolist() == [1, 2, 3]  # 23, the last leaf


@pytest.mark.parametrize(
    ("radices", "dtype"),
    [((256,), "uint8"), ((257,), "uint16"), ((2**16,), "uint16"), ((2**16 + 1,), "uint32"), ((8, 8, 8), "uint16")],
)
def test_stored_dtype_is_the_smallest_that_fits(radices, dtype):
    level = Level(1, 1, radices)
    assert level.dtype == np.dtype(dtype)
    assert np.array([level.codebook_size - 1]).astype(level.dtype)[0] == level.codebook_size - 1


def test_sizes_of_discrete_and_continuous_levels():
    discrete, continuous = Level(2, 3, (4, 5)), Level(2, 3, channels=7)
    assert (discrete.codebook_size, discrete.positions, discrete.shape) == (20, 6, (2, 3))
    assert (continuous.shape, continuous.dtype) == ((7, 2, 3), np.dtype("float32"))
    assert Level(1, 1, (2**31 - 1,)).codebook_size == LARGEST_CODEBOOK_SIZE


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"height": 0, "width": 2, "radices": (4,)}, "0x2"),
        ({"height": 2, "width": -1, "radices": (4,)}, "2x-1"),
        ({"height": 1, "width": 1}, "either radices or channels"),
        ({"height": 1, "width": 1, "radices": (4,), "channels": 3}, "either radices or channels"),
        ({"height": 1, "width": 1, "radices": (4, 1)}, "at least 2"),
        ({"height": 1, "width": 1, "radices": (2**16, 2**15)}, "2147483648"),
    ],
)
def test_invalid_levels_are_refused(arguments, message):
    with pytest.raises(UserError, match=message):
        Level(**arguments)


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9), RADICES | st.integers(1, 9)), min_size=1, max_size=3))
def test_layout_round_trips_through_json(parameters):
    layout = Layout(
        tuple(
            Level(height, width, codebook) if isinstance(codebook, tuple) else Level(height, width, channels=codebook)
            for height, width, codebook in parameters
        )
    )
    assert layout_from_json(json.loads(json.dumps(layout.to_json())), "the test") == layout


def test_resized_layout_keeps_its_codebooks():
    layout = Layout((Level(2, 2, (4, 4)), Level(4, 4, channels=3)))
    assert layout.resized([(3, 5), (6, 10)]) == Layout((Level(3, 5, (4, 4)), Level(6, 10, channels=3)))
    assert str(layout) == "2×2 of 4·4 + 4×4 of 3 floats"


def test_codes_of_another_layout_are_refused():
    layout = Layout((Level(2, 3, (4, 4)), Level(1, 1, channels=2)))
    floats = torch.full((5, 2, 1, 1), 1e9)  # a continuous level accepts any finite number
    layout.check((torch.randint(16, (5, 2, 3)), floats))
    layout.check((torch.zeros(0, 2, 3, dtype=torch.int64), floats[:0]))
    for codes, message in [
        ((torch.zeros(5, 2, 3, dtype=torch.int64),), "2 level"),
        ((torch.zeros(5, 3, 2, dtype=torch.int64), floats), "level 0"),
        ((torch.full((5, 2, 3), 16), floats), "0 to 15"),
        ((torch.full((5, 2, 3), -1), floats), "0 to 15"),
        ((torch.zeros(5, 2, 3, dtype=torch.int64), floats[:, :1]), "level 1"),
        ((torch.zeros(5, 2, 3, dtype=torch.int64), floats.log().log().neg().log()), "level 1 has latents that are not"),
        ((torch.zeros(5, 2, 3, dtype=torch.int64), floats.index_fill(0, torch.tensor(4), float("inf"))), "level 1 has"),
    ]:
        with pytest.raises(UserError, match=message):
            layout.check(codes)
    with pytest.raises(UserError, match="at least one level"):
        Layout(())


@pytest.mark.parametrize("rows", [3, [[0, 1]], torch.ones(4, 1).long(), np.zeros((2, 2), np.int64), torch.tensor(2)])
def test_row_numbers_of_another_dimension_are_refused(rows, monkeypatch):
    """A set of several files would read other rows, and one of a single file return another shape."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # which checks types in tests alone
    with pytest.raises(UserError, match=r"row numbers must have one dimension, such as \[0, 2\], not the shape \("):
        row_numbers(rows)
    assert row_numbers(range(2)).tolist() == row_numbers(torch.tensor([0, 1])).tolist() == [0, 1]
    assert row_numbers([]).shape == (0,)
