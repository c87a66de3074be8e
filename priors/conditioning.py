"""Conditioning of priors: embeddings of the image class, of a vector, and of the coarser levels' codes.

How a network uses these vectors is its own matter: the hourglass and the transformer add them to their input,
the PixelCNN adds them inside every gate.

Legend: b batch, v numbers in a condition's vector, y x grid of a coarser level, h w grid of the prior's level, s factor
between them, d width.
"""

import math
from typing import TypeAlias

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int64
from torch import Tensor, nn

from smalti.core.errors import UserError
from smalti.priors.head import TreeEmbedding

Condition: TypeAlias = Int64[Tensor, " b"] | Float[Tensor, "b _v"]
"""The class of each row, -1 for none; or the vector of each row, NaN for none."""


def no_condition(like: Condition) -> Condition:
    """Returns the condition of rows without class or vector, of the same kind as `like`."""
    return torch.full_like(like, math.nan if like.is_floating_point() else -1)


def require_fitting(condition: Condition, classes: int, condition_width: int) -> None:
    """Checks classes or vectors against those that a prior was trained with.

    Raises:
        UserError: for a label that the prior has no class for, or vectors of another width.
    """
    if condition.is_floating_point():
        if condition.shape[1] != condition_width:
            trained = f"vectors of {condition_width} numbers" if condition_width else "no vectors"
            advice = "give vectors of that width" if condition_width else "give classes, or no condition"
            raise UserError(
                f"this prior is conditioned on {trained}, but vectors of {condition.shape[1]} were given; {advice}"
            )
    elif condition.numel() and not -1 <= condition.min() <= condition.max() < classes:
        raise UserError(
            f"labels must be from -1 (any class) to {classes - 1}, got {int(condition.min())} to {int(condition.max())}"
        )


class ClassEmbedding(nn.Module):
    """Embeds class labels, with one more vector for "no class" (label -1).

    All vectors are initialized to zero, so that classes make no difference before training.
    """

    def __init__(self, classes: int, width: int) -> None:
        super().__init__()
        self.vectors = nn.Embedding(classes + 1, width)
        nn.init.zeros_(self.vectors.weight)

    def forward(self, labels: Int64[Tensor, " b"] | None, rows: int) -> Float[Tensor, "b d"]:
        """Returns one vector for each of `rows` labels; labels of None mean "no class" for all rows."""
        if labels is None:
            return self.vectors.weight[:1].expand(rows, -1)
        return self.vectors(labels + 1)


class VectorEmbedding(nn.Module):
    """Maps vectors of any scale to the network's width; rows without a vector get a learned one.

    Each number is standardized by its mean and deviation in the training set, which `init_from_data` sets. Then follow
    two linear layers with a GELU between them. The output starts at zero, so that vectors make no difference before
    training.

    Args:
        condition_width: numbers in a vector.
        width: width of the result.
    """

    mean: Tensor
    deviation: Tensor

    def __init__(self, condition_width: int, width: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(condition_width))
        self.register_buffer("deviation", torch.ones(condition_width))
        self.hidden = nn.Linear(condition_width, width)
        self.out = nn.Linear(width, width, bias=False)
        self.none = nn.Parameter(torch.zeros(width))
        nn.init.zeros_(self.out.weight)

    @torch.no_grad()
    def init_from_data(self, vectors: Float[Tensor, "n v"]) -> None:
        """Sets mean and deviation to those of training vectors; a number that never varies keeps a deviation of 1."""
        deviation, mean = torch.std_mean(vectors.double(), 0, correction=0)
        self.mean.copy_(mean)
        self.deviation.copy_(torch.where(deviation > 0, deviation, 1.0))

    def forward(self, vectors: Float[Tensor, "b v"] | None, rows: int) -> Float[Tensor, "b d"]:
        """Returns one embedding for each of `rows` vectors; None, or NaN in a row, is no vector."""
        if vectors is None:
            return self.none.expand(rows, -1)
        standardized = (vectors.nan_to_num() - self.mean) / self.deviation
        embedded = self.out(F.gelu(self.hidden(standardized)))
        return torch.where(vectors.isnan().any(1, keepdim=True), self.none, embedded)


class UpperLevels(nn.Module):
    """Embeds all coarser levels as one vector for each position of the prior's own grid.

    Args:
        radices: radices of the codes of each coarser level, coarsest first.
        factors: for each coarser level, positions of the prior's grid per position of that level's grid,
            along one axis.
        width: width of the vectors.

    Raises:
        UserError: if the two differ in length, or a factor is below 1.
    """

    def __init__(self, radices: tuple[tuple[int, ...], ...], factors: tuple[int, ...], width: int) -> None:
        super().__init__()
        if len(radices) != len(factors) or min(factors, default=1) < 1:
            raise UserError(f"each coarser level needs radices and a factor of at least 1, got {radices} and {factors}")
        self.levels = nn.ModuleList(
            UpperLevel(level_radices, factor, width) for level_radices, factor in zip(radices, factors, strict=True)
        )

    def forward(self, upper: tuple[Int64[Tensor, "b _y _x"], ...], h: int, w: int) -> Float[Tensor, "b h w d"]:
        """Returns the sum of the levels' vectors at each position.

        Raises:
            UserError: if the number of levels is not that of the constructor, or a grid does not fit.
        """
        if len(upper) != len(self.levels):
            raise UserError(
                f"this prior is conditioned on {len(self.levels)} coarser level(s), but {len(upper)} were given"
            )
        vectors = [level(codes) for level, codes in zip(self.levels, upper, strict=True)]
        for grid in vectors:
            if tuple(grid.shape[1:3]) != (h, w):
                raise UserError(f"the coarser levels fit a grid of {grid.shape[1]}x{grid.shape[2]} codes, not {h}x{w}")
        return torch.stack(vectors).sum(0)


class UpperLevel(nn.Module):
    """Embeds one coarser level: codes are embedded, mixed with their neighbours and upsampled by `factor`."""

    def __init__(self, radices: tuple[int, ...], factor: int, width: int) -> None:
        super().__init__()
        self.factor = factor
        self.codes = TreeEmbedding(radices, width)
        self.around = nn.Conv2d(width, width, 3, padding=1)
        self.mixed = nn.Conv2d(width, width, 1)
        # separate weights for each place in a patch: a coarse code describes more than a constant patch
        self.spread = nn.Linear(width, factor * factor * width)

    def forward(self, codes: Int64[Tensor, "b y x"]) -> Float[Tensor, "b h w d"]:
        """Returns one vector for each position of the grid that is `factor` times finer."""
        _, y, _ = codes.shape
        x = rearrange(self.codes.embed(codes), "b (y x) d -> b d y x", y=y)
        x = x + self.mixed(F.gelu(self.around(x)))
        upsampled = self.spread(rearrange(x, "b d y x -> b y x d"))
        return rearrange(upsampled, "b y x (s1 s2 d) -> b (y s1) (x s2) d", s1=self.factor, s2=self.factor)
