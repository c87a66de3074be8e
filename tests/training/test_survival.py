"""Tests that really killed and stopped runs of every kind equal uninterrupted ones.

The runs are processes forked from a server that has imported everything once, so that they start quickly.
"""

import multiprocessing
import os
import random
import shutil
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch._dynamo  # imported by the server; otherwise optimizers import it in each process, which takes seconds
import x_transformers  # noqa: F401 - imported by the server; otherwise the hourglass imports it in each process
from helpers import toys

from smalti.training.config import FitConfig
from smalti.training.run_folder import Run
from smalti.training.signals import Interrupted

CONFIG = replace(toys.CONFIG, steps=14, report_steps=5, save_steps=3, optimizer="muon")
SIGNALS = [signal.SIGKILL, signal.SIGTERM, signal.SIGINT]


class Slow:
    """Rows that take `seconds` per batch, so that signals arrive anywhere; batch number `hangs` never ends."""

    def __init__(self, rows, seconds, hangs):
        self.rows, self.seconds, self.hangs, self.batches = rows, seconds, hangs, 0

    def __len__(self):
        return len(self.rows)

    def __getitems__(self, rows):
        time.sleep(10_000 if self.batches == self.hangs else self.seconds)
        self.batches += 1
        return self.rows.__getitems__(rows)


def program(folder, family, kind, config: FitConfig, seconds=0.0, hangs=-1):
    """Trains in a process of its own and exits as the commands do."""
    torch.set_num_threads(1)
    os.setpgid(0, 0)  # so that a test can signal it and its workers together
    multiprocessing.set_start_method("fork", force=True)  # of workers, whose own server would die by the signal
    folder.mkdir(exist_ok=True)
    os.dup2(os.open(folder / "stderr", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
    try:
        toys.train(folder, lambda: toys.make(family, kind), config, wrap=lambda rows: Slow(rows, seconds, hangs))
    except Interrupted as stopped:
        os._exit(128 + stopped.signal_number)


@pytest.fixture(scope="module")
def start():
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(["test_survival"])
    before = os.environ["PYTHONPATH"]
    # the server imports this file from there
    os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), before])
    running = []

    def start(*arguments):
        running.append(server.Process(target=program, args=arguments))
        running[-1].start()
        return running[-1]

    yield start
    os.environ["PYTHONPATH"] = before
    for process in running:
        process.kill()


@pytest.fixture(scope="module")
def uninterrupted(start, tmp_path_factory):
    """Trains every kind without interruption, in folders named for the kinds."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    processes = [start(folder / kind, family, kind, CONFIG) for family, kind in toys.KINDS]
    for process in processes:
        process.join(120)
        assert process.exitcode == 0
    return folder


def lines(folder):
    metrics = folder / "metrics.jsonl"
    return len(metrics.read_text().splitlines()) if metrics.exists() else 0


@pytest.mark.parametrize(("family", "kind"), toys.KINDS, ids=[kind for _, kind in toys.KINDS])
def test_interrupted_run_equals_uninterrupted_run(start, uninterrupted, tmp_path, family, kind):
    """Each signal arrives at a random moment, perhaps while a snapshot is written; then the run may finish."""
    for number in random.sample(SIGNALS, k=len(SIGNALS)):
        wait = random.randint(1, CONFIG.steps // len(SIGNALS))
        process, before = start(tmp_path, family, kind, CONFIG, 0.01), lines(tmp_path)
        while process.is_alive() and lines(tmp_path) < before + wait:
            time.sleep(0.001)
        time.sleep(random.uniform(0, 0.02))
        os.kill(process.pid, number)
        process.join(60)
        stopped = -number if number == signal.SIGKILL else 128 + number
        assert process.exitcode in (stopped, 0), "it may have finished before the signal came"
    process = start(tmp_path, family, kind, CONFIG)
    process.join(60)
    assert process.exitcode == 0
    assert toys.outcome(tmp_path) == toys.outcome(uninterrupted / kind)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_all_processes_of_a_run_stops_it_after_a_snapshot(start, uninterrupted, tmp_path, number):
    """Ctrl-C in a terminal and schedulers signal data loader workers too."""
    config = replace(CONFIG, workers=2, save_steps=100)
    process = start(tmp_path, "tokenizer", "hrvq", config, 0.05)
    while process.is_alive() and not lines(tmp_path):
        time.sleep(0.001)
    os.killpg(process.pid, number)
    process.join(60)
    assert process.exitcode == 128 + number, (tmp_path / "stderr").read_text()
    process = start(tmp_path, "tokenizer", "hrvq", config)
    process.join(60)
    assert process.exitcode == 0
    assert toys.outcome(tmp_path) == toys.outcome(uninterrupted / "hrvq")


@pytest.mark.parametrize("kind", ["hrvq", "vqgan"])
def test_run_resumes_before_a_damaged_snapshot(start, uninterrupted, tmp_path, kind):
    """The newest snapshot is skipped, and the steps since the one before it are trained again."""
    shutil.copytree(uninterrupted / kind, tmp_path / "run")
    newest = max((tmp_path / "run" / "states").glob("step_*")) / "state.pt"
    content = bytearray(newest.read_bytes())
    content[random.randrange(len(content))] ^= 1
    newest.write_bytes(content)
    process = start(tmp_path / "run", "tokenizer", kind, CONFIG)
    process.join(60)
    assert process.exitcode == 0
    assert toys.outcome(tmp_path / "run") == toys.outcome(uninterrupted / kind)


def test_watchdog_ends_a_stalled_run_with_a_traceback(start, tmp_path):
    """The exit status is 75, and the run can resume from the last snapshot."""
    (family, kind), *_ = toys.KINDS
    config = replace(CONFIG, save_steps=1, stall_seconds=5)
    process = start(tmp_path, family, kind, config, 0.0, 3)
    process.join(60)
    assert process.exitcode == 75
    stderr = (tmp_path / "stderr").read_text()
    assert "in __getitems__" in stderr
    assert "no progress for 5 s after step 3; the stacks of all threads are above" in stderr
    assert Run(tmp_path, {"settings": "same"}).step == 3
