"""Building a latent set: any number of processes, killed at any point, build the same file from current inputs."""

import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from helpers.build_toys import (
    CONDITIONS,
    CONFIG,
    FLAGS,
    IMAGES,
    Builders,
    run,
    save_tokenizer,
    wait_for,
    write_images,
    write_inputs,
)

from smalti.core.codes import Layout
from smalti.core.errors import UserError
from smalti.encoding import build
from smalti.images.decoding import to_float
from smalti.images.image_set import open_images
from smalti.images.splits import held_out
from smalti.latentsets.building.blocks import BlockStore
from smalti.latentsets.building.jobs import Job
from smalti.latentsets.reader import LatentSet
from smalti.tokenizers.vq.hrvq import HRVQ

BLOCK_IMAGES = 4
BLOCKS = IMAGES // BLOCK_IMAGES
FOLDER = ".latents.h5.building"


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    """A working folder with a tokenizer, images, and the latent set of one uninterrupted process."""
    folder = tmp_path_factory.mktemp("build")
    write_inputs(folder)
    threads, before = torch.get_num_threads(), Path.cwd()
    torch.set_num_threads(1)
    os.chdir(folder)
    builders = Builders(folder, *FLAGS, *CONDITIONS, "--out", "whole.h5")
    assert builders.join() == [0], (folder / "log").read_text()
    yield folder
    os.chdir(before)
    torch.set_num_threads(threads)


@pytest.fixture
def latents(workspace):
    """The file that a test builds; removed after each test."""
    yield workspace / "latents.h5"
    shutil.rmtree(workspace / FOLDER, ignore_errors=True)
    (workspace / "latents.h5").unlink(missing_ok=True)
    (workspace / "log").unlink(missing_ok=True)


def same(path, other):
    """Returns whether all datasets of two files are equal, vectors if the first has any, read with plain h5py."""
    with h5py.File(path) as one, h5py.File(other) as two:
        names = ["codes/0", "labels", "source_ids", "held_out", "flipped"] + ["conditions"] * ("conditions" in one)
        return all(np.array_equal(one[name][:], two[name][:]) for name in names)


