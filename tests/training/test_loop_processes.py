"""Two processes train what one does, every registered kind. This file is also the program that each of the two runs."""

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
from smalti.training.accelerator import accelerator
from smalti.training.nan_and_stalls import StopAgreement
from smalti.training.run_folder import Run
from smalti.training.signals import Interrupted

CONFIG = toys.CONFIG
SLICED = replace(CONFIG, accumulation=2)
STOPPED_AT = 5  # batches, of one process alone
WHOLE = ("hrvq", "vqgan", "hourglass")  # one of each way to train: how a run ends is not the kind's affair
of_every_kind = pytest.mark.parametrize(("family", "kind"), toys.KINDS, ids=[kind for _, kind in toys.KINDS])
of_every_way = pytest.mark.parametrize(
    ("way", "family", "kind"),
    [("stopped", *each) for each in toys.KINDS] + [("whole", *each) for each in toys.KINDS if each[1] in WHOLE],
)


def train(folder, family, kind, config=CONFIG, *, process, wrap=lambda rows: rows):
    with process.main_process_first():
        run = Run(folder, {}, main=process.is_main_process)
    toys.train(folder, lambda: toys.make(family, kind), config, process=process, run=run, wrap=wrap)


def program(folder):
    """Runs in slices that a signal to one process stops, and some whole ones."""
    process = accelerator("fp32")
    for family, kind in toys.KINDS:
        stop = STOPPED_AT if process.process_index == 1 else -1
        try:
            train(
                folder / "stopped" / kind,
                family,
                kind,
                SLICED,
                process=process,
                wrap=lambda rows, batch=stop: toys.Signalling(rows, batch),
            )
        except Interrupted as stopped:
            (folder / f"{kind} {process.process_index} {stopped.step}").touch()
        if kind in WHOLE:
            train(folder / "whole" / kind, family, kind, process=process)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", __file__, str(folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    for family, kind in toys.KINDS:
        train(folder / "one" / kind, family, kind, process=accelerator("fp32"))
        train(folder / "stopped" / kind, family, kind, SLICED, process=accelerator("fp32"))  # where two stopped
    return folder


@of_every_way
def test_two_processes_train_what_one_does(folder, way, family, kind):
    """And in two slices each, stopped among two to go on with one: nothing is left out or seen twice."""
    one, two = toys.measured(folder / "one" / kind), toys.measured(folder / way / kind)
    losses, others = toys.losses(one), toys.losses(two)
    phases = len(losses) // CONFIG.steps
    assert len(losses) == phases * CONFIG.steps > 0
    within = 1e-5 if phases == 1 else 1e-4  # adversaries enlarge what rounding differs by
    assert others == pytest.approx(losses, rel=within)
    assert max(losses) - min(losses) > 1e-3  # it trains: equal losses would say nothing otherwise
    for ours, theirs in zip(one, two, strict=True):
        assert ours.keys() == theirs.keys()
        for name, value in theirs.items():
            most = 100 if name.endswith("gradient_norm") else 10  # which rounds the most
            assert ours[name] == pytest.approx(value, rel=most * within, abs=within), name
    weights, others = (load_file(folder / count / kind / WEIGHTS_NAME) for count in ("one", way))
    assert weights.keys() == others.keys()
    for name, tensor in weights.items():
        if not name.endswith(".k.bias"):  # no attention hangs on it: its gradient is rounding, which Adam enlarges
            assert (tensor - others[name]).abs().max() < 1e-4, name


@of_every_kind
def test_a_signal_to_one_process_stops_both_after_the_same_step(folder, family, kind):
    """One step after the one in hand: the flags travel meanwhile."""
    assert {path.name for path in folder.glob(f"{kind} *")} == {f"{kind} {n} {STOPPED_AT + 2}" for n in (0, 1)}


def test_states_that_the_processes_do_not_share_are_refused(tmp_path, monkeypatch):
    process = accelerator("fp32")
    monkeypatch.setattr(process, "gather", lambda mine: torch.cat([mine, mine + 3]))
    with pytest.raises(UserError, match=r"the processes see other states in .*, of steps \[0, 3\]; put it on a disk"):
        toys.train(tmp_path, process=process)


def test_one_process_agrees_with_itself():
    agreement = StopAgreement(1)
    assert [agreement.after_step(number, last=False) for number in (0, 15)] == [0, 15]


if __name__ == "__main__":
    program(Path(sys.argv[1]))
