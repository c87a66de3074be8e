"""Tests of the training loop: against one written by hand, and that stopped or killed runs equal uninterrupted ones."""

import json
import math
import signal
from dataclasses import replace
from itertools import pairwise
from unittest.mock import create_autospec

import pytest
import torch
from accelerate import Accelerator
from helpers import toys
from helpers.toys import CONFIG, Signalling, outcome, train
from safetensors.torch import load_file
from torch import nn

from smalti.core.errors import UserError
from smalti.core.models import CONFIG_NAME, WEIGHTS_NAME
from smalti.core.randomness import derive, row_seeds
from smalti.training import checkpoints_and_logs, loop
from smalti.training.accelerator import accelerator
from smalti.training.batches import StepRows
from smalti.training.checkpoints_and_logs import held_out_losses
from smalti.training.config import FitConfig, Phase
from smalti.training.ema import EMA
from smalti.training.loop import fit
from smalti.training.run_folder import METRICS_NAME, Run
from smalti.training.signals import Interrupted


def test_loop_equals_one_written_by_hand(tmp_path):
    """Rows, seeds, learning-rate schedule, gradient clipping, weight decay of matrices only, and EMA."""
    config, trained = CONFIG, train(tmp_path)
    model, objective, rows, _ = toys.toy()
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=config.learning_rate, betas=(0.9, 0.95), fused=True)
    average = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    orders = StepRows(len(rows), batch_size=8, seed=config.seed, steps=range(12))
    norms = []
    for step, chosen in enumerate(orders):
        warm = min(1, (step + 1) / 3)
        fall = max(0, (step + 1 - 6) / 6)
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate * warm * (0.01 + 0.99 * (1 + math.cos(math.pi * fall)) / 2)
        seeds = derive(row_seeds(config.seed, torch.tensor(chosen)), step)
        torch.manual_seed(int(derive(torch.tensor(config.seed), step, 0)))
        loss, _ = objective({**rows.__getitems__(chosen), "seeds": seeds})
        loss.backward()
        norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), config.clip_norm)))
        optimizer.step()
        optimizer.zero_grad()
        decay = min(config.ema_decay, (1 + step) / (10 + step))
        for name, tensor in model.state_dict().items():
            mixed = decay * average[name] + (1 - decay) * tensor if tensor.is_floating_point() else tensor
            average[name] = mixed.clone()
    assert max(norms) > config.clip_norm > min(norms)  # clipping must matter in some steps only
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(trained.state_dict()[name], tensor)
    for name, tensor in load_file(tmp_path / WEIGHTS_NAME).items():
        torch.testing.assert_close(tensor, average[name])


def test_ema_follows_its_formula():
    model = nn.Linear(1, 1, bias=False)
    model.register_buffer("count", torch.tensor(0))
    values, expected = [3.0, -1.0, 2.0, 7.0], 0.5
    with torch.no_grad():
        model.weight.fill_(expected)
        ema = EMA(model, 0.25)
        for step, value in enumerate(values):
            model.weight.fill_(value)
            model.count.fill_(step + 40)
            ema.update(step)
            decay = min(0.25, (1 + step) / (10 + step))  # 0.1, 0.1818..., 0.25, 0.25
            expected = decay * expected + (1 - decay) * value
    with ema.applied():
        assert model.weight.item() == pytest.approx(expected)
        assert int(model.count) == 43
    assert float(model.weight) == values[-1]
    with pytest.raises(RuntimeError), ema.applied():
        raise RuntimeError
    assert float(model.weight) == values[-1]
    none = EMA(model, 0.0)
    none.update(0)
    with none.applied():
        assert float(model.weight) == values[-1]
    assert none.state_dict() == {}


