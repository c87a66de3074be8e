"""Random numbers that are a function of what they are for, not of when or where they are drawn.

A stateful generator ties a draw to everything drawn before it: to the batch, the process and the history of the run.
Here a draw is a hash of (seed of the row, stream, position), as in counter-based generators. So a sample depends on its
own seed only, whatever the batch around it; a resumed run needs no generator state; and two processes draw what one
would. Networks' first weights are not drawn here: torch initializes them.
"""

import math

import torch
from jaxtyping import Float, Int64
from torch import Tensor

_GOLDEN = -7046029254386353131  # 0x9E3779B97F4A7C15 as int64, the increment of SplitMix64
_MIX_1 = -4658895280553007687  # 0xBF58476D1CE4E5B9
_MIX_2 = -7723592293110705685  # 0x94D049BB133111EB
_CACHED = 16_384  # numbers that a CPU draws at a time: what is between stays in its cache, 2-6 times faster


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Logical shift; torch's >> on int64 carries the sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mix(x: Tensor) -> Tensor:
    """SplitMix64's finaliser (Steele, Lea and Flood 2014): an input bit flips each output bit with probability 1/2."""
    return _opaque_mix(x) if torch.compiler.is_compiling() else _plain_mix(x)


def _plain_mix(x: Tensor) -> Tensor:
    x = (x ^ _shift_right(x, 30)) * _MIX_1
    x = (x ^ _shift_right(x, 27)) * _MIX_2
    return x ^ _shift_right(x, 31)


@torch.library.custom_op("smalti::mix", mutates_args=())
def _opaque_mix(x: Tensor) -> Tensor:
    """For torch.compile, whose work doubles with every operation that reads its operand twice: eightfold for a mix, and
    a draw needs several, one in the other."""
    return _plain_mix(x)


@_opaque_mix.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


def derive(seeds: Int64[Tensor, "*shape"], *streams: int | Tensor) -> Int64[Tensor, "*out"]:
    """New seeds from old: for each way of naming a stream (a step, a purpose, a tensor of row numbers) others."""
    for stream in streams:
        if isinstance(stream, int):  # filled in on the device: a copy to it would wait for all it has to do
            stream = torch.full((), stream, dtype=torch.int64, device=seeds.device)
        seeds = _mix((seeds ^ _GOLDEN) + _mix(stream.to(seeds) + _GOLDEN))
    return seeds


def row_seeds(seed: int, rows: Int64[Tensor, " b"]) -> Int64[Tensor, " b"]:
    """One seed for each row of a batch, from the run's seed and the row's number in the whole (not in the batch)."""
    return derive(torch.full_like(rows, seed), rows)


def uniform(seeds: Int64[Tensor, " b"], *shape: int) -> Float[Tensor, "b *shape"]:
    """Numbers uniform on [0, 1), `shape` of them for each seed: float32 multiples of 2**-24, the same on any device."""
    count = math.prod(shape)
    numbers = _opaque_uniform(seeds, count) if torch.compiler.is_compiling() else _plain_uniform(seeds, count)
    return numbers.view(len(seeds), *shape)


def _plain_uniform(seeds: Tensor, count: int) -> Tensor:
    counters, starts = (torch.arange(count, device=seeds.device) + 1) * _GOLDEN, _mix(seeds)[:, None]
    if seeds.device.type != "cpu":
        return _shift_right(_mix(starts + counters), 40).to(torch.float32) * 2.0**-24
    numbers, rows = torch.empty(len(starts), count), max(_CACHED // max(count, 1), 1)
    for made, of_rows in zip(numbers.split(rows), starts.split(rows), strict=True):
        for part, of_columns in zip(made.split(_CACHED, 1), counters.split(_CACHED), strict=True):
            part.copy_(_shift_right(_mix(of_rows + of_columns), 40))
    return numbers.mul_(2.0**-24)


@torch.library.custom_op("smalti::uniform", mutates_args=())
def _opaque_uniform(seeds: Tensor, count: int) -> Tensor:
    """For torch.compile, which makes of `(arange + 1) * number + seeds` of int64 code that writes beyond its output on
    CPUs that have no more than AVX2 (torch 2.13)."""
    return _plain_uniform(seeds, count)


@_opaque_uniform.register_fake
def _(seeds: Tensor, count: int) -> Tensor:
    return seeds.new_empty(len(seeds), count, dtype=torch.float32)


def gumbel(seeds: Int64[Tensor, " b"], *shape: int) -> Float[Tensor, "b *shape"]:
    """Standard Gumbel noise: added to log-weights, the place of the largest sum is drawn with these weights."""
    return uniform(seeds, *shape).clamp_(min=2.0**-25).log_().neg_().log_().neg_()


def normal(seeds: Int64[Tensor, " b"], *shape: int) -> Float[Tensor, "b *shape"]:
    """Standard normal numbers, by the inverse of their distribution function; none beyond 5.5 in either direction."""
    return torch.erfinv(2 * uniform(seeds, *shape) - 1 + 2.0**-24) * math.sqrt(2)  # exact within: never -1 nor 1


def choose(count: int, most: int, seed: int, *streams: int) -> list[int]:
    """Up to `most` of `count` rows, drawn without repeats, in order."""
    return sorted(torch.randperm(count, generator=generator_for(seed, *streams))[:most].tolist())


def generator_for(seed: int, *streams: int) -> torch.Generator:
    """A CPU generator seeded by (seed, streams), for what only a generator can draw, such as a permutation."""
    return torch.Generator().manual_seed(int(derive(torch.tensor(seed), *streams)) & (2**63 - 1))
