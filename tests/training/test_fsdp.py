"""Models split among two processes by FSDP2 train what one process does. This file is also the program of the two."""

import os
import subprocess
import sys
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
from accelerate.state import AcceleratorState
from helpers import toys
from safetensors.torch import load_file
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from smalti.core.errors import UserError
from smalti.core.models import WEIGHTS_NAME
from smalti.training import loop as fit_file
from smalti.training.accelerator import accelerator
from smalti.training.config import Phase
from smalti.training.optimizers import CombinedOptimizer, step_unless_on_device
from smalti.training.run_folder import Run
from smalti.training.signals import Interrupted

ADAMW = replace(toys.CONFIG, steps=9, report_steps=6, save_steps=100)  # saving puts every tensor together, one by one
MUON = replace(ADAMW, optimizer="muon")
AGAIN = replace(ADAMW, accumulation=2, gradient_checkpointing=True)
SPLIT = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
BAD_RUNS = {"bad adamw": ADAMW, "bad muon": MUON}
STOPPED_AT = 3  # batches, of those who begin and of those who go on
BAD = 6
SAME_NETWORK = ("vqvae", "hqa", "hams", "selfvae", "maskgit")  # as hrvq, vae, hourglass: what is split is the same
NOT_SPLIT = ("vqgan",)  # trained in two phases
FAMILIES = {kind: family for family, kind in toys.KINDS if kind not in (*SAME_NETWORK, *NOT_SPLIT)}
WITH_MUON = ("hrvq", "hourglass")


def lengths(_done, model):
    """What a report logs: a number that every weight of the model shown has a part in."""
    assert not any(isinstance(parameter, DTensor) for parameter in model.parameters())
    assert not model.training
    return {"length": float(nn.utils.get_total_norm(model.parameters()))}


def train(folder, of, config, process, wrap=lambda rows: rows):
    with process.main_process_first():
        run = Run(folder, {}, main=process.is_main_process)
    with suppress(Interrupted):
        toys.train(folder, of, config, process=process, run=run, wrap=wrap, on_report=lengths)


def stopping(rows):
    return toys.Signalling(rows, STOPPED_AT)


def as_on_a_device(optimizer, bad):
    for part in optimizer.parts if isinstance(optimizer, CombinedOptimizer) else [optimizer]:
        step_unless_on_device(part, bad)


