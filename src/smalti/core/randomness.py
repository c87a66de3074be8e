"""Counter-based random numbers: each draw is a hash of (seed of the row, stream, position).

A stateful generator ties a draw to everything drawn before it: the batch, the process and the history of the run.
With a hash, a sample depends on its own seed only and not on its batch, a resumed run needs no generator state, and two
processes draw the same numbers as one. Networks' initial weights are drawn by torch's own generator.
"""

import math
from enum import IntEnum, unique
from typing import Self

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from smalti.core.errors import UserError, whole_number

_GOLDEN = -7046029254386353131  # 0x9E3779B97F4A7C15 as int64, the increment of SplitMix64
_MIX_1 = -4658895280553007687  # 0xBF58476D1CE4E5B9
_MIX_2 = -7723592293110705685  # 0x94D049BB133111EB
_ALL_BITS = 2**64 - 1
_CACHED = 16_384  # numbers that a CPU draws at a time, so that intermediate values stay in its cache


@unique
class Stream(IntEnum):
    """The purposes of random draws. Two draws from one seed need different streams, or they would be equal.

    Each member has a scope (the kind of seed it is derived from) and an integer, its value as an `int`. Integers are
    distinct within a scope, and between a scope and the scopes that contain it (`training row` contains
    `training row/SUNDAE`). They repeat across unrelated scopes, whose seeds are never the same. Changing an integer
    changes the samples of every seed.
    """

    def __new__(cls, scope: str, number: int) -> Self:
        """Makes an `int` equal to `number` whose enum value is the pair, so that equal numbers are not aliases."""
        member = int.__new__(cls, number)
        member._value_ = (scope, number)  # type: ignore[assignment] - typeshed types the value as the int
        return member

    # source ids are also keys and seeds elsewhere; hashing them again makes the split independent of those uses
    HELD_OUT_SPLIT = "image source", 0x5B117

    RANDOM_CROPS = "image number", 0

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
    PARTICLE_RESAMPLING = "sample/autoregressive", 3

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
    EVALUATION_MASKS = "evaluation", 2
    EVALUATION_FILLS = "evaluation", 3
    EVALUATION_MANIFOLD = "evaluation", 4
    HQA_STUDY_DECODE = "HQA study", 64


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Computes a logical right shift; torch's >> on int64 is arithmetic."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mix(x: Tensor) -> Tensor:
    """Applies SplitMix64's finaliser (Steele, Lea and Flood 2014): every input bit affects every output bit."""
    return _opaque_mix(x) if torch.compiler.is_compiling() else _plain_mix(x)


def _plain_mix(x: Tensor) -> Tensor:
    x = (x ^ _shift_right(x, 30)) * _MIX_1
    x = (x ^ _shift_right(x, 27)) * _MIX_2
    return x ^ _shift_right(x, 31)


@torch.library.custom_op("smalti::mix", mutates_args=())
def _opaque_mix(x: Tensor) -> Tensor:
    """Hides the mix from torch.compile, whose work doubles with every operation that reads its operand twice.

    A mix has three such operations, and a draw nests several mixes.
    """
    return _plain_mix(x)


@_opaque_mix.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


def derive(seeds: Int64[Tensor, "*shape"], *streams: int | Tensor) -> Int64[Tensor, "*out"]:
    """Derives new seeds, one hash per stream: a step, a `Stream`, or a tensor of row numbers."""
    for stream in streams:
        # an integer is hashed in Python: on a GPU each operation is a kernel, whose launch takes longer than its work
        offset = _mix_integer(stream + _GOLDEN) if isinstance(stream, int) else _mix(stream.to(seeds) + _GOLDEN)
        seeds = _mix((seeds ^ _GOLDEN) + offset)
    return seeds


