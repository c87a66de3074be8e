"""Codes: mixed-radix integers on grids. Tokenizers, latent sets and priors all share this definition.

Legend: b batch, h w grid, n digits.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from smalti.core.errors import UserError, whole_number

Codes: TypeAlias = tuple[Int64[Tensor, "b _h _w"] | Float[Tensor, "b _c _h _w"], ...]
"""A tuple of one tensor per level, coarsest first, also for a single level: int64 `(b, h, w)`, or float `(b, c, h, w)`
for a continuous level."""

LARGEST_CODEBOOK_SIZE = 2**31 - 1
MOST_COUNTED_CODES = 1 << 24
"""Largest codebook whose use is counted, as each count takes 8 bytes."""

Digits: TypeAlias = int | slice
"""The digits of codes that are decoded: the first i, or a slice of them, counted from 0."""

Split: TypeAlias = Literal["train", "held_out", "all"]
"""The rows of a set of images or codes that are read: those to train on, those held out from it, or all."""


def chosen_digits(digits: Digits | None, count: int) -> range:
    """Returns the indices of the chosen digits of codes that have `count` digits; None chooses all.

    Raises:
        UserError: if there are no such digits, none is chosen, or their number is not whole.
    """
    first = count if digits is None else digits
    chosen = first if isinstance(first, slice) else slice(max(whole_number("digits", first), 0))
    indices = range(count)[chosen]
    if not indices or (chosen.stop or 0) > count:
        has = f"these codes have {count} digit{'s' if count > 1 else ''}"
        raise UserError(f"{has}; give a number from 1 to {count}, or a slice within them")
    return indices


def hidden_digits(digits: Digits | None, count: int) -> list[int]:
    """Returns the indices of the digits that are not decoded; arguments and errors are those of `chosen_digits`."""
    chosen = chosen_digits(digits, count)
    return [index for index in range(count) if index not in chosen]


@dataclass(frozen=True)
class Level:
    """One grid of codes.

    A code is an integer below `prod(radices)` in mixed radix, with the most significant digit first. A flat codebook of
    512 is `radices=(512,)`. Three linked layers of 8 (HR-VQVAE) are `(8, 8, 8)`: the digits are the path from the first
    layer's codeword to the leaf, and layer i+1 searches the codebook with the number `code // 8**(3 - i)`.

    A continuous level (selfVAE's u) has no radices, but `channels` real-valued latents at each position.

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
                "latent set can hold; use fewer or smaller radices"
            )

    @property
    def codebook_size(self) -> int:
        """Number of different codes, which are the leaves of the tree of digits."""
        return math.prod(self.radices)

    @property
    def positions(self) -> int:
        """Number of codes that one image has at this level."""
        return self.height * self.width

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one image's codes at this level, without the batch."""
        return (self.channels, self.height, self.width) if self.channels else (self.height, self.width)

    @property
    def dtype(self) -> np.dtype:
        """Smallest unsigned integer type that holds every code; float32 for a continuous level."""
        if self.channels:
            return np.dtype(np.float32)
        return np.dtype(next(t for t in (np.uint8, np.uint16, np.uint32) if self.codebook_size - 1 <= np.iinfo(t).max))

    def require(self, codes: Tensor, name: str) -> None:
        """Refuses codes that this level does not have. On an accelerator it waits for the codes.

        Raises:
            UserError: if a code is outside [0, codebook_size); begins with `name`.
        """
        if codes.numel() and (codes.min() < 0 or codes.max() >= self.codebook_size):
            wrong = f"not from {int(codes.min())} to {int(codes.max())}"
            raise UserError(f"{name} has codes from 0 to {self.codebook_size - 1}, {wrong}")

    def prefix(self, codes: Int64[Tensor, "*shape"], digits: int) -> Int64[Tensor, "*shape"]:
        """Returns the number that the first `digits` digits of every code form: an inner node of the tree."""
        return codes // math.prod(self.radices[digits:])

    def prefix_counts(self, counts: Int64[Tensor, " codes"], digits: int) -> Int64[Tensor, " prefixes"]:
        """Returns how often each number that the first `digits` digits form occurs, from the counts of all codes."""
        return counts.view(math.prod(self.radices[:digits]), -1).sum(dim=1)

    def digit(self, codes: Int64[Tensor, "*shape"], index: int) -> Int64[Tensor, "*shape"]:
        """Returns digit `index` of every code; digit 0 is the most significant, the first layer's."""
        return self.prefix(codes, index + 1) % self.radices[index]

    def split(self, codes: Int64[Tensor, "*shape"]) -> Int64[Tensor, "*shape n"]:
        """Returns all digits of every code, most significant first."""
        return torch.stack([self.digit(codes, index) for index in range(len(self.radices))], dim=-1)

    def join(self, digits: Int64[Tensor, "*shape n"]) -> Int64[Tensor, "*shape"]:
        """Joins digits into codes: the inverse of `split`."""
        codes = torch.zeros_like(digits[..., 0])
        for index, radix in enumerate(self.radices):
            codes = codes * radix + digits[..., index]
        return codes


