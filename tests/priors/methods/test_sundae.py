"""The SUNDAE loss against one computed by hand, and a prior that learns stripes with it."""

import subprocess
import sys

import pytest
import torch
from helpers.toys import log_probs
from torch import Tensor

from smalti.core.errors import UserError
from smalti.core.randomness import Stream, derive, row_seeds, uniform
from smalti.priors.head import FactorizedHead
from smalti.priors.methods.sundae import (
    Sundae,
    SundaeConfig,
    SundaeSampling,
    corrupt,
    sample_sundae,
)
from smalti.priors.networks.hourglass import Hourglass, HourglassConfig


def tiny(**changes) -> Hourglass:
    torch.manual_seed(0)
    config = dict(height=2, width=3, radices=(3, 2), model_width=16, heads=2, depth=(1, 1, 1), shorten=(2,))
    return Hourglass(HourglassConfig(**{**config, **changes}))


def nll_by_enumeration(prior: Hourglass, inputs: Tensor, codes: Tensor) -> Tensor:
    return -log_probs(prior.head, prior.features(inputs)).gather(-1, codes.flatten(1)[..., None])[..., 0]


@pytest.mark.parametrize("unrolled_steps", [1, 2, 3])
def test_loss_and_gradient_equal_those_of_separate_steps(unrolled_steps):
    """Each step's input is computed first, so a gradient through the samples or a wrong weight of a step would show."""
    prior = tiny()
    codes, seeds = torch.randint(6, (4, 2, 3)), row_seeds(1, torch.arange(4))
    inputs = [corrupt(prior.head, codes, seeds)]
    for step in range(1, unrolled_steps):
        draws = uniform(derive(seeds, Stream.SUNDAE_UNROLL, step), 6, 2)
        inputs.append(prior.head.sample(prior.features(inputs[-1]), draws).view_as(codes))
    steps = torch.stack([nll_by_enumeration(prior, noisy, codes).mean() for noisy in inputs])

    loss, metrics = Sundae(prior, SundaeConfig(unrolled_steps))({"codes": codes, "seeds": seeds})

    assert torch.allclose(loss, steps.mean(), atol=1e-5)
    assert torch.allclose(torch.stack([metrics[f"loss_{i + 1}"] for i in range(unrolled_steps)]), steps, atol=1e-5)
    assert torch.allclose(metrics["nll_1"] + metrics["nll_2"], loss, atol=1e-5)
    assert not any(value.requires_grad for value in metrics.values())
    trained = [parameter for parameter in prior.parameters() if parameter.requires_grad]
    gradients, expected = torch.autograd.grad(loss, trained), torch.autograd.grad(steps.mean(), trained)
    assert all(torch.allclose(ours, theirs, atol=1e-5) for ours, theirs in zip(gradients, expected, strict=True))


def test_corruption_has_a_uniform_rate_per_row_and_uniform_codes():
    head = FactorizedHead((50, 20), 4)
    codes = torch.full((3000, 8, 8), 123)
    noisy = corrupt(head, codes, row_seeds(2, torch.arange(3000)))
    replaced = noisy != 123
    rates = replaced.float().mean((1, 2)).sort().values
    assert (rates - torch.linspace(0, 1, 3000)).abs().max() < 0.04  # uniform on [0, 1]
    counts = torch.bincount(noisy[replaced], minlength=1000)
    expected = int(replaced.sum()) / 999
    assert ((counts[torch.arange(1000) != 123] - expected) ** 2 / expected).sum() < 999 + 5 * (2 * 999) ** 0.5
    shares = replaced.float().mean(0)
    assert (shares - 0.5).abs().max() < 0.05  # all positions are corrupted equally often


def test_corruption_of_a_row_depends_on_its_own_seed_only():
    head = FactorizedHead((7,), 4)
    codes, seeds = torch.randint(7, (20, 4, 5)), row_seeds(3, torch.arange(20))
    noisy = corrupt(head, codes, seeds)
    assert torch.equal(noisy[5:7], corrupt(head, codes[5:7], seeds[5:7]))
    assert not torch.equal(noisy, corrupt(head, codes, derive(seeds, 1)))


def test_fewer_than_one_unrolled_step_is_refused():
    with pytest.raises(UserError, match="--unrolled-steps must be at least 1, not 0"):
        SundaeConfig(unrolled_steps=0)


def test_stripes_are_learned_and_sampled():
    """Training grids have one random code along each row: the loss falls, and samples have stripes of all codes."""
    prior = tiny(height=2, width=6, radices=(2, 2), model_width=32)
    objective = Sundae(prior, SundaeConfig())
    optimizer = torch.optim.AdamW([p for p in prior.parameters() if p.requires_grad], 1e-2)
    losses = []
    for step in range(60):
        rows = torch.arange(64) + 64 * step
        codes = prior.head.random_codes(row_seeds(4, rows), 2, 1).expand(-1, -1, 6)
        loss, _ = objective({"codes": codes, "seeds": row_seeds(5, rows)})
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] > 1.3  # log 4 is 1.39
    assert sum(losses[-10:]) / 10 < 0.95
    blank = torch.zeros(64, 2, 6, dtype=torch.int64)
    samples = sample_sundae(
        prior.eval(),
        known=blank,
        known_mask=blank.bool(),
        seeds=row_seeds(6, torch.arange(64)),
        sampling=SundaeSampling(steps=30, temperature=(1.0, 0.7), proportion=(0.5, 0.5), order="random"),
    )
    striped = (samples == samples[..., :1]).all(-1)
    assert striped.float().mean() > 0.5  # one in a thousand rows of uniform codes
    assert len(samples[striped][:, 0].unique()) == 4


def test_loss_is_one_graph_of_the_compiler():
    """It is traced only, as compiling takes minutes, in a process without the shape checks of the tests."""
    script = """
import torch
from smalti.priors.networks.hourglass import Hourglass, HourglassConfig
from smalti.priors.methods.sundae import Sundae, SundaeConfig

prior = Hourglass(HourglassConfig(3, 5, (130, 2), model_width=16, heads=2, depth=(1,), shorten=()))
objective = Sundae(prior, SundaeConfig())
batch = {"codes": torch.randint(260, (2, 3, 5)), "seeds": torch.arange(2)}
compiled = torch.compile(objective, backend="eager", fullgraph=True)
with torch.autocast("cpu", torch.bfloat16):
    assert torch.equal(compiled(batch)[0], objective(batch)[0])
"""
    subprocess.run([sys.executable, "-c", script], check=True)


@pytest.mark.parametrize("rate", [0.0, 0.25, 1.0])
def test_corruption_at_a_rate_replaces_that_share_of_codes(rate):
    """A random code of 16 equals the original in one of 16 positions."""
    head, codes = FactorizedHead((4, 4), 8), torch.zeros(64, 16, 16, dtype=torch.int64)
    corrupted = corrupt(head, codes, row_seeds(0, torch.arange(64)), rate)
    assert float((corrupted != codes).float().mean()) == pytest.approx(rate * 15 / 16, abs=0.01)
