"""Counter-based draws: against SplitMix64 in plain Python, and what they promise: uniform, unrelated, batch-free."""

import itertools
import math
from enum import IntEnum
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from smalti.core.errors import UserError
from smalti.core.randomness import Stream, derive, generator_for, row_seeds, uniform
from smalti.training.config import FitConfig

MASK, GOLDEN = 2**64 - 1, 0x9E3779B97F4A7C15
SEEDS = st.integers(-(2**63), 2**63 - 1)


def mix(state: int) -> int:
    """The output function of SplitMix64, on Python's unbounded integers."""
    state = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 & MASK
    state = (state ^ state >> 27) * 0x94D049BB133111EB & MASK
    return state ^ state >> 31


def splitmix(state: int, index: int) -> int:
    """Output `index`, from 1, of a generator in the given state."""
    return mix(state + index * GOLDEN & MASK)


def signed(number: int) -> int:
    return number - 2**64 if number >> 63 else number


def test_the_reference_gives_the_published_numbers():
    assert [splitmix(1234567, index) for index in range(1, 6)] == [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]


@given(SEEDS, st.lists(SEEDS, min_size=1, max_size=3))
def test_derived_seeds_are_those_of_the_reference(seed, streams):
    expected = seed & MASK
    for stream in streams:
        expected = mix((expected ^ GOLDEN) + mix(stream + GOLDEN & MASK) & MASK)
    assert derive(torch.tensor([seed]), *streams).tolist() == [signed(expected)]


@given(SEEDS, st.lists(st.integers(1, 4), max_size=3))
def test_uniform_numbers_are_the_upper_bits_of_the_reference(seed, shape):
    state = mix(seed & MASK)
    expected = [(splitmix(state, index) >> 40) / 2**24 for index in range(1, math.prod(shape) + 1)]
    drawn = uniform(torch.tensor([seed]), *shape)
    assert drawn.shape == (1, *shape)
    assert drawn.dtype == torch.float32
    assert drawn.flatten().tolist() == expected
    assert 0 <= drawn.min() <= drawn.max() < 1


@given(st.integers(1, 8), SEEDS, st.data())
def test_a_row_draws_the_same_alone_and_in_any_batch(size, seed, data):
    rows = torch.tensor(data.draw(st.permutations(range(size))))
    together = uniform(derive(row_seeds(seed, rows), 3), 2, 5)
    for place, row in enumerate(rows):
        assert torch.equal(uniform(derive(row_seeds(seed, row.view(1)), 3), 2, 5)[0], together[place])


def test_a_stream_may_be_a_number_or_a_tensor_of_them():
    seeds = torch.arange(4)
    steps = torch.tensor([5, 6, 7, 8])
    by_tensor = derive(seeds, steps)
    assert by_tensor.tolist() == [int(derive(seeds[i : i + 1], int(steps[i]))) for i in range(4)]
    assert torch.equal(row_seeds(9, steps), derive(torch.full((4,), 9), steps))


def test_seeds_of_neighbouring_seeds_rows_and_steps_are_all_different():
    """A hundred thousand of 2**64 values: two that agree by chance would be a one in four thousand million event."""
    seeds = derive(torch.arange(-5, 5).view(10, 1, 1), torch.arange(100).view(1, 100, 1), torch.arange(100))
    assert len(seeds.unique()) == 10 * 100 * 100
    assert int(derive(torch.tensor(1), 2, 3)) != int(derive(torch.tensor(1), 3, 2))


DRAWS = 1 << 16