@dataclass(frozen=True)
class Layout:
    """The levels of one image's codes, coarsest first. Most tokenizers have one, VQ-VAE-2 has several resolutions."""

    levels: tuple[Level, ...]

    def __post_init__(self) -> None:
        if not self.levels:
            raise UserError("a layout needs at least one level")

    def resized(self, grids: Sequence[tuple[int, int]]) -> "Layout":
        """Returns the layout with the same codebooks and other grid sizes (height, width), for another image size."""
        return Layout(
            tuple(replace(level, height=h, width=w) for level, (h, w) in zip(self.levels, grids, strict=True))
        )

    def level(self, number: int, owner: object) -> Level:
        """Returns the level of a number, counted from 0, the coarsest.

        Raises:
            UserError: if there is none; begins with the `owner` of the layout, such as a file.
        """
        if not 0 <= whole_number("the level", number) < len(self.levels):
            raise UserError(f"{owner} has levels 0 to {len(self.levels) - 1}, not {number}")
        return self.levels[number]

    def check(self, codes: Codes) -> None:
        """Refuses codes that do not belong to this layout.

        Raises:
            UserError: for a wrong number of levels, a wrong grid, a code outside [0, codebook_size), or a latent of a
                continuous level that is not finite; names the level.
        """
        if len(codes) != len(self.levels):
            raise UserError(
                f"the layout has {len(self.levels)} level(s), but there are {len(codes)} tensor(s) of codes"
            )
        for index, (level, grid) in enumerate(zip(self.levels, codes, strict=True)):
            if tuple(grid.shape[1:]) != level.shape:
                raise UserError(
                    f"level {index} has codes of shape {level.shape} per image, not {tuple(grid.shape[1:])}"
                )
            if level.radices:
                level.require(grid, f"level {index}")
            elif not grid.isfinite().all():
                raise UserError(
                    f"level {index} has latents that are not finite; a model that computes NaN or infinity must be "
                    "trained again"
                )

    def to_json(self) -> list[dict[str, Any]]:
        """Returns plain lists and numbers, for a latent set's attributes and a checkpoint's config."""
        return [
            {"height": level.height, "width": level.width, "radices": list(level.radices), "channels": level.channels}
            for level in self.levels
        ]

    def __str__(self) -> str:
        def describe(level: Level) -> str:
            codebook = f"{level.channels} floats" if level.channels else "·".join(map(str, level.radices))
            return f"{level.height}×{level.width} of {codebook}"

        return " + ".join(describe(level) for level in self.levels)


def perplexity(counts: Int64[Tensor, " codes"]) -> float:
    """Returns exp(entropy) of the codes' frequencies: the number of equally frequent codes with the same entropy."""
    frequencies = counts[counts > 0].double() / counts.sum()
    return float(torch.exp(-(frequencies * frequencies.log()).sum()))


def row_numbers(rows: Sequence[int] | Tensor | np.ndarray) -> Int64[np.ndarray, " b"]:
    """Returns row numbers, a list or an array of any library, as an array.

    Raises:
        UserError: for a mask, whose values would be read as the rows 0 and 1, for floats, which would be cut off, and
            for anything but one dimension.
    """
    numbers = rows.numpy(force=True) if isinstance(rows, Tensor) else np.asarray(rows)
    if numbers.size and numbers.dtype.kind not in "iu":
        if numbers.dtype == bool:
            raise UserError("the rows are a boolean mask; give their numbers, such as mask.nonzero()[:, 0] of a tensor")
        raise UserError(f"row numbers must be integers, not {numbers.dtype}")
    if numbers.ndim != 1:
        raise UserError(f"row numbers must have one dimension, such as [0, 2], not the shape {numbers.shape}")
    return numbers.astype(np.int64, copy=False)


def counted_from_start(numbers: Int64[np.ndarray, " b"], total: int) -> Int64[np.ndarray, " b"]:
    """Returns row numbers in [0, total), of which negative ones count from the end.

    Raises:
        IndexError: if a row is outside [-total, total).
    """
    if not numbers.size or numbers.view(np.uint64).max() < total:  # unsigned, a negative number is above all others
        return numbers
    lowest, highest = numbers.min(), numbers.max()
    if not -total <= lowest <= highest < total:
        raise IndexError(f"rows {lowest} to {highest} are not all in [-{total}, {total})")
    return np.where(numbers < 0, numbers + total, numbers)
