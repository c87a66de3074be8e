"""Tests of snapshots: which are kept, that damage is detected, and that full disks and kills cost no other snapshot."""

import errno
import json
import os
import resource
import shutil

import pytest
import torch
from helpers.toys import Signalling, train
from hypothesis import given
from hypothesis import strategies as st

from smalti.core.models import CONFIG_NAME, WEIGHTS_NAME
from smalti.training.signals import Interrupted
from smalti.training.snapshots import DIGESTS_NAME, STATE_NAME, Snapshots

STATE = {"step": 3, "weights": torch.arange(1000.0), "more": [1, 0.5, "text", None]}


@pytest.fixture
def states(tmp_path):
    for name in (WEIGHTS_NAME, CONFIG_NAME):
        (tmp_path / name).write_text("a model")
    return Snapshots(tmp_path)


def files(states):
    return {path: path.read_bytes() for path in states.folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("keep", "best", "kept"),
    [(1, None, [4]), (2, None, [3, 4]), (2, 1, [1, 3, 4]), (2, 3, [3, 4]), (9, None, [1, 2, 3, 4])],
)
def test_newest_and_best_snapshots_are_kept(states, keep, best, kept):
    for step in (1, 2, 3, 4):
        states.save(step, STATE, keep=keep, best=best)
    assert states.steps() == kept
    assert states.newest(warn=False) == 4
    loaded = states.load(4)
    assert torch.equal(loaded.pop("weights"), STATE["weights"])
    assert loaded == {name: value for name, value in STATE.items() if name != "weights"}
    assert (states.path(4) / WEIGHTS_NAME).read_text() == "a model"


def test_snapshot_is_replaced_by_one_of_the_same_step(states):
    states.save(4, {"v": 1}, keep=2, best=None)
    states.save(4, {"v": 2}, keep=2, best=None)
    assert states.load(4) == {"v": 2}
    assert [path.name for path in states.folder.iterdir()] == ["step_00000004"]


@given(data=st.data())
def test_every_flipped_bit_and_truncation_is_detected(tmp_path_factory, data):
    """Also in the file of digests, where a flipped bit may leave valid JSON with other digests or names."""
    folder = tmp_path_factory.mktemp("states")
    for name in (WEIGHTS_NAME, CONFIG_NAME):
        (folder / name).write_text("a model")
    states = Snapshots(folder)
    states.save(1, {"v": 1}, keep=2, best=None)
    states.save(2, STATE, keep=2, best=None)
    file = states.path(2) / data.draw(st.sampled_from([STATE_NAME, WEIGHTS_NAME, CONFIG_NAME]))
    content = bytearray(file.read_bytes())
    if data.draw(st.booleans()):
        content[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    else:
        del content[data.draw(st.integers(0, len(content) - 1)) :]
    file.write_bytes(content)
    assert states.newest(warn=False) == 1


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: (folder / STATE_NAME).unlink(),
        lambda folder: (folder / DIGESTS_NAME).unlink(),
        lambda folder: (folder / DIGESTS_NAME).write_text('{"sha256": {"state'),
        lambda folder: (folder / DIGESTS_NAME).write_text("[]"),
        lambda folder: (folder / DIGESTS_NAME).write_text('{"sha256": 5}'),
        lambda folder: (folder / DIGESTS_NAME).write_text('{"sha256": {}}'),
        lambda folder: (folder / DIGESTS_NAME).write_bytes(b"\xff"),
    ],
)
def test_snapshot_with_missing_or_invalid_files_is_damaged(states, damage, capsys):
    states.save(1, STATE, keep=3, best=None)
    states.save(2, STATE, keep=3, best=None)
    damage(states.path(2))
    assert states.newest(warn=True) == 1
    assert capsys.readouterr().err.count("\n") == 1
    shutil.rmtree(states.path(1))
    assert states.newest(warn=False) is None


@pytest.mark.parametrize("full", ["patched", 2_000, 100_000])
def test_full_disk_costs_no_snapshot(states, full, monkeypatch):
    """ENOSPC while the snapshot is written, or a limit on file sizes, which the kernel enforces.

    Torch writes many tensors one after the other; when one fails, it raises an error of its own.
    """
    states.save(1, STATE, keep=1, best=None)
    before = files(states)
    if full == "patched":

        def no_space(_state, file):
            file.write(b"half of it")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), file.name)

        monkeypatch.setattr(torch, "save", no_space)
        with pytest.raises(OSError, match="No space") as caught:
            states.save(2, STATE, keep=1, best=None)
        assert caught.value.errno == errno.ENOSPC
    else:
        many = {"step": 2, **{f"weights {number}": torch.zeros(10_000) for number in range(12)}}
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (full, limits[1]))
        try:
            with pytest.raises(OSError, match="too large") as caught:
                states.save(2, many, keep=1, best=None)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert caught.value.errno == errno.EFBIG
    assert files(states) == before
    assert states.newest(warn=False) == 1


def test_leftovers_of_a_kill_are_ignored_and_replaced(states):
    states.save(1, STATE, keep=2, best=None)
    for name in (".step_00000002.partial", ".step_00000001.removed"):
        (states.folder / name).mkdir()
        (states.folder / name / STATE_NAME).write_text("half")
    assert states.steps() == [1]
    states.save(2, STATE, keep=1, best=None)
    assert [path.name for path in states.folder.iterdir()] == ["step_00000002"]
    assert json.loads((states.path(2) / DIGESTS_NAME).read_text())["step"] == 2


def test_a_stop_at_a_saved_step_does_not_write_its_snapshot_again(tmp_path, monkeypatch):
    saved, save = [], Snapshots.save

    def recording(self, step, *state, **kept):
        saved.append(step)
        save(self, step, *state, **kept)

    monkeypatch.setattr(Snapshots, "save", recording)
    with pytest.raises(Interrupted, match="after step 10 of 12"):
        train(tmp_path, wrap=lambda rows: Signalling(rows, 9))
    assert saved == [4, 5, 8, 10]
