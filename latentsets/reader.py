"""Reading a latent set: random rows through a memory map, codebook usage and perplexity, and a check of every byte.

No HDF5 handle stays open after the constructor, so nothing is locked and forked processes (DataLoader workers) are
safe. Training reads through `dataset.py`.
"""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from smalti.core.codes import Codes, Layout
from smalti.core.errors import UserError
from smalti.core.hub.ids import parse_target
from smalti.core.hub.upload import upload
from smalti.latentsets.captions import CAPTION_ENDS, read_captions
from smalti.latentsets.format import (
    COLUMNS,
    CONDITIONS,
    attribute_texts,
    attributes_digest,
    content_digest,
    read_contents,
)
from smalti.latentsets.provenance import Provenance
from smalti.latentsets.sharing import ROWS_AT_ONCE, files_to_share, find_file

BLOCK_VALUES = 1 << 18
"""Codes that are counted at a time; numpy widens each to 8 bytes."""

MOST_COUNTED_CODES = 1 << 24
"""Largest codebook whose codes are counted, as each count takes 8 bytes."""


class LatentSet:
    """A latent set on disk. It opens quickly, and it is pickled by its path, so spawned workers map the file anew.

    Attributes:
        path: The file; of a hub id, the copy in the hub's cache.
        layout: The layout of its codes.
        provenance: Where the codes come from.
        version: The version of its format.
        content_digest: SHA-256 of codes, columns and what decides their meaning, when they were written; `verify`
            computes it again.
        labels: The class of each row, -1 for none.
        source_ids: The source image of each row: 0, 1, ... in order of first appearance.
        held_out: True if a row is held out from training; equal for all rows of a source image.
        flipped: True if a row is the mirror image of its source.
        stored: The memory maps of the codes, one array `(rows, *level.shape)` per level, in the stored dtype.
        conditions: The memory map of the vector of each row, float16 `(rows, condition_width)`; None if there are none.
        condition_width: Numbers in the vector of a row; 0 if there are none.

    Args:
        path: a file, or the id of a data set on the hub: `owner/name`, `owner/name@revision`, or
            `owner/name@revision/file.h5` if it has several latent sets.

    Raises:
        UserError: if the file does not exist, is not HDF5, is truncated or damaged, is not a latent set, has another
            format version, or lacks a dataset or an attribute.
    """

    labels: Int64[Tensor, " rows"]
    source_ids: Int64[Tensor, " rows"]
    held_out: Bool[Tensor, " rows"]
    flipped: Bool[Tensor, " rows"]

    def __init__(self, path: str | Path) -> None:
        self.path = find_file(path)
        contents = read_contents(self.path)
        self.layout: Layout = contents.layout
        self.provenance: Provenance = contents.provenance
        self._attributes = contents.attributes
        self.version = int(self._attributes["format_version"])
        self.content_digest: str = self._attributes["content_digest"]
        self._columns, self._arrays = contents.columns, contents.arrays
        self.labels, self.source_ids, held_out, flipped = (torch.from_numpy(self._columns[name]) for name in COLUMNS)
        self.held_out, self.flipped = held_out.bool(), flipped.bool()
        self._offsets = contents.offsets
        # Plain arrays over the memory map: indexing an np.memmap builds an instance of the subclass each time.
        mapped = [
            np.asarray(np.memmap(self.path, dtype, "r", offset, shape))
            for (dtype, shape), offset in zip(self._arrays.values(), self._offsets, strict=True)
        ]
        self.stored: tuple[np.ndarray, ...] = tuple(mapped[: len(self.layout.levels)])
        self.conditions: np.ndarray | None = mapped[-1] if CONDITIONS in self._arrays else None
        self.condition_width: int = 0 if self.conditions is None else self.conditions.shape[1]

    def __len__(self) -> int:
        return len(self.labels)

    def __reduce__(self) -> tuple[Any, ...]:
        return _reopen, (self.path, self.content_digest)

    def count_images(self) -> dict[str, int]:
        """Returns the number of source images in the training split and held out from it."""
        return {
            split: len(self.source_ids[self.held_out == held_out].unique())
            for split, held_out in (("training", False), ("held_out", True))
        }

    def push_to_hub(
        self,
        hub_id: str,
        *,
        license: str | None = None,
        private: bool = False,
        revision: str | None = None,
        message: str | None = None,
        tokenizer: str | None = None,
    ) -> str:
        """Uploads the set with a card to a data set repository of the Hugging Face hub; returns its page's address.

        The uploaded copy has the same content digest. Local folders are left out of its names.

        Args:
            hub_id: `owner/name`.
            license: the licence for the card's front matter, such as `mit`; by default the card gives none.
            private: create a private repository.
            revision: the branch, which is created if needed; by default the main one.
            message: the commit's message.
            tokenizer: the hub id of the tokenizer, which the uploaded copy records as the source of its codes.

        Raises:
            UserError: if the set is damaged or unsuitable, or with the reason why nothing was uploaded.
        """
        target = parse_target(hub_id, revision)
        with TemporaryDirectory(prefix="smalti-push-") as scratch:
            files = files_to_share(self, target, Path(scratch), license=license, tokenizer=tokenizer)
            return upload(files, target, "dataset", private=private, message=message)

    def batch(self, rows: Sequence[int] | Int64[Tensor, " b"]) -> Codes:
        """Returns the codes of the given rows, in their order.

        Raises:
            IndexError: if a row is outside [-len, len).
        """
        return tuple(self.read(level, rows) for level in range(len(self.layout.levels)))

    def read(
        self, level: int, rows: Sequence[int] | Int64[Tensor, " b"] | Int64[np.ndarray, " b"]
    ) -> Int64[Tensor, "b _h _w"] | Float[Tensor, "b _c _h _w"]:
        """Returns the codes of the given rows at one level; see `batch`.

        Raises:
            UserError: if a code is outside its level's codebook.
        """
        grid = self.read_stored(level, rows)
        return torch.from_numpy(grid.astype(np.int64 if self.layout.levels[level].radices else np.float32, copy=False))

    def read_stored(
        self, level: int, rows: Sequence[int] | Int64[Tensor, " b"] | Int64[np.ndarray, " b"]
    ) -> np.ndarray:
        """Returns the codes of the given rows at one level in the stored dtype; see `read`."""
        grid = np.take(self.stored[level], rows, axis=0)
        self._require_valid(level, grid)
        return grid

    def vectors(self, rows: Sequence[int] | Int64[Tensor, " b"] | Int64[np.ndarray, " b"]) -> Float[Tensor, "b _v"]:
        """Returns the vectors of the given rows that priors can be conditioned on, in float32.

        Raises:
            UserError: if the set has none, or one is not finite.
        """
        if self.conditions is None:
            raise UserError(f"{self.path} has no vectors; build it with --conditions, or add them (add_conditions)")
        vectors = np.take(self.conditions, rows, axis=0)
        if not np.isfinite(vectors).all():
            raise UserError(f"{self.path} has vectors that are not finite; build it again")
        return torch.from_numpy(vectors.astype(np.float32))

    def captions(self, rows: Sequence[int]) -> list[str]:
        """Returns the captions of the given rows, read from the file; "" for a row without one.

        A row made by mirroring or cropping has the caption of its image.
        """
        if CAPTION_ENDS not in self._columns:
            return ["" for _ in rows]
        return read_captions(self.path, self._columns[CAPTION_ENDS], rows)

    def captioned_rows(self) -> Int64[np.ndarray, " n"]:
        """Returns the numbers of the rows that have a caption."""
        ends = self._columns.get(CAPTION_ENDS, np.zeros(0, np.int64))
        return np.flatnonzero(np.diff(ends, prepend=0))

    def usage(self, level: int = 0, digits: int | None = None) -> Int64[Tensor, " codes"]:
        """Counts how often each code occurs in the whole set, or each prefix of `digits` digits if that is given.

        Raises:
            UserError: if the level is continuous, has fewer digits, or has more codes than are counted.
        """
        radices = self.layout.levels[level].radices
        digits = len(radices) if digits is None else digits
        if not 1 <= digits <= len(radices):
            raise UserError(f"level {level} of {self.path} has {len(radices)} digits; {digits} cannot be counted")
        if (codes := math.prod(radices)) > MOST_COUNTED_CODES:
            raise UserError(f"level {level} of {self.path} has {codes} codes; up to {MOST_COUNTED_CODES} are counted")
        counts = np.zeros(codes, np.int64)
        for block in self._blocks(level):
            self._require_valid(level, block)
            counts += np.bincount(block.ravel(), minlength=len(counts))
        return torch.from_numpy(counts).view(math.prod(radices[:digits]), -1).sum(dim=1)

    def perplexity(self, level: int = 0, digits: int | None = None) -> float:
        """Returns the perplexity of `usage`, from 1 (one code only) to the number of codes (all equally frequent)."""
        return perplexity(self.usage(level, digits))

    def digest(self) -> str:
        """Returns the content digest that a new set of the same content has, from its current bytes."""
        texts = attribute_texts(self.layout, self.provenance)
        return content_digest(self.path, self._arrays, self._offsets, self._columns, texts)

    def verify(self) -> None:
        """Checks every byte of the set against its digests, and the values for consistency.

        Version 2 has no digest of the attributes.

        Raises:
            UserError: if a byte or an attribute differs from what was written, a code is outside its level's codebook,
                or a vector is not finite.
        """
        current = _reopen(self.path, self.content_digest)._attributes
        if self.version > 2 and attributes_digest(current) != current["attributes_digest"]:
            raise UserError(f"{self.path}: an attribute was changed after it was written; copy it or build it again")
        digest = content_digest(self.path, self._arrays, self._offsets, self._columns, current)
        if digest != self.content_digest:
            digests = f"its content has digest {digest[:12]}, not {self.content_digest[:12]}"
            raise UserError(f"{self.path} is damaged: {digests}; copy it or build it again")
        for index in range(len(self.layout.levels)):
            for block in self._blocks(index):
                self._require_valid(index, block)
        for start in range(0, len(self) if self.condition_width else 0, ROWS_AT_ONCE):
            self.vectors(range(start, min(start + ROWS_AT_ONCE, len(self))))

    def _require_valid(self, index: int, codes: np.ndarray) -> None:
        """Refuses codes outside the codebook of their level, and real-valued latents that are not finite."""
        level = self.layout.levels[index]
        if level.channels:
            if not np.isfinite(codes).all():
                raise UserError(f"{self.path} has latents that are not finite at level {index}; build it again")
        elif codes.size and codes.max() >= level.codebook_size:
            raise UserError(f"{self.path} has codes not below {level.codebook_size} at level {index}; rebuild it")

    def _blocks(self, level: int) -> Iterator[np.ndarray]:
        step = max(1, BLOCK_VALUES // math.prod(self.layout.levels[level].shape))
        for start in range(0, len(self), step):
            yield self.stored[level][start : start + step]


def perplexity(counts: Int64[Tensor, " codes"]) -> float:
    """Returns exp(entropy) of the codes' frequencies: the number of equally frequent codes with the same entropy."""
    frequencies = counts[counts > 0].double() / counts.sum()
    return float(torch.exp(-(frequencies * frequencies.log()).sum()))


def require_tokenizer(latent_set: LatentSet, digests: Sequence[str]) -> None:
    """Checks that a tokenizer encodes as the one that made the codes. No other tokenizer can decode them.

    Args:
        latent_set: the set.
        digests: those of all tokenizers that encode as the tokenizer at hand does, its own first.

    Raises:
        UserError: if the digest of the set's tokenizer is not among them.
    """
    provenance = latent_set.provenance
    if provenance.tokenizer_digest not in digests:
        maker = f"{provenance.tokenizer_digest[:12]} ({provenance.tokenizer_kind}, {provenance.tokenizer_source})"
        raise UserError(
            f"{latent_set.path} was made by the tokenizer {maker}, but the tokenizer given is {digests[0][:12]}; "
            "use the set's tokenizer, or build the latent set again"
        )


def _reopen(path: Path, content_digest: str) -> LatentSet:
    latent_set = LatentSet(path)
    if latent_set.content_digest != content_digest:
        raise UserError(f"{path} was replaced by another latent set since it was opened; start again")
    return latent_set
