"""Blocks of an unfinished latent set: only undamaged ones count, the rest is encoded again, and all are merged."""

from collections import namedtuple
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers.latents import PROVENANCE
from hypothesis import given, settings
from hypothesis import strategies as st

from smalti.core.codes import Layout, Level
from smalti.core.errors import UserError
from smalti.latentsets.building.blocks import BlockStore
from smalti.latentsets.building.jobs import Job
from smalti.latentsets.reader import LatentSet

LAYOUT = Layout((Level(1, 2, (300,)), Level(1, 1, channels=2)))
IMAGES, BLOCK_IMAGES = 11, 3
LABELS, SOURCES = torch.arange(IMAGES) % 3 - 1, torch.arange(IMAGES) // 2 * 10**9
HELD_OUT = SOURCES % 3 == 1
COLUMNS = {"labels": LABELS, "source_ids": SOURCES, "held_out": HELD_OUT}


def job(path: Path, **changes) -> Job:
    return replace(Job(path, LAYOUT, IMAGES, BLOCK_IMAGES, flips=True, key={"tokenizer": "a"}), **changes)


def codes_of(images) -> tuple[torch.Tensor, torch.Tensor]:
    """Two rows for each image, which identify it."""
    rows = torch.tensor([2 * image + flip for image in images for flip in range(2)])
    reals = rows.view(-1, 1, 1, 1).float() / 7 + torch.arange(2).view(2, 1, 1)
    return rows.view(-1, 1, 1) * 13 + torch.arange(2), reals


def append(store: BlockStore, blocks, bad=()) -> None:
    for block in blocks:
        images = store.job.images_of(block)
        store.append(block, codes_of(images), {image: f"bad {image}" for image in images if image in bad})


