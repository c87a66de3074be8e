"""The SUNDAE objective against its loss computed by hand, and on stripes that it has to learn."""

import subprocess
import sys

import pytest
import torch
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


def nll_by_enumeration(prior: Hourglass, given: Tensor, codes: Tensor) -> Tensor:
    return -prior.head.log_probs(prior.features(given)).gather(-1, codes.flatten(1)[..., None])[..., 0]


@pytest.mark.parametrize("unrolled_steps", [1, 2, 3])
def test_loss_and_gradient_are_those_of_the_steps_taken_apart(unrolled_steps):
    """Each step's input is fixed first: a gradient through the draws, or a step weighted amiss, would show."""
    prior = tiny()
    codes, seeds = torch.randint(6, (4, 2, 3)), row_seeds(1, torch.arange(4))
    given = [corrupt(prior.head, codes, seeds)]
    for step in range(1, unrolled_steps):
        draws = uniform(derive(seeds, Stream.SUNDAE_UNROLL, step), 6, 2)
        given.append(prior.head.sample(prior.features(given[-1]), draws).view_as(codes))
    steps = torch.stack([nll_by_enumeration(prior, noisy, codes).mean() for noisy in given])

    loss, metrics = Sundae(prior, SundaeConfig(unrolled_steps))({"codes": codes, "seeds": seeds})

    assert torch.allclose(loss, steps.mean(), atol=1e-5)
    assert torch.allclose(torch.stack([metrics[f"loss_{i + 1}"] for i in range(unrolled_steps)]), steps, atol=1e-5)
    assert torch.allclose(metrics["nll_1"] + metrics["nll_2"], loss, atol=1e-5)
    assert not any(value.requires_grad for value in metrics.values())
    trained = [parameter for parameter in prior.parameters() if parameter.requires_grad]
    found, expected = torch.autograd.grad(loss, trained), torch.autograd.grad(steps.mean(), trained)
    assert all(torch.allclose(ours, theirs, atol=1e-5) for ours, theirs in zip(found, expected, strict=True))


def test_corruption_has_a_uniform_rate_for_each_row_and_uniform_codes():
    head = FactorizedHead((50, 20), 4)
    codes = torch.full((3000, 8, 8), 123)
    noisy = corrupt(head, codes, row_seeds(2, torch.arange(3000)))
    replaced = noisy != 123
    rates = replaced.float().mean((1, 2)).sort().values
    assert (
        rates - torch.linspace(0, 1, 3000)
    ).abs().max() < 0.04  # the rates' distribution function, uniform on [0, 1]
    counts = torch.bincount(noisy[replaced], minlength=1000)
    expected = int(replaced.sum()) / 999
    assert ((counts[torch.arange(1000) != 123] - expected) ** 2 / expected).sum() < 999 + 5 * (2 * 999) ** 0.5
    places = replaced.float().mean(0)
    assert (places - 0.5).abs().max() < 0.05  # no position is spared


def test_finer_digits_keep_any_number_of_those_before_them():
    """At corrupted positions each depth is as likely, and below it every code: by the digit that differs first."""
    head = FactorizedHead((5, 4, 3), 4)
    seeds = row_seeds(2, torch.arange(2000))
    noisy = corrupt(head, torch.full((2000, 8, 8), 34), seeds, "finer-digits")  # 34 is 2, 3, 1
    where = uniform(derive(seeds, Stream.SUNDAE_POSITIONS), 8, 8) < uniform(derive(seeds, Stream.SUNDAE_RATE), 1, 1)
    assert torch.equal(noisy[~where], torch.full_like(noisy[~where], 34))
    counts = torch.bincount(noisy[where], minlength=60)
    expected = torch.full((60,), 1 / 3 / 60)
    expected[24:36] += 1 / 3 / 12
    expected[33:36] += 1 / 3 / 3
    expected = expected * int(where.sum())
    assert ((counts - expected) ** 2 / expected).sum() < 59 + 5 * (2 * 59) ** 0.5


def test_finer_digits_are_what_training_corrupts_if_told():
    prior = tiny()
    batch = {"codes": torch.randint(6, (4, 2, 3)), "seeds": row_seeds(1, torch.arange(4))}
    noisy = corrupt(prior.head, batch["codes"], batch["seeds"], "finer-digits")
    loss, _ = Sundae(prior, SundaeConfig(1, corruption="finer-digits"))(batch)
    assert torch.allclose(loss, nll_by_enumeration(prior, noisy, batch["codes"]).mean(), atol=1e-5)


def test_a_rows_corruption_is_its_own():
    head = FactorizedHead((7,), 4)
    codes, seeds = torch.randint(7, (20, 4, 5)), row_seeds(3, torch.arange(20))
    noisy = corrupt(head, codes, seeds)
    assert torch.equal(noisy[5:7], corrupt(head, codes[5:7], seeds[5:7]))
    assert not torch.equal(noisy, corrupt(head, codes, derive(seeds, 1)))


def test_fewer_than_one_step_is_refused():
    with pytest.raises(UserError, match="at least 1, got 0"):
        SundaeConfig(unrolled_steps=0)


def test_stripes_are_learnt_and_drawn():
    """Grids with one random code along each row: the loss finds out, and what is sampled has stripes of all codes."""
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
    drawn = sample_sundae(
        prior.eval(),
        known=blank,
        known_mask=blank.bool(),
        seeds=row_seeds(6, torch.arange(64)),
        sampling=SundaeSampling(steps=30, temperature=(1.0, 0.7), proportion=(0.5, 0.5)),
    )
    striped = (drawn == drawn[..., :1]).all(-1)
    assert striped.float().mean() > 0.5  # of uniform codes, one row in a thousand is
    assert len(drawn[striped][:, 0].unique()) == 4


def test_the_whole_loss_is_one_graph_to_the_compiler():
    """Traced only, as compiling takes minutes. In a process of its own, without the shape checks of the tests."""
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
