"""VQ-GAN's training: losses against their formulas, separate phases, stopped runs and bad batches in both phases."""

import math
from dataclasses import replace

import pytest
import torch
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


def make(**changes):
    """Returns the phases of a tiny, seeded VQ-GAN: the generator's and the discriminator's."""
    torch.manual_seed(1)
    model = VQGAN(replace(toys.TINY["vqgan"], discriminator_start=0, discriminator_ramp=0, **changes))
    return model.phases(CONFIG)


def batch_of(b=3, h=8, w=12):
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (b, 3, h, w), dtype=torch.uint8, generator=generator)
    return {"images": images, "seeds": torch.arange(b)}


def train_step(phases, batch):
    """Runs a step of all phases without the training loop."""
    for phase in phases:
        loss, _ = phase.objective(batch)
        loss.backward()
        phase.optimizer.step()
        phase.objective.zero_grad()
    phases[0].objective.after_step(batch["seeds"], torch.tensor(False))


def test_adaptive_weight_is_the_ratio_of_gradient_norms():
    """Gradients at the decoder's last layer are computed in separate passes; the next step uses the weight."""
    generator, discriminator = make()
    batch, objective = batch_of(), generator.objective
    gradients = {}
    images = batch["images"].float() / 127.5 - 1
    for name in ("reconstruction", "adversarial"):
        reconstruction = objective.tokenizer(images).reconstruction
        adversarial = -discriminator.objective.judge(reconstruction).mean()
        loss = (reconstruction - images).abs().mean() if name == "reconstruction" else adversarial
        (gradients[name],) = torch.autograd.grad(loss, objective.tokenizer.decoder[-1].weight)
    expected = gradients["reconstruction"].norm() / (gradients["adversarial"].norm() + 1e-4)
    objective(batch)
    objective.after_step(batch["seeds"], torch.tensor(False))
    torch.testing.assert_close(objective.weight, expected)
    loss, terms = objective(batch)
    torch.testing.assert_close(terms["adaptive_weight"], expected)
    own = terms["reconstruction"] + terms["commitment"]
    torch.testing.assert_close(loss.detach(), own + 0.8 * expected * terms["adversarial"])
    assert float(adaptive_weight(torch.tensor([3.0, 4.0]), torch.zeros(2))) == 1e4
    assert float(adaptive_weight(torch.tensor([3.0, 4.0]), torch.tensor([0.0, 2.5 - 1e-4]))) == pytest.approx(2)


def test_discriminator_loss_is_the_hinge_loss():
    generator, discriminator = make()
    batch = batch_of()
    generator.objective(batch)
    reconstruction = generator.objective.reconstructions[0]
    loss, terms = discriminator.objective(batch)
    network = discriminator.objective.judge
    with torch.no_grad():
        real, fake = network(batch["images"].float() / 127.5 - 1), network(reconstruction)
    torch.testing.assert_close(loss, (torch.relu(1 - real).mean() + torch.relu(1 + fake).mean()) / 2)
    assert (terms["real"], terms["fake"]) == (real.mean(), fake.mean())
    assert not generator.objective.reconstructions  # nothing is left for the next step


def test_each_phase_trains_its_own_network():
    generator, discriminator = make()
    batch = batch_of()
    train_step([generator, discriminator], batch)  # afterwards the adaptive weight is not zero
    for phase, other in ((generator, discriminator), (discriminator, generator)):
        loss, _ = phase.objective(batch)
        loss.backward()
        assert not any(parameter.grad is not None for parameter in other.objective.parameters())
        assert all(parameter.grad is not None for parameter in phase.objective.parameters())
        assert any(parameter.grad.any() for parameter in phase.objective.parameters())
        phase.objective.zero_grad()


def test_adversarial_loss_adds_its_weighted_gradient():
    """Compares the tokenizer's gradients with and without the adversarial loss."""
    batch, gradients = batch_of(), {}
    for weight in (0.8, 0.0):
        generator, *_ = make(adversarial_weight=weight)
        objective = generator.objective
        objective.weight.fill_(3.0)
        objective(batch)[0].backward()
        gradients[weight] = objective.tokenizer.decoder[-1].weight.grad
    generator, discriminator = make()
    reconstruction = generator.objective.tokenizer(batch["images"].float() / 127.5 - 1).reconstruction
    (-0.8 * 3 * discriminator.objective.judge(reconstruction).mean()).backward()
    expected = generator.objective.tokenizer.decoder[-1].weight.grad
    torch.testing.assert_close(gradients[0.8] - gradients[0.0], expected, rtol=1e-3, atol=1e-6)


