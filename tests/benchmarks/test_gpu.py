"""The queue of measurements that wait for a GPU."""

import sys
from functools import partial
from pathlib import Path

from smalti.benchmarks.gpu import commands
from smalti.benchmarks.gpu import run_all as run_with

FAILS_IF_ASKED = "import sys; sys.exit('fail' in sys.argv)"
run_all = partial(run_with, program=(sys.executable, "-S", "-c", FAILS_IF_ASKED))


def test_only_indented_commands_of_smalti_are_taken():
    page = "smalti sample\n\n    smalti sample --num 4\n    torchrun x\n    smalti inpaint \\\n        --num 2\n"
    assert commands(page) == ["smalti sample --num 4", "smalti inpaint --num 2"]


def test_finished_commands_are_not_run_again(tmp_path: Path):
    lines = ["smalti sample --help", "smalti evaluate fail", "smalti inpaint --help"]
    assert not run_all(lines, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "00-sample.txt",
        "01-evaluate.partial",
        "02-inpaint.txt",
    ]
    before = (tmp_path / "00-sample.txt").stat().st_mtime_ns
    assert not run_all(lines, tmp_path)  # tries the failed one again
    assert (tmp_path / "00-sample.txt").stat().st_mtime_ns == before
    assert run_all(["smalti sample --help", "smalti inpaint --help"], tmp_path / "other")


def test_a_command_that_was_changed_runs_again(tmp_path: Path):
    assert run_all(["smalti sample --help"], tmp_path)
    assert run_all(["smalti inpaint --help"], tmp_path)
    assert run_all(["smalti inspect-latents --help"], tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"00-sample.txt", "00-inpaint.txt", "00-inspect-latents.txt"}


def test_no_command_starts_after_the_time_is_over(tmp_path: Path):
    assert not run_all(["smalti sample --help"], tmp_path, minutes=1e-9)
    assert not list(tmp_path.iterdir())
