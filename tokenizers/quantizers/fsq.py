"""Finite scalar quantization: codes without a codebook, by rounding a few bounded dimensions.

Legend: b batch, d code width, h w grid, n dimensions, which are the digits of a code.
"""

from collections.abc import Sequence

import torch
from einops import rearrange
from jaxtyping import Float, Int64
from torch import Tensor, nn

from smalti.core.codes import Digits, Level, hidden_digits
from smalti.tokenizers.quantizers.linked import QuantizerOutput

LEVELS: dict[int, tuple[int, ...]] = {
    2**8: (8, 6, 5),
    2**9: (8, 8, 8),
    2**10: (8, 5, 5, 5),
    2**12: (7, 5, 5, 5, 5),
    2**14: (8, 8, 8, 6, 5),
    2**16: (8, 8, 8, 5, 5, 5),
}
"""Levels for about as many codes: the paper's recommendations (Tab. 1), and one for 2**9 by its rule of at least five
levels a dimension."""
MARGIN = 1e-3
"""Share by which the bounds exceed the outermost levels, so that these are reached and `atanh` is finite.

With more than 1000 levels it is more than half a level: values that round to a level beyond become the outermost."""


class FSQ(nn.Module):
    """Finite scalar quantization (FSQ, arXiv 2309.15505, Sec. 3 and App. A.1): each digit is a rounded dimension.

    A linear map takes z_e to n dimensions. Dimension i is bounded by tanh to an interval of `radices[i]` integers and
    rounded, with the straight-through estimator; another linear map takes the values, scaled to [-1, 1], to z_q. Every
    code is reachable, so there is neither a codebook to learn nor a loss. The first dimension is the most significant
    digit. All of it is float32 under autocast.

    Deviations from the published code: for an even number of levels the shift of tanh is `atanh`, not `tan`, so that 0
    stays 0; the bounds lie slightly outside of the outermost levels, not inside, so that two levels are possible.

    Args:
        code_width: length of z_e and z_q.
        radices: levels of each dimension, at least 2.

    Raises:
        UserError: if a dimension has fewer than 2 levels, or there are more than 2**31 - 1 codes.
    """

    last: Tensor
    middle: Tensor
    offset: Tensor
    span: Tensor

    def __init__(self, *, code_width: int, radices: Sequence[int]) -> None:
        super().__init__()
        self.level = Level(1, 1, tuple(radices))
        self.down = nn.Conv2d(code_width, len(radices), 1)
        self.up = nn.Conv2d(len(radices), code_width, 1)
        levels = rearrange(torch.tensor(self.radices), "n -> n 1 1")
        self.register_buffer("last", levels - 1, persistent=False)  # the largest digit
        self.register_buffer("middle", levels // 2, persistent=False)  # the digit of value 0
        self.register_buffer("offset", (1 - levels % 2) / 2, persistent=False)  # of an even number of levels
        self.register_buffer("span", (levels - 1) * (1 + MARGIN) / 2, persistent=False)

    @property
    def radices(self) -> tuple[int, ...]:
        """Radices of a code: the levels of each dimension."""
        return self.level.radices

    def forward(self, z_e: Float[Tensor, "b d h w"]) -> QuantizerOutput:
        """Quantizes a grid of any size. There are no losses."""
        with torch.autocast(z_e.device.type, enabled=False):
            bounded = self._bounded(z_e)
            nearest = bounded.round().clamp(-self.middle, self.last - self.middle)
            rounded = bounded + (nearest - bounded).detach()  # straight-through estimator
            z_q = self.up(rounded / self.middle)
        return QuantizerOutput(z_q=z_q, codes=self._codes(bounded), losses={})

    def encode(self, z_e: Float[Tensor, "b d h w"]) -> Int64[Tensor, "b h w"]:
        """Returns the codes alone."""
        with torch.autocast(z_e.device.type, enabled=False):
            return self._codes(self._bounded(z_e))

    def lookup(self, codes: Int64[Tensor, "b h w"], digits: Digits | None = None) -> Float[Tensor, "b d h w"]:
        """Returns z_q of codes, or of some of their dimensions with the others at 0, the centre.

        Raises:
            UserError: if there are no such codes, or they do not have these digits.
        """
        self.level.require(codes, "FSQ")
        values = (rearrange(self.level.split(codes), "b h w n -> b n h w") - self.middle) / self.middle
        values[:, hidden_digits(digits, len(self.radices))] = 0
        with torch.autocast(codes.device.type, enabled=False):
            return self.up(values)

    def init_from_data(self, z_e: Float[Tensor, "b d h w"]) -> None:
        """Does nothing: there is no codebook."""

    def _bounded(self, z_e: Tensor) -> Tensor:
        """Returns the dimensions, each within bounds slightly outside of its outermost levels; 0 stays 0."""
        shift = torch.atanh(self.offset / self.span)
        return torch.tanh(self.down(z_e.float()) + shift) * self.span - self.offset

    def _codes(self, bounded: Tensor) -> Tensor:
        digits = bounded.detach().round().long() + self.middle
        digits = digits.clamp(min=0).minimum(self.last)  # also NaN, which is any integer, is a code then
        return self.level.join(rearrange(digits, "b n h w -> b h w n"))
