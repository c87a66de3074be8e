"""The torch dataset of a latent set: splits, batches in this process and in DataLoader workers, codes on a device."""

import re
from typing import Any

import jaxtyping
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader, default_convert

from smalti.core.codes import Layout, Level
from smalti.core.errors import UserError
from smalti.images.splits import held_out
from smalti.latentsets.dataset import LatentRows
from smalti.latentsets.provenance import Provenance
from smalti.latentsets.reader import LatentSet
from smalti.latentsets.writer import LatentSetWriter

ROWS = 300
LAYOUT = Layout(
    (Level(1, 2, channels=2), Level(2, 3, (256,)), Level(2, 2, (41, 41, 38)), Level(2, 2, (41, 41, 41))),
)
WIDTHS_BYTES = (4, 1, 2, 4)
LABELS = torch.arange(ROWS) % 7 - 1
SOURCE_IDS = torch.arange(ROWS) // 3
HELD_OUT = held_out(SOURCE_IDS * 7919)  # of other ids: the set must keep the split, not compute it


def make_codes() -> tuple[torch.Tensor, ...]:
    """Codes that identify their row, from the top of each codebook down; at level 2 they use both bytes."""
    numbers = torch.arange(ROWS * 6).view(ROWS, 2, 3)
    return (
        torch.arange(ROWS * 4, dtype=torch.float32).view(ROWS, 2, 1, 2),
        numbers % 256,
        41 * 41 * 38 - 1 - numbers[:, :, :2] * 30,
        41 * 41 * 41 - 1 - numbers[:, :, :2] * 30,
    )


@pytest.fixture(scope="module")
def latent_set(tmp_path_factory: pytest.TempPathFactory) -> LatentSet:
    path = tmp_path_factory.mktemp("sets") / "latents.h5"
    provenance = Provenance("hrvq", {}, "ab" * 32, "runs/tokenizers/hrvq", "emoji", "f00d", {})
    columns = {"labels": LABELS, "source_ids": SOURCE_IDS, "held_out": HELD_OUT, "flipped": torch.arange(ROWS) % 3 == 1}
    with LatentSetWriter(path, LAYOUT, **columns, provenance=provenance) as writer:
        writer.write(0, make_codes())
    return LatentSet(path)


def identity(batch: Any) -> Any:
    return batch


def test_split_separates_source_images_and_loses_no_row(latent_set):
    train, kept = (LatentRows(latent_set, split=split, level=1) for split in ("train", "held_out"))
    assert len(train) + len(kept) == len(LatentRows(latent_set, split="all")) == ROWS
    rows_of_kept = HELD_OUT.nonzero().squeeze(1)
    batch = kept.__getitems__(list(range(len(kept))))
    assert torch.equal(batch["codes"], make_codes()[1][rows_of_kept])
    assert torch.equal(batch["labels"], LABELS[rows_of_kept])
    sources = [set(SOURCE_IDS[side == HELD_OUT].tolist()) for side in (True, False)]
    assert len(kept) == 3 * len(sources[0]) > 0
    assert not sources[0] & sources[1]


@settings(max_examples=25)
@given(level=st.sampled_from(range(4)), asked=st.lists(st.integers(0, 200), min_size=1, max_size=9))
def test_resident_batch_equals_memory_mapped_batch(latent_set, level, asked):
    rows = LatentRows(latent_set, split="train", level=level)
    mapped = rows.__getitems__(asked)
    resident = rows.to("cpu").__getitems__(asked)
    expected = make_codes()[level][~HELD_OUT][asked]
    for batch in (mapped, resident):
        assert torch.equal(batch["codes"], expected)
        assert batch["codes"].dtype == (torch.int64 if level else torch.float32)
        for coarser in range(level):
            assert torch.equal(batch[f"upper_{coarser}"], make_codes()[coarser][~HELD_OUT][asked])
        assert torch.equal(batch["labels"], LABELS[~HELD_OUT][asked])
        assert batch["rows"].tolist() == asked
        assert len(batch) == level + 3


def test_resident_codes_keep_their_stored_width(latent_set):
    stored_bytes = [codes.numel() * width for codes, width in zip(make_codes(), WIDTHS_BYTES, strict=True)]
    for level in range(len(WIDTHS_BYTES)):
        rows = LatentRows(latent_set, split="all", level=level).to("cpu")
        assert rows._resident is not None
        assert rows._resident["codes"].nbytes == stored_bytes[level]
        held = sum(codes.nbytes for name, codes in rows._resident.items() if name != "labels")
        assert held == rows.resident_bytes == sum(stored_bytes[: level + 1])


@pytest.mark.parametrize(("method", "workers", "reads"), [("fork", 2, 100_000), ("spawn", 1, 10_000)])
def test_dataloader_workers_read_correct_rows(tmp_path, method, workers, reads):
    """Spawned workers receive the set by its path and map the file again."""
    numbers, layout = torch.arange(20_000), Layout((Level(2, 3, (2**17,)),))
    columns = {"labels": numbers % 5 - 1, "source_ids": numbers, "held_out": numbers < 0, "flipped": numbers < 0}
    codes = numbers.view(-1, 1, 1) * 6 + torch.arange(6).view(2, 3)  # they identify their row and position
    provenance = Provenance("hrvq", {}, "ab" * 32, "runs/tokenizers/hrvq", "emoji", "f00d", {})
    with LatentSetWriter(tmp_path / "latents.h5", layout, **columns, provenance=provenance) as writer:
        writer.write(0, (codes,))
    rows = LatentRows(LatentSet(tmp_path / "latents.h5"), split="all")
    order = torch.randint(len(rows), (reads,), generator=torch.Generator().manual_seed(0))
    loader = DataLoader(
        rows, 256, sampler=order.tolist(), num_workers=workers, multiprocessing_context=method, collate_fn=identity
    )
    read = 0
    for batch in loader:
        asked = order[read : read + len(batch["rows"])]
        assert torch.equal(batch["rows"], asked)
        assert torch.equal(batch["codes"], codes[asked])
        assert torch.equal(batch["labels"], asked % 5 - 1)
        read += len(asked)
    assert read == reads


