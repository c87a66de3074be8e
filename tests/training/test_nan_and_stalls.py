"""Tests of the NaN guard, rollback, and one-line errors about memory and workers."""

import contextlib
import gc
import math
import os
import signal
import time
from dataclasses import replace

import jaxtyping
import pytest
import torch
from helpers import toys
from helpers.toys import CONFIG, BadRows, train
from safetensors.torch import load_file

from smalti.core.errors import OneProcessError, UserError
from smalti.core.models import WEIGHTS_NAME
from smalti.training.nan_and_stalls import Buffers, SkippedSteps, explain_errors, spread_nan
from smalti.training.optimizers import make_optimizer, parts_of, step_unless_on_device
from smalti.training.run_folder import Run
from smalti.training.signals import Interrupted
from smalti.training.snapshots import STATE_NAME


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_bad_batch_changes_nothing_but_its_count(tmp_path, value):
    """Weights, averages, running statistics and optimizer states stay as they were."""
    seen = []

    class Watching(BadRows):
        def __getitems__(self, rows):
            seen.append({name: tensor.clone() for name, tensor in model.state_dict().items()})
            return super().__getitems__(rows)

    def make():
        nonlocal model
        model, *rest = toys.toy()
        return model, *rest

    model = None
    train(tmp_path, make, wrap=lambda rows: Watching(rows, {4}, value))
    assert all(torch.equal(seen[4][name], tensor) for name, tensor in seen[5].items())
    assert not torch.equal(seen[5]["net.0.weight"], seen[6]["net.0.weight"])
    lines = [line for line in toys.measured(tmp_path) if "skipped_steps" in line]
    assert [line["skipped_steps"] for line in lines] == [0] * 4 + [1] * 8
    assert ["loss" in line for line in lines] == [step != 5 for step in range(1, 13)]
    assert all(tensor.isfinite().all() for tensor in load_file(tmp_path / WEIGHTS_NAME).values())


def test_resumed_run_still_counts_a_bad_batch(tmp_path):
    def die_at_8(done, _model):
        assert done != 8

    train(tmp_path / "whole", wrap=lambda rows: BadRows(rows, {3}))
    with pytest.raises(AssertionError):
        train(tmp_path / "killed", wrap=lambda rows: BadRows(rows, {3}), on_report=die_at_8)
    train(tmp_path / "killed")  # resumes after step 5
    assert toys.outcome(tmp_path / "killed") == toys.outcome(tmp_path / "whole")


@pytest.mark.parametrize("intact", [5, 4])
def test_many_skipped_steps_roll_the_weights_back(tmp_path, capsys, intact):
    """Broken weights give no finite loss for any rows; the newest intact snapshot from before repairs them."""
    config = replace(CONFIG, steps=40, ema_decay=0.0)

    class Breaking(BadRows):
        def __getitems__(self, rows):
            if self.batches == 7:
                with torch.no_grad():
                    model.net[0].weight.fill_(math.nan)
                if intact == 4:
                    (tmp_path / "states" / "step_00000005" / STATE_NAME).write_bytes(b"damaged")
            return super().__getitems__(rows)

    def make():
        nonlocal model
        model, *rest = toys.toy()
        return model, *rest

    model = None
    train(tmp_path, make, config, wrap=lambda rows: Breaking(rows, ()))
    assert f"in the last 10 of 17 steps: taking the weights of step {intact} (rollback)" in capsys.readouterr().err
    lines = [line for line in toys.measured(tmp_path) if "skipped_steps" in line]
    assert lines[-1]["skipped_steps"] == 10
    assert ["loss" in line for line in lines] == [True] * 7 + [False] * 10 + [True] * 23
    assert all(tensor.isfinite().all() for tensor in load_file(tmp_path / WEIGHTS_NAME).values())


