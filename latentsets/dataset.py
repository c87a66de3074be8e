"""The torch `Dataset` of a latent set: whole batches of one level and its coarser levels, from one side of the split.

Batches come from a memory map of the file (in this process or in DataLoader workers) or from a copy on the device.
Reading a whole latent set is in `reader.py`.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from smalti.core.codes import Split, counted_from_start, row_numbers
from smalti.core.config import require_choice
from smalti.core.errors import UserError
from smalti.latentsets.hdf5.format import CONDITION_DTYPE, level_bytes
from smalti.latentsets.reader import LatentSet

RESIDENT_SHARE = 0.25
"""Largest share of the device's free memory that codes may take; the network and its activations need the rest."""
PREFETCHING_WORKERS = 2

_SIGNED = {1: np.dtype("u1"), 2: np.dtype("<i2"), 4: np.dtype("<i4")}
"""The dtype by item size under which codes are kept in torch. Torch has few operations for uint16 and uint32, so their
bits are stored in signed integers and `_widen` undoes that."""


class LatentRows(Dataset):
    """A torch dataset of code grids whose `__getitems__` returns whole batches.

    They need no collation: `DataLoader(rows, batch_size=32, collate_fn=torch.utils.data.default_convert)`.

    The held-out split is the one stored in the set. Rows made from one source image, such as mirror images, are always
    on the same side.

    Args:
        latent_set: The set to read. DataLoader workers read through their own memory map of its file.
        split: The side to read: `train`, `held_out`, or `all` rows.
        level: The level whose codes are the target. The codes of all coarser levels come with them.
        conditions: Whether the rows' vectors come with them.

    Raises:
        UserError: if the set has no such level, no vectors, or no rows on that side.
    """

    def __init__(self, latent_set: LatentSet, *, split: Split, level: int = 0, conditions: bool = False) -> None:
        require_choice("split", split, Split)
        latent_set.layout.level(level, latent_set.path)  # raises if there is none
        self.latent_set, self.level = latent_set, level
        rows, self._index = len(latent_set), None
        if split != "all":
            held_out = np.unpackbits(latent_set.overview.held_out, count=rows).view(bool)
            numbers = np.arange(rows, dtype=np.min_scalar_type(rows))  # half the memory of int64
            self._index = numbers[held_out if split == "held_out" else ~held_out]
        self._length = rows if self._index is None else len(self._index)
        if not self._length:
            raise UserError(f"{latent_set.path} has no {split} rows among {len(latent_set)}; build it from more images")
        if conditions:
            latent_set.vectors([])  # raises if there are none
        self.conditions = conditions
        self._labels = latent_set.overview.labels
        self._levels = {"codes": level, **{f"upper_{coarser}": coarser for coarser in range(level)}}
        self._resident: dict[str, Tensor] | None = None

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, row: int) -> dict[str, Tensor]:
        """Returns one row, without the dimension of the batch; see `__getitems__`, which is faster for many."""
        return {name: column[0] for name, column in self.__getitems__([row]).items()}

    def __getitems__(self, rows: Sequence[int]) -> dict[str, Tensor]:
        """Returns one batch, on the CPU or on the device that `to` copied the codes to.

        Returns:
            `codes` of the level: int64 `(b, h, w)`, or float32 `(b, c, h, w)` if the level is continuous. `upper_0`,
            `upper_1`, ...: the codes of the coarser levels in the same form, coarsest first. `labels`: int64 `(b,)`,
            -1 for none. `conditions`: float32 `(b, v)`, the vectors, if they were asked for. `rows`: int64 `(b,)`, the
            requested row numbers within this dataset, counted from 0.

        Raises:
            UserError: as `row_numbers` does.
            IndexError: if a row is outside [-len, len).
        """
        # numpy converts a list and gathers rows several times faster than torch
        numbers = counted_from_start(row_numbers(rows), self._length)
        if self._resident:
            numbers = torch.from_numpy(numbers).to(self._resident["labels"].device)
            batch = {name: column.index_select(0, numbers) for name, column in self._resident.items()}
            widened = {name: _widen(batch[name]) for name in batch if name != "labels"}
            return {**batch, **widened, "rows": numbers}
        index = numbers if self._index is None else self._index[numbers].astype(np.int64)
        codes = {name: self.latent_set.read(level, index) for name, level in self._levels.items()}
        columns = {"labels": self._labels[index].astype(np.int64), "rows": numbers}
        vectors = {"conditions": self.latent_set.vectors(index)} if self.conditions else {}
        return codes | {name: torch.from_numpy(column) for name, column in columns.items()} | vectors

    @property
    def resident_bytes(self) -> int:
        """Device memory that the codes, and vectors, take after `to`."""
        vectors = len(self) * self.latent_set.condition_width * CONDITION_DTYPE.itemsize if self.conditions else 0
        codes = sum(level_bytes(level, len(self)) for level in self.latent_set.layout.levels[: self.level + 1])
        return codes + vectors

    def for_training(self, device: torch.device, workers: int) -> tuple["LatentRows", int]:
        """Chooses the fastest way to feed a device; returns the rows and the number of DataLoader workers to use.

        Codes that fit are copied to the device whole, where a batch costs one indexing operation. Codes that do not
        fit stay memory-mapped, and DataLoader workers prefetch and pin the batches. They also stay mapped if workers
        were requested, and on a CPU, which can read the map directly.
        """
        if device.type == "cpu" or workers:
            return self, workers
        if self.resident_bytes <= _free_bytes(device) * RESIDENT_SHARE:
            return self.to(device), 0
        return self, PREFETCHING_WORKERS

    def to(self, device: torch.device | str) -> "LatentRows":
        """Copies all codes to a device in their stored width; later batches are indexed there. Returns itself.

        Raises:
            UserError: if a code is outside its level's codebook.
        """
        index = np.arange(self._length) if self._index is None else self._index.astype(np.int64)
        self._resident = {"labels": torch.from_numpy(self._labels[index].astype(np.int64)).to(device)}
        for name, level in self._levels.items():
            codes = self.latent_set.read_stored(level, index)
            if self.latent_set.layout.levels[level].radices:
                codes = codes.view(_SIGNED[codes.itemsize])
            self._resident[name] = torch.from_numpy(codes).to(device)
        if self.conditions:
            self._resident["conditions"] = self.latent_set.vectors(index).half().to(device)
        return self


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
    return 0  # unknown for other devices: the codes stay in the CPU's memory


def _widen(codes: Tensor) -> Tensor:
    """Converts codes stored under `_SIGNED` dtypes to int64, continuous codes and vectors to float32."""
    if codes.is_floating_point():
        return codes.float()
    return codes.long().bitwise_and_((1 << 8 * codes.itemsize) - 1)  # undoes the sign extension