def test_training_copies_codes_to_the_device_if_they_fit(latent_set, monkeypatch):
    moved = []
    monkeypatch.setattr(LatentRows, "to", lambda self, device: moved.append(device) or self)
    rows, gpu = LatentRows(latent_set, split="all", level=1), torch.device("cuda")
    for free_bytes, device, workers, expected, moves in [
        (4 * rows.resident_bytes, gpu, 0, 0, [gpu]),
        (4 * rows.resident_bytes - 4, gpu, 0, 2, []),
        (4 * rows.resident_bytes, gpu, 3, 3, []),
        (0, torch.device("cpu"), 0, 0, []),
    ]:
        monkeypatch.setattr("smalti.latentsets.dataset._free_bytes", lambda _, free=free_bytes: free)
        moved.clear()
        assert rows.for_training(device, workers) == (rows, expected)
        assert moved == moves


def test_missing_level_and_empty_split_are_refused(latent_set, tmp_path):
    with pytest.raises(UserError, match="has levels 0 to 3, not 4"):
        LatentRows(latent_set, split="all", level=4)
    for read in (latent_set.usage, latent_set.perplexity, lambda level: latent_set.read(level, [0])):
        for missing in (4, -1):
            with pytest.raises(UserError, match=f"^{latent_set.path} has levels 0 to 3, not {missing}$"):
                read(missing)
    layout, no = Layout((Level(1, 1, (2,)),)), torch.tensor([False])
    columns = {"labels": LABELS[:1], "source_ids": SOURCE_IDS[:1], "held_out": no, "flipped": no}
    with LatentSetWriter(tmp_path / "one.h5", layout, **columns, provenance=latent_set.provenance) as writer:
        writer.write(0, (torch.ones(1, 1, 1).long(),))
    with pytest.raises(UserError, match="has no held_out rows among 1"):
        LatentRows(LatentSet(tmp_path / "one.h5"), split="held_out")


def test_a_split_that_does_not_exist_is_refused(latent_set, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # which checks types in tests alone
    with pytest.raises(UserError, match="split must be one of train, held_out, all, not 'heldout'"):
        LatentRows(latent_set, split="heldout")


WRONG_ROWS = [
    ([True, False], "the rows are a boolean mask; give their numbers, such as mask.nonzero()[:, 0]"),
    (torch.arange(ROWS) > 3, "the rows are a boolean mask"),
    (torch.tensor([0.0, 1.9]), "row numbers must be integers, not float32"),
    ([0.5], "row numbers must be integers, not float64"),
]


@pytest.mark.parametrize(("rows", "message"), WRONG_ROWS)
@pytest.mark.parametrize("resident", [False, True])
def test_masks_and_floats_are_no_row_numbers(rows, message, resident, latent_set, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # which checks types in tests alone
    dataset = LatentRows(latent_set, split="all")
    readers = [(dataset.to("cpu") if resident else dataset).__getitems__, latent_set.batch, latent_set.captions]
    for read in readers:
        with pytest.raises(UserError, match=re.escape(message)):
            read(rows)
        assert read([]) is not None


@pytest.mark.parametrize("resident", [False, True])
def test_one_row_is_that_of_a_batch(latent_set, resident):
    rows = LatentRows(latent_set, split="train", level=1)
    rows = rows.to("cpu") if resident else rows
    batch, row = rows.__getitems__([2, 0]), rows[2]
    assert list(row) == list(batch)
    assert all(value.equal(batch[name][0]) for name, value in row.items())
    assert len(list(rows)) == len(rows)


@pytest.mark.parametrize("split", ["train", "all"])
@pytest.mark.parametrize("resident", [False, True])
def test_negative_rows_count_from_the_end(latent_set, split, resident):
    rows = LatentRows(latent_set, split=split, level=1)
    expected = rows.__getitems__([len(rows) - 1, 0])
    batch = (rows.to("cpu") if resident else rows).__getitems__([-1, -len(rows)])
    assert batch.keys() == expected.keys()
    assert all(torch.equal(batch[name], expected[name]) for name in expected)
    for outside in (len(rows), -len(rows) - 1):
        with pytest.raises(IndexError, match="are not all in"):
            rows.__getitems__([0, outside])


def test_a_data_loader_yields_whole_batches(latent_set):
    rows = LatentRows(latent_set, split="all", level=1)
    first = next(iter(DataLoader(rows, batch_size=4, collate_fn=default_convert)))
    assert torch.equal(first["codes"], make_codes()[1][:4])
    assert first["rows"].tolist() == [0, 1, 2, 3]


def test_columns_are_copies(latent_set):
    for name, expected in (("labels", LABELS), ("source_ids", SOURCE_IDS), ("held_out", HELD_OUT)):
        getattr(latent_set, name).zero_()
        assert torch.equal(getattr(latent_set, name), expected)
    latent_set.flipped.zero_()
    assert int(latent_set.flipped.sum()) == ROWS // 3
