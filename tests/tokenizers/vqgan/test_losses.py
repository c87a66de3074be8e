"""How a VQ-GAN is trained: every loss against its formula, the phases apart, stops and bad batches in both."""

import math
from dataclasses import replace

import pytest
import torch
from accelerate.state import AcceleratorState
from helpers import toys
from safetensors.torch import load_file

from smalti import VQGAN, UserError
from smalti.core.models import WEIGHTS_NAME
from smalti.tokenizers.vqgan import losses
from smalti.tokenizers.vqgan.losses import Discriminator, adaptive_weight
from smalti.tokenizers.vqgan.perceptual import Lite0Distance
from smalti.training.run_folder import Run
from smalti.training.signals import Interrupted

CONFIG = toys.CONFIG
START, RAMP = toys.TINY["vqgan"].discriminator_start, toys.TINY["vqgan"].discriminator_ramp


@pytest.fixture(autouse=True)
def _fresh_accelerator():
    AcceleratorState._reset_state(reset_partial_state=True)


def make(**changes):
    """(generator's phase, discriminator's phase) of a tiny VQ-GAN with its seed set."""
    torch.manual_seed(1)
    model = VQGAN(replace(toys.TINY["vqgan"], discriminator_start=0, discriminator_ramp=0, **changes))
    return model.phases(CONFIG)


def batch_of(b=3, h=8, w=12):
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (b, 3, h, w), dtype=torch.uint8, generator=generator)
    return {"images": images, "seeds": torch.arange(b)}


def trained(phases, batch, steps=1):
    """The measured terms of plain steps, without the training loop."""
    for _ in range(steps):
        found = []
        for phase in phases:
            loss, terms = phase.objective(batch)
            loss.backward()
            phase.optimizer.step()
            phase.objective.zero_grad()
            found.append({"loss": loss.detach(), **terms})
        phases[0].objective.after_step(batch["seeds"], torch.tensor(False))
    return found


def test_the_adaptive_weight_is_the_ratio_of_whole_gradients():
    """At the decoder's last layer, each from a pass of its own; used by the step after."""
    generator, judge = make()
    batch, objective = batch_of(), generator.objective
    lasts = {}
    images = batch["images"].float() / 127.5 - 1
    for name in ("likeness", "adversarial"):
        made = objective.tokenizer(images).reconstruction
        loss = (made - images).abs().mean() if name == "likeness" else -judge.objective.judge(made).mean()
        (lasts[name],) = torch.autograd.grad(loss, objective.tokenizer.decoder[-1].weight)
    expected = lasts["likeness"].norm() / (lasts["adversarial"].norm() + 1e-4)
    objective(batch)
    objective.after_step(batch["seeds"], torch.tensor(False))
    torch.testing.assert_close(objective.weight, expected)
    loss, terms = objective(batch)
    torch.testing.assert_close(terms["adaptive_weight"], expected)
    own = terms["reconstruction"] + terms["commitment"]
    torch.testing.assert_close(loss.detach(), own + 0.8 * expected * terms["adversarial"])
    assert float(adaptive_weight(torch.tensor([3.0, 4.0]), torch.zeros(2))) == 1e4
    assert float(adaptive_weight(torch.tensor([3.0, 4.0]), torch.tensor([0.0, 2.5 - 1e-4]))) == pytest.approx(2)


def test_the_discriminator_s_loss_is_the_hinge():
    generator, judge = make()
    batch = batch_of()
    generator.objective(batch)
    made = generator.objective.made[0]
    loss, terms = judge.objective(batch)
    with torch.no_grad():
        real, fake = judge.objective.judge(batch["images"].float() / 127.5 - 1), judge.objective.judge(made)
    torch.testing.assert_close(loss, (torch.relu(1 - real).mean() + torch.relu(1 + fake).mean()) / 2)
    assert (terms["real"], terms["fake"]) == (real.mean(), fake.mean())
    assert not generator.objective.made  # nothing is left for another step


def test_each_phase_trains_its_own_network():
    generator, judge = make()
    batch = batch_of()
    trained([generator, judge], batch)  # from here on the adaptive weight is not zero
    for phase, other in ((generator, judge), (judge, generator)):
        loss, _ = phase.objective(batch)
        loss.backward()
        assert not any(parameter.grad is not None for parameter in other.objective.parameters())
        assert all(parameter.grad is not None for parameter in phase.objective.parameters())
        assert any(parameter.grad.any() for parameter in phase.objective.parameters())
        phase.objective.zero_grad()


