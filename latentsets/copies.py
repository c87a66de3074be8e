"""Copies of latent sets with another provenance, or with vectors added."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from smalti.core.codes import Codes, Layout
from smalti.latentsets.hdf5.captions import CAPTION_ENDS, read_captions
from smalti.latentsets.hdf5.format import COLUMNS, SOURCE_NUMBERS, arrays_of, read_columns, read_header
from smalti.latentsets.hdf5.mapped import MappedRows
from smalti.latentsets.hdf5.sharded import SetFiles
from smalti.latentsets.provenance import Provenance
from smalti.latentsets.writer import LatentSetWriter

ROWS_AT_ONCE = 4096


@runtime_checkable
class SetToShare(Protocol):
    """The members of a latent set that its card is made from."""

    path: Path
    layout: Layout
    provenance: Provenance
    version: int
    files: SetFiles

    @property
    def content_digest(self) -> str:
        """The digest of the content."""
        ...

    @property
    def labels(self) -> Int64[Tensor, " rows"]:
        """The class of each row."""
        ...

    @property
    def source_ids(self) -> Int64[Tensor, " rows"]:
        """The source image of each row."""
        ...

    @property
    def held_out(self) -> Bool[Tensor, " rows"]:
        """True if a row is held out."""
        ...

    @property
    def flipped(self) -> Bool[Tensor, " rows"]:
        """True if a row is a mirror image."""
        ...

    condition_width: int

    def batch(self, rows: Sequence[int]) -> Codes:
        """Returns the codes of the given rows."""
        ...

    def vectors(self, rows: Sequence[int]) -> Float[Tensor, "b _v"]:
        """Returns the vectors of the given rows."""
        ...

    def captions(self, rows: Sequence[int]) -> list[str]:
        """Returns the captions of the given rows."""
        ...

    def captioned_rows(self) -> Int64[np.ndarray, " n"]:
        """Returns the numbers of the rows that have a caption."""
        ...

    def count_images(self) -> dict[str, int]:
        """Returns the number of source images of each split."""
        ...

    def usage(self, level: int = 0, digits: int | None = None) -> Int64[Tensor, " codes"]:
        """Counts how often each code occurs."""
        ...

    def verify(self) -> None:
        """Checks every byte."""
        ...


def copy_file(path: Path, copy: Path, change: Callable[[Provenance], Provenance]) -> None:
    """Writes a file of a set again with another provenance of the same meaning, which `change` returns.

    A replaced attribute may stay in a file's gaps.
    """
    header = read_header(path)
    rows, width = header.extent.rows, header.condition_width
    read = read_columns(header, (*COLUMNS, CAPTION_ENDS) if header.captioned else tuple(COLUMNS))
    captions = read_captions(path, read.pop(CAPTION_ENDS), range(rows)) if header.captioned else None
    columns = {name: torch.from_numpy(values) for name, values in read.items()}
    numbers = columns.pop(SOURCE_NUMBERS, None)
    columns |= {name: columns[name].bool() for name in ("held_out", "flipped")}
    added = {"provenance": change(header.provenance), "condition_width": width}
    kinds = arrays_of(header.layout, rows, width).values()
    mapped = [MappedRows([header.extent], number, dtype, shape[1:]) for number, (dtype, shape) in enumerate(kinds)]
    with LatentSetWriter(copy, header.layout, **columns, **added, captions=captions, source_numbers=numbers) as writer:
        writer.expected_digest = header.attributes["content_digest"]
        dtypes = [np.int64 if level.radices else np.float32 for level in header.layout.levels]
        for start in range(0, rows, ROWS_AT_ONCE):
            block = np.arange(start, min(start + ROWS_AT_ONCE, rows))
            codes = (grid.take(block).astype(dtype) for grid, dtype in zip(mapped, dtypes, strict=False))
            vectors = torch.from_numpy(mapped[-1].take(block)) if width else None
            writer.write(start, tuple(map(torch.from_numpy, codes)), vectors)


def copy_set(
    latent_set: SetToShare,
    provenance: Provenance,
    path: Path,
    *,
    conditions: Float[Tensor, "rows v"] | None = None,
) -> None:
    """Writes a set again with another provenance, since a replaced attribute may stay in a file's gaps.

    Args:
        latent_set: the set.
        provenance: that of the copy.
        path: the file to write, whole or not at all.
        conditions: vectors instead of the set's own.
    """
    rows = len(latent_set.labels)
    columns = {name: getattr(latent_set, name) for name in COLUMNS}
    width = latent_set.condition_width if conditions is None else conditions.shape[1]
    captions = latent_set.captions(range(rows)) if len(latent_set.captioned_rows()) else None
    added = {"provenance": provenance, "condition_width": width, "captions": captions}
    with LatentSetWriter(path, latent_set.layout, **columns, **added) as writer:
        for start in range(0, rows, ROWS_AT_ONCE):
            block = range(start, min(start + ROWS_AT_ONCE, rows))
            if conditions is not None:
                vectors = conditions[block.start : block.stop]
            else:
                vectors = latent_set.vectors(block) if width else None
            writer.write(start, latent_set.batch(block), vectors)