def test_discriminator_learns_to_separate_images_from_reconstructions():
    """The reconstructions are those of an untrained tokenizer."""
    _, discriminator = make(discriminator_layers=1, discriminator_width=8)
    generator = make()[0].objective
    discriminator.objective._reconstructions = generator.reconstructions
    batch = batch_of(8)
    for _ in range(60):
        generator(batch)
        loss, terms = discriminator.objective(batch)
        loss.backward()
        discriminator.optimizer.step()
        discriminator.objective.zero_grad()
    assert terms["real"] > 0.5 > -0.5 > terms["fake"]


def test_discriminator_logits_do_not_depend_on_the_batch():
    """Other images in the batch change nothing, unlike with BatchNorm; also checks shapes and smallest sizes."""
    torch.manual_seed(0)
    discriminator, images = Discriminator(3, 8, 2).train(), torch.randn(4, 3, 16, 20)
    torch.testing.assert_close(discriminator(images)[1:2], discriminator(images[1:2]))
    torch.testing.assert_close(discriminator.frozen(images), discriminator(images))
    assert discriminator(images).shape == (4, 1, 2, 3)
    discriminator.check_size(12, 16)
    discriminator(torch.randn(1, 3, 12, 16))
    with pytest.raises(UserError, match="images of 11x16 are too small for a discriminator with 2 layers"):
        discriminator.check_size(11, 16)


def test_perceptual_loss_is_part_of_the_loss_and_of_the_adaptive_weight():
    generator, _ = make(perceptual_weight=2.0, height=16, width=20)
    batch, objective = batch_of(h=16, w=20), generator.objective
    images = batch["images"].float() / 127.5 - 1
    loss, terms = objective(batch)
    reconstruction = objective.tokenizer(images).reconstruction
    perceptual = 2 * Lite0Distance()(reconstruction, images)
    torch.testing.assert_close(terms["perceptual"], perceptual.detach())
    torch.testing.assert_close(loss.detach(), terms["reconstruction"] + terms["commitment"] + terms["perceptual"])
    reconstruction_loss = (reconstruction - images).abs().mean() + perceptual
    (expected,) = torch.autograd.grad(reconstruction_loss, objective.tokenizer.decoder[-1].weight)
    torch.testing.assert_close(objective._gradients[0][0], expected, rtol=1e-3, atol=1e-6)
    with pytest.raises(
        UserError, match="images of 8x12 are too small for a perceptual distance; use --perceptual-weight 0"
    ):
        make(perceptual_weight=2.0)


def test_without_discriminator_there_is_one_phase():
    (only,) = make(adversarial_weight=0.0)
    loss, terms = only.objective(batch_of())
    assert set(terms) == {"reconstruction", "commitment", "mse"}
    torch.testing.assert_close(loss.detach(), terms["reconstruction"] + terms["commitment"])


def test_held_out_losses_leave_out_the_adversarial_loss():
    generator, discriminator = make()
    batch = batch_of()
    train_step([generator, discriminator], batch)
    loss, terms = generator.objective.eval()(batch)
    assert "adversarial" not in terms
    torch.testing.assert_close(loss.detach(), terms["reconstruction"] + terms["commitment"])
    assert not generator.objective.reconstructions


def test_gumbel_vqgan_samples_codes_only_in_training():
    generator, _ = make(quantizer="gumbel", depth=1, branching=5)
    batch, losses_seen = batch_of(), []
    for mode in (True, True, False):
        objective = generator.objective.train(mode)
        seeds = batch["seeds"] + len(losses_seen)
        losses_seen.append(objective({**batch, "seeds": seeds})[1]["reconstruction"])
    assert losses_seen[0] != losses_seen[1]
    images = batch["images"].float() / 127.5 - 1
    assert losses_seen[2] == (generator.objective.tokenizer(images).reconstruction - images).abs().mean()


def test_compile_is_refused():
    with pytest.raises(UserError, match="leave --compile out"):
        VQGAN(toys.TINY["vqgan"]).phases(replace(CONFIG, compile=True))


def run(folder, config=CONFIG, **more):
    return toys.train(folder, lambda: toys.make("tokenizer", "vqgan"), config, **more)


def test_adversarial_loss_starts_on_time_and_ramps_up(tmp_path, monkeypatch):
    factors, ramp = [], losses.GeneratorLoss._ramp

    def recorded(objective):
        factors.append(ramp(objective))
        return factors[-1]

    monkeypatch.setattr(losses.GeneratorLoss, "_ramp", recorded)
    run(tmp_path)
    assert factors == [0.0] * START + [min(1, (step + 1) / RAMP) for step in range(CONFIG.steps - START)]
    lines = [line for line in toys.measured(tmp_path) if "generator/loss" in line]
    assert ["generator/adversarial" in line for line in lines] == [step >= START for step in range(CONFIG.steps)]
    assert [line["discriminator/loss"] > 0 for line in lines] == [step >= START for step in range(CONFIG.steps)]
    assert [line["generator/adaptive_weight"] > 0 for line in lines[START:]] == [False] + [True] * (
        CONFIG.steps - START - 1
    )
    assert {"held_out_mse", "held_out_loss"} <= {name for line in toys.measured(tmp_path) for name in line}