def test_the_discriminator_pushes_the_tokenizer():
    """The gradients of its term, times its weight, are what the loss with it has more than the loss without."""
    batch, found = batch_of(), {}
    for weight in (0.8, 0.0):
        generator, *_ = make(adversarial_weight=weight)
        objective = generator.objective
        objective.weight.fill_(3.0)
        objective(batch)[0].backward()
        found[weight] = objective.tokenizer.decoder[-1].weight.grad
    generator, judge = make()
    made = generator.objective.tokenizer(batch["images"].float() / 127.5 - 1).reconstruction
    (-0.8 * 3 * judge.objective.judge(made).mean()).backward()
    expected = generator.objective.tokenizer.decoder[-1].weight.grad
    torch.testing.assert_close(found[0.8] - found[0.0], expected, rtol=1e-3, atol=1e-6)


def test_a_discriminator_learns_to_tell():
    """Images against what an untrained tokenizer makes of them."""
    _, judge = make(discriminator_layers=1, discriminator_width=8)
    generator = make()[0].objective
    judge.objective._made = generator.made
    batch = batch_of(8)
    for _ in range(60):
        generator(batch)
        loss, terms = judge.objective(batch)
        loss.backward()
        judge.optimizer.step()
        judge.objective.zero_grad()
    assert terms["real"] > 0.5 > -0.5 > terms["fake"]


def test_what_is_said_of_an_image_is_its_own():
    """Other images beside it change nothing, as they would with BatchNorm."""
    torch.manual_seed(0)
    judge, images = Discriminator(3, 8, 2).train(), torch.randn(4, 3, 16, 20)
    torch.testing.assert_close(judge(images)[1:2], judge(images[1:2]))
    torch.testing.assert_close(judge.frozen(images), judge(images))
    assert judge(images).shape == (4, 1, 2, 3)
    judge.check_size(12, 16)
    judge(torch.randn(1, 3, 12, 16))
    with pytest.raises(UserError, match="images of 11x16 are too small for 2 layers"):
        judge.check_size(11, 16)


def test_the_perceptual_term_is_part_of_the_loss_and_of_the_adaptive_weight():
    generator, _ = make(perceptual_weight=2.0, height=16, width=20)
    batch, objective = batch_of(h=16, w=20), generator.objective
    images = batch["images"].float() / 127.5 - 1
    loss, terms = objective(batch)
    made = objective.tokenizer(images).reconstruction
    perceptual = 2 * Lite0Distance()(made, images)
    torch.testing.assert_close(terms["perceptual"], perceptual.detach())
    torch.testing.assert_close(loss.detach(), terms["reconstruction"] + terms["commitment"] + terms["perceptual"])
    likeness = (made - images).abs().mean() + perceptual
    (expected,) = torch.autograd.grad(likeness, objective.tokenizer.decoder[-1].weight)
    torch.testing.assert_close(objective._gradients[0][0], expected, rtol=1e-3, atol=1e-6)
    with pytest.raises(UserError, match="images of 8x12 are too small for the perceptual loss"):
        make(perceptual_weight=2.0)


def test_without_a_discriminator_there_is_one_phase():
    (only,) = make(adversarial_weight=0.0)
    loss, terms = only.objective(batch_of())
    assert set(terms) == {"reconstruction", "commitment", "mse"}
    torch.testing.assert_close(loss.detach(), terms["reconstruction"] + terms["commitment"])


def test_held_out_losses_are_without_the_discriminator():
    generator, judge = make()
    batch = batch_of()
    trained([generator, judge], batch)
    loss, terms = generator.objective.eval()(batch)
    assert "adversarial" not in terms
    torch.testing.assert_close(loss.detach(), terms["reconstruction"] + terms["commitment"])
    assert not generator.objective.made


def test_a_gumbel_vqgan_draws_in_training_and_not_when_held_out():
    generator, _ = make(quantizer="gumbel", depth=1)
    batch, seen = batch_of(), []
    for mode in (True, True, False):
        objective = generator.objective.train(mode)
        seen.append(objective({**batch, "seeds": batch["seeds"] + len(seen)})[1]["reconstruction"])
    assert seen[0] != seen[1]
    images = batch["images"].float() / 127.5 - 1
    assert seen[2] == (generator.objective.tokenizer(images).reconstruction - images).abs().mean()


def test_a_graph_that_is_differentiated_in_the_middle_is_not_compiled():
    with pytest.raises(UserError, match="leave --compile out"):
        VQGAN(toys.TINY["vqgan"]).phases(replace(CONFIG, compile=True))


def run(folder, config=CONFIG, **more):
    return toys.train(folder, lambda: toys.make("tokenizer", "vqgan"), config, **more)


