"""Reading a latent set: random rows through a memory map, and counts over the whole of it.

No HDF5 handle outlives the opening, so nothing is locked and nothing breaks when a process forks. Training
reads through `rows.py`.
"""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from smalti.core.codes import Codes, Layout
from smalti.core.errors import UserError
from smalti.latentsets.format import COLUMNS, Provenance, content_digest, fault, read_contents, stored_dtype

BLOCK_VALUES = 1 << 18
"""Codes that are counted at once; numpy widens them to 8 bytes each."""


class LatentSet:
    """A latent set on disk. Cheap to open; pickled by its path, so spawned workers map the file themselves.

    Attributes:
        path: the file.
        layout: of its codes.
        provenance: where they come from.
        content_digest: SHA-256 of codes and columns, as written; `verify` computes it again.
        labels: the class of each row, -1 where there is none.
        source_ids: equal for rows made from the same source image: 0, 1, ... in order of first appearance.
        held_out: True where training must not see a row; the same for all rows of a source image.
        flipped: True where a row is the mirror image of its source.

    Raises:
        UserError: if there is no file, it is not HDF5, truncated or damaged, not a latent set, of another format
            version, or lacks something.
    """

    labels: Int64[Tensor, " rows"]
    source_ids: Int64[Tensor, " rows"]
    held_out: Bool[Tensor, " rows"]
    flipped: Bool[Tensor, " rows"]

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        contents = read_contents(self.path)
        self.layout: Layout = contents.layout
        self.provenance: Provenance = contents.provenance
        self.content_digest: str = contents.content_digest
        self._columns = contents.columns
        self.labels, self.source_ids, held_out, flipped = (torch.from_numpy(self._columns[name]) for name in COLUMNS)
        self.held_out, self.flipped = held_out.bool(), flipped.bool()
        self._offsets = contents.offsets
        # As plain arrays: indexing np.memmap itself builds a subclass each time.
        self.stored: tuple[np.ndarray, ...] = tuple(
            np.asarray(np.memmap(self.path, stored_dtype(level), "r", offset, (contents.rows, *level.shape)))
            for level, offset in zip(self.layout.levels, self._offsets, strict=True)
        )

    def __len__(self) -> int:
        return len(self.labels)

    def __reduce__(self) -> tuple[Any, ...]:
        return _reopen, (self.path, self.content_digest)

    def batch(self, rows: Sequence[int] | Int64[Tensor, " b"]) -> Codes:
        """The codes of any rows, in the order asked for.

        Raises:
            IndexError: for a row outside [-len, len).
        """
        return tuple(self.read(level, rows) for level in range(len(self.layout.levels)))

    def read(
        self, level: int, rows: Sequence[int] | Int64[Tensor, " b"] | Int64[np.ndarray, " b"]
    ) -> Int64[Tensor, "b _h _w"] | Float[Tensor, "b _c _h _w"]:
        """Like `batch`, of one level."""
        grid = np.take(self.stored[level], rows, axis=0)
        return torch.from_numpy(grid.astype(np.int64 if self.layout.levels[level].radices else np.float32, copy=False))

    def usage(self, level: int = 0, digits: int | None = None) -> Int64[Tensor, " codes"]:
        """How often each code occurs in the whole set; with `digits`, each path of that many first digits.

        Raises:
            UserError: if the level is continuous or has fewer digits.
        """
        radices = self.layout.levels[level].radices
        digits = len(radices) if digits is None else digits
        if not 1 <= digits <= len(radices):
            raise UserError(f"level {level} of {self.path} has {len(radices)} digits; {digits} cannot be counted")
        counts = np.zeros(math.prod(radices), np.int64)
        for block in self._blocks(level):
            counts += np.bincount(block.ravel(), minlength=len(counts))
        return torch.from_numpy(counts).view(math.prod(radices[:digits]), -1).sum(dim=1)

    def perplexity(self, level: int = 0, digits: int | None = None) -> float:
        """`perplexity` of `usage`: from 1 (one code only) to the number of codes (all equally often)."""
        return perplexity(self.usage(level, digits))

    def verify(self) -> None:
        """Reads every byte of the set.

        Raises:
            UserError: if any differs from what was written, a code lies outside its level's codebook, a label has no
                name, source ids are not numbered as they should be, or a source is on both sides of the split.
        """
        _reopen(self.path, self.content_digest)
        found = content_digest(self.path, self.layout, self._offsets, self._columns)
        if found != self.content_digest:
            digests = f"its content has digest {found[:12]}, not {self.content_digest[:12]}"
            raise UserError(f"{self.path} is damaged: {digests}; copy it or build it again")
        for index, level in enumerate(self.layout.levels):
            if level.radices and max(int(block.max()) for block in self._blocks(index)) >= level.codebook_size:
                raise UserError(f"{self.path} has codes not below {level.codebook_size} at level {index}; rebuild it")
        if wrong := fault(self._columns, self.provenance.label_names):
            raise UserError(f"{self.path}: {wrong}; build it again")

    def _blocks(self, level: int) -> Iterator[np.ndarray]:
        step = max(1, BLOCK_VALUES // math.prod(self.layout.levels[level].shape))
        for start in range(0, len(self), step):
            yield self.stored[level][start : start + step]


def perplexity(counts: Int64[Tensor, " codes"]) -> float:
    """exp of the entropy of the codes' frequencies: how many equally frequent codes would be as varied."""
    frequencies = counts[counts > 0].double() / counts.sum()
    return float(torch.exp(-(frequencies * frequencies.log()).sum()))


def require_tokenizer(latent_set: LatentSet, digest: str) -> None:
    """Refuses a tokenizer that did not make these codes: to any other they mean nothing.

    Raises:
        UserError: if the digests differ.
    """
    made_by = latent_set.provenance
    if digest != made_by.tokenizer_digest:
        theirs = f"{made_by.tokenizer_digest[:12]} ({made_by.tokenizer_kind}, {made_by.tokenizer_source})"
        raise UserError(
            f"{latent_set.path} was made by the tokenizer {theirs}, but the one at hand is {digest[:12]}; "
            "use that tokenizer or build the latent set again"
        )


def _reopen(path: Path, content_digest: str) -> LatentSet:
    latent_set = LatentSet(path)
    if latent_set.content_digest != content_digest:
        raise UserError(f"{path} was replaced by another latent set since it was opened; start again")
    return latent_set