def finished(folder, width=0):
    """Returns the number of every complete record of all processes, duplicates included; `width` is that of vectors."""
    job = Job(folder / "latents.h5", HRVQ(CONFIG).layout, IMAGES, BLOCK_IMAGES, True, {}, condition_width=width)
    store = BlockStore(job)
    blocks = []
    for file in store.folder.glob("*.blocks"):
        records = np.fromfile(file, store.record, count=file.stat().st_size // store.record.itemsize)
        blocks += [int(record["block"]) for record in records]
    return blocks


def test_builds_killed_again_and_again_give_the_same_file_and_encode_no_block_twice(workspace, latents):
    draw, before = random.Random(0), []
    for turn in range(5):
        builders = Builders(workspace, *FLAGS, *CONDITIONS, "--out", "latents.h5", processes=1 + turn % 2)
        target = len(before) + draw.randint(1, BLOCKS // 12)
        wait_for(lambda target=target: len(finished(workspace, 3)) >= target)
        builders.kill()
        blocks = finished(workspace, 3)
        assert len(set(blocks)) == len(blocks), "a block was encoded again"
        assert len(blocks) < BLOCKS, "the build finished before it was killed"
        assert set(before) <= set(blocks)
        before = blocks
    assert not latents.exists()
    assert Builders(workspace, *FLAGS, *CONDITIONS, "--out", "latents.h5").join() == [0]
    assert same(latents, "whole.h5")
    assert LatentSet(latents).content_digest == LatentSet("whole.h5").content_digest
    assert [path.name for path in workspace.iterdir() if "latents" in path.name] == ["latents.h5"]


@pytest.mark.parametrize(
    "dies_at",
    [
        ("smalti.latentsets.building.blocks", "write_json", 1),
        ("smalti.latentsets.building.blocks", "LatentSetWriter.write", 40),
        ("smalti.latentsets.writer", "add_digests", 1),
        ("smalti.latentsets.building.blocks", "shutil.rmtree", 1),
    ],
)
def test_a_kill_before_during_or_after_the_merge_changes_nothing(workspace, latents, dies_at):
    assert Builders(workspace, *FLAGS, "--out", "latents.h5", dies_at=dies_at).join() == [-signal.SIGKILL]
    before = sorted(finished(workspace))
    assert Builders(workspace, *FLAGS, "--out", "latents.h5").join() == [0], (workspace / "log").read_text()
    assert before in ([], list(range(BLOCKS)))
    assert same(latents, "whole.h5")
    assert not (workspace / FOLDER).exists()


def test_two_processes_build_the_same_file_as_one(workspace, latents):
    script = Path(__file__).parents[2] / "scripts" / "build_latents.py"
    flags = [*FLAGS[:-4], *CONDITIONS, "--workers", "1", "--device", "cpu", "--out", "latents.h5"]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", str(script), *flags]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(f"{2 * IMAGES}, 2×2 of 4·4") == 1  # only one process prints
    assert same(latents, "whole.h5")
    assert LatentSet(latents).content_digest == LatentSet("whole.h5").content_digest


def test_the_columns_are_those_of_the_images(workspace):
    whole = LatentSet("whole.h5")
    images = open_images("img", height=8, width=8)
    first = images.source_ids.tolist()
    order = list(dict.fromkeys(first))
    assert len(order) == IMAGES * 9 // 10
    assert whole.source_ids.tolist() == [order.index(source) for source in first for _ in range(2)]
    assert whole.held_out.equal(held_out(images.source_ids).repeat_interleave(2))
    assert whole.flipped.tolist() == [False, True] * IMAGES
    means = images.pixels(range(IMAGES)).numpy().mean((2, 3)) / 255
    assert np.allclose(whole.vectors(range(2 * IMAGES)), means.repeat(2, 0), atol=1e-3)
    pixels = images.pixels([7, 150])
    tokenizer = HRVQ.load("tokenizer")
    for row, image in [(14, pixels[0]), (15, pixels[0].flip(-1)), (300, pixels[1]), (301, pixels[1].flip(-1))]:
        (codes,) = tokenizer.encode(image[None].float() / 127.5 - 1)
        assert codes.equal(whole.batch([row])[0])
    whole.verify()


def interrupted(monkeypatch, capfd, *flags, after=9):
    """Runs a build that Ctrl-C stops after some blocks."""
    encode, calls = build.encode_block, iter(range(after))

    def stopping(*args, **options):
        if next(calls, None) is None:
            raise KeyboardInterrupt
        return encode(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(build, "encode_block", stopping)
        status, out, err = run(capfd, *FLAGS, "--out", "latents.h5", *flags)
    assert status == 130
    assert "run the same command to resume" in out
    assert "stopped" in err


def test_a_stopped_build_resumes_at_its_first_missing_block(workspace, latents, monkeypatch, capfd):
    interrupted(monkeypatch, capfd)
    encoded = []
    encode = build.encode_block
    monkeypatch.setattr(build, "encode_block", lambda *a, **k: encoded.append(0) or encode(*a, **k))
    assert run(capfd, *FLAGS, "--out", "latents.h5")[0] == 0
    assert len(encoded) == BLOCKS - 9
    assert same(latents, "whole.h5")


def other_tokenizer(workspace):
    save_tokenizer(workspace / "tokenizer", seed=1)


def other_pixels(workspace):
    shutil.copy(workspace / "img" / "0001.png", workspace / "img" / "0000.png")


def other_image(workspace):
    (workspace / "img" / "0020.png").unlink()


@pytest.mark.parametrize(
    ("change", "flags", "message"),
    [
        (other_tokenizer, [], "with another tokenizer_digest"),
        (other_pixels, [], "with another image_fingerprint"),
        (other_image, [], "with another image_fingerprint"),
        (None, ["--height", "12"], "with another layout"),
        (None, ["--no-flips"], "with another block_images"),
        (None, ["--precision", "bf16"], "with another preprocessing"),
        (None, ["--batch-size", "16"], "with another block_images"),
    ],
)
def test_blocks_of_other_inputs_are_discarded(workspace, latents, monkeypatch, capfd, tmp_path, change, flags, message):
    write_images(tmp_path / "img", 40)
    shutil.copytree(workspace / "tokenizer", tmp_path / "tokenizer")
    monkeypatch.chdir(tmp_path)
    interrupted(monkeypatch, capfd)
    if change:
        change(tmp_path)
    status, out, _ = run(capfd, *FLAGS, *flags, "--out", "latents.h5")
    assert status == 0
    assert message in out
    assert run(capfd, *FLAGS, *flags, "--out", "fresh.h5")[0] == 0
    assert same("latents.h5", "fresh.h5")


def test_an_existing_set_is_rebuilt_only_if_its_inputs_change(workspace, capfd, monkeypatch, tmp_path):
    shutil.copytree(workspace / "img", tmp_path / "img")
    shutil.copytree(workspace / "tokenizer", tmp_path / "tokenizer")
    monkeypatch.chdir(tmp_path)
    assert run(capfd, *FLAGS, "--out", "latents.h5")[0] == 0
    before = Path("latents.h5").stat()
    status, out, _ = run(capfd, *FLAGS, "--out", "latents.h5")
    assert (status, "already holds these codes" in out) == (0, True)
    after = Path("latents.h5").stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    other_pixels(tmp_path)
    assert run(capfd, *FLAGS, "--out", "latents.h5")[0] == 0
    assert not same("latents.h5", workspace / "whole.h5")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["img", "latents.h5", "tokenizer"]


def test_bf16_gives_other_codes_and_the_set_records_it(capfd, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    save_tokenizer(Path("tokenizer"))
    write_images(Path("img"), 60)
    assert run(capfd, *FLAGS, "--no-flips", "--out", "latents.h5")[0] == 0
    exact = LatentSet(Path("latents.h5"))
    status, out, _ = run(capfd, *FLAGS, "--no-flips", "--precision", "bf16", "--out", "latents.h5")
    assert (status, "already holds these codes" in out, '"precision": "bf16"' in out) == (0, False, True)
    images = open_images("img", height=8, width=8, channels=3)
    tokenizer = HRVQ.load("tokenizer")
    expected = []
    with torch.autocast("cpu", torch.bfloat16):
        for rows in torch.arange(60).split(8):  # the batch size in FLAGS
            expected.append(tokenizer.encode(to_float(images.pixels(rows)))[0])
    (codes,), (before,) = (each.batch(torch.arange(60)) for each in (LatentSet(Path("latents.h5")), exact))
    assert codes.equal(torch.cat(expected))
    assert 0 < (codes != before).float().mean() < 0.1


def test_new_content_under_the_same_source_id_changes_the_fingerprint(tmp_path):
    """Source ids come from the key column if there is one; the fingerprint must include the images too."""
    from helpers.image_toys import png, write_parquet

    digests = [
        open_images(str(write_parquet(tmp_path / f"{colour}.parquet", image=[png(colour)], source_id=[1]))).fingerprint
        for colour in ("red", "lime")
    ]
    assert digests[0] != digests[1]


def test_a_second_builder_of_the_same_file_is_refused(workspace, latents, capfd):
    first = Builders(workspace, *FLAGS, "--out", "latents.h5")
    wait_for(lambda: finished(workspace))
    first.signal(signal.SIGSTOP)
    before = sorted(finished(workspace))
    status, out, err = run(capfd, *FLAGS, "--out", "latents.h5")
    assert (status, out) == (2, "")
    assert [line for line in err.splitlines() if line.startswith("error")] == [
        "error: latents.h5 is being written by another process; wait until it is done, or give another --out"
    ]
    assert sorted(finished(workspace)) == before
    first.signal(signal.SIGCONT)
    assert first.join() == [0]
    assert same(latents, "whole.h5")


def test_an_orphaned_worker_that_holds_its_shard_is_detected(workspace, latents):
    """The main process and the launcher are killed, and another of their processes survives."""
    builders = Builders(workspace, *FLAGS, "--out", "latents.h5", processes=2)
    wait_for(lambda: (workspace / FOLDER / "00000-00001.blocks").exists())
    os.kill(builders.processes[1].pid, signal.SIGSTOP)
    builders.processes[0].kill()
    builders.processes[0].join()
    again = Builders(workspace, *FLAGS, "--out", "latents.h5", processes=2)
    assert again.join() == [2, 2]
    assert "00000-00001.blocks is being written by another process" in (workspace / "log").read_text()
    builders.kill()
    assert Builders(workspace, *FLAGS, "--out", "latents.h5", processes=2).join() == [0, 0]
    assert same(latents, "whole.h5")


def test_an_error_on_one_process_stops_all_with_one_message(workspace, tmp_path):
    shutil.copytree(workspace / "tokenizer", tmp_path / "tokenizer")
    write_images(tmp_path / "img", 40)
    (tmp_path / "img" / "0005.png").write_bytes(b"none")  # in block 1, which the second process encodes
    assert Builders(tmp_path, *FLAGS, "--out", "latents.h5", processes=2).join() == [2, 2]
    log = (tmp_path / "log").read_text()
    assert "Traceback" not in log
    assert log.count("error: ") == 1
    assert "0005.png, row 5: these 4 bytes are not an image" in log
    assert not (tmp_path / "latents.h5").exists()
    shutil.copy(tmp_path / "img" / "0006.png", tmp_path / "img" / "0005.png")
    assert Builders(tmp_path, *FLAGS, "--out", "latents.h5").join() == [0]


@pytest.mark.parametrize("limit_bytes", [1000, 5000, 15_000])
def test_a_full_disk_gives_one_message_and_keeps_finished_blocks(workspace, latents, capfd, limit_bytes):
    """The kernel's limit on file size stands for a full disk. The merge exceeds the last of the limits."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    shutil.rmtree(FOLDER, ignore_errors=True)
    assert run(capfd, *FLAGS, "--out", "latents.h5")[0] == 0
    flags = [*FLAGS, "--no-flips", "--out", "latents.h5"]
    assert run(capfd, *flags[:-1], "fresh.h5")[0] == 0  # also fills all caches
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, hard))
    try:
        status, _, err = run(capfd, *flags)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert status == 2
    assert ["no room for latents.h5" in line for line in err.splitlines() if line.startswith("error")] == [True]
    assert same("latents.h5", "whole.h5")
    assert len(list((workspace / FOLDER).glob("*.blocks"))) == 1
    assert run(capfd, *flags)[0] == 0
    assert same("latents.h5", "fresh.h5")


def test_too_little_disk_space_is_reported_before_encoding(workspace, latents, monkeypatch, capfd):
    usage = namedtuple("Usage", "total used free")
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage(0, 0, 3000))
    monkeypatch.setattr(build, "encode_block", lambda *_, **__: pytest.fail("encoded"))
    status, _, err = run(capfd, *FLAGS, "--out", "latents.h5")
    assert (status, (workspace / FOLDER).exists()) == (2, False)
    assert re.search(r"no room for latents.h5: it takes \d+\.\d KiB while it is built, but 2\.9 KiB are free", err)


def test_codes_outside_the_layout_are_refused_at_once(tmp_path):
    job = Job(tmp_path / "x.h5", Layout(HRVQ(CONFIG).layout.levels), 8, 4, flips=False, key={})
    with BlockStore(job) as store:
        store.claim()
        with pytest.raises(UserError, match="level 0 has codes from 0 to 15, not from 0 to 16"):
            store.append(0, (torch.arange(16).view(4, 2, 2) + torch.arange(16).view(4, 2, 2) // 15,), {})
    assert json.loads((store.folder / "key.json").read_text())["block_images"] == 4
