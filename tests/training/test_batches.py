"""Which rows a step has: every epoch all of them once, whatever the batch, the processes and where a run goes on."""

import itertools

import pytest
import torch
from helpers.toys import Rows
from hypothesis import given, settings
from hypothesis import strategies as st

from smalti.training.batches import StepRows, batches

SIZES = {"size": st.integers(2, 20), "share": st.integers(1, 5), "seed": st.integers(-5, 5)}


@given(**SIZES, steps=st.integers(1, 12))
def test_every_epoch_is_a_permutation(size, share, seed, steps):
    """Also where a batch is larger than the data: it then runs over several epochs."""
    stream = [row for rows in StepRows(size, batch_size=share, seed=seed, steps=range(steps)) for row in rows]
    assert len(stream) == share * steps
    for start in range(0, len(stream), size):
        epoch = stream[start : start + size]
        assert len(set(epoch)) == len(epoch)
        assert set(epoch) <= set(range(size))


@settings(max_examples=50)
@given(**SIZES, processes=st.integers(1, 4), first=st.integers(0, 3), count=st.integers(0, 3))
def test_processes_share_the_batch_and_a_run_goes_on_where_it_was(size, share, seed, processes, first, count):
    batch_size = share * processes
    whole = list(StepRows(size, batch_size=batch_size, seed=seed, steps=range(first + count)))
    parts = [
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
    assert all(len(rows) == share for part in parts for rows in part)
    assert [[*itertools.chain(*rows)] for rows in zip(*parts, strict=True)] == whole[first:]


def test_epochs_and_seeds_have_other_orders():
    size = 40
    first, second = list(StepRows(size, batch_size=size, seed=0, steps=range(2)))
    (other,) = list(StepRows(size, batch_size=size, seed=1, steps=range(1)))
    assert len({tuple(order) for order in (first, second, other, sorted(first))}) == 4


@pytest.mark.parametrize("workers", [0, 1])
def test_a_loader_gives_whole_batches_in_order_with_and_without_workers(workers):
    data = Rows(x=torch.arange(7) * 10)
    rows = StepRows(7, batch_size=3, seed=0, steps=range(2, 6))
    found = list(batches(data, rows, workers=workers, pin_memory=False))
    assert [batch["rows"].tolist() for batch in found] == list(rows)
    assert all(torch.equal(batch["x"], batch["rows"] * 10) for batch in found)
    assert len(rows) == 4
