"""Tests that two processes train what one does, for every kind. This file is also the program of the two processes."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import toys
from safetensors.torch import load_file

from smalti.core.errors import UserError
from smalti.core.models import WEIGHTS_NAME
from smalti.training import checkpoints_and_logs
from smalti.training.accelerator import accelerator
from smalti.training.nan_and_stalls import Agreement
from smalti.training.run_folder import METRICS_NAME, Run
from smalti.training.signals import Interrupted

CONFIG = toys.CONFIG
ACCUMULATED = replace(CONFIG, accumulation=2)
STOPPED_AT = 5  # batches of the process that receives the signal
UNINTERRUPTED = ("hrvq", "vqgan", "hourglass")  # one kind of each way to train
of_every_kind = pytest.mark.parametrize(("family", "kind"), toys.KINDS, ids=[kind for _, kind in toys.KINDS])
of_every_run = pytest.mark.parametrize(
    ("run", "family", "kind"),
    [("stopped", *each) for each in toys.KINDS]
    + [("uninterrupted", *each) for each in toys.KINDS if each[1] in UNINTERRUPTED],
)


def train(folder, family, kind, config=CONFIG, *, process, wrap=lambda rows: rows, draw=None):
    with process.main_process_first():
        run = Run(folder, {}, main=process.is_main_process)
    toys.train(folder, lambda: toys.make(family, kind), config, process=process, run=run, wrap=wrap, draw=draw)


def program(folder):
    """Trains with gradient accumulation until a signal to one process stops the run; and some runs to the end.

    The first pictures are due at once on the main process.
    """
    process = accelerator("fp32")
    checkpoints_and_logs.FIRST_PICTURES_SECONDS = 0.0
    for family, kind in toys.KINDS:
        stop = STOPPED_AT if process.process_index == 1 else -1
        try:
            train(
                folder / "stopped" / kind,
                family,
                kind,
                ACCUMULATED,
                process=process,
                wrap=lambda rows, batch=stop: toys.Signalling(rows, batch),
            )
        except Interrupted as stopped:
            (folder / f"{kind} {process.process_index} {stopped.step}").touch()
        if kind in UNINTERRUPTED:
            whole = folder / "uninterrupted" / kind
            train(whole, family, kind, process=process, draw=lambda _, path=whole: drawn(path, process.process_index))


def drawn(folder, process):
    """Draws a picture: notes which process draws, after how many lines of metrics."""
    metrics = folder / METRICS_NAME
    lines = len(metrics.read_text().splitlines()) if metrics.exists() else 0
    with (folder / "drawn").open("a") as file:
        file.write(f"{process} {lines}\n")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", __file__, str(folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    finished = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=600)
    assert finished.returncode == 0, finished.stderr
    for family, kind in toys.KINDS:
        train(folder / "one" / kind, family, kind, process=accelerator("fp32"))
        train(folder / "stopped" / kind, family, kind, ACCUMULATED, process=accelerator("fp32"))  # resumes
    return folder


@of_every_run
def test_two_processes_train_what_one_does(folder, run, family, kind):
    """Also with two micro-batches each, stopped with two processes and resumed with one."""
    one, two = toys.measured(folder / "one" / kind), toys.measured(folder / run / kind)
    losses, others = toys.losses(one), toys.losses(two)
    phases = len(losses) // CONFIG.steps
    assert len(losses) == phases * CONFIG.steps > 0
    within = 1e-5 if phases == 1 else 1e-4  # adversarial training amplifies rounding differences
    assert others == pytest.approx(losses, rel=within)
    assert max(losses) - min(losses) > 1e-3  # it trains, so that equal losses mean something
    for expected, actual in zip(one, two, strict=True):
        assert expected.keys() == actual.keys()
        for name, value in actual.items():
            # gradient norms, and the adaptive weight, a ratio of two, have the largest rounding errors
            factor = 100 if name.endswith(("gradient_norm", "adaptive_weight")) else 10
            assert expected[name] == pytest.approx(value, rel=factor * within, abs=within), name
    weights, others = (load_file(folder / count / kind / WEIGHTS_NAME) for count in ("one", run))
    assert weights.keys() == others.keys()
    for name, tensor in weights.items():
        if not name.endswith(".k.bias"):  # attention ignores it: its gradient is rounding error, which Adam amplifies
            assert (tensor - others[name]).abs().max() < 1e-4, name


@of_every_kind
def test_signal_to_one_process_stops_both_after_the_same_step(folder, family, kind):
    """They stop one step later, because the flags are exchanged during that step."""
    assert {path.name for path in folder.glob(f"{kind} *")} == {f"{kind} {n} {STOPPED_AT + 2}" for n in (0, 1)}


@pytest.mark.parametrize("kind", UNINTERRUPTED)
def test_first_pictures_of_two_processes_are_drawn_once_and_by_the_main_one(folder, kind):
    """The processes agree on it one step after they are due."""
    processes, lines = zip(*(line.split() for line in (folder / "uninterrupted" / kind / "drawn").open()), strict=True)
    assert processes == ("0",) * (1 + CONFIG.steps // CONFIG.report_steps)
    assert int(lines[0]) == 2 * CONFIG.log_steps


def test_snapshots_that_differ_between_processes_are_refused(tmp_path, monkeypatch):
    process = accelerator("fp32")
    monkeypatch.setattr(process, "gather", lambda step: torch.cat([step, step + 3]))
    with pytest.raises(UserError, match=r"see different snapshots in .*, of steps \[0, 3\]; put it on a disk"):
        toys.train(tmp_path, process=process)


def test_agreement_of_one_process():
    agreement = Agreement(1)
    assert agreement.after_step(0, True, last=False) == (0, True)
    assert agreement.after_step(15, False, last=False) == (15, False)


if __name__ == "__main__":
    program(Path(sys.argv[1]))