@settings(max_examples=40)
@given(
    owners=st.lists(st.integers(0, 2), min_size=4, max_size=4),
    order=st.permutations(range(4)),
    count=st.integers(0, 4),
    damage=st.sampled_from(["none", "cut", "flip", "zeros"]),
    position=st.floats(0, 1, exclude_max=True),
    bad=st.sets(st.integers(0, IMAGES - 1), max_size=IMAGES - 1),
)
def test_only_undamaged_blocks_count(tmp_path_factory, owners, order, count, damage, position, bad):
    path = tmp_path_factory.mktemp("blocks") / "latents.h5"
    for process in range(3):
        with BlockStore(job(path), process=process) as store:
            if process == 0:
                store.claim()
            append(store, [block for block in order[:count] if owners[block] == process], bad)
    written, lost = set(order[:count]), set()
    own = [block for block in order[:count] if owners[block] == 1]
    if damage != "none" and own:
        file, size = store.folder / "00000-00001.blocks", store.record.itemsize
        content, place = bytearray(file.read_bytes()), int(position * len(own) * size)
        if damage == "cut":
            content, lost = content[:place], set(own[place // size :])
        elif damage == "flip":
            content[place] ^= 1
            lost = {own[place // size]}
        else:  # a disk may contain zeros after a power failure
            before, content[place:] = bytes(content), bytes(len(content) - place)
            starts = range(0, len(before), size)
            same = [before[start:][:size] == content[start:][:size] for start in starts]
            lost = {block for block, kept in zip(own, same, strict=True) if not kept}
        file.write_bytes(content)
    with BlockStore(job(path)) as store:
        assert store.claim() is None
        assert set(store.missing()) == set(range(4)) - (written - lost)
    with BlockStore(job(path), process=1) as store:
        append(store, store.missing(), bad)
        assert store.missing() == []
    with BlockStore(job(path)) as store:
        store.claim()
        store.merge(PROVENANCE, **COLUMNS)
        store.finish()
    check(path, bad)
    assert not store.folder.exists()


def check(path: Path, bad) -> None:
    latent_set, kept = LatentSet(path), [image for image in range(IMAGES) if image not in bad]
    for grid, expected in zip(latent_set.batch(range(len(latent_set))), codes_of(kept), strict=True):
        assert torch.equal(grid, expected)
    assert latent_set.labels.equal(LABELS[kept].repeat_interleave(2))
    assert latent_set.held_out.equal(HELD_OUT[kept].repeat_interleave(2))
    sources = SOURCES[kept].tolist()
    order = list(dict.fromkeys(sources))
    assert latent_set.source_ids.tolist() == [order.index(source) for source in sources for _ in range(2)]
    assert latent_set.provenance.skipped == tuple({"row": row, "reason": f"bad {row}"} for row in sorted(bad))
    latent_set.verify()


@pytest.mark.parametrize(
    ("changes", "stale"),
    [
        ({}, None),
        ({"key": {"tokenizer": "b"}}, "tokenizer"),
        ({"key": {"tokenizer": "a", "more": 1}}, "more"),
        ({"images": 12}, "images"),
        ({"block_images": 4}, "block_images"),
        ({"layout": Layout((Level(2, 1, (300,)), Level(1, 1, channels=2)))}, "layout"),
        ({"flips": False}, "flips"),
    ],
)
def test_blocks_under_another_key_are_deleted(tmp_path, changes, stale):
    path = tmp_path / "latents.h5"
    with BlockStore(job(path)) as store:
        store.claim()
        append(store, [0, 2], bad={1})
    with BlockStore(job(path, **changes)) as store:
        assert store.claim() == stale
        assert (2 in store.missing()) == (stale is not None)
        assert bool([*store.folder.glob("*.s*")]) == (stale is None)


def test_blocks_without_a_key_are_not_used(tmp_path):
    path = tmp_path / "latents.h5"
    with BlockStore(job(path)) as store:
        store.claim()
        append(store, range(4))
    (store.folder / "key.json").unlink()
    with BlockStore(job(path)) as store:
        assert store.claim() is None
        assert store.missing() == [0, 1, 2, 3]


def test_truncated_note_damages_no_other(tmp_path):
    path = tmp_path / "latents.h5"
    with BlockStore(job(path)) as store:
        store.claim()
        append(store, [0], bad={1, 2})
        notes = store.folder / "00000-00000.skipped"
        notes.write_text(notes.read_text()[:-5])
        append(store, [1, 2, 3], bad={4})
        store.merge(PROVENANCE, **COLUMNS)
        store.finish()
    skipped = {image["row"]: image["reason"] for image in LatentSet(path).provenance.skipped}
    assert skipped == {1: "bad 1", 2: "it could not be decoded", 4: "bad 4"}


def test_blocks_that_lack_an_image_are_missing_on_request(tmp_path):
    path = tmp_path / "latents.h5"
    with BlockStore(job(path), process=1) as store:
        store.folder.mkdir()
        append(store, range(4), bad={4, 10})
        assert store.missing() == []
        assert store.missing(with_bad=True) == [1, 3]
    with BlockStore(job(path)) as store:  # images were repaired; this shard is read before the other
        append(store, [1], bad={})
        assert store.missing(with_bad=True) == [3]
        store.merge(PROVENANCE, **COLUMNS)
        store.finish()
    check(path, {10})


def test_failed_process_stops_the_others_until_the_next_build(tmp_path):
    first, second = BlockStore(job(tmp_path / "latents.h5")), BlockStore(job(tmp_path / "latents.h5"), process=1)
    first.claim()
    assert not second.abandoned
    first.abandon()
    assert second.abandoned
    first.claim()
    assert not second.abandoned


def test_only_bad_images_are_refused_and_their_blocks_stay(tmp_path):
    with BlockStore(job(tmp_path / "latents.h5")) as store:
        store.claim()
        append(store, range(4), bad=range(IMAGES))
        with pytest.raises(UserError, match="none of the 11 images can be decoded"):
            store.merge(PROVENANCE, **COLUMNS)
        assert store.missing() == []


def test_records_are_hardly_larger_than_their_codes(tmp_path):
    layout = Layout((Level(8, 8, (512,)),))
    store = BlockStore(job(tmp_path / "latents.h5", layout=layout, block_images=128))
    assert store.record.itemsize < 1.01 * 256 * 128


def test_the_room_for_vectors_counts(tmp_path, monkeypatch):
    usage = namedtuple("Usage", "total used free")
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage(0, 0, 1_000_000))
    for width in (0, 768):
        with BlockStore(job(tmp_path / "x.h5", images=1_000, condition_width=width)) as store:
            store.claim()
            with pytest.raises(UserError, match="no room") if width else nullcontext():
                store.require_room(0)
