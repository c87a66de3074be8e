"""Files are whole or absent, whatever goes wrong while they are written, a kill included."""

import errno
import json
import signal
import subprocess
import sys

import pytest

from smalti.core.files import whole_file, whole_folder, write_json


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_the_file_appears_when_the_block_ends(tmp_path):
    path = tmp_path / "made" / "for" / "it.txt"
    with whole_file(path) as partial:
        partial.write_text("new")
        assert not path.exists()
        assert partial.parent == path.parent  # one file system, or the rename would be a copy
    assert path.read_text() == "new"
    assert names(path.parent) == ["it.txt"]


@pytest.mark.parametrize("before", [None, "old"])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_error_leaves_what_was_there_and_no_litter(tmp_path, before, error):
    path = tmp_path / "file.txt"
    if before:
        path.write_text(before)

    def write_half():
        with whole_file(path) as partial:
            partial.write_text("half")
            raise error

    with pytest.raises(error):
        write_half()
    assert names(tmp_path) == (["file.txt"] if before else [])
    assert not before or path.read_text() == before


KILLED = """
import os, signal, sys
from pathlib import Path
from smalti.core.files import whole_file
with whole_file(Path(sys.argv[1])) as partial:
    partial.write_text("half of a long text")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_after_a_kill_the_old_file_stands_and_the_next_writing_cleans_up(tmp_path):
    path = tmp_path / "file.txt"
    path.write_text("old")
    done = subprocess.run([sys.executable, "-c", KILLED, str(path)], check=False)
    assert done.returncode == -signal.SIGKILL
    assert path.read_text() == "old"
    assert len(names(tmp_path)) == 2  # the kill left its half beside it
    with whole_file(path) as partial:
        partial.write_text("new")
    assert path.read_text() == "new"
    assert names(tmp_path) == ["file.txt"]


def test_a_block_that_wrote_nothing_is_an_error_and_not_an_empty_file(tmp_path):
    with pytest.raises(FileNotFoundError), whole_file(tmp_path / "file.txt"):
        pass
    assert names(tmp_path) == []


def test_a_folder_appears_when_the_block_ends_and_not_if_it_fails(tmp_path):
    with whole_folder(tmp_path / "some" / "folder") as partial:
        (partial / "file.txt").write_text("new")
        assert names(tmp_path / "some") == [partial.name]
    assert names(tmp_path / "some") == ["folder"]

    def write_half():
        with whole_folder(tmp_path / "some" / "other") as partial:
            (partial / "file.txt").write_text("half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        write_half()
    assert names(tmp_path / "some") == ["folder"]


def test_a_folder_that_is_there_is_not_overwritten(tmp_path):
    def write(text):
        with whole_folder(tmp_path / "folder") as partial:
            (partial / "file.txt").write_text(text)

    write("old")
    with pytest.raises(OSError, match="not empty"):
        write("new")
    assert (tmp_path / "folder" / "file.txt").read_text() == "old"
    assert names(tmp_path) == ["folder"]


@pytest.mark.parametrize("whole", [whole_file, whole_folder])
def test_an_error_of_the_disk_names_what_was_to_be_written(tmp_path, whole):
    """Python's own names nothing, where it is writing that fails."""

    def fill():
        with whole(tmp_path / "place"):
            raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match="No space") as caught:
        fill()
    assert caught.value.filename == str(tmp_path / "place")


def test_json_reads_back_and_stays_readable(tmp_path):
    value = {"größe": [1, 2.5, None], "nested": {"a": "×"}}
    write_json(tmp_path / "value.json", value)
    text = (tmp_path / "value.json").read_text()
    assert json.loads(text) == value
    assert "größe" in text
    assert text.endswith("}\n")
