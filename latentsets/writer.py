"""Writing a latent set: blocks of rows in any order into a file that takes its name only when it is whole."""

import errno
import os
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, TypeAlias

import numpy as np
from jaxtyping import Bool, Int64
from torch import Tensor

from smalti.core.codes import Codes, Layout
from smalti.core.errors import UserError
from smalti.core.files import whole_file
from smalti.latentsets.format import (
    COLUMNS,
    Provenance,
    add_columns,
    complete,
    content_digest,
    fault,
    lay_down,
    level_bytes,
    stored_dtype,
)

ErrorType: TypeAlias = type[BaseException] | None

HEADROOM_BYTES = 1 << 16
"""Reserved beside codes, columns and texts for HDF5's own records; on closing it gives back what it does not use."""


class LatentSetWriter:
    """Writes one latent set, in a `with` block: it stands at `path` if the block ends well, else `path` is as it was.

    The disk space is reserved on entering, where the system can: a full disk is told before the work, not after it. In
    memory it holds one block and 19 bytes a row.

    Args:
        path: the file to make or to replace.
        layout: of the codes.
        labels: the class of each row, -1 for none.
        source_ids: as `number_sources` gives them; rows of one source image share theirs.
        held_out: whether training must not see a row; the same for all rows of a source.
        flipped: whether a row is a mirror image.
        provenance: where the codes come from.

    Raises:
        UserError: if there are no rows, or columns are not as described; in the block, for codes that do not belong,
            rows written twice or a full disk; at its end, if rows are missing.
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
    ) -> None:
        self.path, self.layout, self.rows, self.provenance = Path(path), layout, len(labels), provenance
        if not self.rows:
            raise UserError(f"{path} was not written: a latent set of 0 rows would be empty; give at least one image")
        given = zip(COLUMNS.items(), (labels, source_ids, held_out, flipped), strict=True)
        self._columns = {name: column.numpy().astype(dtype, copy=False) for (name, dtype), column in given}
        if wrong := fault(self._columns, provenance.label_names):
            raise UserError(f"{path} was not written: {wrong}")
        self._written = np.zeros(self.rows, bool)
        self._stack = ExitStack()
        self._partial: Path
        self._file: BinaryIO
        self._offsets: tuple[int, ...]

    def __enter__(self) -> "LatentSetWriter":
        with ExitStack() as stack, room(self.path):
            self._partial = stack.enter_context(whole_file(self.path))
            self._offsets = lay_down(self._partial, self.layout, self.rows)
            self._file = stack.enter_context(self._partial.open("r+b"))
            self._reserve()
            add_columns(self._partial, self.layout, self.provenance, self._columns)
            stack.push(self._finish)  # runs first on leaving; if it raises, the file is dropped as if the block had
            self._stack = stack.pop_all()
        return self

    def __exit__(self, kind: ErrorType, error: BaseException | None, trace: TracebackType | None) -> None:
        with room(self.path):
            self._stack.__exit__(kind, error, trace)

    def write(self, start: int, codes: Codes) -> None:
        """Writes the codes of rows `start` to `start + b`.

        Raises:
            UserError: for codes outside the layout, rows outside the set or written before, or a full disk.
        """
        self.layout.check(codes)
        assert len({len(grid) for grid in codes}) == 1
        rows = slice(start, start + len(codes[0]))
        if start < 0 or rows.stop > self.rows:
            raise UserError(f"rows {start} to {rows.stop - 1} do not fit a latent set of {self.rows} rows")
        if self._written[rows].any():
            raise UserError(f"row {start + int(self._written[rows].argmax())} was already written; write each row once")
        with room(self.path):
            for level, grid, offset in zip(self.layout.levels, codes, self._offsets, strict=True):
                assert grid.is_floating_point() == bool(level.channels), "codes are integers, continuous levels floats"
                self._file.seek(offset + level_bytes(level, start))
                self._file.write(np.ascontiguousarray(grid.detach().cpu().numpy(), stored_dtype(level)).data)
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
        complete(self._partial, content_digest(self._partial, self.layout, self._offsets, self._columns))

    def _reserve(self) -> None:
        """Takes the room for what HDF5 will write: where it finds none, it crashes. And for the codes, if possible."""
        end = self._partial.stat().st_size
        columns = sum(column.nbytes for column in self._columns.values())
        beside = columns + sum(len(text.encode()) for text in self.provenance.to_attributes().values()) + HEADROOM_BYTES
        if hasattr(os, "posix_fallocate"):  # not on macOS: there it is noticed among the codes that the disk is full
            os.posix_fallocate(self._file.fileno(), 0, end + beside)
        else:
            self._file.seek(end)
            self._file.write(bytes(beside))
            self._file.flush()


@contextmanager
def room(path: Path) -> Iterator[None]:
    """Says in one line, as a UserError, that a full disk ended the writing of `path`."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        if not _is_full(error):
            raise
        raise UserError(
            f"no room for {path}: the disk is full; free some and do the same again, nothing is lost"
        ) from error


def _is_full(error: OSError | RuntimeError) -> bool:
    """Whether an error is for want of room; HDF5 gives some of its errors as text only."""
    said = re.search(r"errno = (\d+)", str(error))
    number = error.errno if isinstance(error, OSError) else int(said[1]) if said else None
    return number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
