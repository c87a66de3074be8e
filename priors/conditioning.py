"""What a prior is told beside the codes: the class of the image, and the levels above its own. How it uses them is the
prior's own.

Legend: b batch, y x grid of an upper level, h w grid of the prior's level, s how many times finer it is, d width.
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int64
from torch import Tensor, nn

from smalti.core.errors import UserError
from smalti.priors.head import TreeEmbedding


class ClassEmbedding(nn.Module):
    """A vector for each class of images, and one for a class not told. All begin at zero: a class says nothing yet."""

    def __init__(self, classes: int, width: int) -> None:
        super().__init__()
        self.vectors = nn.Embedding(classes + 1, width)
        nn.init.zeros_(self.vectors.weight)

    def forward(self, labels: Int64[Tensor, " b"] | None, rows: int) -> Float[Tensor, "b d"]:
        """The vectors of `rows` labels; -1, or None for all, is the class not told."""
        if labels is None:
            return self.vectors.weight[:1].expand(rows, -1)
        return self.vectors(labels + 1)


class UpperLevels(nn.Module):
    """All levels above, as one vector for each position of the prior's own grid.

    Args:
        radices: of the codes of each upper level, coarsest first.
        factors: positions of the prior's level to one of the upper level's, on either axis.
        width: numbers at each position.

    Raises:
        UserError: if the two do not go together, or a factor is below 1.
    """

    def __init__(self, radices: tuple[tuple[int, ...], ...], factors: tuple[int, ...], width: int) -> None:
        super().__init__()
        if len(radices) != len(factors) or min(factors, default=1) < 1:
            raise UserError(f"each level above needs radices and a factor of at least 1, got {radices} and {factors}")
        self.levels = nn.ModuleList(
            UpperLevel(of_level, factor, width) for of_level, factor in zip(radices, factors, strict=True)
        )

    def forward(self, upper: tuple[Int64[Tensor, "b _y _x"], ...], h: int, w: int) -> Float[Tensor, "b h w d"]:
        """The sum over the levels of what each says.

        Raises:
            UserError: if the levels are not as many as the prior was made for, or their grids do not fit.
        """
        if len(upper) != len(self.levels):
            raise UserError(f"this prior draws below {len(self.levels)} level(s), but {len(upper)} were given")
        said = [level(codes) for level, codes in zip(self.levels, upper, strict=True)]
        if wrong := [tuple(grid.shape[1:3]) for grid in said if tuple(grid.shape[1:3]) != (h, w)]:
            raise UserError(f"the levels above belong to a grid of {wrong[0][0]}x{wrong[0][1]} codes, not {h}x{w}")
        return torch.stack(said).sum(0)


class UpperLevel(nn.Module):
    """One level above: its codes embedded, each told of its neighbours, and spread over the positions below it."""

    def __init__(self, radices: tuple[int, ...], factor: int, width: int) -> None:
        super().__init__()
        self.factor = factor
        self.codes = TreeEmbedding(radices, width)
        self.around = nn.Conv2d(width, width, 3, padding=1)
        self.mixed = nn.Conv2d(width, width, 1)
        # other weights for each place below a code: it says more than one thing of its patch
        self.spread = nn.Linear(width, factor * factor * width)

    def forward(self, codes: Int64[Tensor, "b y x"]) -> Float[Tensor, "b h w d"]:
        """What the level says to each position of a grid `factor` times finer."""
        _, y, _ = codes.shape
        x = rearrange(self.codes.embed(codes), "b (y x) d -> b d y x", y=y)
        x = x + self.mixed(F.gelu(self.around(x)))
        spread = self.spread(rearrange(x, "b d y x -> b y x d"))
        return rearrange(spread, "b y x (s1 s2 d) -> b (y s1) (x s2) d", s1=self.factor, s2=self.factor)