def test_learning_rate_schedule_warms_up_stays_and_decays():
    config = FitConfig(steps=100, warmup_steps=10, decay_fraction=0.4)
    rates = [config.rate(step) for step in range(100)]
    assert rates[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert rates[10:60] == [1.0] * 50
    assert rates[79] == pytest.approx(0.505)  # halfway down the cosine
    assert rates[99] == pytest.approx(0.01)
    assert all(after < before for before, after in pairwise(rates[59:]))
    assert [FitConfig(steps=9, warmup_steps=0, decay_fraction=0.0).rate(step) for step in range(9)] == [1.0] * 9


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("stops", [[0, 4, 0, 3], [10], [9]], ids=["at 1, 6, 7, 11", "at 11", "at a save"])
def test_stopped_and_resumed_run_equals_uninterrupted_run(tmp_path, stops, accumulation):
    """Real signals arrive while a batch is made; `stops` are batches since the run last resumed."""
    config = replace(CONFIG, accumulation=accumulation)
    train(tmp_path / "whole", config=config)
    done = 0
    for number, stop in zip([signal.SIGINT, signal.SIGTERM] * 2, stops, strict=False):
        with pytest.raises(Interrupted) as stopped:
            train(tmp_path / "stopped", config=config, wrap=lambda rows, at=stop, by=number: Signalling(rows, at, by))
        done = done + stop + 1
        assert (stopped.value.step, stopped.value.signal_number) == (done, number)
    assert done < CONFIG.steps
    train(tmp_path / "stopped", config=config)
    assert outcome(tmp_path / "stopped") == outcome(tmp_path / "whole")


def test_gradient_accumulation_trains_what_the_whole_batch_does(tmp_path):
    """`test_loop_processes.py` tests the same with several processes."""
    whole = train(tmp_path / "1", toys.plain_toy)
    accumulated = train(tmp_path / "4", toys.plain_toy, replace(CONFIG, accumulation=4))
    for actual, expected in zip(accumulated.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(actual, expected)
    for actual, expected in zip(toys.measured(tmp_path / "4"), toys.measured(tmp_path / "1"), strict=True):
        assert actual.keys() == expected.keys()
        for name in actual.keys() - {"largest", "held_out_largest"}:  # a mean of maxima is not the maximum
            assert actual[name] == pytest.approx(expected[name], rel=1e-4), name
    train(tmp_path / "1", toys.plain_toy, replace(CONFIG, accumulation=2))  # counts as the same run, which is finished


@pytest.mark.parametrize(("family", "kind"), toys.KINDS)
def test_gradient_checkpointing_does_not_change_results(tmp_path, family, kind, monkeypatch):
    train(tmp_path / "stored", lambda: toys.make(family, kind))
    checkpoint, calls = loop.checkpoint, []
    monkeypatch.setattr(loop, "checkpoint", lambda *a, **k: calls.append(1) or checkpoint(*a, **k))
    train(tmp_path / "recomputed", lambda: toys.make(family, kind), replace(CONFIG, gradient_checkpointing=True))
    assert len(calls) >= CONFIG.steps
    assert outcome(tmp_path / "recomputed") == outcome(tmp_path / "stored")


def test_gradient_checkpointing_is_refused_without_blocks(tmp_path):
    with pytest.raises(UserError, match="toy has no blocks to recompute; leave --gradient-checkpointing out"):
        train(tmp_path, config=replace(CONFIG, gradient_checkpointing=True))


class Killed(BaseException):
    """Simulates a kill: nothing in smalti catches it."""


class KilledRows(Signalling):
    def __getitems__(self, rows):
        if self.batches == self.at:
            raise Killed
        self.batches += 1
        return self.rows.__getitems__(rows)


@pytest.mark.parametrize("at", [2, 5, 8, 11])
def test_killed_and_resumed_run_equals_uninterrupted_run(tmp_path, at):
    """Also before the first snapshot. Metrics logged after the last snapshot are deleted and logged again."""
    train(tmp_path / "whole")
    with pytest.raises(Killed):
        train(tmp_path / "killed", wrap=lambda rows: KilledRows(rows, at))
    (tmp_path / "killed" / METRICS_NAME).open("a").write('{"step": 7, "lo')  # a truncated line
    train(tmp_path / "killed")
    assert outcome(tmp_path / "killed") == outcome(tmp_path / "whole")


@pytest.mark.parametrize("saved_before", [0, 1])
def test_kill_between_saving_model_and_snapshot_does_no_harm(tmp_path, saved_before):
    train(tmp_path / "whole")
    run, saves = Run(tmp_path / "killed", {"settings": "same"}), []
    save = run.states.save

    def killed_at_the_last_save(step, state, **keep):
        saves.append(step)
        if len(saves) > saved_before:
            raise Killed
        save(step, state, **keep)

    run.states.save = killed_at_the_last_save
    with pytest.raises(Killed):
        train(tmp_path / "killed", run=run)
    assert Run(tmp_path / "killed", {"settings": "same"}).step < saves[-1]
    train(tmp_path / "killed")
    assert outcome(tmp_path / "killed") == outcome(tmp_path / "whole")


def test_signal_during_the_last_report_is_not_lost(tmp_path):
    def interrupt(done, _model):
        if done == CONFIG.steps:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(Interrupted, match="after step 12 of 12"):
        train(tmp_path, on_report=interrupt)
    assert Run(tmp_path, {"settings": "same"}).step == CONFIG.steps


def test_reports_receive_the_averaged_model_in_evaluation_mode(tmp_path):
    seen, (model, objective, rows, held_out) = [], toys.toy()

    def report(done, model):
        seen.append((done, model.training, {name: tensor.clone() for name, tensor in model.state_dict().items()}))

    fit(
        accelerator("fp32"),
        toys.one_phase(objective),
        rows,
        CONFIG,
        model=model,
        run=Run(tmp_path, {}),
        held_out=held_out,
        on_report=report,
    )
    assert [(done, training) for done, training, _ in seen] == [(4, False), (8, False), (12, False)]
    saved = load_file(tmp_path / WEIGHTS_NAME)
    assert all(torch.equal(saved[name], tensor) for name, tensor in seen[-1][2].items())
    assert not torch.equal(saved["net.0.weight"], model.state_dict()["net.0.weight"])
    assert model.training
    lines = outcome(tmp_path)[3]
    assert [line["step"] for line in lines if "held_out_loss" in line] == [4, 8, 12]
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, 13))
    model.load_state_dict(saved)
    losses = held_out_losses(accelerator("fp32"), objective.eval(), held_out, CONFIG)
    assert losses["held_out_loss"] == pytest.approx(lines[-1]["held_out_loss"], rel=1e-5)


