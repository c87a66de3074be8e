"""Building sets of several files, and on engines: the set of one process, whatever is killed and resumed."""

import os
import shutil
import signal
from contextlib import nullcontext
from pathlib import Path

import datasets
import h5py
import pytest
from helpers.build_toys import FLAGS, Builders, one_thread, run, save_tokenizer, write_images

from smalti.commands.build_latents import BuildLatents, build_latents
from smalti.core.errors import UserError
from smalti.encoding import encoder
from smalti.encoding.encoder import EncodeBatches
from smalti.images.reading import Reading
from smalti.latentsets import provenance
from smalti.latentsets.building.blocks import BlockStore
from smalti.latentsets.reader import LatentSet

IMAGES, BLOCK_IMAGES = 24, 4
SHARDS = ("--out", "set", "--shard-rows", "24")  # 3 of 6 blocks a file


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    """A working folder with a tokenizer, images of which one is bad, and the one-file set of one process."""
    folder, before = tmp_path_factory.mktemp("engine"), Path.cwd()
    write_images(folder / "img", IMAGES)
    save_tokenizer(folder / "tokenizer")
    os.chdir(folder)
    (folder / "img" / "0017.png").write_bytes(b"none")
    with one_thread():
        built(Path("one.h5"))
        yield folder
    os.chdir(before)


@pytest.fixture(autouse=True)
def removed(workspace):
    yield
    for path in ("set", ".set.building", "engine.h5", ".engine.h5.building"):
        shutil.rmtree(path, ignore_errors=True)
    Path("engine.h5").unlink(missing_ok=True)


def built(out: Path, engine=None, **changes) -> LatentSet:
    settings = {"batch_size": 2 * BLOCK_IMAGES, "workers": 0, "device": "cpu", "reading": Reading(on_bad_image="skip")}
    return LatentSet(build_latents(BuildLatents("tokenizer", images="img", out=out, **{**settings, **changes}), engine))


def same(one: LatentSet, other: LatentSet) -> bool:
    one.verify()
    rows = range(len(one))
    return one.content_digest == other.content_digest and one.batch(rows)[0].equal(other.batch(rows)[0])


@pytest.mark.parametrize(
    ("dies_at", "finished"),
    [
        (("smalti.encoding.build", "encode_block", 5), 1),
        (("smalti.latentsets.building.blocks", "BlockStore._delete_blocks", 2), 1),
        (("smalti.latentsets.building.blocks", "write_index", 1), 2),
        (("smalti.latentsets.building.blocks", "sync", 1), 0),  # the folder has its name
    ],
)
def test_a_killed_build_of_several_files_resumes(workspace, dies_at, finished):
    flags = [*FLAGS, "--on-bad-image", "skip", *SHARDS]
    assert Builders(workspace, *flags, dies_at=dies_at).join() == [-signal.SIGKILL]
    assert Path("set").exists() == (finished == 0)
    before = {path.name: path.stat().st_ino for path in Path(".set.building").glob("shards/*.h5")}
    assert len(before) == finished
    built(Path("set"), shard_rows=24)
    assert all((Path("set") / name).stat().st_ino == inode for name, inode in before.items())
    assert same(LatentSet("set"), LatentSet("one.h5"))
    assert not Path(".set.building").exists()


@pytest.mark.parametrize("changes", [{"out": Path("engine.h5")}, {"out": Path("set"), "shard_rows": 24}])
def test_classes_that_could_not_be_read_are_refused_before_anything_is_encoded(workspace, monkeypatch, changes):
    monkeypatch.setattr(provenance, "LARGEST_JSON_BYTES", 1)
    with pytest.raises(UserError, match=r"its 0 classes take 2 bytes .*--label-column"):
        built(**changes)
    assert not list(Path().glob(".*.building"))


def test_two_processes_build_the_set_of_one(workspace):
    flags = [*FLAGS, "--on-bad-image", "skip", *SHARDS]
    assert Builders(workspace, *flags, processes=2).join() == [0, 0], Path("log").read_text()
    assert same(LatentSet("set"), LatentSet("one.h5"))


def test_datasets_map_is_an_engine():
    def engine(encoder, blocks):
        rows = datasets.Dataset.from_dict({"block": blocks})
        return rows.map(EncodeBatches(encoder), batched=True, batch_size=3).iter(2)

    assert same(built(Path("engine.h5"), engine), LatentSet("one.h5"))


