"""Random numbers that are a function of what they are for, not of when or where they are drawn.

A stateful generator ties a draw to everything drawn before it: to the batch, the process and the history of the run.
Here a draw is a hash of (seed of the row, stream, position), as in counter-based generators. So a sample depends on its
own seed only, whatever the batch around it; a resumed run needs no generator state; and two processes draw what one
would. Networks' first weights are not drawn here: torch initializes them.
"""

import math
from enum import IntEnum, unique
from typing import Self

import torch
from jaxtyping import Float, Int64
from torch import Tensor

_GOLDEN = -7046029254386353131  # 0x9E3779B97F4A7C15 as int64, the increment of SplitMix64
_MIX_1 = -4658895280553007687  # 0xBF58476D1CE4E5B9
_MIX_2 = -7723592293110705685  # 0x94D049BB133111EB
_CACHED = 16_384  # numbers that a CPU draws at a time: what is between stays in its cache, 2-6 times faster


@unique
class Stream(IntEnum):
    """Every random stream: what a draw is for, so that two draws from one seed never share their numbers.

    Each member has a scope, the kind of seed it is derived from, and an integer, its value as an `int`. Integers differ
    within a scope and between a scope and those it is part of (`training row/SUNDAE` is part of `training row`); they
    repeat across other scopes, whose seeds are never the same. The integers are part of what a seed means: changing one
    changes the samples of every seed.
    """

    def __new__(cls, scope: str, number: int) -> Self:
        """An `int` equal to `number` whose enum value is the pair, so that equal numbers are no aliases."""
        member = int.__new__(cls, number)
        member._value_ = (scope, number)  # type: ignore[assignment] - typeshed has it as the int
        return member

    # source ids are keys and seeds elsewhere too; hashing them once more makes the split independent of that
    HELD_OUT_SPLIT = "image source", 0x5B117

    LABEL_DROPOUT = "training row", 4
    SUNDAE_RATE = "training row/SUNDAE", 0
    SUNDAE_POSITIONS = "training row/SUNDAE", 1
    SUNDAE_CODES = "training row/SUNDAE", 2
    SUNDAE_UNROLL = "training row/SUNDAE", 3
    MASKED_RATE = "training row/masked", 0
    MASKED_POSITIONS = "training row/masked", 1

    CLASS_LABEL = "sample", 4
    LEVEL = "sample", 16
    IMAGE_DETAILS = "sample", 17
    SUNDAE_START = "sample/SUNDAE", 0
    SUNDAE_STEP = "sample/SUNDAE", 1
    SUNDAE_PROPOSAL = "SUNDAE step", 2
    SUNDAE_UPDATE = "SUNDAE step", 3
    SUNDAE_WINDOW = "SUNDAE step", 5
    MASKED_DRAW = "masked step", 0
    MASKED_RANK = "masked step", 1
    MASKED_WINDOW = "masked step", 2
    AUTOREGRESSIVE_DRAW = "particle", 0
    PARTICLE = "sample/autoregressive", 1
    PARTICLE_CHOICE = "sample/autoregressive", 2

    HQA_ENCODE = "HQA image", 0
    HQA_DECODE = "HQA image", 1
    GUMBEL_NOISE = "stochastic codes", 0
    CODE_RESET = "stochastic codes", 1
    CODE_RESET_NOISE = "code reset", 1
    LOGISTIC_COMPONENT = "logistic mixture", 0
    LOGISTIC_VALUE = "logistic mixture", 1
    VAE_LATENTS = "VAE image", 32
    VAE_PIXELS = "VAE image", 33

    EVALUATION_REFERENCE = "evaluation", 0
    EVALUATION_HELD_OUT = "evaluation", 1
    EVALUATION_HOLES = "evaluation", 2
    EVALUATION_FILLS = "evaluation", 3
    HQA_STUDY_DECODE = "HQA study", 64


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
