"""Tests that two processes with FSDP2-sharded models train what one process does. This file is also their program."""

import os
import subprocess
import sys
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from helpers import toys
from safetensors.torch import load_file
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from smalti.core.errors import UserError
from smalti.core.models import WEIGHTS_NAME
from smalti.training import checkpoints_and_logs, loop
from smalti.training.accelerator import accelerator
from smalti.training.config import Phase
from smalti.training.optimizers import parts_of, step_unless_on_device
from smalti.training.run_folder import Run
from smalti.training.signals import Interrupted

ADAMW = replace(toys.CONFIG, steps=9, report_steps=6, save_steps=100)  # saving is slow: it gathers every tensor
MUON = replace(ADAMW, optimizer="muon", learning_rate=1e-3)  # at higher rates, rounding moves a vector to another code
AGAIN = replace(ADAMW, accumulation=2, gradient_checkpointing=True)
SHARDED = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
BAD_RUNS = {"bad adamw": ADAMW, "bad muon": MUON}
STOPPED_AT = 3  # batches since the run was started or resumed
BAD = 6
SAME_NETWORK = ("vqvae", "hqa", "hams", "selfvae", "maskgit")  # the same networks as hrvq, vae and hourglass
NOT_SHARDED = ("vqgan",)  # trained in two phases
FAMILIES = {kind: family for family, kind in toys.KINDS if kind not in (*SAME_NETWORK, *NOT_SHARDED)}
WITH_MUON = ("hrvq", "hourglass")


def lengths(_done, model):
    """A report that logs a number to which every weight of the reported model contributes."""
    assert not any(isinstance(parameter, DTensor) for parameter in model.parameters())
    assert not model.training
    return {"length": float(nn.utils.get_total_norm(model.parameters()))}


def draw(model):
    """Draws a picture, which needs the full model too."""
    lengths(0, model)


def train(folder, build, config, process, wrap=lambda rows: rows):
    with process.main_process_first():
        run = Run(folder, {}, main=process.is_main_process)
    with suppress(Interrupted):
        toys.train(folder, build, config, process=process, run=run, wrap=wrap, on_report=lengths, draw=draw)


def stopping(rows):
    return toys.Signalling(rows, STOPPED_AT)


def step_as_on_a_gpu(optimizer, bad):
    for part in parts_of(optimizer):
        step_unless_on_device(part, bad)


def program(folder):
    """Resumes runs that one process began and will finish; trains with Muon; and with a bad batch in one process."""
    process, built = accelerator("fp32"), []
    checkpoints_and_logs.FIRST_PICTURES_SECONDS = 0.0

    def make(kind):
        model, objective, rows, held_out = toys.make(FAMILIES[kind], kind)
        built.append((model, objective))
        return model, objective, rows, held_out

    for kind in FAMILIES:
        train(folder / "adamw" / kind, lambda kind=kind: make(kind), AGAIN, process, stopping)
        if kind in WITH_MUON:
            train(folder / "muon" / kind, lambda kind=kind: make(kind), MUON, process)
    loop.step_unless = step_as_on_a_gpu
    for name, config in BAD_RUNS.items():
        bad = {BAD} if process.process_index == 1 else set()
        train(folder / name, toys.plain_toy, config, process, lambda rows, at=bad: toys.BadRows(rows, at))
    for model, objective in built:
        assert isinstance(objective, FSDPModule)
        blocks = model.recomputable()
        assert blocks
        assert all(isinstance(block, FSDPModule) for block in blocks)
        local_size = sum(parameter.to_local().numel() for parameter in model.parameters())
        assert local_size < 0.75 * sum(parameter.numel() for parameter in model.parameters())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sharding")
    one = accelerator("fp32")
    for kind, family in FAMILIES.items():
        build = lambda family=family, kind=kind: toys.make(family, kind)  # noqa: E731 - a new model for each run
        train(folder / "one adamw" / kind, build, ADAMW, one)
        if kind in WITH_MUON:
            train(folder / "one muon" / kind, build, MUON, one)
        train(folder / "adamw" / kind, build, ADAMW, one, stopping)
    for name, config in BAD_RUNS.items():
        train(folder / f"one {name}", toys.plain_toy, config, one, lambda rows: toys.BadRows(rows, {BAD}))
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", __file__, str(folder)]
    environment = {**os.environ, **SHARDED, "OMP_NUM_THREADS": "1"}
    finished = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=600)
    assert finished.returncode == 0, finished.stderr
    for kind, family in FAMILIES.items():
        train(folder / "adamw" / kind, lambda f=family, k=kind: toys.make(f, k), ADAMW, one)
    return folder


