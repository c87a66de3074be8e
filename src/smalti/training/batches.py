"""The rows of each step, as a function of seed and step: a resumed run needs no data loader state.

Training counts steps, not epochs; an epoch is only a new permutation of the rows. Data sets define what a row contains.
"""

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from typing import Any, Protocol, TypeAlias, cast, runtime_checkable

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from smalti.core.errors import OneProcessError, UserError
from smalti.core.randomness import generator_for

Batch: TypeAlias = dict[str, Tensor]


@runtime_checkable
class RowData(Protocol):
    """A data set that returns whole batches.

    `__getitems__` returns tensors by name, among them `rows`, the int64 numbers of the requested rows.
    """

    def __len__(self) -> int: ...

    def __getitems__(self, rows: list[int]) -> Batch: ...


class StepRows(Sampler[list[int]]):
    """The row numbers of each step: a new permutation every epoch, cut into global batches that may span epochs.

    Each process takes one contiguous share of the batch: together the rows of a step are the same for any number of
    processes.
    """

    def __init__(
        self, size: int, *, batch_size: int, seed: int, steps: range, process: int = 0, processes: int = 1
    ) -> None:
        assert size > 0
        assert batch_size % processes == 0
        self.size, self.batch_size, self.seed, self.steps = size, batch_size, seed, steps
        share = batch_size // processes
        self.slice = slice(process * share, (process + 1) * share)

    def __len__(self) -> int:
        return len(self.steps)

    def __iter__(self) -> Iterator[list[int]]:
        orders: dict[int, Tensor] = {}
        for step in self.steps:
            first, end = step * self.batch_size, (step + 1) * self.batch_size
            epochs = range(first // self.size, (end - 1) // self.size + 1)
            orders = {epoch: orders[epoch] if epoch in orders else self._order(epoch) for epoch in epochs}
            parts = [
                rows[max(0, first - epoch * self.size) : end - epoch * self.size] for epoch, rows in orders.items()
            ]
            yield torch.cat(parts)[self.slice].tolist()

    def _order(self, epoch: int) -> Tensor:
        kind = torch.int32 if self.size < 2**31 else torch.int64  # the order is the same, and takes half the memory
        return torch.randperm(self.size, generator=generator_for(self.seed, epoch), dtype=kind)


class _ErrorsReturned:
    """Returns errors of rows, such as a missing image, as text: an exception of a worker would be a traceback."""

    def __init__(self, data: RowData) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __getitems__(self, rows: list[int]) -> Batch | str:
        try:
            return self.data.__getitems__(rows)
        except UserError as error:
            return str(error)


def batches(data: RowData, rows: StepRows, *, workers: int, pin_memory: bool) -> Iterator[Batch]:
    """Yields whole batches, made in this process or in workers that leave signals to it.

    Raises:
        OneProcessError: if rows cannot be read; other processes read other rows of the batch.
    """
    loader = DataLoader(
        cast(Dataset, _ErrorsReturned(data)),
        batch_sampler=rows,
        num_workers=workers,
        collate_fn=_unchanged,
        worker_init_fn=leave_signals,
        pin_memory=pin_memory,
    )
    for batch in loader:
        if isinstance(batch, str):
            raise OneProcessError(batch)
        yield batch


def _unchanged(batch: Any) -> Any:
    return batch


def leave_signals(_worker: int) -> None:
    """Makes a data loader worker ignore SIGINT, and SIGTERM unless the process that it works for sent it.

    Ctrl-C and schedulers signal all processes of a job. The process that trains handles that, and still needs its
    workers for the step that it finishes. A worker within a call that holds the interpreter ends after it.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # not on macOS
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_by_signal, daemon=True).start()


def _end_by_signal() -> None:
    trainer = multiprocessing.parent_process()
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != getattr(trainer, "pid", None):
        if trainer is None or not trainer.is_alive():
            break
    os._exit(0)