@pytest.mark.parametrize("from_the_start", [True, False])
def test_run_ends_in_one_line_if_rollback_does_not_help(tmp_path, from_the_start, capsys):
    config = replace(CONFIG, steps=90, save_steps=5)
    first = 0 if from_the_start else 11
    with pytest.raises(UserError, match=r"no loss .* no earlier snapshot is left.*--resume never") as caught:
        train(tmp_path, config=config, wrap=lambda rows: BadRows(rows, range(first, 90)))
    assert "\n" not in str(caught.value)
    assert ("taking the weights" in capsys.readouterr().err) != from_the_start


@pytest.mark.parametrize("log_steps", [1, 25])
def test_steps_skipped_after_a_rollback_count_anew(tmp_path, log_steps, capsys):
    """Twelve bad batches are one streak, however often it is looked at; of 25 steps the last ones are good."""
    config = replace(CONFIG, steps=50, log_steps=log_steps, save_steps=5, keep_states=1)
    train(tmp_path, config=config, wrap=lambda rows: BadRows(rows, range(11, 23)))
    assert capsys.readouterr().err.count("(rollback)") == (1 if log_steps == 1 else 0)


def test_stops_within_skipped_steps_keep_the_good_snapshots(tmp_path):
    """Each takes the place of the one before; the resumed run equals an uninterrupted one."""
    config, bad = replace(CONFIG, steps=30), range(6, 14)
    train(tmp_path / "whole", config=config, wrap=lambda rows: BadRows(rows, bad))
    for before, stop, kept in ((0, 10, [4, 5, 10]), (10, 12, [4, 5, 12])):
        rows = Stopped(bad, before, stop)
        with pytest.raises(Interrupted, match=f"after step {stop} of 30"):
            train(tmp_path / "stopped", config=config, wrap=rows)
        assert Run(tmp_path / "stopped", {"settings": "same"}).states.steps() == kept
    train(tmp_path / "stopped", config=config, wrap=Stopped(bad, stop))
    assert toys.outcome(tmp_path / "stopped") == toys.outcome(tmp_path / "whole")


def test_a_stop_after_a_rollback_leaves_the_snapshots_for_another(tmp_path):
    config, bad = replace(CONFIG, steps=50, report_steps=100), range(11, 33)
    train(tmp_path / "whole", config=config, wrap=lambda rows: BadRows(rows, bad))
    with pytest.raises(Interrupted, match="after step 10 of 50"):
        train(tmp_path / "stopped", config=config, wrap=Stopped(bad, 0, 21))
    assert Run(tmp_path / "stopped", {"settings": "same"}).states.steps() == [5, 10]
    train(tmp_path / "stopped", config=config, wrap=Stopped(bad, 10))
    assert toys.outcome(tmp_path / "stopped") == toys.outcome(tmp_path / "whole")


class Stopped:
    """Wraps rows of a run that resumes after step `before`, with bad ones in `bad`; a signal comes in step `stop`."""

    def __init__(self, bad, before, stop=None):
        self.bad, self.before, self.stop = bad, before, stop

    def __call__(self, rows):
        rest = BadRows(rows, range(max(0, self.bad.start - self.before), self.bad.stop - self.before))
        return rest if self.stop is None else toys.Signalling(rest, self.stop - self.before - 1)


@pytest.mark.parametrize("name", ["adamw", "muon", "sgd", "plain sgd"])
@pytest.mark.parametrize("steps_before", [0, 2])
def test_step_is_skipped_without_reading_the_flag(name, steps_before):
    """The code for GPUs, run on the CPU: bad steps change nothing, and good ones are the optimizer's own."""

    def run(bad_steps):
        torch.manual_seed(0)
        net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2))
        sgd = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9 if name == "sgd" else 0)
        optimizer = sgd if "sgd" in name else make_optimizer(net, name, learning_rate=0.01, weight_decay=0.1)
        for step in range(4 + len(bad_steps)):
            net.zero_grad()
            loss = net(torch.full((5, 3), 0.5 + step - sum(bad < step for bad in bad_steps))).square().sum()
            bad = torch.tensor(step in bad_steps)
            (loss * math.nan if step in bad_steps else loss).backward()
            for part in parts_of(optimizer):
                step_unless_on_device(part, bad)
        return [parameter.detach() for parameter in net.parameters()]

    for actual, expected in zip(run([steps_before, steps_before + 1]), run([]), strict=True):
        assert torch.equal(actual, expected)