@pytest.fixture
def accelerate_reads_the_environment():
    """Accelerate reads it once for each process; here, for each of these tests."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def comparable(line):
    """Drops the largest error, whose mean over processes differs, and accuracies, which count whole codes."""
    return {name: value for name, value in line.items() if name not in ("largest", "accuracy", "held_out_accuracy")}


def compare(first, second, *, within):
    """Compares metrics and weights of two runs."""
    lines, others = ([comparable(line) for line in toys.measured(run)] for run in (first, second))
    assert len([line for line in lines if "learning_rate" in line]) == ADAMW.steps
    assert [line.keys() for line in lines] == [line.keys() for line in others]
    for line, other in zip(lines, others, strict=True):
        assert line == pytest.approx(other, rel=within, abs=within / 10)
    weights, others = load_file(first / WEIGHTS_NAME), load_file(second / WEIGHTS_NAME)
    assert weights.keys() == others.keys()
    for name, tensor in weights.items():
        assert (tensor - others[name]).abs().max() < within, name


@pytest.mark.parametrize(
    ("name", "kind", "within"),
    [("adamw", kind, 1e-4) for kind in FAMILIES] + [("muon", kind, 1e-2) for kind in WITH_MUON],
)
def test_sharded_model_trains_what_a_full_one_does(folder, name, kind, within):
    """With AdamW one process begins and finishes the run; in between it is sharded, with gradient accumulation and
    gradient checkpointing. With Muon, which rounds to bfloat16, the whole run is sharded."""
    compare(folder / name / kind, folder / f"one {name}" / kind, within=within)


@pytest.mark.parametrize(("name", "within"), [("bad adamw", 1e-4), ("bad muon", 1e-2)])
def test_bad_batch_of_one_process_is_skipped_by_all(folder, name, within):
    """The step is skipped as on GPUs, without reading the flag on the CPU."""
    compare(folder / name, folder / f"one {name}", within=within)
    assert toys.measured(folder / name)[-2]["skipped_steps"] == 1


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "DeepSpeed has its own training loop.*fsdp_version: 2"),
        ({"ACCELERATE_USE_MEGATRON_LM": "true"}, "Megatron-LM has its own training loop.*fsdp_version: 2"),
        ({**SHARDED, "FSDP_VERSION": "1"}, "supports FSDP version 2 only; set fsdp_version: 2"),
        ({**SHARDED, "FSDP_OFFLOAD_PARAMS": "true"}, "on the device; set fsdp_offload_params: false"),
        ({**SHARDED, "FSDP_ACTIVATION_CHECKPOINTING": "true"}, "give --gradient-checkpointing instead"),
    ],
)
@pytest.mark.usefixtures("accelerate_reads_the_environment")
def test_unsupported_configurations_are_refused(tmp_path, monkeypatch, environment, message):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=message):
        train(tmp_path, toys.plain_toy, ADAMW, two_processes())


@pytest.mark.usefixtures("accelerate_reads_the_environment")
def test_fp16_is_refused(tmp_path, monkeypatch):
    for name, value in SHARDED.items():
        monkeypatch.setenv(name, value)
    process = two_processes()
    process.scaler = torch.amp.GradScaler("cpu")
    with pytest.raises(UserError, match="--precision fp16 does not work with FSDP; use bf16 or fp32"):
        train(tmp_path, toys.plain_toy, ADAMW, process)


@pytest.mark.usefixtures("accelerate_reads_the_environment")
def test_several_phases_are_refused(tmp_path, monkeypatch):
    for name, value in SHARDED.items():
        monkeypatch.setenv(name, value)
    model, objective, rows, _ = toys.plain_toy()
    phases = [Phase(name, objective, ADAMW.optimizer_of(objective)) for name in ("generator", "discriminator")]
    with pytest.raises(UserError, match=r"toy is trained in 2 phases, whose networks FSDP cannot shard.*--multi_gpu"):
        toys.fit(two_processes(), phases, rows, ADAMW, model=model, run=Run(tmp_path, {}))


def two_processes():
    """Returns an accelerator that reports two processes, usable until the first collective operation."""
    process = accelerator("fp32")
    process.state._shared_state["num_processes"] = 2
    return process


if __name__ == "__main__":
    program(Path(sys.argv[1]))
