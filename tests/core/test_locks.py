"""Tests of output locks: a second process is refused in one line, and a killed one leaves nothing that refuses."""

import errno
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from smalti.core import locks
from smalti.core.errors import UserError

HOLDER = """
import sys, time
from pathlib import Path
from smalti.core import locks
with locks.writing(Path(sys.argv[1]), folder=sys.argv[2] == "folder"):
    print("locked", flush=True)
    sys.stdin.read()
"""


def holder(path: Path, kind: str) -> subprocess.Popen:
    """Starts a process that holds the lock of a path until its input is closed."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(path), kind], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout
    assert process.stdout.readline() == "locked\n"
    return process


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_second_process_is_refused_until_the_first_ends_or_is_killed(tmp_path, kind):
    path, folder = tmp_path / "new" / "out", kind == "folder"
    for kill in (False, True):
        process = holder(path, kind)
        with pytest.raises(UserError, match="is being written by another process"), locks.writing(path, folder=folder):
            pass
        (tmp_path / "link").unlink(missing_ok=True)
        (tmp_path / "link").symlink_to(path)
        if folder:  # another spelling of the same folder
            with pytest.raises(UserError), locks.writing(tmp_path / "link", folder=True):
                pass
        if kill:
            os.kill(process.pid, signal.SIGKILL)
        process.communicate("")
        with locks.writing(path, folder=folder):
            pass
    assert [*(tmp_path / "new").rglob("*lock")] == []


def test_a_lock_that_waits_is_taken_when_the_first_process_ends(tmp_path):
    process = holder(tmp_path / "out", "file")
    release = threading.Timer(3 * locks.RETRY_SECONDS, process.communicate)
    release.start()
    with locks.writing(tmp_path / "out", wait=True):
        release.join()
    assert process.returncode == 0


def test_lock_may_be_taken_again_in_one_process(tmp_path):
    stack = locks.hold(tmp_path / "run", folder=True)
    with locks.writing(tmp_path / "run", folder=True):
        assert (tmp_path / "run" / ".lock").exists()
    assert (tmp_path / "run" / ".lock").exists()
    stack.close()
    assert not (tmp_path / "run").exists()


@pytest.mark.filterwarnings("ignore:flock not supported")
@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK])
def test_disk_without_locks_is_written_without_one_unless_a_lock_is_required(tmp_path, monkeypatch, number):
    def flock(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("fcntl.flock", flock)
    with locks.writing(tmp_path / "out"):
        (tmp_path / "out").touch()
    with (
        pytest.raises(UserError, match=rf"cannot be locked \({os.strerror(number)}\); give --out on another disk"),
        locks.writing(tmp_path / "out", required=True),
    ):
        pass
    assert [path.name for path in tmp_path.iterdir() if path.suffix != ".lock"] == ["out"]


def test_removed_lock_file_does_not_lock(tmp_path, monkeypatch):
    """The process that held the lock before has removed the file, and another one may have made a new one."""
    removals = iter([True, True, False])

    def flock(*_):
        if next(removals, False):
            (tmp_path / ".out.lock").unlink(missing_ok=True)

    monkeypatch.setattr("fcntl.flock", flock)
    with locks.writing(tmp_path / "out"):
        assert (tmp_path / ".out.lock").exists()


def test_folders_made_for_a_lock_are_removed_unless_they_were_used(tmp_path):
    for use in (False, True):
        with locks.writing(tmp_path / "new" / "folder" / "out"):
            if use:
                (tmp_path / "new" / "folder" / "out").touch()
        assert (tmp_path / "new").exists() == use


def test_each_of_a_commands_outputs_is_locked_and_a_folder_as_a_whole(tmp_path):
    outputs = [tmp_path / "fill.png", tmp_path / "fill-2.png"]
    process = holder(outputs[1], "file")
    with pytest.raises(UserError, match=r"fill-2\.png is being written by another process"), locks.claim(outputs):
        pass
    process.communicate("")
    with locks.claim([tmp_path / "run" / f"{number}.png" for number in range(2_000)], folder=tmp_path / "run"):
        assert [path.name for path in tmp_path.rglob(".*")] == [".lock"]
    with locks.claim([tmp_path / f"{number}.png" for number in range(2_000)]):
        assert len([*tmp_path.glob(".*")]) == locks.MOST_LOCKS
