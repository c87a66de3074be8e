"""Rows of the contiguous datasets of a latent set through memory maps, of one file or several."""

import math
from collections.abc import Iterator, Sequence

import numpy as np
from jaxtyping import Int64
from numpy.lib.stride_tricks import as_strided
from torch import Tensor

from smalti.core.codes import counted_from_start, row_numbers
from smalti.latentsets.hdf5.format import Extent


class MappedRows:
    """One level's codes, or the conditions, in all files of a set, memory-mapped.

    Args:
        extents: The files, in order.
        index: The number of the array among the contiguous datasets (`arrays_of`).
        dtype: The stored type.
        shape: The shape of a row.
    """

    def __init__(self, extents: Sequence[Extent], index: int, dtype: np.dtype, shape: tuple[int, ...]) -> None:
        self.shape = shape
        # Plain arrays over the memory maps: indexing an np.memmap builds an instance of the subclass each time.
        self._maps = [
            np.asarray(np.memmap(extent.path, dtype, "r", extent.offsets[index], (extent.rows, *shape)))
            for extent in extents
        ]
        self._ends = np.cumsum([extent.rows for extent in extents])
        self._total = int(self._ends[-1])
        *others, last = (extent.rows for extent in extents)
        # `--shard-rows` writes such files; dividing takes a tenth of the time of a search
        self._equal_rows = others[0] if others and max(*others, last) == min(others) else 0
        self._map_addresses()

    def take(self, rows: Sequence[int] | Int64[Tensor, " b"] | Int64[np.ndarray, " b"]) -> np.ndarray:
        """Returns the values of rows in any order, `(b, *shape)` in the stored dtype.

        Raises:
            UserError: as `row_numbers` does.
            IndexError: if a row is outside [-len, len).
        """
        numbers = row_numbers(rows)
        if len(self._maps) == 1:
            return np.take(self._maps[0], numbers, axis=0)
        if not numbers.size:
            return np.empty((0, *self.shape), self._maps[0].dtype)
        numbers = counted_from_start(numbers, self._total)
        files = numbers // self._equal_rows if self._equal_rows else self._ends.searchsorted(numbers, "right")
        shifts = self._shifts.take(files)
        if self._whole_rows is not None:
            return self._whole_rows.take(shifts + numbers, 0)
        units = (shifts + numbers * len(self._within))[:, None] + self._within
        # Joined to whole rows first: a unit may be smaller than a value, where one file has them at an odd address.
        rows_of_bytes = self._memory.take(units, 0).reshape(len(numbers), -1)
        return rows_of_bytes.view(self._maps[0].dtype).reshape(-1, *self.shape)

    def blocks(self, rows: int) -> Iterator[np.ndarray]:
        """Yields the values of all rows in order, at most so many rows at once."""
        for codes in self._maps:
            for start in range(0, len(codes), rows):
                yield codes[start : start + rows]

    def _map_addresses(self) -> None:
        """Prepares `take` to gather rows of all files in one call: one for each file would take several times as long.

        All maps are in this process's memory, so the memory from the first to the last is one array of units, with a
        unit that divides the size of a row and all distances between maps. What lies between the maps is never read.
        """
        itemsize = self._maps[0].itemsize
        row_bytes = math.prod(self.shape) * itemsize
        starts = np.array([codes.ctypes.data for codes in self._maps], np.int64)
        distances = starts - starts.min()
        unit = math.gcd(row_bytes, *distances.tolist())
        self._within = np.arange(row_bytes // unit)
        first = self._maps[int(starts.argmin())].reshape(-1)[: row_bytes // itemsize]
        size = (int(distances.max()) + max(codes.nbytes for codes in self._maps)) // unit
        self._memory = as_strided(first.view(np.uint8)[:unit].reshape(1, unit), (size, unit), (unit, 1))
        rows_before = self._ends - [len(codes) for codes in self._maps]
        self._shifts = distances // unit - rows_before * len(self._within)
        strides = (row_bytes, *first.reshape(self.shape).strides)
        # As values, if the distances are whole rows; an odd address would make numpy copy all of it.
        whole = len(self._within) == 1 and first.flags.aligned
        self._whole_rows = as_strided(first, (size, *self.shape), strides) if whole else None
