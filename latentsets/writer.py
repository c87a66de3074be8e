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

from smalti.codes import Codes, Layout
from smalti.errors import UserError
from smalti.files import whole_file
from smalti.latentsets.format import COLUMNS, Provenance, complete, content_digest, lay_down, level_bytes, stored_dtype

ErrorType: TypeAlias = type[BaseException] | None

HEADROOM_BYTES = 1 << 16
"""Reserved beside codes and columns for HDF5's own records; on closing it gives back what it does not use."""


class LatentSetWriter:
    """Writes one latent set, in a `with` block: it stands at `path` if the block ends well, else `path` is as it was.

    The disk space is reserved on entering, where the system can: a full disk is told before the work, not after it. In
    memory it holds one block and 18 bytes a row.

    Args:
        path: the file to make or to replace.
        layout: of the codes.
        rows: how many there will be; each must be written exactly once.
        provenance: where they come from.

    Raises:
        UserError: if `rows` is below 1; in the block, for values that do not belong, rows written twice or a full disk;
            at its end, if rows are missing.
    """

    def __init__(self, path: str | Path, layout: Layout, *, rows: int, provenance: Provenance) -> None:
        if rows < 1:
            raise UserError(f"a latent set of {rows} rows would be empty; give at least one image")
        self.path, self.layout, self.rows, self.provenance = Path(path), layout, rows, provenance
        self._written = np.zeros(rows, bool)
        self._columns = {name: np.zeros(rows, dtype) for name, dtype in COLUMNS.items()}
        self._stack = ExitStack()
        self._partial: Path
        self._file: BinaryIO
        self._offsets: tuple[int, ...]

    def __enter__(self) -> "LatentSetWriter":
        with ExitStack() as stack, self._room():
            self._partial = stack.enter_context(whole_file(self.path))
            self._offsets = lay_down(self._partial, self.layout, self.rows, self.provenance)
            self._file = stack.enter_context(self._partial.open("r+b"))
            self._reserve()
            stack.push(self._finish)  # runs first on leaving; if it raises, the file is dropped as if the block had
            self._stack = stack.pop_all()
        return self

    def __exit__(self, kind: ErrorType, error: BaseException | None, trace: TracebackType | None) -> None:
        with self._room():
            self._stack.__exit__(kind, error, trace)

    def write(
        self,
        start: int,
        codes: Codes,
        labels: Int64[Tensor, " b"],
        source_ids: Int64[Tensor, " b"],
        flipped: Bool[Tensor, " b"],
    ) -> None:
        """Writes rows `start` to `start + b`. Labels are -1 for none; rows of one source image share their source id.

        Raises:
            UserError: for codes outside the layout, a label without a name, rows outside the set or written before, or
                a full disk.
        """
        rows = slice(start, start + len(codes[0]))
        self.layout.check(codes)
        columns = dict(zip(COLUMNS, (labels, source_ids, flipped), strict=True))
        assert {len(values) for values in (*codes, *columns.values())} == {len(codes[0])}
        if start < 0 or rows.stop > self.rows:
            raise UserError(f"rows {start} to {rows.stop - 1} do not fit a latent set of {self.rows} rows")
        if self._written[rows].any():
            raise UserError(f"row {start + int(self._written[rows].argmax())} was already written; write each row once")
        largest_label = (len(self.provenance.label_names) or 2**63) - 1
        if len(wrong := labels[(labels < -1) | (labels > largest_label)]):
            raise UserError(f"{int(wrong[0])} is no label; give -1 for none or a number up to {largest_label}")
        with self._room():
            for level, grid, offset in zip(self.layout.levels, codes, self._offsets, strict=True):
                assert grid.is_floating_point() == bool(level.channels), "codes are integers, continuous levels floats"
                self._file.seek(offset + level_bytes(level, start))
                self._file.write(np.ascontiguousarray(grid.detach().cpu().numpy(), stored_dtype(level)).data)
        for name, values in columns.items():
            self._columns[name][rows] = values.numpy()
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
        digest = content_digest(self._partial, self.layout, self._offsets, self._columns)
        complete(self._partial, self._columns, digest)

    def _reserve(self) -> None:
        if hasattr(os, "posix_fallocate"):  # not on macOS: there a full disk is noticed when it is full
            os.posix_fallocate(self._file.fileno(), 0, self._bytes())

    def _bytes(self) -> int:
        codes = sum(level_bytes(level, self.rows) for level in self.layout.levels)
        return max(self._offsets) + codes + sum(column.nbytes for column in self._columns.values()) + HEADROOM_BYTES

    @contextmanager
    def _room(self) -> Iterator[None]:
        try:
            yield
        except (OSError, RuntimeError) as error:
            if not _is_full(error):
                raise
            needed = sum(level_bytes(level, self.rows) for level in self.layout.levels) / 2**20
            raise UserError(f"no room for {self.path} ({needed:.1f} MiB); free some or write elsewhere") from error


def _is_full(error: OSError | RuntimeError) -> bool:
    """Whether an error is for want of room; HDF5 gives some of its errors as text only."""
    said = re.search(r"errno = (\d+)", str(error))
    number = error.errno if isinstance(error, OSError) else int(said[1]) if said else None
    return number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