def test_an_engine_that_stops_is_given_the_rest_and_its_order_does_not_matter():
    asked = []

    def engine(encoder, blocks):
        asked.append(blocks)
        for number, block in enumerate(blocks[::-1]):
            if len(asked) == 1 and number == 4:  # blocks 5 to 2: the last file is whole, the first one is not
                raise KeyboardInterrupt
            yield EncodeBatches(encoder)({"block": [block]})

    with pytest.raises(KeyboardInterrupt):
        built(Path("set"), engine, shard_rows=24)
    assert same(built(Path("set"), engine, shard_rows=24), LatentSet("one.h5"))
    assert asked == [[*range(6)], [0, 1]]


def test_a_set_with_other_files_is_built_again(capfd):
    built(Path("set"), shard_rows=24)
    before = Path("set/00000.h5").stat().st_ino
    capfd.readouterr()
    assert len(built(Path("set"), shard_rows=24).files.extents) == 2
    assert "already holds these codes" in capfd.readouterr().out
    assert Path("set/00000.h5").stat().st_ino == before
    Path("set/notes.txt").write_text("mine")
    Path("set/plots").mkdir()
    Path("set/plots/usage.png").write_text("a plot")
    again = built(Path("set"), shard_rows=16)
    assert len(again.files.extents) == 3
    assert same(again, LatentSet("one.h5"))
    assert Path("set/notes.txt").read_text() == "mine"
    assert Path("set/plots/usage.png").read_text() == "a plot"


def test_a_kill_before_other_files_are_moved_to_the_new_set_loses_none(workspace, monkeypatch):
    built(Path("set"), shard_rows=24)
    Path("set/notes.txt").write_text("mine")
    monkeypatch.setattr(BlockStore, "discard", lambda _: None)
    built(Path("set"), shard_rows=16)
    assert not Path("set/notes.txt").exists()
    monkeypatch.undo()
    monkeypatch.chdir(workspace)
    built(Path("set"), shard_rows=16)
    assert Path("set/notes.txt").read_text() == "mine"
    assert not Path(".set.building").exists()


@pytest.mark.parametrize("shards", [{}, {"shard_rows": 24}])
def test_a_damaged_set_is_built_again_with_overwrite(shards, capfd):
    out = Path("set" if shards else "engine.h5")
    built(out, **shards)
    with h5py.File(out / "00000.h5" if shards else out, "r+") as file:
        file["codes/0"][2, 1, 1] ^= 1
    with pytest.raises(UserError, match="build it with --overwrite"):
        LatentSet(out).verify()
    built(out, **shards)
    assert "already holds these codes" in capfd.readouterr().out
    assert same(built(out, **shards, overwrite=True), LatentSet("one.h5"))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--out", "set.h5", "--shard-rows", "24"), "--out set.h5 is the name of a file; with --shard-rows, give"),
        (("--out", "img"), "--out img is a folder; give a file, or --shard-rows for a set of several files"),
        (("--out", "img", "--shard-rows", "24"), "--out img"),
        (("--out", "set", "--shard-rows", "4"), "--shard-rows must be at least --batch-size (8), not 4"),
    ],
)
def test_unsuitable_outputs_are_refused(capfd, flags, message):
    status, _, err = run(capfd, *FLAGS, "--on-bad-image", "skip", *flags)
    (line,) = [line for line in err.splitlines() if line.startswith("error")]
    assert status == 2
    assert message in line


def test_a_bad_image_on_an_engine_is_one_line():
    def engine(encoder, blocks):
        return map(EncodeBatches(encoder), [{"block": blocks}])

    with pytest.raises(UserError, match=r"0017\.png, row 17"):
        built(Path("engine.h5"), engine, reading=Reading())


def test_the_search_knows_how_many_vectors_a_build_has(workspace, monkeypatch):
    """It is compiled in builds that are large enough, in every process and after every stop."""
    told = []
    monkeypatch.setattr(encoder, "part_of_job", lambda vectors: told.append(vectors) or nullcontext())
    built(Path("engine.h5"), flips=True, crops=2)
    assert set(told) == {IMAGES * 6 * sum(level.height * level.width for level in LatentSet("engine.h5").layout.levels)}
