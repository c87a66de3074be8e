"""In which order the positions of a grid have their turn. Which codes they then take is the samplers'.

Legend: b batch, h w grid, n positions.
"""

from functools import cache
from typing import Literal, TypeAlias

import torch
from jaxtyping import Float, Int64
from torch import Tensor

Order: TypeAlias = Literal["halton", "confidence", "random"]


def ranks(keys: Float[Tensor, "b n"]) -> Int64[Tensor, "b n"]:
    """The place of each key among its row's, from the smallest; of equals the first comes first."""
    return keys.argsort(dim=1, stable=True).argsort(dim=1)


@torch.compiler.assume_constant_result
def halton_ranks(h: int, w: int) -> Int64[Tensor, " n"]:
    """The place of each position, in raster order, in a Halton sequence of bases 2 and 3 over the grid, in which each
    prefix is spread evenly."""
    return _halton_ranks(h, w)


@cache
def _halton_ranks(h: int, w: int) -> Int64[Tensor, " n"]:
    order: dict[int, None] = {}  # kept in the order of insertion
    number = 0
    while len(order) < h * w:
        number += 1
        order[int(_radical_inverse(number, 2) * h) * w + int(_radical_inverse(number, 3) * w)] = None
    places = torch.empty(h * w, dtype=torch.int64)
    places[torch.tensor(list(order))] = torch.arange(h * w)
    return places


def _radical_inverse(number: int, base: int) -> float:
    """The digits of a number mirrored at the point: 6 = 110 in base 2 becomes 0.011."""
    result, share = 0.0, 1.0
    while number:
        share /= base
        number, digit = divmod(number, base)
        result += digit * share
    return result
