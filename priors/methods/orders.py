"""Orders of a grid's positions: which ones a sampler updates or reveals first.

Legend: b batch, h w grid, n positions (n = h w).
"""

from functools import cache
from typing import Literal, TypeAlias

import torch
from jaxtyping import Float, Int64
from torch import Tensor

Order: TypeAlias = Literal["halton", "confidence", "random"]


def ranks(keys: Float[Tensor, "b n"]) -> Int64[Tensor, "b n"]:
    """Returns the rank of each key in its row, 0 for the smallest; among equal keys the first has the lowest rank."""
    return keys.argsort(dim=1, stable=True).argsort(dim=1)


def halton_ranks(h: int, w: int) -> Int64[Tensor, " n"]:
    """Returns the rank of each position, in raster order, in a Halton sequence of bases 2 and 3 over the grid.

    Every prefix of the sequence is spread evenly over the grid.
    """
    return _halton_ranks(h, w)


# What the decorator torch.compiler.assume_constant_result does, which imports the compiler and takes over a second.
halton_ranks._dynamo_marked_constant = True  # pyright: ignore[reportFunctionMemberAccess]


@cache
def _halton_ranks(h: int, w: int) -> Int64[Tensor, " n"]:
    order: dict[int, None] = {}  # keeps the order of insertion
    number = 0
    while len(order) < h * w:
        number += 1
        order[int(_radical_inverse(number, 2) * h) * w + int(_radical_inverse(number, 3) * w)] = None
    result = torch.empty(h * w, dtype=torch.int64)
    result[torch.tensor(list(order))] = torch.arange(h * w)
    return result


def _radical_inverse(number: int, base: int) -> float:
    """Mirrors the digits of a number at the point: 6 = 110 in base 2 becomes 0.011."""
    result, share = 0.0, 1.0
    while number:
        share /= base
        number, digit = divmod(number, base)
        result += digit * share
    return result