@pytest.mark.parametrize(("at", "optimizer"), [(1, "adamw"), (6, "adamw"), (10, "adamw"), (6, "muon")])
def test_resume_equals_uninterrupted_run(tmp_path, at, optimizer):
    """Stops before the discriminator starts, on the ramp, and after it."""
    config = replace(CONFIG, optimizer=optimizer)
    run(tmp_path / "whole", config)
    with pytest.raises(Interrupted):
        run(tmp_path / "stopped", config, wrap=lambda rows: toys.Signalling(rows, at))
    run(tmp_path / "stopped", config)
    assert toys.outcome(tmp_path / "stopped") == toys.outcome(tmp_path / "whole")


class NaNBatches:
    """Makes the images of some batches NaN after their conversion to float: uint8 pixels cannot be NaN."""

    def __init__(self, monkeypatch, indices):
        self.indices, self.batch, self.bad = indices, -1, False
        convert = losses.to_float
        monkeypatch.setattr(losses, "to_float", lambda images: convert(images) * (math.nan if self.bad else 1))

    def rows(self, rows):
        outer = self

        class Rows(toys.Signalling):
            def __getitems__(self, chosen):
                outer.batch += 1
                outer.bad = outer.batch in outer.indices
                return super().__getitems__(chosen)

        return Rows(rows, -1)


def test_bad_batch_changes_nothing_in_either_phase(tmp_path, monkeypatch):
    """Weights, discriminator, adaptive weight, step count and optimizer states stay the same."""
    states, phases = [], toys.phases

    def recorded(*arguments):
        result = phases(*arguments)

        class Recording(toys.Signalling):
            def __getitems__(self, chosen):
                state = [{**phase.objective.state_dict()} for phase in result]
                moments = [list(phase.optimizer.state.values()) for phase in result]
                states.append([[t.clone() for t in s.values()] for s in state])
                states[-1] += [[t.clone() for moment in m for t in moment.values()] for m in moments]
                return super().__getitems__(chosen)

        nan_batches.wrapped = Recording
        return result

    nan_batches = NaNBatches(monkeypatch, {8})
    monkeypatch.setattr(toys, "phases", recorded)
    run(tmp_path, wrap=lambda rows: LateRows(nan_batches, rows))
    for before, after, later in zip(states[8], states[9], states[10], strict=True):
        assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
        assert not all(torch.equal(a, b) for a, b in zip(after, later, strict=True))
    lines = [line for line in toys.measured(tmp_path) if "skipped_steps" in line]
    assert [line["skipped_steps"] for line in lines] == [0] * 8 + [1] * 4
    assert all(tensor.isfinite().all() for tensor in load_file(tmp_path / WEIGHTS_NAME).values())


class LateRows:
    """Rows that are wrapped when first read, since the phases that the wrapper records are built after them."""

    def __init__(self, nan_batches, rows):
        self.nan_batches, self.rows, self.wrapped = nan_batches, rows, None

    def __len__(self):
        return len(self.rows)

    def __getitems__(self, chosen):
        if self.wrapped is None:
            self.wrapped = self.nan_batches.rows(self.nan_batches.wrapped(self.rows, -1))
        return self.wrapped.__getitems__(chosen)


def test_many_bad_steps_roll_back_both_networks(tmp_path, capsys):
    """Breaks the discriminator's weights, which makes the tokenizer's losses NaN in every further step."""
    built, phases = [], toys.phases

    class Breaking(toys.Signalling):
        def __getitems__(self, chosen):
            if self.batches == 7:
                with torch.no_grad():
                    next(built[1].objective.parameters()).fill_(math.nan)
            return super().__getitems__(chosen)

    def recorded(*arguments):
        built.extend(phases(*arguments))
        return built

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(toys, "phases", recorded)
        run(tmp_path, replace(CONFIG, steps=30, ema_decay=0.0), wrap=lambda rows: Breaking(rows, -1))
    assert "in the last 10 of 17 steps: taking the weights of step 5" in capsys.readouterr().err
    for phase in built:
        assert all(tensor.isfinite().all() for tensor in phase.objective.state_dict().values())
    lines = [line for line in toys.measured(tmp_path) if "skipped_steps" in line]
    assert lines[-1]["skipped_steps"] == 10
    assert Run(tmp_path, {"settings": "same"}).state()["phases"][0]["objective"]["steps"] == 5 + 30 - 17
