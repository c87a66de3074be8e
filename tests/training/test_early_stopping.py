"""Tests of early stopping: where it ends, which weights it keeps, after a kill too."""

import json
from dataclasses import replace

import pytest
import torch
from helpers import toys
from helpers.toys import CONFIG, train
from safetensors.torch import load_file

from smalti.core.errors import UserError
from smalti.core.models import CONFIG_NAME, WEIGHTS_NAME
from smalti.core.provenance import last_metrics
from smalti.training import checkpoints_and_logs
from smalti.training.run_folder import Run
from smalti.training.snapshots import STATE_NAME


def test_early_stopping_keeps_the_best_weights_also_after_a_kill(tmp_path, monkeypatch):
    config = replace(CONFIG, steps=40, patience=4)
    monkeypatch.setattr(checkpoints_and_logs, "held_out_losses", lambda *_: {"held_out_loss": next(losses)})
    losses = iter([3.0, 1.0, 2.0])
    train(tmp_path / "early", config=config)
    losses = iter([3.0, 1.0, 2.0])
    train(tmp_path / "all", config=replace(config, steps=12))
    for folder in (tmp_path / "early", tmp_path / "all"):
        run = Run(folder, {"settings": "same"})
        assert run.step == 12
        assert last_metrics(folder)["step"] == 12
        assert load_file(folder / WEIGHTS_NAME).keys() == load_file(run.states.path(8) / WEIGHTS_NAME).keys()
        for name, weight in load_file(run.states.path(8) / WEIGHTS_NAME).items():
            assert torch.equal(load_file(folder / WEIGHTS_NAME)[name], weight)
        run.states.publish(12)  # as if a kill had come before the best weights were put in place
        assert run.end(13, 0) is None
        assert run.end(40, 5) is None
        assert "early stopping after 12 steps, with the lowest held-out loss after 8" in (run.end(40, 4) or "")
        assert "12 steps, with the lowest held-out loss after 8" in (run.end(12, 5) or "")
        assert run.advice(12, 0, "--steps") == run.advice(12, 5, "--steps") == "--steps"
        assert run.advice(40, 4, "--steps") == "a larger --patience (0 turns early stopping off)"
        assert run.advice(12, 4, "--steps") == "--steps and a larger --patience (0 turns early stopping off)"
        assert json.loads((folder / CONFIG_NAME).read_text())["provenance"]["steps"] == 8
        del run
    train(tmp_path / "early", config=config)
    assert last_metrics(tmp_path / "early")["step"] == 12
    losses = iter([0.5, 4.0, 4.0])
    train(tmp_path / "early", config=replace(config, patience=5))
    assert last_metrics(tmp_path / "early")["step"] == 18


@pytest.mark.parametrize("name", [WEIGHTS_NAME, STATE_NAME])
def test_a_damaged_best_snapshot_does_not_become_the_model(tmp_path, monkeypatch, capsys, name):
    def losses(*_):
        for path in tmp_path.glob("states/step_00000004"):  # the best, damaged after the second report
            content = bytearray((path / name).read_bytes())
            content[-1] ^= 1
            (path / name).write_bytes(content)
        return {"held_out_loss": next(values)}

    values = iter([1.0, 2.0])
    monkeypatch.setattr(checkpoints_and_logs, "held_out_losses", losses)
    train(tmp_path, config=replace(CONFIG, steps=40, patience=4))
    states = Run(tmp_path, {"settings": "same"}).states
    assert (tmp_path / WEIGHTS_NAME).read_bytes() == (states.path(8) / WEIGHTS_NAME).read_bytes()
    assert "lowest held-out loss after 4; its snapshot" in capsys.readouterr().err


def test_early_stopping_needs_held_out_rows(tmp_path):
    def without_held_out_rows():
        return *toys.toy()[:3], None

    with pytest.raises(UserError, match="--patience needs held-out images"):
        train(tmp_path, without_held_out_rows, replace(CONFIG, patience=1))