def _mix_integer(x: int) -> int:
    """Returns what `_mix` computes, of a Python integer modulo 2**64, as an int64."""
    x &= _ALL_BITS
    x = (x ^ (x >> 30)) * (_MIX_1 & _ALL_BITS) & _ALL_BITS
    x = (x ^ (x >> 27)) * (_MIX_2 & _ALL_BITS) & _ALL_BITS
    x ^= x >> 31
    return x - 2**64 if x >= 2**63 else x


def require_seed(seed: int) -> None:
    """Checks that a seed is a whole number that fits a signed 64-bit integer.

    Raises:
        UserError: if it is not.
    """
    if not -(2**63) <= whole_number("the seed", seed) < 2**63:
        raise UserError(f"--seed must be from -2**63 to 2**63 - 1, not {seed}; give another")


def row_seeds(seed: int, rows: Int64[Tensor, " b"]) -> Int64[Tensor, " b"]:
    """Returns one seed per row, from the run's seed and the row's number in the data set (not in the batch)."""
    require_seed(seed)
    return derive(torch.full_like(rows, seed), rows)


def uniform(seeds: Int64[Tensor, " b"], *shape: int) -> Float[Tensor, "b *shape"]:
    """Draws uniform float32 on [0, 1), `shape` per seed: multiples of 2**-24, equal on all devices."""
    count = math.prod(shape)
    numbers = _opaque_uniform(seeds, count) if torch.compiler.is_compiling() else _plain_uniform(seeds, count)
    return numbers.view(len(seeds), *shape)


def _plain_uniform(seeds: Tensor, count: int) -> Tensor:
    counters, starts = (torch.arange(count, device=seeds.device) + 1) * _GOLDEN, _mix(seeds)[:, None]
    if seeds.device.type != "cpu":
        return _shift_right(_mix(starts + counters), 40).to(torch.float32) * 2.0**-24
    numbers, rows = torch.empty(len(starts), count), max(_CACHED // max(count, 1), 1)
    for row_block, row_starts in zip(numbers.split(rows), starts.split(rows), strict=True):
        for block, column_counters in zip(row_block.split(_CACHED, 1), counters.split(_CACHED), strict=True):
            block.copy_(_shift_right(_mix(row_starts + column_counters), 40))
    return numbers.mul_(2.0**-24)


@torch.library.custom_op("smalti::uniform", mutates_args=())
def _opaque_uniform(seeds: Tensor, count: int) -> Tensor:
    """Hides the draw from torch.compile, which miscompiles int64 `(arange + 1) * number + seeds` on some CPUs.

    On CPUs with AVX2 but not AVX-512 the compiled code writes beyond its output (torch 2.13).
    """
    return _plain_uniform(seeds, count)


@_opaque_uniform.register_fake
def _(seeds: Tensor, count: int) -> Tensor:
    return seeds.new_empty(len(seeds), count, dtype=torch.float32)


def gumbel(seeds: Int64[Tensor, " b"], *shape: int) -> Float[Tensor, "b *shape"]:
    """Draws standard Gumbel noise. The argmax of log-weights plus this noise is a sample from the weights."""
    return uniform(seeds, *shape).clamp_(min=2.0**-25).log_().neg_().log_().neg_()


def normal(seeds: Int64[Tensor, " b"], *shape: int) -> Float[Tensor, "b *shape"]:
    """Draws standard normal numbers through the inverse distribution function; none lie beyond +-5.5."""
    # the argument is exact in float32 and never -1 or 1
    return torch.erfinv(2 * uniform(seeds, *shape) - 1 + 2.0**-24) * math.sqrt(2)


def choose(count: int, most: int, seed: int, *streams: int) -> list[int]:
    """Draws up to `most` of `count` rows without replacement; returns them sorted."""
    return sorted(torch.randperm(count, generator=generator_for(seed, *streams))[:most].tolist())


def generator_for(seed: int, *streams: int) -> torch.Generator:
    """Returns a CPU generator seeded by (seed, streams), for draws that need a generator, such as permutations."""
    require_seed(seed)
    return torch.Generator().manual_seed(int(derive(torch.tensor(seed), *streams)) & (2**63 - 1))
