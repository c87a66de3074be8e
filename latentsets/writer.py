"""Writing a latent set: blocks of rows, in any order, into an HDF5 file that gets its name only when it is complete.

Building a set in several processes, or resuming a build, is in `building/blocks.py`.
"""

import errno
import math
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, TypeAlias

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from smalti.core.codes import Codes, Layout
from smalti.core.errors import UserError
from smalti.core.files import whole_file
from smalti.latentsets.hdf5.captions import CAPTION_ENDS, CAPTIONS, encode_captions
from smalti.latentsets.hdf5.digests import add_digests, content_digest
from smalti.latentsets.hdf5.format import (
    COLUMNS,
    SOURCE_NUMBERS,
    Extent,
    add_columns,
    arrays_of,
    attribute_texts,
    create_file,
    find_column_error,
)
from smalti.latentsets.provenance import Provenance

ErrorType: TypeAlias = type[BaseException] | None

HEADROOM_BYTES = 1 << 16
"""Disk space reserved for HDF5's own structures; HDF5 truncates the file to what it uses when it closes it."""


class LatentSetWriter:
    """Writes one latent set in a `with` block. If the block raises, the file at `path` is unchanged.

    If the system can reserve disk space, it is reserved on entry, so that a full disk is reported before the work. The
    writer holds one block of codes, the captions and 19 bytes per row in memory.

    Args:
        path: The file to create or replace.
        layout: The layout of the codes.
        labels: The class of each row, -1 for none.
        source_ids: The source image of each row, numbered by `number_sources`.
        held_out: Whether a row is held out from training; equal for all rows of a source image.
        flipped: Whether a row is a mirror image.
        provenance: Where the codes come from.
        source_numbers: For a shard of a larger set, the number of each of its sources in the whole set.
        condition_width: Numbers in the vector of each row, which `write` receives; 0 for none.
        captions: The text of each row, "" for none; None for a set without captions.

    Attributes:
        expected_digest: The content digest that the set must have, if it is known; set it before the block ends.

    Raises:
        UserError: if there are no rows, the columns or captions contradict the description above or are not as many, or
            the names of the classes are too long to be read; in the block, as `write` does; at its end, if rows are
            missing or the content digest is not the expected one.
    """

    def __init__(
        self,
        path: str | Path,
        layout: Layout,
        *,
        labels: Int64[Tensor, " rows"],
        source_ids: Int64[Tensor, " rows"],
        held_out: Bool[Tensor, " rows"],
        flipped: Bool[Tensor, " rows"],
        provenance: Provenance,
        source_numbers: Int64[Tensor, " sources"] | None = None,
        condition_width: int = 0,
        captions: Sequence[str] | None = None,
    ) -> None:
        self.path, self.layout, self.rows, self.provenance = Path(path), layout, len(labels), provenance
        if not self.rows:
            raise UserError(f"{path} was not written: a latent set of 0 rows would be empty; give at least one image")
        tensors = zip(COLUMNS, (labels, source_ids, held_out, flipped), strict=True)
        self._columns = {name: self._stored(name, column, self.rows) for name, column in tensors}
        if error := find_column_error(self._columns, provenance.label_names):
            raise UserError(f"{path} was not written: {error}")
        provenance.require_readable(self.path)
        self._more: dict[str, np.ndarray] = {}  # datasets with another number of values than rows
        if source_numbers is not None:
            sources = int(self._columns["source_ids"].max()) + 1
            self._more[SOURCE_NUMBERS] = self._stored(SOURCE_NUMBERS, source_numbers, sources)
        if captions is not None:
            if len(captions) != self.rows or not all(isinstance(caption, str) for caption in captions):
                raise UserError(
                    f'{path} was not written: give {self.rows} captions, a text for each row, "" for none; '
                    f"not {len(captions)} values, or any that are no texts"
                )
            if any(captions):
                self._columns[CAPTION_ENDS], self._more[CAPTIONS] = encode_captions(captions)
        self._condition_width = condition_width
        self._arrays = arrays_of(layout, self.rows, condition_width)
        self.expected_digest: str | None = None
        self._written = np.zeros(self.rows, bool)
        self._stack = ExitStack()
        self._partial: Path
        self._file: BinaryIO
        self._offsets: tuple[int, ...]

    def _stored(self, name: str, values: Tensor, count: int) -> np.ndarray:
        """Returns a column as it is stored, which changes no value."""
        column, dtype = values.numpy(), COLUMNS.get(name, COLUMNS["source_ids"])
        if column.shape != (count,):
            raise UserError(f"{self.path} was not written: {name} has shape {column.shape}, not ({count},)")
        if column.dtype.kind not in "biu" or ((stored := column.astype(dtype, copy=False)) != column).any():
            raise UserError(f"{self.path} was not written: {name} of {column.dtype} has values that are no {dtype}")
        return stored

    def __enter__(self) -> "LatentSetWriter":
        with ExitStack() as stack, reporting_full_disk(self.path):
            self._partial = stack.enter_context(whole_file(self.path))
            self._offsets = create_file(self._partial, self._arrays)
            self._file = stack.enter_context(self._partial.open("r+b"))
            self._reserve()
            add_columns(self._partial, self.layout, self.provenance, self._columns | self._more)
            stack.push(self._finish)  # runs first on exit; if it raises, the partial file is removed
            self._stack = stack.pop_all()
        return self

    def __exit__(self, kind: ErrorType, error: BaseException | None, trace: TracebackType | None) -> None:
        with reporting_full_disk(self.path):
            self._stack.__exit__(kind, error, trace)

    def write(self, start: int, codes: Codes, conditions: Float[Tensor, "b v"] | None = None) -> None:
        """Writes the codes of rows `start` to `start + b`, and their vectors if the set has any.

        Raises:
            UserError: if codes are outside the layout or of a wrong type, the levels have codes of different numbers of
                rows, vectors are missing, of a wrong shape or not finite in float16, rows are outside the set or
                already written, or the disk is full.
        """
        self.layout.check(codes)
        rows = slice(start, start + len(codes[0]))
        for index, (level, grid) in enumerate(zip(self.layout.levels, codes, strict=True)):
            if grid.is_floating_point() != bool(level.channels):
                kind = "floats" if level.channels else "integers"
                raise UserError(f"level {index} has codes that are {kind}, not {grid.dtype}")
            if len(grid) != len(codes[0]):
                raise UserError(f"level {index} has codes of {len(grid)} rows, not {len(codes[0])} as level 0")
        vectors = torch.zeros(len(codes[0]), 0) if conditions is None else conditions.half()
        if tuple(vectors.shape) != (len(codes[0]), self._condition_width):
            raise UserError(
                f"rows {start} to {rows.stop - 1} have vectors of shape {tuple(vectors.shape)}, not "
                f"{(len(codes[0]), self._condition_width)}; give `condition_width` numbers for each row"
            )
        if not vectors.isfinite().all():
            raise UserError(f"vectors of rows {start} to {rows.stop - 1} are not finite in float16")
        if start < 0 or rows.stop > self.rows:
            raise UserError(f"rows {start} to {rows.stop - 1} do not fit a latent set of {self.rows} rows")
        if self._written[rows].any():
            raise UserError(f"row {start + int(self._written[rows].argmax())} was already written; write each row once")
        written = (*codes, vectors) if self._condition_width else codes
        with reporting_full_disk(self.path):
            for (dtype, shape), values, offset in zip(self._arrays.values(), written, self._offsets, strict=True):
                self._file.seek(offset + start * math.prod(shape[1:]) * dtype.itemsize)
                self._file.write(np.ascontiguousarray(values.detach().cpu().numpy(), dtype).data)
        self._written[rows] = True

    def _finish(self, kind: ErrorType, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is not None:
            return
        if not self._written.all():
            missing = np.flatnonzero(~self._written)
            raise UserError(
                f"{self.path}: row {missing[0]} and {len(missing) - 1} others were never written; write all"
            )
        self._file.close()
        texts = attribute_texts(self.layout, self.provenance)
        extent = Extent(self._partial, self.rows, self._offsets)
        kinds = {"condition_width": self._condition_width, "captioned": (CAPTION_ENDS in self._columns,)}
        digest = content_digest(self.layout, texts, [extent], lambda name: [self._columns[name]], **kinds)
        if self.expected_digest not in (None, digest):
            raise UserError(
                f"{self.path} was not written: its values have digest {digest[:12]}, not {self.expected_digest[:12]} "
                "as when they were read from a latent set, so some were changed, rows were reordered, or vectors or "
                "captions removed; convert the latent set again"
            )
        add_digests(self._partial, self.layout, self.provenance, digest)

    def _reserve(self) -> None:
        """Reserves disk space for what HDF5 will write, as HDF5 crashes on a full disk; if possible, also for codes."""
        end = self._partial.stat().st_size
        columns = sum(column.nbytes for column in (self._columns | self._more).values())
        texts = sum(len(text.encode()) for text in self.provenance.to_attributes().values())
        extra = columns + texts + HEADROOM_BYTES
        if hasattr(os, "posix_fallocate"):  # macOS lacks it: a full disk is only noticed while codes are written
            os.posix_fallocate(self._file.fileno(), 0, end + extra)
        else:
            self._file.seek(end)
            self._file.write(bytes(extra))
            self._file.flush()


@contextmanager
def reporting_full_disk(path: Path) -> Iterator[None]:
    """Converts the error of a full disk while `path` is written into a UserError of one line."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        if not _is_full(error):
            raise
        raise UserError(
            f"no room for {path}: the disk is full; free some space and run the command again, nothing is lost"
        ) from error


def _is_full(error: OSError | RuntimeError) -> bool:
    """Returns whether an error means a full disk. HDF5 states the number of some of its errors only in their text."""
    match = re.search(r"errno = (\d+)", str(error))
    number = error.errno if isinstance(error, OSError) else int(match[1]) if match else None
    return number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