def test_the_discriminator_starts_when_it_should_and_is_heard_by_and_by(tmp_path, monkeypatch):
    heard, of = [], losses.Generator._heard

    def watched(objective):
        heard.append(of(objective))
        return heard[-1]

    monkeypatch.setattr(losses.Generator, "_heard", watched)
    run(tmp_path)
    assert heard == [0.0] * START + [min(1, (step + 1) / RAMP) for step in range(CONFIG.steps - START)]
    lines = [line for line in toys.measured(tmp_path) if "generator/loss" in line]
    assert ["generator/adversarial" in line for line in lines] == [step >= START for step in range(CONFIG.steps)]
    assert [line["discriminator/loss"] > 0 for line in lines] == [step >= START for step in range(CONFIG.steps)]
    assert [line["generator/adaptive_weight"] > 0 for line in lines[START:]] == [False] + [True] * (
        CONFIG.steps - START - 1
    )
    assert {"held_out_mse", "held_out_loss"} <= {name for line in toys.measured(tmp_path) for name in line}


@pytest.mark.parametrize("at", [1, 6, 10])
def test_a_run_that_was_stopped_goes_on_with_both_losses(tmp_path, at):
    """Before the discriminator starts, on the ramp, and after; killed runs are in test_survival.py."""
    run(tmp_path / "whole")
    with pytest.raises(Interrupted):
        run(tmp_path / "stopped", wrap=lambda rows: toys.Signalling(rows, at))
    run(tmp_path / "stopped")
    assert toys.outcome(tmp_path / "stopped") == toys.outcome(tmp_path / "whole")


class Harming:
    """Makes the images of some batches NaN, whose pixels could not say so."""

    def __init__(self, monkeypatch, at):
        self.at, self.batch, self.bad = at, -1, False
        convert = losses.to_float
        monkeypatch.setattr(losses, "to_float", lambda images: convert(images) * (math.nan if self.bad else 1))

    def rows(self, rows):
        outer = self

        class Rows(toys.Signalling):
            def __getitems__(self, chosen):
                outer.batch += 1
                outer.bad = outer.batch in outer.at
                return super().__getitems__(chosen)

        return Rows(rows, -1)


def test_a_bad_batch_changes_nothing_in_either_phase(tmp_path, monkeypatch):
    """Not the weights, nor the discriminator, the adaptive weight, the count of steps, or the optimisers."""
    seen, phases = [], toys.phases

    def watched(*arguments):
        made = phases(*arguments)

        class Watching(toys.Signalling):
            def __getitems__(self, chosen):
                state = [{**phase.objective.state_dict()} for phase in made]
                moments = [list(phase.optimizer.state.values()) for phase in made]
                seen.append([[t.clone() for t in s.values()] for s in state])
                seen[-1] += [[t.clone() for moment in m for t in moment.values()] for m in moments]
                return super().__getitems__(chosen)

        harming.wrapped = Watching
        return made

    harming = Harming(monkeypatch, {8})
    monkeypatch.setattr(toys, "phases", watched)
    run(tmp_path, wrap=lambda rows: LateRows(harming, rows))
    for before, after, later in zip(seen[8], seen[9], seen[10], strict=True):
        assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
        assert not all(torch.equal(a, b) for a, b in zip(after, later, strict=True))
    lines = [line for line in toys.measured(tmp_path) if "skipped_steps" in line]
    assert [line["skipped_steps"] for line in lines] == [0] * 8 + [1] * 4
    assert all(tensor.isfinite().all() for tensor in load_file(tmp_path / WEIGHTS_NAME).values())


class LateRows:
    """Rows wrapped when first read: what they watch is made after them."""

    def __init__(self, harming, rows):
        self.harming, self.rows, self.made = harming, rows, None

    def __len__(self):
        return len(self.rows)

    def __getitems__(self, chosen):
        if self.made is None:
            self.made = self.harming.rows(self.harming.wrapped(self.rows, -1))
        return self.made.__getitems__(chosen)


def test_after_many_bad_steps_both_networks_come_back(tmp_path, capsys):
    """The discriminator's weights break; the tokenizer's losses are NaN through it, and neither has a way on."""
    made, phases = [], toys.phases

    class Breaking(toys.Signalling):
        def __getitems__(self, chosen):
            if self.batches == 7:
                with torch.no_grad():
                    next(made[1].objective.parameters()).fill_(math.nan)
            return super().__getitems__(chosen)

    def watched(*arguments):
        made.extend(phases(*arguments))
        return made

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(toys, "phases", watched)
        run(tmp_path, replace(CONFIG, steps=30, ema_decay=0.0), wrap=lambda rows: Breaking(rows, -1))
    assert "in the last 10 of 17 steps: taking the weights of step 5" in capsys.readouterr().err
    for phase in made:
        assert all(tensor.isfinite().all() for tensor in phase.objective.state_dict().values())
    lines = [line for line in toys.measured(tmp_path) if "skipped_steps" in line]
    assert lines[-1]["skipped_steps"] == 10
    assert Run(tmp_path, {"settings": "same"}).state()["phases"][0]["objective"]["steps"] == 5 + 30 - 17