def test_loss_that_is_not_finite_makes_every_gradient_nan():
    weight = torch.tensor([2.0, 3.0], requires_grad=True)
    for constant, finite in [(0.0, True), (math.nan, False), (math.inf, False)]:
        (gradient,) = torch.autograd.grad(spread_nan((weight**2).sum() + constant), weight)
        assert gradient.isfinite().all() == finite
    assert torch.equal(torch.autograd.grad(spread_nan((weight**2).sum()), weight)[0], 2 * weight.detach())


@pytest.mark.parametrize("bad", [True, False])
def test_buffers_are_restored_after_a_bad_step(bad):
    net = torch.nn.BatchNorm1d(2)
    before = {name: buffer.clone() for name, buffer in net.named_buffers()}
    kept = Buffers(net)
    kept.keep()
    net(torch.randn(4, 2))
    kept.restore(torch.tensor(bad))
    assert all(torch.equal(before[name], buffer) == bad for name, buffer in net.named_buffers())


def test_skipped_steps_are_counted_in_total_and_in_a_row():
    skipped = SkippedSteps(torch.device("cpu"))
    counts = []
    for bad in (0, 1, 1, 0, 1):
        skipped.count(torch.tensor(bool(bad)))
        counts.append(skipped.read())
    assert counts == [(0, 0), (1, 1), (2, 2), (2, 0), (3, 1)]


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), MemoryError(), None])
def test_full_memory_error_lists_remedies(tmp_path, error):
    class Greedy:
        def __len__(self):
            return 9

        def __getitems__(self, rows):
            if error:
                raise error
            return {"x": torch.empty(2**55)}  # the allocator's own error

    with pytest.raises(OneProcessError, match=r"out of memory on \w+; give --accumulation 4 .*--batch-size") as caught:
        train(tmp_path, config=replace(CONFIG, accumulation=2), wrap=lambda _rows: Greedy())
    assert "--gradient-checkpointing" in str(caught.value)


def test_other_errors_keep_their_traceback():
    with pytest.raises(RuntimeError, match="shapes differ"), explain_errors(torch.device("cpu"), ["nothing"]):
        raise RuntimeError("shapes differ")


def test_worker_death_while_it_sends_a_batch_is_reported_in_one_line():
    def receive():
        torch.set_grad_enabled(False)  # as if the error arrived within a no_grad block
        raise ConnectionResetError(104, "Connection reset by peer")

    with (
        pytest.raises(OneProcessError, match=r"a data loader worker died \(.*reset by peer.*fewer --workers"),
        explain_errors(torch.device("cpu"), ["nothing"]),
    ):
        receive()
    assert torch.is_grad_enabled()


def test_worker_death_is_reported_in_one_line_and_the_run_resumes(tmp_path, monkeypatch):
    """Shape checks are off: the error is raised from a signal, and within a check it would count as its failure."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)

    class Dying:
        def __init__(self, rows):
            self.rows, self.parent = rows, os.getpid()

        def __len__(self):
            return len(self.rows)

        def __getitems__(self, rows):
            if os.getpid() != self.parent and 17 in rows:
                os.kill(os.getpid(), signal.SIGKILL)
            return self.rows.__getitems__(rows)

    config = replace(CONFIG, workers=1, save_steps=1)
    with pytest.raises(OneProcessError, match=r"a data loader worker died \(.*fewer --workers") as caught:
        train(tmp_path, config=config, wrap=Dying)
    assert "\n" not in str(caught.value)
    with contextlib.suppress(RuntimeError):  # torch may raise the error again from a signal until it drops the worker
        del caught
        gc.collect()
        time.sleep(0.2)
    config = replace(config, workers=0)
    train(tmp_path, config=config)
    train(tmp_path / "whole", config=config)
    assert toys.outcome(tmp_path) == toys.outcome(tmp_path / "whole")
    assert Run(tmp_path, {"settings": "same"}).step == CONFIG.steps
