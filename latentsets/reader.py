"""Reading a latent set: random rows through a memory map, codebook usage and perplexity, and a check of every byte.

No HDF5 handle stays open after a call, so nothing is locked and forked processes (DataLoader workers) are safe.
Training reads through `dataset.py`. A set of several files (`hdf5/sharded.py`) reads like one file.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from smalti.core.codes import MOST_COUNTED_CODES, Codes, Layout, perplexity, row_numbers
from smalti.core.errors import UserError
from smalti.core.hub.ids import parse_target
from smalti.core.hub.upload import upload
from smalti.latentsets.copies import ROWS_AT_ONCE
from smalti.latentsets.hdf5.captions import CAPTION_ENDS, read_captions
from smalti.latentsets.hdf5.digests import attributes_digest, content_digest
from smalti.latentsets.hdf5.format import COLUMNS, CONDITION_DTYPE, attribute_texts, stored_dtype
from smalti.latentsets.hdf5.mapped import MappedRows
from smalti.latentsets.hdf5.sharded import SetFiles, digest_of_files, open_files
from smalti.latentsets.overview import Overview, read_overview
from smalti.latentsets.provenance import Provenance
from smalti.latentsets.sharing import files_to_share, find_file, former_set

BLOCK_VALUES = 1 << 18
"""Codes that are counted at a time; numpy widens each to 8 bytes."""


class LatentSet:
    """A latent set on disk, of one file or several. It opens quickly: what it holds of several files is read on demand.

    It is pickled by its path, so spawned workers map the files again.

    Attributes:
        path: The file, folder or pattern; of a hub id, the copy in the hub's cache.
        layout: The layout of its codes.
        provenance: Where the codes come from.
        version: The version of its format.
        condition_width: Numbers in the vector of a row; 0 if there are none.

    Args:
        path: A file; a folder of files, such as `build_latents --shard-rows` writes, or a pattern such as
            `folder/*.h5`, whose rows are numbered in order of the files' names; or the id of a data set on the hub:
            `owner/name`, `owner/name@revision`, or `owner/name@revision/file.h5` if it has several latent sets.

    Raises:
        UserError: if a file does not exist, is not HDF5, is truncated or damaged, is not a latent set, has another
            format version, or lacks a dataset or an attribute; or if several files have another tokenizer,
            preprocessing, classes or layout.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = find_file(path)
        self.files: SetFiles = open_files(self.path)
        self.layout: Layout = self.files.layout
        self.provenance: Provenance = self.files.provenance
        self.version = int(self.files.attributes["format_version"])
        self.condition_width: int = self.files.condition_width
        if len(self.files.extents) == 1:
            _ = self._columns  # so that a damaged file is refused at once
        kinds = [(stored_dtype(level), level.shape) for level in self.layout.levels]
        kinds += [(CONDITION_DTYPE, (self.condition_width,))] if self.condition_width else []
        self._mapped = [MappedRows(self.files.extents, number, *kind) for number, kind in enumerate(kinds)]

    def __len__(self) -> int:
        return sum(extent.rows for extent in self.files.extents)

    def __reduce__(self) -> tuple[Any, ...]:
        return _reopen, (self.path, self.files.identity)

    @property
    def content_digest(self) -> str:
        """SHA-256 of codes, columns and what decides their meaning, when they were written; `verify` computes it again.

        Several files without an index do not record it: all are read once.
        """
        return self.files.attributes.get("content_digest") or self._computed_digest

    @cached_property
    def _computed_digest(self) -> str:
        return self.digest()

    @property
    def labels(self) -> Int64[Tensor, " rows"]:
        """The class of each row, -1 for none; a copy, as the other columns are."""
        return torch.from_numpy(self._columns["labels"].copy())

    @property
    def source_ids(self) -> Int64[Tensor, " rows"]:
        """The source image of each row: 0, 1, ... in order of first appearance."""
        return torch.from_numpy(self._columns["source_ids"].copy())

    @property
    def held_out(self) -> Bool[Tensor, " rows"]:
        """True if a row is held out from training; equal for all rows of a source image."""
        return torch.from_numpy(self._columns["held_out"].copy()).view(torch.bool)

    @property
    def flipped(self) -> Bool[Tensor, " rows"]:
        """True if the row is the mirror image of its source."""
        return torch.from_numpy(self._columns["flipped"].copy()).view(torch.bool)

    @cached_property
    def _columns(self) -> dict[str, np.ndarray]:
        """All columns of all rows, 18 bytes a row. Training on several files needs the `overview` only."""
        one = len(self.files.extents) == 1
        names = self.files.column_names if one else tuple(COLUMNS)  # ends of captions count within each file
        files = list(self.files.columns(names))
        return {name: np.concatenate([columns[name] for columns in files]) for name in names}

    @cached_property
    def overview(self) -> Overview:
        """The columns that training needs; those of several files are read once, one file after another."""
        columns = [self._columns] if "_columns" in self.__dict__ else self.files.columns()
        return read_overview(columns, len(self))

    def count_images(self) -> dict[str, int]:
        """Returns the number of source images in the training split and held out from it."""
        return self.overview.images

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
            return upload(files, target, "dataset", find_former=former_set, private=private, message=message)

    def batch(self, rows: Sequence[int] | Int64[Tensor, " b"]) -> Codes:
        """Returns the codes of the given rows, in their order.

        Raises:
            UserError: as `row_numbers` does.
            IndexError: if a row is outside [-len, len).
        """
        return tuple(self.read(level, rows) for level in range(len(self.layout.levels)))

    def read(
        self, level: int, rows: Sequence[int] | Int64[Tensor, " b"] | Int64[np.ndarray, " b"]
    ) -> Int64[Tensor, "b _h _w"] | Float[Tensor, "b _c _h _w"]:
        """Returns the codes of the given rows at one level; see `batch`.

        Raises:
            UserError: if there is no such level, or a code is outside its codebook.
        """
        grid = self.read_stored(level, rows)
        return torch.from_numpy(grid.astype(np.int64 if self.layout.levels[level].radices else np.float32, copy=False))

    def read_stored(
        self, level: int, rows: Sequence[int] | Int64[Tensor, " b"] | Int64[np.ndarray, " b"]
    ) -> np.ndarray:
        """Returns the codes of the given rows at one level in the stored dtype; see `read`."""
        self.layout.level(level, self.path)  # raises if there is none
        grid = self._mapped[level].take(rows)
        self._require_valid(level, grid)
        return grid

    def codes_in_order(self, level: int, rows: int | None = None) -> Iterator[np.ndarray]:
        """Yields the codes of all rows at one level in the stored dtype, at most `rows` at once, from memory maps."""
        return self._mapped[level].blocks(rows or max(1, BLOCK_VALUES // math.prod(self.layout.levels[level].shape)))

    def vectors(self, rows: Sequence[int] | Int64[Tensor, " b"] | Int64[np.ndarray, " b"]) -> Float[Tensor, "b _v"]:
        """Returns the vectors of the given rows that priors can be conditioned on, in float32.

        Raises:
            UserError: if the set has none, or one is not finite.
        """
        if not self.condition_width:
            raise UserError(f"{self.path} has no vectors; build it with --conditions, or add them (add_conditions)")
        vectors = self._mapped[-1].take(rows)
        if not np.isfinite(vectors).all():
            raise UserError(f"{self.path} has vectors that are not finite; build it again")
        return torch.from_numpy(vectors.astype(np.float32))

    def captions(self, rows: Sequence[int]) -> list[str]:
        """Returns the captions of the given rows, read from the files; "" for a row without one.

        A row made by mirroring or cropping has the caption of its image.

        Raises:
            UserError: as `row_numbers` does, and if a file was replaced by another latent set.
            IndexError: if a row is outside [-len, len).
        """
        texts: dict[int, str] = {}
        numbers = [range(len(self))[row] for row in row_numbers(rows)]
        start = 0
        for number, (extent, ends) in enumerate(zip(self.files.extents, self._caption_ends, strict=True)):
            inside = [row for row in dict.fromkeys(numbers) if start <= row < start + extent.rows]
            if ends is not None and inside:
                self.files.header(number)  # the ends are of the file that was opened
                found = read_captions(extent.path, ends, [row - start for row in inside])
                texts |= dict(zip(inside, found, strict=True))
            start += extent.rows
        return [texts.get(row, "") for row in numbers]

    def captioned_rows(self) -> Int64[np.ndarray, " n"]:
        """Returns the numbers of the rows that have a caption."""
        found, start = [np.zeros(0, np.int64)], 0
        for extent, ends in zip(self.files.extents, self._caption_ends, strict=True):
            if ends is not None:
                found.append(np.flatnonzero(np.diff(ends, prepend=0)) + start)
            start += extent.rows
        return np.concatenate(found)

    @cached_property
    def _caption_ends(self) -> list[Int64[np.ndarray, " rows"] | None]:
        """The ends of the captions in each file; None for a file without captions."""
        if len(self.files.extents) == 1:
            return [self._columns.get(CAPTION_ENDS)]
        captioned = self.files.captioned
        if not any(captioned):
            return [None] * len(captioned)
        columns = self.files.columns([CAPTION_ENDS])
        return [each[CAPTION_ENDS] if has else None for each, has in zip(columns, captioned, strict=True)]

    def usage(self, level: int = 0, digits: int | None = None) -> Int64[Tensor, " codes"]:
        """Counts how often each code occurs in the whole set, or each prefix of `digits` digits if that is given.

        Raises:
            UserError: if the level does not exist, is continuous, has fewer digits, or has more codes than are counted.
        """
        of_codes = self.layout.level(level, self.path)
        most, codes = len(of_codes.radices), of_codes.codebook_size
        digits = most if digits is None else digits
        if not 1 <= digits <= most:
            raise UserError(f"level {level} of {self.path} has {most} digits; {digits} cannot be counted")
        if codes > MOST_COUNTED_CODES:
            raise UserError(f"level {level} of {self.path} has {codes} codes; up to {MOST_COUNTED_CODES} are counted")
        counts = np.zeros(codes, np.int64)
        for block in self.codes_in_order(level):
            self._require_valid(level, block)
            counts += np.bincount(block.ravel(), minlength=len(counts))
        return of_codes.prefix_counts(torch.from_numpy(counts), digits)

    def perplexity(self, level: int = 0, digits: int | None = None) -> float:
        """Returns the perplexity of `usage`, from 1 (one code only) to the number of codes (all equally frequent)."""
        return perplexity(self.usage(level, digits))

    def digest(self) -> str:
        """Returns the content digest that a new set of the same content has, from its current bytes.

        Raises:
            UserError: if a file was replaced by another latent set.
        """
        return self._digest(attribute_texts(self.layout, self.provenance))

    def _digest(self, attributes: Mapping[str, str]) -> str:
        """Computes the content digest. The columns of one file are in memory already."""
        files = self.files
        if len(files.extents) == 1 and not files.indexed:
            files.header(0)  # the columns are of the file that was opened
            columns, kinds = self._columns, {"condition_width": files.condition_width, "captioned": files.captioned}
            return content_digest(self.layout, attributes, files.extents, lambda name: [columns[name]], **kinds)
        return digest_of_files(files, attributes)

    def verify(self) -> None:
        """Checks every byte of the set against its digests, and the values for consistency.

        Version 2 has no digest of the attributes.

        Raises:
            UserError: if a byte or an attribute differs from what was written, a code is outside its level's codebook,
                or a vector is not finite.
        """
        current = _reopen(self.path, self.files.identity)
        files, attributes = current.files, current.files.attributes
        several = files.indexed or len(files.extents) > 1
        if "attributes_digest" in attributes and attributes_digest(attributes) != attributes["attributes_digest"]:
            raise UserError(f"{self.path}: an attribute was changed after it was written; copy it or build it again")
        for header in [*files.headers()] if several else ():
            LatentSet(header.extent.path).verify()
        recorded = attributes.get("content_digest")
        if recorded and (digest := current._digest(attributes)) != recorded:
            digests = f"its content has digest {digest[:12]}, not {recorded[:12]}"
            raise UserError(f"{self.path} is damaged: {digests}; copy it again, or build it with --overwrite")
        for index in range(0 if several else len(self.layout.levels)):
            for block in self.codes_in_order(index):
                self._require_valid(index, block)
        for start in range(0, len(self) if self.condition_width and not several else 0, ROWS_AT_ONCE):
            self.vectors(range(start, min(start + ROWS_AT_ONCE, len(self))))

    def _require_valid(self, index: int, codes: np.ndarray) -> None:
        """Refuses codes outside the codebook of their level, and real-valued latents that are not finite."""
        level = self.layout.levels[index]
        if level.channels:
            if not np.isfinite(codes).all():
                raise UserError(f"{self.path} has latents that are not finite at level {index}; build it again")
        elif codes.size and codes.max() >= level.codebook_size:
            raise UserError(f"{self.path} has codes not below {level.codebook_size} at level {index}; rebuild it")


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


def _reopen(path: Path, identity: str) -> LatentSet:
    latent_set = LatentSet(path)
    if latent_set.files.identity != identity:
        raise UserError(f"{path} was replaced by another latent set since it was opened; start again")
    return latent_set
