"""Runs of every registered kind, killed and stopped for real in processes of their own, end as if they had not been.

The processes come from a server that has imported everything once: each starts in no time.
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
import torch._dynamo  # by the server, once: optimisers would in each process, which takes seconds
import x_transformers  # noqa: F401 - by the server, once: the hourglass would in each process
from helpers import toys

from smalti.training.config import FitConfig
from smalti.training.run_folder import Run
from smalti.training.signals import Interrupted

CONFIG = replace(toys.CONFIG, steps=14, report_steps=5, save_steps=3, optimizer="muon")
SIGNALS = [signal.SIGKILL, signal.SIGTERM, signal.SIGINT]


class Slow:
    """Rows that take their time, so that a signal finds the run anywhere; for ever, with the batch numbered `hangs`."""

    def __init__(self, rows, seconds, hangs):
        self.rows, self.seconds, self.hangs, self.batches = rows, seconds, hangs, 0

    def __len__(self):
        return len(self.rows)

    def __getitems__(self, rows):
        time.sleep(10_000 if self.batches == self.hangs else self.seconds)
        self.batches += 1
        return self.rows.__getitems__(rows)


def program(folder, family, kind, config: FitConfig, seconds=0.0, hangs=-1):
    """What a process runs. Exits as the commands do."""
    torch.set_num_threads(1)
    folder.mkdir(exist_ok=True)
    os.dup2(os.open(folder / "said", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
    try:
        toys.train(folder, lambda: toys.make(family, kind), config, wrap=lambda rows: Slow(rows, seconds, hangs))
    except Interrupted as stopped:
        os._exit(128 + stopped.signal_number)


@pytest.fixture(scope="module")
def start():
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(["test_survival"])
    before = os.environ["PYTHONPATH"]
    os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), before])  # where the server looks
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
def whole(start, tmp_path_factory):
    """Folders of uninterrupted runs, by kind."""
    folder = tmp_path_factory.mktemp("whole")
    processes = [start(folder / kind, family, kind, CONFIG) for family, kind in toys.KINDS]
    for process in processes:
        process.join(120)
        assert process.exitcode == 0
    return folder


def lines(folder):
    metrics = folder / "metrics.jsonl"
    return len(metrics.read_text().splitlines()) if metrics.exists() else 0


@pytest.mark.parametrize(("family", "kind"), toys.KINDS, ids=[kind for _, kind in toys.KINDS])
def test_a_run_survives(start, whole, tmp_path, family, kind):
    """Each signal, at random moments, wherever they fall: while a state is written too. Then it is left in peace."""
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
    assert toys.outcome(tmp_path) == toys.outcome(whole / kind)


@pytest.mark.parametrize("kind", ["hrvq", "vqgan"])
def test_a_run_survives_a_flipped_byte(start, whole, tmp_path, kind):
    """The newest state is passed over, and what was trained since the one before it is trained again."""
    shutil.copytree(whole / kind, tmp_path / "run")
    newest = max((tmp_path / "run" / "states").glob("step_*")) / "state.pt"
    content = bytearray(newest.read_bytes())
    content[random.randrange(len(content))] ^= 1
    newest.write_bytes(content)
    process = start(tmp_path / "run", "tokenizer", kind, CONFIG)
    process.join(60)
    assert process.exitcode == 0
    assert toys.outcome(tmp_path / "run") == toys.outcome(whole / kind)


def test_a_run_that_hangs_says_where_and_leaves(start, tmp_path):
    """Status 75, and the last saved state is there to go on from."""
    (family, kind), *_ = toys.KINDS
    config = replace(CONFIG, save_steps=1, stall_seconds=5)
    process = start(tmp_path, family, kind, config, 0.0, 3)
    process.join(60)
    assert process.exitcode == 75
    said = (tmp_path / "said").read_text()
    assert "in __getitems__" in said
    assert "nothing has happened for 5 s after step 3; above is where every thread is" in said
    assert Run(tmp_path, {"settings": "same"}).step == 3
