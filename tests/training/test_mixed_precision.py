"""Tests of fp16's loss scaling in the training loop, on CPUs: networks compute in fp32, a scaler scales the loss."""

from dataclasses import replace

import pytest
import torch
from helpers import toys
from helpers.toys import CONFIG, BadRows, Signalling, train
from safetensors.torch import load_file

from smalti.core.models import WEIGHTS_NAME
from smalti.training.accelerator import accelerator
from smalti.training.run_folder import Run
from smalti.training.signals import Interrupted

SCALE = 2.0**10


class CountingScaler(torch.amp.GradScaler):
    """Torch's scaler, which doubles its scale after 4 good steps and halves it after a bad one; counts its calls."""

    def __init__(self):
        super().__init__("cpu", init_scale=SCALE, growth_interval=4)
        self.calls = []

    def scale(self, outputs):
        self.calls.append("scale")
        return super().scale(outputs)

    def unscale_(self, optimizer):
        self.calls.append("unscale")
        super().unscale_(optimizer)

    def step(self, optimizer, *args, **options):
        self.calls.append("step")

    def update(self, new_scale=None):
        self.calls.append("update")
        super().update(new_scale)


def scaled_process():
    process = accelerator("fp32")
    process.scaler = CountingScaler()
    return process


@pytest.mark.parametrize("optimizer", ["adamw", "muon", "adamax"])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_loss_scaling_does_not_change_training(tmp_path, optimizer, accumulation):
    """Scaling by powers of two is exact in fp32. Some steps clip their gradients, after unscaling."""
    config = replace(CONFIG, optimizer=optimizer, accumulation=accumulation)
    process = scaled_process()
    train(tmp_path / "scaled", config=config, process=process)
    train(tmp_path / "plain", config=config, process=accelerator("fp32"))
    assert toys.outcome(tmp_path / "scaled") == toys.outcome(tmp_path / "plain")
    parts = 2 if optimizer == "muon" else 1
    assert process.scaler.calls == [*["scale"] * accumulation, *["unscale"] * parts, "update"] * CONFIG.steps
    assert process.scaler.get_scale() == SCALE * 2**3


def test_two_phases_share_one_update_per_step(tmp_path):
    process = scaled_process()
    train(tmp_path / "scaled", lambda: toys.make("tokenizer", "vqgan"), process=process)
    train(tmp_path / "plain", lambda: toys.make("tokenizer", "vqgan"), process=accelerator("fp32"))
    assert process.scaler.calls == ["scale", "unscale", "scale", "unscale", "update"] * CONFIG.steps
    scaled, plain = (load_file(tmp_path / name / WEIGHTS_NAME) for name in ("scaled", "plain"))
    for name, tensor in scaled.items():
        torch.testing.assert_close(tensor, plain[name], rtol=1e-4, atol=1e-5)


def test_overflow_skips_the_step_and_halves_the_scale(tmp_path):
    """The loss is finite, but its scaled gradients are not."""
    process = scaled_process()
    process.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127, growth_interval=100)
    config = replace(CONFIG, learning_rate=1e-9, clip_norm=1e9)
    train(tmp_path, config=config, process=process)
    lines = [line for line in toys.measured(tmp_path) if "skipped_steps" in line]
    skipped = int(lines[-1]["skipped_steps"])
    assert 0 < skipped < CONFIG.steps
    assert process.scaler.get_scale() == 2.0 ** (127 - skipped)
    assert ["gradient_norm" in line for line in lines] == [step >= skipped for step in range(CONFIG.steps)]
    assert all("loss" in line for line in lines)
    assert all(tensor.isfinite().all() for tensor in load_file(tmp_path / WEIGHTS_NAME).values())


def test_bad_batch_halves_the_scale_and_changes_nothing_else(tmp_path):
    process = scaled_process()
    train(tmp_path / "scaled", process=process, wrap=lambda rows: BadRows(rows, {3}))
    train(tmp_path / "plain", process=accelerator("fp32"), wrap=lambda rows: BadRows(rows, {3}))
    assert toys.outcome(tmp_path / "scaled") == toys.outcome(tmp_path / "plain")
    assert process.scaler.get_scale() == SCALE / 2 * 2**2  # 3 good steps, the bad one, 8 good ones


@pytest.mark.parametrize("stop", [1, 5, 9])
def test_resuming_restores_the_scale(tmp_path, stop):
    """The scale and its count of good steps must be equal in the snapshots of both runs."""
    train(tmp_path / "uninterrupted", process=scaled_process())
    with pytest.raises(Interrupted):
        train(tmp_path / "stopped", process=scaled_process(), wrap=lambda rows: Signalling(rows, stop))
    train(tmp_path / "stopped", process=scaled_process())
    states = [Run(tmp_path / name, {"settings": "same"}).state()["scaler"] for name in ("uninterrupted", "stopped")]
    assert states[0] == states[1]
    assert states[0]["scale"] == SCALE * 2**3
    assert toys.outcome(tmp_path / "stopped") == toys.outcome(tmp_path / "uninterrupted")


def test_snapshots_without_a_scaler_have_no_scale(tmp_path):
    train(tmp_path, process=accelerator("fp32"))
    assert "scaler" not in Run(tmp_path, {"settings": "same"}).state()
