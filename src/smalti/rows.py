"""Which rows of a data set make up step s: a function of seed and step, so that nothing needs to be remembered to go on from any step."""

import signal
from collections.abc import Iterator
from typing import Protocol, TypeAlias, cast

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from smalti.randomness import generator_for

Batch: TypeAlias = dict[str, torch.Tensor]


class RowData(Protocol):
    """A data set that makes whole batches: a tensor for each name, among them `rows`, the int64 row numbers it was asked for."""

    def __len__(self) -> int: ...

    def __getitems__(self, rows: list[int]) -> Batch: ...


class StepRows(Sampler[list[int]]):
    """The rows of each step from `first_step` on: a new permutation of the data set every epoch, cut into global batches that run on
    across epochs, each cut into one slice a process.
    """

    def __init__(self, size: int, *, batch_size: int, seed: int, first_step: int, last_step: int, process: int = 0, processes: int = 1) -> None:
        self.size, self.batch_size, self.seed = size, batch_size, seed
        self.steps = range(first_step, last_step)
        self.slice = slice(process * batch_size // processes, (process + 1) * batch_size // processes)

    def __len__(self) -> int:
        return len(self.steps)

    def __iter__(self) -> Iterator[list[int]]:
        epoch, order = -1, torch.empty(0, dtype=torch.long)
        for step in self.steps:
            rows: list[int] = []
            for position in range(step * self.batch_size, (step + 1) * self.batch_size):
                if position // self.size != epoch:
                    epoch = position // self.size
                    order = torch.randperm(self.size, generator=generator_for(self.seed, epoch))
                rows.append(int(order[position % self.size]))
            yield rows[self.slice]


def batches(data: RowData, rows: Sampler[list[int]], *, workers: int, pin_memory: bool) -> DataLoader:
    """A loader whose data set makes each batch whole (`__getitems__`), in this process or in workers that leave Ctrl-C to it."""
    return DataLoader(
        cast(Dataset, data), batch_sampler=rows, num_workers=workers, collate_fn=_as_it_is, worker_init_fn=_leave_interrupts, pin_memory=pin_memory
    )


def _as_it_is(batch: Batch) -> Batch:
    return batch


def _leave_interrupts(_worker: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