def neighbours(kind: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Two series of uniform numbers that a bad generator would relate."""
    rows, steps = row_seeds(0, torch.arange(DRAWS + 1)), derive(torch.zeros(DRAWS + 1, dtype=torch.int64))
    series = {
        "rows": uniform(rows),
        "seeds": uniform(torch.arange(DRAWS + 1)),
        "steps": uniform(derive(steps, torch.arange(DRAWS + 1))),
        "positions": uniform(torch.tensor([7]), DRAWS + 1)[0],
    }
    if kind == "streams":
        return uniform(derive(rows[1:], 0)), uniform(derive(rows[1:], 1))
    return series[kind][1:], series[kind][:-1]


@pytest.mark.parametrize("kind", ["rows", "seeds", "steps", "positions", "streams"])
def test_draws_are_uniform_and_neighbours_unrelated(kind):
    first, second = neighbours(kind)
    steps = (torch.arange(DRAWS) + 0.5) / DRAWS
    for series in (first, 1 - first):  # Kolmogorov and Smirnov's statistic; 1.95 is exceeded once in a thousand
        assert (series.double().sort().values - steps).abs().max() * DRAWS**0.5 < 1.95
    bins = 16  # pairs, in a grid of 256: chi-square of 255 degrees of freedom, 330 is exceeded once in a thousand
    counts = ((first * bins).long() * bins + (second * bins).long()).bincount(minlength=bins**2).double()
    expected = DRAWS / bins**2
    assert (counts - expected).square().sum() / expected < 330


@pytest.mark.parametrize("of_stream", [False, True])
def test_every_input_bit_flips_every_output_bit_half_the_time(of_stream):
    trials = 2_000
    numbers = derive(torch.arange(trials), 99)
    flipped = numbers ^ (1 << torch.arange(64).view(-1, 1))
    of = (lambda x: derive(torch.zeros_like(x), x)) if of_stream else (lambda x: derive(x, 0))
    changed = of(numbers) ^ of(flipped)  # input bit, trial
    share = torch.stack([(changed >> bit & 1).double().mean(1) for bit in range(64)])
    assert (share - 0.5).abs().max() < 5.5 / (2 * trials**0.5)  # 5.5 deviations, for the largest of 4096


def test_generators_depend_on_every_stream_and_leave_the_global_one_alone():
    before = torch.get_rng_state()
    orders = [torch.randperm(50, generator=generator_for(*streams)) for streams in [(0, 1), (0, 1), (0, 2), (1, 1)]]
    assert torch.equal(orders[0], orders[1])
    assert not torch.equal(orders[0], orders[2])
    assert not torch.equal(orders[0], orders[3])
    assert torch.equal(torch.get_rng_state(), before)


def stream_collisions(streams: Any) -> list[tuple[str, str]]:
    """Returns the pairs of streams with equal integers whose scopes are equal or contain one another."""

    def contains(outer: str, inner: str) -> bool:
        return f"{inner}/".startswith(f"{outer}/")

    pairs = itertools.combinations(streams, 2)
    scoped = [(a, b, a.value[0], b.value[0]) for a, b in pairs if int(a) == int(b)]
    return [(a.name, b.name) for a, b, first, second in scoped if contains(first, second) or contains(second, first)]


def test_random_streams_do_not_collide():
    assert stream_collisions(Stream) == []


def test_planted_stream_collisions_are_found():
    class Planted(IntEnum):
        def __new__(cls, scope, number):
            member = int.__new__(cls, number)
            member._value_ = (scope, number)
            return member

        LABEL = "row", 4
        OTHER = "other row", 4
        DEPTH = "row/SUNDAE", 4
        RATE = "row/SUNDAE", 0
        MASK = "row/masked", 0
        PREFIX = "row/SUNDAE steps", 0
        TWIN = "row/masked", 1
        TWIN_AGAIN = "row/masked/step", 1

    assert stream_collisions(Planted) == [("LABEL", "DEPTH"), ("TWIN", "TWIN_AGAIN")]


@pytest.mark.parametrize("seed", [2**63, -(2**63) - 1, 2**64 - 1])
def test_seeds_beyond_64_bits_are_refused(seed):
    for draw_with in (
        lambda: row_seeds(seed, torch.arange(2)),
        lambda: generator_for(seed),
        lambda: FitConfig(seed=seed),
    ):
        with pytest.raises(UserError, match=f"--seed must be from .* not {seed}; give another"):
            draw_with()
    row_seeds(2**63 - 1, torch.arange(2))
    generator_for(-(2**63))
