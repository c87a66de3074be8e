"""Files are complete or absent after any failure, including a kill; outputs are checked before the work."""

import errno
import json
import os
import signal
import subprocess
import sys

import pytest

from smalti.core.errors import UserError
from smalti.core.files import (
    require_outputs,
    require_replaceable,
    sync,
    whole_file,
    whole_folder,
    write_json,
)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_file_appears_when_the_block_ends(tmp_path):
    path = tmp_path / "new" / "folder" / "file.txt"
    with whole_file(path) as partial:
        partial.write_text("new")
        assert not path.exists()
        assert partial.parent == path.parent  # the same file system, so that the rename is atomic
    assert path.read_text() == "new"
    assert names(path.parent) == ["file.txt"]


@pytest.mark.parametrize("before", [None, "old"])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_error_keeps_the_old_file_and_leaves_no_temporary_file(tmp_path, before, error):
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


def test_kill_keeps_the_old_file_and_the_next_write_cleans_up(tmp_path):
    path = tmp_path / "file.txt"
    path.write_text("old")
    killed = subprocess.run([sys.executable, "-c", KILLED, str(path)], check=False)
    assert killed.returncode == -signal.SIGKILL
    assert path.read_text() == "old"
    assert len(names(tmp_path)) == 2  # the half-written file is beside it
    with whole_file(path) as partial:
        partial.write_text("new")
    assert path.read_text() == "new"
    assert names(tmp_path) == ["file.txt"]


def test_block_that_writes_nothing_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError), whole_file(tmp_path / "file.txt"):
        pass
    assert names(tmp_path) == []


def test_folder_appears_only_if_the_block_succeeds(tmp_path):
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


def test_existing_folder_is_not_overwritten(tmp_path):
    def write(text):
        with whole_folder(tmp_path / "folder") as partial:
            (partial / "file.txt").write_text(text)

    write("old")
    with pytest.raises(OSError, match="not empty"):
        write("new")
    assert (tmp_path / "folder" / "file.txt").read_text() == "old"
    assert names(tmp_path) == ["folder"]


@pytest.mark.parametrize("whole", [whole_file, whole_folder])
def test_disk_error_names_the_file(tmp_path, whole):
    """Errors from write() name no file by themselves."""

    def fill():
        with whole(tmp_path / "place"):
            raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match="No space") as caught:
        fill()
    assert caught.value.filename == str(tmp_path / "place")


@pytest.mark.parametrize("whole", [whole_file, whole_folder])
@pytest.mark.parametrize("error", [ValueError("I/O operation on closed file"), RuntimeError("unexpected pos")])
def test_an_error_of_a_library_after_a_failed_write_is_that_of_the_disk(tmp_path, whole, error):
    """pyarrow, matplotlib and torch close their file when the disk is full, which fails in another way."""

    def fill():
        with whole(tmp_path / "place"):
            try:
                raise OSError(errno.ENOSPC, "No space left on device")
            finally:
                raise error

    with pytest.raises(OSError, match="No space") as caught:
        fill()
    assert caught.value.filename == str(tmp_path / "place")


def test_json_round_trips_and_is_readable(tmp_path):
    value = {"größe": [1, 2.5, None], "nested": {"a": "×"}}
    write_json(tmp_path / "value.json", value)
    text = (tmp_path / "value.json").read_text(encoding="utf-8")
    assert json.loads(text) == value
    assert "größe" in text
    assert text.endswith("}\n")


def test_folders_are_not_synced_on_windows(tmp_path, monkeypatch):
    """Windows cannot open folders; files are opened for writing there."""
    opened = []
    open_file = os.open
    monkeypatch.setattr("smalti.core.files.os.open", lambda path, flags: opened.append(flags) or open_file(path, flags))
    monkeypatch.setattr("smalti.core.files.os.name", "nt")
    (tmp_path / "file.txt").write_text("text")
    sync(tmp_path)
    assert opened == []
    sync(tmp_path / "file.txt")
    assert opened == [os.O_RDWR]


def test_an_output_is_never_an_input(tmp_path):
    """By another spelling, a symbolic link, a hard link or a link of a folder."""
    source, folder = tmp_path / "in.png", tmp_path / "folder"
    source.write_text("input")
    folder.mkdir()
    (tmp_path / "soft.png").symlink_to(source)
    (tmp_path / "hard.png").hardlink_to(source)
    (tmp_path / "link").symlink_to(tmp_path)
    names = ["in.png", "folder/../in.png", "soft.png", "hard.png", "link/in.png"]
    for output in (tmp_path / name for name in names):
        for inputs in ([source], [tmp_path / "soft.png"], [folder, source]):
            with pytest.raises(UserError, match="would overwrite an input"):
                require_outputs([tmp_path / "new.png", output], inputs=inputs)
    with pytest.raises(UserError, match="lies inside the input folder"):
        require_outputs([tmp_path / "link" / "folder" / "new" / "a.png"], inputs=[folder])
    require_outputs([tmp_path / "folder.png"], inputs=[folder, source])
    assert source.read_text() == "input"


def test_existing_outputs_need_overwrite_unless_they_are_the_commands_own(tmp_path):
    own, other, dangling = tmp_path / "own.png", tmp_path / "other.png", tmp_path / "dangling.png"
    own.write_text("own")
    other.write_text("other")
    dangling.symlink_to(tmp_path / "nowhere")
    require_replaceable([own], is_own=lambda path: path.read_text() == "own")
    for output in (other, dangling):
        for overwrite, advice in ((False, "pass --overwrite"), (None, "remove it first")):
            with pytest.raises(UserError, match=rf"exists and this command did not make it .* {advice}") as refused:
                require_replaceable([own, output], overwrite=overwrite, is_own=lambda path: path == own)
            assert "\n" not in str(refused.value)
        require_replaceable([own, output], overwrite=True)
    with pytest.raises(UserError, match="is a folder"):
        require_replaceable([tmp_path], overwrite=True)
    with pytest.raises(UserError, match="would overwrite each other"):
        require_outputs([tmp_path / "a.png", tmp_path / "." / "a.png", tmp_path / "x" / ".." / "a.png"])


def test_outputs_that_cannot_be_written_are_refused_before_the_work(tmp_path):
    """A successful check leaves no folder and no file behind."""
    (tmp_path / "file").write_text("text")
    for output, reason in [
        (tmp_path / f"{'n' * 300}.png", "too long"),
        (tmp_path / ("n" * 300) / "a.png", "too long"),
        (tmp_path / "file" / "a.png", "a part of its path is a file"),
        (tmp_path / "file" / "new" / "a.png", "a part of its path is a file"),
    ]:
        with pytest.raises(UserError, match=f"cannot be written: .*{reason}") as refused:
            require_outputs([output])
        assert len(str(refused.value)) < 250 + len(str(tmp_path))
    require_outputs([tmp_path / "new" / "folder" / "a.png"])
    assert names(tmp_path) == ["file"]


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="the superuser may write anywhere")
def test_a_folder_without_permission_is_refused(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(UserError, match="cannot be written: Permission denied"):
        require_outputs([tmp_path / "a.png"])