def test_first_pictures_come_before_the_first_report_and_change_nothing(tmp_path, monkeypatch, capfd):
    """They are due after a time, so a stopped and resumed run draws them at other steps."""
    monkeypatch.setattr(checkpoints_and_logs, "FIRST_PICTURES_SECONDS", 0.0)
    train(tmp_path / "none")
    drawn = []

    def draw(model):
        assert not model.training
        assert not torch.is_grad_enabled()
        drawn.append({name: tensor.clone() for name, tensor in model.state_dict().items()})
        return tmp_path / "sheet.png"

    capfd.readouterr()
    train(tmp_path / "whole", draw=draw)
    assert len(drawn) == 1 + 3  # once, and at the reports
    assert f"pictures after 1 steps: {tmp_path / 'sheet.png'}; redrawn every 4 steps" in capfd.readouterr().err
    with pytest.raises(Interrupted):
        train(tmp_path / "stopped", draw=draw, wrap=lambda rows: Signalling(rows, 5))
    train(tmp_path / "stopped", draw=draw)
    assert len(drawn) == 4 + 2 + 3
    saved = load_file(tmp_path / "whole" / WEIGHTS_NAME)
    assert all(torch.equal(saved[name], tensor) for name, tensor in drawn[3].items())
    assert outcome(tmp_path / "whole") == outcome(tmp_path / "none")
    assert outcome(tmp_path / "stopped") == outcome(tmp_path / "none")


def test_first_pictures_wait_for_their_time_and_a_report_comes_instead(tmp_path):
    drawn = []
    train(tmp_path, draw=drawn.append)
    assert len(drawn) == 3


