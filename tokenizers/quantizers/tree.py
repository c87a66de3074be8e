"""Settings of linked codebooks layer by layer: branchings, loss weights, and the ranges in which codewords start.

The quantizer that uses them is in `linked.py`.

Legend: m branching, n layers.
"""

import math
from collections.abc import Sequence
from typing import Literal, TypeAlias

from smalti.core.codes import LARGEST_CODEBOOK_SIZE
from smalti.core.errors import UserError

Branching: TypeAlias = int | tuple[int, ...]
"""Codewords per codebook: one number for every layer, or a number for each."""
LayerWeights: TypeAlias = float | tuple[float, ...]
"""Weights of a loss term: one for every layer, or one for each."""
RandomStart: TypeAlias = Literal["uniform", "unit-variance", "scaled"]


def depth_of(branching: int | Sequence[int], depth: int, *, default: int) -> int:
    """Returns the number of layers: that of the branchings if there is one for each layer, else `depth`.

    Raises:
        UserError: if `depth` is neither the number of branchings nor its default.
    """
    if isinstance(branching, int):
        return depth
    if depth not in (default, len(branching)):
        values, layers = " ".join(map(str, branching)), len(branching)
        raise UserError(
            f"branching {values} has one value for each of {layers} layers, but depth is {depth}; give {depth} values "
            f"of branching, or depth {layers}"
        )
    return len(branching)


def radices_of(branching: int | Sequence[int], depth: int) -> tuple[int, ...]:
    """Returns the branching of every layer, which are the radices of a code.

    Raises:
        UserError: if there is no layer, a branching is below 2, or there are more than 2**31 - 1 leaves.
    """
    values = (branching,) if isinstance(branching, int) else tuple(branching)
    shown = " ".join(map(str, values[:8]))
    if depth < 1 or min(values, default=0) < 2:
        raise UserError(f"depth must be at least 1 and branching at least 2, not {depth} and {shown or 'no value'}")
    layers = depth if isinstance(branching, int) else 1
    # the number of digits first, since the power might never end
    if len(values) * layers > 31 or math.prod(values) ** layers > LARGEST_CODEBOOK_SIZE:
        raise UserError(
            f"a branching of {shown} in {len(values) * layers} layers makes more than {LARGEST_CODEBOOK_SIZE} leaves; "
            "take a smaller depth or branching"
        )
    return values * layers


def weights_of(weights: float | Sequence[float], depth: int) -> tuple[float, ...]:
    """Returns the commitment weight beta of every layer.

    Raises:
        UserError: if there are neither one nor `depth` weights, or one is negative.
    """
    values = (weights,) * depth if isinstance(weights, int | float) else tuple(weights)
    if len(values) != depth:
        layers = f"{depth} layers; give one value, or {depth}" if depth > 1 else "1 layer; give one value"
        raise UserError(f"commitment_weight has {len(values)} values, but codes have {layers}")
    if negative := [value for value in values if not value >= 0]:
        raise UserError(f"commitment_weight must not be negative, got {negative[0]}; 0.25 is usual")
    return values


def start_bound(start: RandomStart, *, layer: int, branching: int, code_width: int) -> float:
    """Returns the largest absolute value of the uniform random numbers that codewords start as.

    `uniform` is 0.5**layer: each layer's codewords are half as long as those of the layer before, as residuals are.
    `unit-variance` is sqrt(3 / code_width): a codeword has an expected squared length of 1. That is the start in the
    VQ-VAE authors' code. `scaled` is 1 / branching, as in widespread reimplementations of it.

    Args:
        start: the kind of range.
        layer: number of the layer, from 0.
        branching: codewords per codebook of the layer, K.
        code_width: length of a codeword, D.
    """
    match start:
        case "uniform":
            return 0.5**layer
        case "unit-variance":
            return (3 / code_width) ** 0.5
        case "scaled":
            return 1 / branching
