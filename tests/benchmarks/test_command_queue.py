"""Queues of commands: those that wait for a GPU, and the studies."""

import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

from smalti.benchmarks.command_queue import commands, log_name
from smalti.benchmarks.command_queue import run_all as run_with

FAILS_IF_ASKED = "import sys; sys.exit('fail' in sys.argv)"
run_all = partial(run_with, program=(sys.executable, "-S", "-c", FAILS_IF_ASKED))


def test_only_indented_commands_of_smalti_are_taken():
    page = "smalti sample\n\n    smalti sample --num 4\n    torchrun x\n    smalti inpaint \\\n        --num 2\n"
    assert commands(page) == ["smalti sample --num 4", "smalti inpaint --num 2"]


def test_finished_commands_are_not_run_again(tmp_path: Path):
    lines = ["smalti sample --help", "smalti evaluate fail", "smalti inpaint --help"]
    assert not run_all(lines, tmp_path)
    sample, evaluate, inpaint = (log_name(line) for line in lines)
    assert sample.startswith("sample-")
    assert {path.name for path in tmp_path.iterdir()} == {f"{sample}.txt", f"{evaluate}.partial", f"{inpaint}.txt"}
    before = (tmp_path / f"{sample}.txt").stat().st_mtime_ns
    assert not run_all(lines, tmp_path)  # tries the failed one again
    assert (tmp_path / f"{sample}.txt").stat().st_mtime_ns == before
    assert run_all(["smalti sample --help", "smalti inpaint --help"], tmp_path / "other")


def test_a_command_that_was_changed_runs_again_and_the_former_log_stays(tmp_path: Path):
    lines = ["smalti sample --num 2", "smalti sample --num 4"]
    for line in lines:
        assert run_all([line], tmp_path)
    logs = {path.name: path.read_text().splitlines()[0] for path in tmp_path.iterdir()}
    assert logs == {f"{log_name(line)}.txt": f"$ {line}" for line in lines}


def test_a_new_command_before_the_finished_ones_runs_none_of_them_again(tmp_path: Path):
    """A study whose data was missing is one when its data appears."""
    finished = ["smalti sample --help", "smalti inpaint --help"]
    assert run_all(finished, tmp_path)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    assert run_all(["smalti evaluate --help", *finished], tmp_path)
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert len([*tmp_path.iterdir()]) == 3


def test_no_command_starts_after_the_time_is_over(tmp_path: Path):
    assert not run_all(["smalti sample --help"], tmp_path, minutes=1e-9)
    assert not list(tmp_path.iterdir())


MEET = """
import sys, time
from pathlib import Path
own, other = Path(sys.argv[2]), Path(sys.argv[3])  # after -c and the command's name
own.touch()
while not other.exists():
    time.sleep(0.01)
"""


def test_several_commands_run_at_once(tmp_path: Path):
    one, other = tmp_path / "one", tmp_path / "other"
    lines = [f"smalti a {one} {other}", f"smalti b {other} {one}"]  # each waits for the other
    assert run_with(lines, tmp_path / "logs", processes=2, program=(sys.executable, "-S", "-c", MEET), minutes=1.0)


STOPPABLE = """
import signal
import sys
from pathlib import Path
from smalti.benchmarks.command_queue import run_all
signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs of a shell ignore it
sleep = "import time; print('asleep', flush=True); time.sleep(60)"
run_all(["smalti a", "smalti b"], Path(sys.argv[1]), program=(sys.executable, "-S", "-c", sleep))
"""


def test_ctrl_c_ends_the_running_command_and_starts_no_other(tmp_path: Path):
    queue = subprocess.Popen(
        [sys.executable, "-c", STOPPABLE, tmp_path], start_new_session=True, stderr=subprocess.PIPE
    )
    running = tmp_path / f"{log_name('smalti a')}.partial"
    while not (running.exists() and "asleep" in running.read_text()):
        time.sleep(0.05)
    queue.send_signal(signal.SIGINT)  # to the queue alone
    _, error = queue.communicate(timeout=30)
    assert b"KeyboardInterrupt" in error
    assert [path.name for path in tmp_path.iterdir()] == [running.name]


def test_a_command_that_outlasts_the_time_is_ended(tmp_path: Path):
    start = time.monotonic()
    sleep = (sys.executable, "-S", "-c", "import time; time.sleep(60)")
    assert not run_with(["smalti a", "smalti b"], tmp_path, minutes=1 / 60, program=sleep)
    assert time.monotonic() - start < 30
    assert [path.name for path in tmp_path.iterdir()] == [f"{log_name('smalti a')}.partial"]
