"""Tests of the row order: every epoch has each row once, for any batch size, number of processes and resumed step."""

import itertools
import multiprocessing
import os
import signal
import subprocess
import time

import pytest
import torch
from helpers.toys import Rows
from hypothesis import given, settings
from hypothesis import strategies as st

from smalti.core.errors import OneProcessError, UserError
from smalti.core.randomness import derive, generator_for, row_seeds
from smalti.training.batches import StepRows, batches, leave_signals
from smalti.training.config import FitConfig
from smalti.training.loop import step_seeds

SIZES = {"size": st.integers(2, 20), "share": st.integers(1, 5), "seed": st.integers(-5, 5)}


@given(**SIZES, steps=st.integers(1, 12))
def test_every_epoch_is_a_permutation(size, share, seed, steps):
    """Also if a batch is larger than the data and spans several epochs."""
    stream = [row for rows in StepRows(size, batch_size=share, seed=seed, steps=range(steps)) for row in rows]
    assert len(stream) == share * steps
    for start in range(0, len(stream), size):
        epoch = stream[start : start + size]
        assert len(set(epoch)) == len(epoch)
        assert set(epoch) <= set(range(size))


@settings(max_examples=50)
@given(**SIZES, processes=st.integers(1, 4), step=st.integers(0, 9))
def test_rows_have_a_seed_for_each_time_that_a_step_has_them(size, share, seed, processes, step):
    """Also a row that a batch larger than the data has several times; equally for any number of processes."""
    batch_size = share * processes
    config = FitConfig(seed=seed, batch_size=batch_size)

    def seeds(processes: int) -> list[int]:
        parts = []
        for process in range(processes):
            rows = StepRows(
                size,
                batch_size=batch_size,
                seed=seed,
                steps=range(step, step + 1),
                process=process,
                processes=processes,
            )
            (chosen,) = rows
            first = step * batch_size + process * len(chosen)
            parts += step_seeds(config, step, torch.tensor(chosen), first, size).tolist()
        return parts

    together = seeds(1)
    assert len(set(together)) == batch_size
    assert seeds(processes) == together
    if step * batch_size // size == ((step + 1) * batch_size - 1) // size:  # all of one epoch
        (rows,) = StepRows(size, batch_size=batch_size, seed=seed, steps=range(step, step + 1))
        assert together == derive(row_seeds(seed, torch.tensor(rows)), step).tolist()


@settings(max_examples=50)
@given(**SIZES, processes=st.integers(1, 4), first=st.integers(0, 3), count=st.integers(0, 3))
def test_processes_share_the_batch_and_resuming_keeps_the_order(size, share, seed, processes, first, count):
    batch_size = share * processes
    whole = list(StepRows(size, batch_size=batch_size, seed=seed, steps=range(first + count)))
    shares = [
        list(
            StepRows(
                size,
                batch_size=batch_size,
                seed=seed,
                steps=range(first, first + count),
                process=process,
                processes=processes,
            )
        )
        for process in range(processes)
    ]
    assert all(len(rows) == share for share_of_process in shares for rows in share_of_process)
    assert [[*itertools.chain(*rows)] for rows in zip(*shares, strict=True)] == whole[first:]


def _worker(ready):
    leave_signals(0)
    ready.set()
    time.sleep(60)


@pytest.mark.parametrize("start", ["fork", "forkserver"])
def test_only_the_training_process_ends_its_workers(start):
    context = multiprocessing.get_context(start)
    ready = context.Event()
    worker = context.Process(target=_worker, args=(ready,), daemon=True)
    worker.start()
    assert ready.wait(60)
    subprocess.run(["kill", "-TERM", str(worker.pid)], check=True)
    os.kill(worker.pid, signal.SIGINT)
    worker.join(0.5)
    assert worker.is_alive()
    worker.terminate()
    worker.join(20)
    assert not worker.is_alive()


def test_order_depends_on_epoch_and_seed():
    size = 40
    first, second = list(StepRows(size, batch_size=size, seed=0, steps=range(2)))
    (other,) = list(StepRows(size, batch_size=size, seed=1, steps=range(1)))
    assert len({tuple(order) for order in (first, second, other, sorted(first))}) == 4
    assert first == torch.randperm(size, generator=generator_for(0, 0)).tolist()  # of int64; half as large here


@pytest.mark.parametrize("workers", [0, 1])
def test_loader_returns_whole_batches_in_order_with_and_without_workers(workers):
    data = Rows(x=torch.arange(7) * 10)
    rows = StepRows(7, batch_size=3, seed=0, steps=range(2, 6))
    loaded = list(batches(data, rows, workers=workers, pin_memory=False))
    assert [batch["rows"].tolist() for batch in loaded] == list(rows)
    assert all(torch.equal(batch["x"], batch["rows"] * 10) for batch in loaded)
    assert len(rows) == 4


@pytest.mark.parametrize("workers", [0, 1])
def test_error_of_a_row_is_one_line_that_its_process_prints(workers):
    """Another process does not read the row, and a worker's exception would be a traceback."""
    rows = StepRows(7, batch_size=3, seed=0, steps=range(4))
    loaded = batches(MissingRow(x=torch.arange(7)), rows, workers=workers, pin_memory=False)
    with pytest.raises(OneProcessError) as raised:
        list(loaded)
    assert str(raised.value) == "row 4 is missing"


class MissingRow(Rows):
    """A data set whose row 4 cannot be read."""

    def __getitems__(self, rows):
        if 4 in rows:
            raise UserError("row 4 is missing")
        return super().__getitems__(rows)
