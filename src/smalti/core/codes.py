"""What a code is: mixed-radix integers on grids. The one idea all three wings share, and the only place they meet.

Legend: b batch, h w grid, n digits.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from smalti.core.errors import UserError

Codes: TypeAlias = tuple[Int64[Tensor, "b _h _w"] | Float[Tensor, "b _c _h _w"], ...]
"""One tensor per level, coarsest first, even for one level: int64 `(b, h, w)`, or float `(b, c, h, w)` where a level is
continuous."""

LARGEST_CODEBOOK_SIZE = 2**31 - 1


@dataclass(frozen=True)
class Level:
    """One grid of codes.

    A code is an integer below `prod(radices)`, written in mixed radix with the most significant digit first. A flat
    codebook of 512 is `radices=(512,)`; three linked layers of 8 (HR-VQVAE) are `(8, 8, 8)`: the digits are the path
    from the first layer's codeword to the leaf, so the codebook that layer i+1 searches is the prefix
    `code // 8**(3 - i)`.

    A continuous level (selfVAE's u) has no radices and `channels` real numbers at each position.

    Raises:
        UserError: for an empty grid, a radix below 2, more than 2**31 - 1 codes, or a level that is both discrete and
            continuous.
    """

    height: int
    width: int
    radices: tuple[int, ...] = ()
    channels: int = 0

    def __post_init__(self) -> None:
        if self.height < 1 or self.width < 1:
            raise UserError(
                f"a level of {self.height}x{self.width} positions is empty; give a height and width of at least 1"
            )
        if bool(self.radices) == bool(self.channels):
            raise UserError(
                f"a level has either radices or channels, not radices={self.radices} with channels={self.channels}"
            )
        if any(radix < 2 for radix in self.radices):
            raise UserError(f"every radix must be at least 2, got {self.radices}")
        if self.codebook_size > LARGEST_CODEBOOK_SIZE:
            raise UserError(
                f"radices {self.radices} make {self.codebook_size} codes, more than the {LARGEST_CODEBOOK_SIZE} that a "
                "latent set holds; take fewer or smaller radices"
            )

    @property
    def codebook_size(self) -> int:
        """How many codes there are: the number of leaves."""
        return math.prod(self.radices)

    @property
    def positions(self) -> int:
        """How many codes one image has at this level."""
        return self.height * self.width

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of one image's codes at this level, without the batch."""
        return (self.channels, self.height, self.width) if self.channels else (self.height, self.width)

    @property
    def dtype(self) -> np.dtype:
        """The smallest type that stores this level: unsigned integers, or float32 where it is continuous."""
        if self.channels:
            return np.dtype(np.float32)
        return np.dtype(next(t for t in (np.uint8, np.uint16, np.uint32) if self.codebook_size - 1 <= np.iinfo(t).max))

    def prefix(self, codes: Int64[Tensor, "*shape"], digits: int) -> Int64[Tensor, "*shape"]:
        """The first `digits` digits of every code, read as one number: the node of the tree that they lead to."""
        return codes // math.prod(self.radices[digits:])

    def digit(self, codes: Int64[Tensor, "*shape"], index: int) -> Int64[Tensor, "*shape"]:
        """Digit `index` of every code, 0 being the most significant (the first layer's)."""
        return self.prefix(codes, index + 1) % self.radices[index]

    def split(self, codes: Int64[Tensor, "*shape"]) -> Int64[Tensor, "*shape n"]:
        """All digits of every code, most significant first."""
        return torch.stack([self.digit(codes, index) for index in range(len(self.radices))], dim=-1)

    def join(self, digits: Int64[Tensor, "*shape n"]) -> Int64[Tensor, "*shape"]:
        """The inverse of `split`."""
        codes = torch.zeros_like(digits[..., 0])
        for index, radix in enumerate(self.radices):
            codes = codes * radix + digits[..., index]
        return codes


@dataclass(frozen=True)
class Layout:
    """The levels of one image's codes, coarsest first: one for most tokenizers, several resolutions for VQ-VAE-2."""

    levels: tuple[Level, ...]

    def __post_init__(self) -> None:
        if not self.levels:
            raise UserError("a layout needs at least one level")

    def resized(self, grids: Sequence[tuple[int, int]]) -> "Layout":
        """The same codebooks on grids of other (height, width): a fully convolutional tokenizer's, for another size."""
        return Layout(
            tuple(replace(level, height=h, width=w) for level, (h, w) in zip(self.levels, grids, strict=True))
        )

    def check(self, codes: Codes) -> None:
        """Refuses codes that do not belong to this layout.

        Raises:
            UserError: naming the level, for a wrong number of levels, a wrong grid, or a code outside
                [0, codebook_size).
        """
        if len(codes) != len(self.levels):
            raise UserError(
                f"the layout has {len(self.levels)} level(s) but {len(codes)} tensor(s) of codes were given"
            )
        for index, (level, grid) in enumerate(zip(self.levels, codes, strict=True)):
            if tuple(grid.shape[1:]) != level.shape:
                raise UserError(
                    f"level {index} has codes of shape {level.shape} an image but {tuple(grid.shape[1:])} were given"
                )
            if level.radices and grid.numel() and (grid.min() < 0 or grid.max() >= level.codebook_size):
                raise UserError(
                    f"level {index} holds codes from 0 to {level.codebook_size - 1} but {int(grid.min())} to "
                    f"{int(grid.max())} were given"
                )

    def to_json(self) -> list[dict[str, Any]]:
        """Plain lists and numbers, for a latent set's attributes and a checkpoint's config."""
        return [
            {"height": level.height, "width": level.width, "radices": list(level.radices), "channels": level.channels}
            for level in self.levels
        ]

    @classmethod
    def from_json(cls, levels: Sequence[dict[str, Any]]) -> "Layout":
        """The inverse of `to_json`."""
        return cls(tuple(Level(**{**level, "radices": tuple(level["radices"])}) for level in levels))

    def __str__(self) -> str:
        def describe(level: Level) -> str:
            codebook = f"{level.channels} floats" if level.channels else "·".join(map(str, level.radices))
            return f"{level.height}×{level.width} of {codebook}"

        return " + ".join(describe(level) for level in self.levels)
