"""Rows of a latent set as training wants them: one level and those above it, one side of the held-out split, whole
batches at a time."""

from collections.abc import Sequence
from typing import Literal, TypeAlias

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from smalti.core.errors import UserError
from smalti.latentsets.format import level_bytes
from smalti.latentsets.reader import LatentSet

Split: TypeAlias = Literal["train", "held_out", "all"]

RESIDENT_SHARE = 0.25  # of the memory that is free on the device: the network and what it computes need the rest
PREFETCHING_WORKERS = 2

_SIGNED = {1: np.dtype("u1"), 2: np.dtype("<i2"), 4: np.dtype("<i4")}
"""What torch computes with at each width. It has few operations for uint16 and uint32: their bits travel as signed."""


class LatentRows(Dataset):
    """A torch dataset of code grids that gives whole batches, so a `DataLoader`'s `collate_fn` has nothing to do.

    The split is the one stored in the set: mirror images, and all else made from one source image, are on one side.

    Args:
        latent_set: to read from; in workers through a map of the file.
        split: which side: `train`, `held_out`, or `all` rows.
        level: whose codes; with them come those of the levels above.

    Raises:
        UserError: if the set has no such level, or no rows on that side.
    """

    def __init__(self, latent_set: LatentSet, *, split: Split, level: int = 0) -> None:
        if not 0 <= level < len(latent_set.layout.levels):
            raise UserError(f"{latent_set.path} has levels 0 to {len(latent_set.layout.levels) - 1}, not {level}")
        self.latent_set, self.level = latent_set, level
        if split == "all":
            self._index = np.arange(len(latent_set))
        else:
            self._index = np.flatnonzero(latent_set.held_out.numpy() == (split == "held_out"))
        if not len(self._index):
            raise UserError(f"{latent_set.path} has no {split} rows among {len(latent_set)}; build it from more images")
        self._levels = {"codes": level, **{f"upper_{above}": above for above in range(level)}}
        self._resident: dict[str, Tensor] | None = None

    def __len__(self) -> int:
        return len(self._index)

    def __getitems__(self, rows: Sequence[int]) -> dict[str, Tensor]:
        """One batch, on the CPU or where `to` moved it.

        Returns:
            `codes` of the level, int64 `(b, h, w)`, or float32 `(b, c, h, w)` where it is continuous; likewise
            `upper_0`, `upper_1`, ... of the levels above, coarsest first; `labels`, int64 `(b,)`, -1 for none; `rows`,
            int64 `(b,)`: the numbers asked for, each naming its row within this dataset.
        """
        if self._resident:
            numbers = torch.as_tensor(rows, dtype=torch.int64, device=self._resident["labels"].device)
            batch = {name: column.index_select(0, numbers) for name, column in self._resident.items()}
            return {**batch, **{name: _widen(batch[name]) for name in self._levels}, "rows": numbers}
        numbers = np.array(rows, np.int64)  # numpy reads a list, and gathers, several times faster than torch
        index = self._index[numbers]
        codes = {name: self.latent_set.read(level, index) for name, level in self._levels.items()}
        columns = {"labels": self.latent_set.labels.numpy()[index], "rows": numbers}
        return codes | {name: torch.from_numpy(column) for name, column in columns.items()}

    @property
    def resident_bytes(self) -> int:
        """What `to` takes on the device for the codes."""
        return sum(level_bytes(level, len(self)) for level in self.latent_set.layout.levels[: self.level + 1])

    def for_training(self, device: torch.device, workers: int) -> tuple["LatentRows", int]:
        """The same rows as a device reads them fastest, and how many workers a loader then needs.

        Codes that fit move onto the device whole, and a batch costs an index; more than fit stay mapped, for workers
        to prepare and pin ahead. So do those of which workers were asked for, and on a CPU all: they are in its memory
        already.
        """
        if device.type == "cpu" or workers:
            return self, workers
        if self.resident_bytes <= _free_bytes(device) * RESIDENT_SHARE:
            return self.to(device), 0
        return self, PREFETCHING_WORKERS

    def to(self, device: torch.device | str) -> "LatentRows":
        """Moves the codes whole onto a device, in the width they are stored in. From then on a batch costs an index."""
        self._resident = {"labels": self.latent_set.labels[self._index].to(device)}
        for name, level in self._levels.items():
            codes = np.take(self.latent_set.stored[level], self._index, axis=0)
            if self.latent_set.layout.levels[level].radices:
                codes = codes.view(_SIGNED[codes.itemsize])
            self._resident[name] = torch.from_numpy(codes).to(device)
        return self


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
    return 0  # unknown for other devices: the codes stay in the CPU's memory


def _widen(codes: Tensor) -> Tensor:
    if codes.is_floating_point():
        return codes
    return codes.long().bitwise_and_((1 << 8 * codes.itemsize) - 1)  # the top bit was taken for a sign