def test_workers_do_not_change_results(tmp_path):
    train(tmp_path / "none")
    train(tmp_path / "one", config=replace(CONFIG, workers=1))
    assert outcome(tmp_path / "one") == outcome(tmp_path / "none")


def test_phases_do_not_share_gradients(tmp_path):
    """In a GAN, the generator's loss has gradients in the discriminator, which another optimizer trains."""

    class Half(nn.Module):
        def __init__(self, both, first):
            super().__init__()
            self.both, self.first = both, first

        def forward(self, batch):
            a, b = self.both.net[0].weight.sum(), self.both.net[3].weight.sum()
            loss = (a * b + 3 * a if self.first else (a.detach() * b - 1).square()) + 0 * batch["x"].sum()
            return loss, {"a": a.detach()}

    def sgd(layer):
        return torch.optim.SGD(layer.parameters(), lr=0.01)

    model, _, rows, _ = toys.toy()
    phases = [
        Phase("one", Half(model, first=True), sgd(model.net[0])),
        Phase("two", Half(model, first=False), sgd(model.net[3])),
    ]
    config = FitConfig(steps=3, batch_size=2, warmup_steps=0, decay_fraction=0.0, clip_norm=0.0, log_steps=1)
    a, b = model.net[0].weight.detach().double().clone(), model.net[3].weight.detach().double().clone()
    fit(accelerator("fp32"), phases, rows, config, model=model, run=Run(tmp_path, {}))
    for _ in range(3):
        a -= 0.01 * (b.sum() + 3)
        b -= 0.01 * 2 * (a.sum() * b.sum() - 1) * a.sum()
    torch.testing.assert_close(model.net[0].weight.double(), a, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(model.net[3].weight.double(), b, rtol=1e-5, atol=1e-6)
    assert {"one/loss", "two/loss", "one/a", "two/gradient_norm"} <= outcome(tmp_path)[3][0].keys()


def test_batch_size_that_does_not_divide_is_refused(tmp_path):
    several = create_autospec(Accelerator, instance=True, num_processes=3, process_index=0)
    with pytest.raises(UserError, match=r"a batch of 8 does not divide among 3 processes; change --batch-size$"):
        train(tmp_path, process=several)
    with pytest.raises(UserError, match="among 1 processes of 3 micro-batches; change --batch-size or --accumulation"):
        train(tmp_path, config=replace(CONFIG, accumulation=3))


def test_snapshot_with_the_best_held_out_loss_is_kept(tmp_path, monkeypatch):
    losses = iter([3.0, 1.0, 2.0])
    monkeypatch.setattr(checkpoints_and_logs, "held_out_losses", lambda *_: {"held_out_loss": next(losses)})
    train(tmp_path, config=replace(CONFIG, save_steps=2, keep_states=1))
    assert Run(tmp_path, {"settings": "same"}).states.steps() == [8, 12]
    assert json.loads((tmp_path / "states" / "step_00000008" / CONFIG_NAME).read_text())["provenance"]["steps"] == 8
    monkeypatch.undo()
    assert Run(tmp_path, {"settings": "same"}).state()["best"] == [1.0, 8]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("steps", 0),
        ("batch_size", 0),
        ("log_steps", 0),
        ("report_steps", 0),
        ("save_steps", -1),
        ("keep_states", 0),
        ("accumulation", 0),
        ("stall_seconds", -1),
        ("warmup_steps", -1),
        ("weight_decay", -0.1),
        ("workers", -1),
        ("patience", -1),
        ("learning_rate", 0.0),
        ("learning_rate", math.nan),
        ("clip_norm", -1.0),
        ("decay_fraction", 1.5),
        ("ema_decay", 1.0),
        ("seed", 2**63),
    ],
)
def test_settings_out_of_range_are_refused_by_name(name, value):
    with pytest.raises(UserError, match=f"{name.replace('_', '[-_]')} .*{value}"):
        FitConfig(**{name: value})
