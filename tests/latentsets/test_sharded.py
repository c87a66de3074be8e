"""Latent sets of several files: the rows, columns and digest of one file; sets that are not whole are refused."""

import json
import pickle
import shutil
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.latents import GRID, PROVENANCE, make_codes, opened, write
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from smalti.core.codes import Layout, Level
from smalti.core.errors import UserError
from smalti.latentsets.building.blocks import BlockStore
from smalti.latentsets.building.jobs import Job
from smalti.latentsets.dataset import LatentRows
from smalti.latentsets.hdf5.format import Extent
from smalti.latentsets.hdf5.mapped import MappedRows
from smalti.latentsets.reader import LatentSet
from smalti.latentsets.summary import describe
from smalti.latentsets.table import from_parquet, to_parquet

LAYOUT = Layout((Level(1, 2, (300,)), Level(3, 1, (70,)), Level(1, 1, channels=2)))
NAMED = replace(PROVENANCE, label_names=("a", "b", "c"))


def build(path: Path, sources, *, shard_blocks=0, block_images=2, bad=(), crops=0, stop_at=None) -> LatentSet:
    """Builds a set of images with the given sources; with `stop_at`, from a store that stops there and resumes."""
    ids = torch.tensor(sources) * 10**9
    columns = {"labels": ids // 10**9 % 4 - 1, "source_ids": ids, "held_out": ids % 3 == 1}
    job = Job(path, LAYOUT, len(ids), block_images, True, {}, crops, condition_width=2, shard_blocks=shard_blocks)
    with BlockStore(job) as store:
        store.claim()
        for shard in store.unfinished():
            if stop_at is not None and shard >= stop_at:
                return build(path, sources, shard_blocks=shard_blocks, block_images=block_images, bad=bad, crops=crops)
            for block in job.shards[shard]:
                images = job.images_of(block)
                rows = torch.arange(images.start * job.rows_per_image, images.stop * job.rows_per_image).view(-1, 1, 1)
                codes = (rows * 7 % 300 + torch.zeros(1, 2).long(), rows * 3 % 67 + torch.arange(3).view(3, 1))
                reals = rows.view(-1, 1, 1, 1).expand(-1, 2, 1, 1).float() / 3
                vectors = torch.tensor([[image, image / 2] for image in images])
                store.append(block, (*codes, reals), {image: "gone" for image in images if image in bad}, vectors)
            captions = [f"image {number}" * (number % 3) for number in range(len(sources))]
            store.merge(NAMED, **columns, captions=captions, shard=shard)
        store.finish()
    return LatentSet(path)


@settings(max_examples=3, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    sources=st.lists(st.integers(0, 9), min_size=1, max_size=8),
    shard_blocks=st.integers(1, 3),
    crops=st.integers(0, 1),
    stop_at=st.none() | st.integers(1, 2),
    data=st.data(),
)
def test_shards_have_the_rows_and_the_digest_of_one_file(tmp_path_factory, sources, shard_blocks, crops, stop_at, data):
    """Sources recur in later files; a few images are bad, of each file all but one at most."""
    folder = tmp_path_factory.mktemp("sets")
    step = 2 * shard_blocks
    kept = [
        data.draw(st.integers(start, min(start + step, len(sources)) - 1)) for start in range(0, len(sources), step)
    ]
    bad = data.draw(st.sets(st.integers(0, len(sources) - 1))) - {*kept}
    one = build(folder / "one.h5", sources, bad=bad, crops=crops)
    several = build(folder / "set", sources, shard_blocks=shard_blocks, bad=bad, crops=crops, stop_at=stop_at)
    assert len(several.files.extents) == len(kept)
    assert several.content_digest == one.content_digest == several.digest()
    several.verify()
    assert sorted(path.name for path in folder.iterdir()) == ["one.h5", "set"]
    for name in ("labels", "source_ids", "held_out", "flipped"):
        assert getattr(several, name).equal(getattr(one, name))
    assert several.provenance.skipped == one.provenance.skipped
    assert several.count_images() == one.count_images()
    rows = data.draw(st.lists(st.integers(-len(one), len(one) - 1), max_size=8))
    for level in range(3):
        assert several.read(level, rows).equal(one.read(level, rows))
    assert several.usage(1).equal(one.usage(1))
    assert several.vectors(rows).equal(one.vectors(rows))
    assert several.captions(rows) == one.captions(rows)
    assert several.captioned_rows().tolist() == one.captioned_rows().tolist()
    for split in ("train", "held_out"):
        with suppress(UserError):  # no such rows
            expected, found = (LatentRows(each, split=split, level=1) for each in (one, several))
            asked = list(range(len(expected)))
            for name, values in expected.__getitems__(asked).items():
                assert found.__getitems__(asked)[name].equal(values)
    assert describe(several).splitlines()[2:7] == describe(one).splitlines()[2:7]


def test_a_set_is_replaced_although_an_earlier_build_was_killed_as_it_removed_the_replaced_one(tmp_path, monkeypatch):
    """Other files in the folder stay, also those that the killed build had not moved yet."""
    sets = [build(tmp_path / name, range(count), shard_blocks=1) for name, count in (("set", 8), ("other", 6))]
    (tmp_path / "set" / "notes.txt").write_text("mine")
    moved = Path.rename

    def killed(path, target):
        if path.name == "notes.txt":
            raise KeyboardInterrupt
        return moved(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", killed)
        with pytest.raises(KeyboardInterrupt):
            build(tmp_path / "set", range(4), shard_blocks=1)
    assert (tmp_path / ".set.building" / "replaced" / "notes.txt").exists()
    rebuilt = build(tmp_path / "set", range(6), shard_blocks=1)
    assert rebuilt.content_digest == sets[1].content_digest
    assert (tmp_path / "set" / "notes.txt").read_text() == "mine"
    assert not (tmp_path / ".set.building").exists()


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    return build(tmp_path_factory.mktemp("whole") / "set", range(8), shard_blocks=1).path


@pytest.fixture
def shards(whole, tmp_path) -> Path:
    return shutil.copytree(whole, tmp_path / "set")


def refusal(path: Path, *, verify=False) -> str:
    with pytest.raises(UserError) as caught:
        LatentSet(path).verify() if verify else LatentSet(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_pattern_of_all_shards_is_the_set_and_of_some_a_part(shards):
    whole, some, one = (LatentSet(shards / name) for name in ("*.h5", "0000[1-3].h5", "00003.h5"))
    assert whole.content_digest == LatentSet(shards).content_digest
    assert [len(each) for each in (whole, some, one)] == [16, 12, 4]
    for part, rows in ((some, range(4, 16)), (one, range(12, 16))):
        assert all(map(torch.equal, part.batch(range(len(part))), whole.batch(list(rows))))
        part.verify()
        assert pickle.loads(pickle.dumps(part)).batch([0])[0].equal(part.batch([0])[0])
    with pytest.raises(IndexError):
        whole.batch([16])


def test_files_without_an_index_are_read_in_order_of_name(tmp_path):
    codes = make_codes(GRID, 90)[0]
    for name, rows in (("b.h5", slice(60, 90)), ("a.h5", slice(0, 60))):
        write(tmp_path / name, GRID, (codes[rows],), [0], replace(PROVENANCE, image_fingerprint=name))
    latent_set = LatentSet(tmp_path)
    assert latent_set.batch(range(90))[0].equal(codes)
    assert latent_set.source_ids.tolist() == [row // 2 for row in range(90)]  # sources of two files are different
    assert LatentSet(tmp_path / "*.h5").content_digest == latent_set.digest() == latent_set.content_digest
    latent_set.verify()
    with opened(tmp_path / "b.h5", "r+") as file:
        file["codes/0"][7, 1, 1] ^= 1
    assert "b.h5 is damaged" in refusal(tmp_path, verify=True)


@pytest.mark.parametrize(
    ("change", "layout", "what"),
    [
        ({"tokenizer_digest": "cd" * 32}, GRID, "tokenizer_digest"),
        ({"preprocessing": {"size": [64, 64]}}, GRID, "preprocessing"),
        ({"label_names": ("a", "b", "c", "d")}, GRID, "label_names"),
        ({}, Layout((Level(3, 4, (512,)),)), "layout"),
    ],
)
def test_files_of_different_tokenizers_are_refused(tmp_path, change, layout, what):
    write(tmp_path / "a.h5", GRID, make_codes(GRID, 6), [0])
    write(tmp_path / "b.h5", layout, make_codes(layout, 6), [0], replace(PROVENANCE, **change))
    message = refusal(tmp_path / "*.h5")
    assert f"a.h5 and {tmp_path / 'b.h5'} cannot be read as one set, because their {what} differs" in message


def remove(folder: Path) -> None:
    (folder / "00002.h5").unlink()


def truncate(folder: Path) -> None:
    (folder / "00002.h5").write_bytes((folder / "00002.h5").read_bytes()[:-1])


def add(folder: Path) -> None:
    shutil.copy(folder / "00002.h5", folder / "other.h5")


def swap(folder: Path) -> None:
    for first, second in (("00001.h5", "x"), ("00002.h5", "00001.h5"), ("x", "00002.h5")):
        (folder / first).rename(folder / second)


def change_codes(folder: Path) -> None:
    with opened(folder / "00003.h5", "r+") as file:
        file["codes/1"][1] ^= 1


def change_sources(folder: Path) -> None:
    with opened(folder / "00003.h5", "r+") as file:
        file["source_numbers"][1] += 1


def change_index(folder: Path) -> None:
    index = json.loads((folder / "index.json").read_text())
    index["attributes"]["label_names"] = '["a", "b", "x"]'
    (folder / "index.json").write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (remove, r"lacks 00002.h5, one of its 4 files"),
        (truncate, "00002.h5 is not the file that index.json lists"),
        (add, "other.h5 is not a file of the set in that folder"),
        (swap, "00001.h5 was replaced by another latent set"),
        (change_codes, "00003.h5 is damaged: its content has digest"),
        (change_sources, "set is damaged: its content has digest"),
        (change_index, "set: an attribute was changed after it was written"),
    ],
)
def test_sets_that_are_not_whole_are_refused(shards, damage, message):
    damage(shards)
    assert message in refusal(shards, verify=True)


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_changed_index_is_refused_in_one_line(shards, data):
    """No offset or number of rows makes it read outside the files."""
    text = (shards / "index.json").read_text()
    index = json.loads(text)
    other = data.draw(st.sampled_from([None, -1, 0, 3, 2**62, 2**70, "..", "../set/00000.h5", [], {}, [1, 2], 1.5]))
    node = data.draw(st.sampled_from([index, index["attributes"], index["shards"], *index["shards"]]))
    node[data.draw(st.sampled_from(list(node) if isinstance(node, dict) else range(len(node))))] = other
    (shards / "index.json").write_text(json.dumps(index))
    assert refusal(shards, verify=True)
    (shards / "index.json").write_text(text)


def test_parquet_of_several_files_and_back_keeps_the_digest(shards, tmp_path):
    several = LatentSet(shards)
    to_parquet(several, tmp_path / "x.parquet")
    again = from_parquet(str(tmp_path / "x.parquet"), tmp_path / "again.h5")
    assert again.content_digest == several.content_digest


@pytest.mark.parametrize("offsets", [(0, 0), (0, 2), (1, 0), (3, 1), (8, 5)])
def test_rows_of_several_files_are_read_at_any_address(tmp_path, offsets):
    """A small dataset may begin at an odd address, so that a row's unit is smaller than a value."""
    codes = np.arange(2 * 5 * 3, dtype="<u2").reshape(2, 5, 3)
    for number, offset in enumerate(offsets):
        (tmp_path / f"{number}").write_bytes(bytes(offset) + codes[number].tobytes())
    extents = [Extent(tmp_path / f"{number}", 5, (offset,)) for number, offset in enumerate(offsets)]
    mapped = MappedRows(extents, 0, np.dtype("<u2"), (3,))
    rows = [9, 0, 5, -1, 4]
    assert np.array_equal(mapped.take(rows), codes.reshape(10, 3)[rows])
    assert mapped.take([]).shape == (0, 3)