def program(folder):
    """Runs that one process began and will end; whole ones, with Muon; and some with a bad batch of one process."""
    process, seen = accelerator("fp32"), []

    def make(kind):
        model, objective, rows, held_out = toys.make(FAMILIES[kind], kind)
        seen.append((model, objective))
        return model, objective, rows, held_out

    for kind in FAMILIES:
        train(folder / "adamw" / kind, lambda kind=kind: make(kind), AGAIN, process, stopping)
        if kind in WITH_MUON:
            train(folder / "muon" / kind, lambda kind=kind: make(kind), MUON, process)
    fit_file.step_unless = as_on_a_device
    for name, config in BAD_RUNS.items():
        bad = {BAD} if process.process_index == 1 else set()
        train(folder / name, toys.plain_toy, config, process, lambda rows, at=bad: toys.Bad(rows, at))
    for model, objective in seen:
        assert isinstance(objective, FSDPModule)
        blocks = model.recomputable()
        assert blocks
        assert all(isinstance(block, FSDPModule) for block in blocks)
        held = sum(parameter.to_local().numel() for parameter in model.parameters())
        assert held < 0.75 * sum(parameter.numel() for parameter in model.parameters())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sharding")
    AcceleratorState._reset_state(reset_partial_state=True)
    one = accelerator("fp32")
    for kind, family in FAMILIES.items():
        of = lambda family=family, kind=kind: toys.make(family, kind)  # noqa: E731 - a fresh one for each run
        train(folder / "one adamw" / kind, of, ADAMW, one)
        if kind in WITH_MUON:
            train(folder / "one muon" / kind, of, MUON, one)
        train(folder / "adamw" / kind, of, ADAMW, one, stopping)
    for name, config in BAD_RUNS.items():
        train(folder / f"one {name}", toys.plain_toy, config, one, lambda rows: toys.Bad(rows, {BAD}))
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", __file__, str(folder)]
    environment = {**os.environ, **SPLIT, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stderr
    for kind, family in FAMILIES.items():
        train(folder / "adamw" / kind, lambda f=family, k=kind: toys.make(f, k), ADAMW, one)
    return folder


def comparable(line):
    """Without the largest error, whose mean over processes is another number, and what counts whole codes."""
    return {name: value for name, value in line.items() if name not in ("largest", "accuracy", "held_out_accuracy")}


def compare(ours, theirs, *, within):
    """All that was measured, and the weights, of two runs."""
    lines, others = ([comparable(line) for line in toys.measured(run)] for run in (ours, theirs))
    assert len([line for line in lines if "learning_rate" in line]) == ADAMW.steps
    assert [line.keys() for line in lines] == [line.keys() for line in others]
    for line, other in zip(lines, others, strict=True):
        assert line == pytest.approx(other, rel=within, abs=within / 10)
    weights, others = load_file(ours / WEIGHTS_NAME), load_file(theirs / WEIGHTS_NAME)
    assert weights.keys() == others.keys()
    for name, tensor in weights.items():
        assert (tensor - others[name]).abs().max() < within, name


@pytest.mark.parametrize(
    ("name", "kind", "within"),
    [("adamw", kind, 1e-4) for kind in FAMILIES] + [("muon", kind, 1e-2) for kind in WITH_MUON],
)
def test_a_split_model_trains_what_a_whole_one_does(folder, name, kind, within):
    """Begun by one process, gone on with split, in slices and with blocks computed again, ended by one; and, with Muon,
    which rounds to bfloat16, split all along."""
    compare(folder / name / kind, folder / f"one {name}" / kind, within=within)


@pytest.mark.parametrize(("name", "within"), [("bad adamw", 1e-4), ("bad muon", 1e-2)])
def test_a_bad_batch_of_one_process_is_a_step_that_none_takes(folder, name, within):
    """Skipped as on GPUs, without a look."""
    compare(folder / name, folder / f"one {name}", within=within)
    assert toys.measured(folder / name)[-2]["skipped_steps"] == 1


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "DeepSpeed brings a training loop of its own.*fsdp_version: 2"),
        ({"ACCELERATE_USE_MEGATRON_LM": "true"}, "Megatron-LM brings a training loop of its own.*fsdp_version: 2"),
        ({**SPLIT, "FSDP_VERSION": "1"}, "smalti knows the second version; set fsdp_version: 2"),
        ({**SPLIT, "FSDP_OFFLOAD_PARAMS": "true"}, "on the device; set fsdp_offload_params: false"),
        ({**SPLIT, "FSDP_ACTIVATION_CHECKPOINTING": "true"}, "give --gradient-checkpointing, which does that"),
    ],
)
def test_what_is_not_followed_is_refused(tmp_path, monkeypatch, environment, said):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    AcceleratorState._reset_state(reset_partial_state=True)
    with pytest.raises(UserError, match=said):
        train(tmp_path, toys.plain_toy, ADAMW, two_processes())


def test_several_phases_are_refused(tmp_path, monkeypatch):
    for name, value in SPLIT.items():
        monkeypatch.setenv(name, value)
    model, objective, rows, _ = toys.plain_toy()
    phases = [Phase(name, objective, ADAMW.optimizer_of(objective)) for name in ("generator", "discriminator")]
    with pytest.raises(UserError, match=r"toy is trained in 2 phases, whose networks FSDP cannot split.*--multi_gpu"):
        toys.fit(two_processes(), phases, rows, ADAMW, model=model, run=Run(tmp_path, {}))


def two_processes():
    """As the first of two sees them, up to where they would meet."""
    process = accelerator("fp32")
    process.state._shared_state["num_processes"] = 2
    return process


if __name__ == "__main__":
    program(Path(sys.argv[1]))
