"""SUNDAE's sampler against its Markov chain enumerated on a 2x2 grid; known codes, seeds, orders and stopping."""

import itertools
from collections.abc import Callable
from dataclasses import replace
from math import inf, nan

import jaxtyping
import numpy as np
import pytest
import torch
from helpers import toys
from helpers.toys import log_probs
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from smalti.commands.inpainting import Filling
from smalti.core import models
from smalti.core.errors import UserError
from smalti.core.randomness import row_seeds
from smalti.priors.methods.autoregressive import AncestralFilling, AncestralSampling
from smalti.priors.methods.masked import MaskedSampling
from smalti.priors.methods.sampling import select_positions
from smalti.priors.methods.sundae import SundaeSampling, sample_sundae
from smalti.priors.networks.hourglass import Hourglass, HourglassConfig
from smalti.priors.networks.realnvp import FlowSampling
from smalti.training.config import FitConfig


def prior_of(sharpness: float = 4.0, **changes) -> Hourglass:
    """Returns an untrained prior with far from uniform predictions that depend on all positions."""
    torch.manual_seed(1)
    config = dict(height=4, width=6, radices=(3, 2), model_width=16, heads=2, depth=(1, 1, 1), shorten=(2,))
    prior = Hourglass(HourglassConfig(**{**config, **changes})).eval()
    with torch.no_grad():
        prior.head.weight.mul_(sharpness / prior.head.weight.norm(dim=1, keepdim=True))
    return prior


def generate(
    prior: Hourglass,
    seeds: Tensor,
    h: int,
    w: int,
    sampling: SundaeSampling,
    callback: Callable[[int, Tensor], None] | None = None,
) -> Tensor:
    blank = torch.zeros(len(seeds), h, w, dtype=torch.int64)
    return sample_sundae(prior, known=blank, known_mask=blank.bool(), seeds=seeds, sampling=sampling, callback=callback)


def transitions(
    prior: Hourglass, temperature: float, proportion: float, unknown: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the chain on all 2x2 grids of 3 codes if only `unknown` positions may change.

    Returns:
        The grids `(81, 4)`, the transition matrix, and the probability that all unknown positions of a grid are
        selected and keep their codes.
    """
    grids = torch.tensor(list(itertools.product(range(3), repeat=4)))
    log_p_table = log_probs(prior.head, prior.features(grids.view(81, 2, 2)))
    new = (log_p_table / temperature).softmax(-1).double()  # from, position, code
    stay = torch.nn.functional.one_hot(grids, 3).double()
    each = torch.where(unknown[:, None], proportion * new + (1 - proportion) * stay, stay)
    columns = [each[:, i, grids[:, i]] for i in range(4)]  # from, to
    settled = torch.where(unknown, proportion * new.gather(2, grids[..., None])[..., 0], 1.0).prod(-1)
    return grids, columns[0] * columns[1] * columns[2] * columns[3], settled


@pytest.mark.parametrize(("known", "min_steps"), [(None, 2), (None, 1), (3, 1)])
@torch.no_grad()
def test_samples_follow_the_enumerated_chain(known, min_steps):
    """Two steps with different temperature and proportion, optionally with position `known` fixed to code 2.

    With `min_steps=1`, rows that the first step did not change, although it selected all positions, are finished.
    """
    prior = prior_of(1.5, height=2, width=2, radices=(3,), depth=(1,), shorten=())
    mask = torch.zeros(4, dtype=torch.bool)
    if known is not None:
        mask[known] = True
    grids, first, settled = transitions(prior, 1.2, 0.3, ~mask)
    _, second, _ = transitions(prior, 0.6, 0.8, ~mask)
    start = ((grids == 2) | ~mask).all(-1).double()
    start = start / start.sum()
    if min_steps == 1:
        stopped = start * settled
        expected = stopped + (start @ first - stopped) @ second
    else:
        expected = start @ first @ second

    rows = 30_000
    codes = sample_sundae(
        prior,
        known=torch.full((rows, 2, 2), 2),
        known_mask=mask.view(1, 2, 2).expand(rows, -1, -1),
        seeds=row_seeds(7, torch.arange(rows)),
        sampling=SundaeSampling(
            steps=2, temperature=(1.2, 0.6), proportion=(0.3, 0.8), min_steps=min_steps, order="random"
        ),
    )
    counts = torch.bincount(codes.flatten(1) @ torch.tensor([27, 9, 3, 1]), minlength=81)
    assert abs(expected.sum() - 1) < 1e-5
    assert counts[expected == 0].sum() == 0
    cells = expected * rows > 5
    chi_square = ((counts - expected * rows) ** 2 / (expected * rows))[cells].sum()
    degrees = int(cells.sum())
    assert chi_square < degrees + 5 * (2 * degrees) ** 0.5


@given(data=st.data())
@settings(max_examples=15)
def test_known_codes_are_kept_and_unknown_values_ignored(data):
    prior = prior_of()
    h, w = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 5))
    cells = 2 * h * w
    mask = torch.tensor(data.draw(st.lists(st.booleans(), min_size=cells, max_size=cells))).view(2, h, w)
    codes = torch.tensor(data.draw(st.lists(st.integers(0, 5), min_size=cells, max_size=cells))).view(2, h, w)
    calls = []

    def fill(known: Tensor) -> Tensor:
        return sample_sundae(
            prior,
            known=known,
            known_mask=mask,
            seeds=row_seeds(0, torch.arange(2)),
            sampling=SundaeSampling(steps=4),
            callback=lambda step, now: calls.append((step, now)),
        )

    filled = fill(codes)
    assert [step for step, _ in calls] == [0, 1, 2, 3]
    assert torch.equal(calls[-1][1], filled)
    assert all(torch.equal(now[mask], codes[mask]) for _, now in calls)
    assert all(((now >= 0) & (now < 6)).all() for _, now in calls)
    assert torch.equal(fill(torch.where(mask, codes, -1)), filled)


@given(st.integers(1, 6), st.integers(1, 6), st.floats(0.05, 1.0), st.integers(0, 2**20))
@settings(max_examples=30)
def test_halton_order_selects_unknown_positions_equally_often(h, w, proportion, seed):
    unknown = torch.rand(3, h, w, generator=torch.Generator().manual_seed(seed)) < 0.7
    before, times = torch.zeros(3, 1, dtype=torch.int64), torch.zeros(3, h, w, dtype=torch.int64)
    for _ in range(7):
        selected, after = select_positions(unknown, proportion, before, None, torch.zeros(3, dtype=torch.int64))
        assert (after - before)[:, 0].tolist() == selected.sum((1, 2)).tolist()
        assert not (selected & ~unknown).any()
        before, times = after, times + selected
        for row, mask in zip(times, unknown, strict=True):
            assert not mask.any() or row[mask].max() - row[mask].min() <= 1


def test_confidence_order_selects_positions_with_weights_of_inverse_probability():
    """One of three unknown positions is selected, with weights 1 / p; the known one never."""
    rows = 20_000
    nll = torch.tensor([[0.0, 1.0, 2.0, 9.0]]).expand(rows, -1)
    unknown = torch.tensor([True, True, True, False]).view(1, 2, 2).expand(rows, -1, -1)
    selected, _ = select_positions(
        unknown, 0.3, torch.zeros(rows, 1, dtype=torch.int64), nll, row_seeds(0, torch.arange(rows))
    )
    shares = selected.flatten(1).double().mean(0)
    assert torch.allclose(shares[:3], nll[0, :3].double().softmax(0), atol=0.015)
    assert shares[3] == 0


@pytest.mark.parametrize("order", ["confidence", "halton"])
def test_orders_keep_known_codes_and_depend_on_the_seed_only(order):
    prior, seeds = prior_of(), row_seeds(12, torch.arange(3))
    known = prior.head.random_codes(seeds, 4, 6)
    mask = known % 2 == 0
    sampling = SundaeSampling(steps=6, order=order)

    def fill(rows: slice, **more) -> Tensor:
        inputs = {"known": known[rows], "known_mask": mask[rows], "seeds": seeds[rows]}
        return sample_sundae(prior, **inputs, sampling=replace(sampling, **more))

    filled = fill(slice(None))
    assert torch.equal(filled[mask], known[mask])
    assert torch.equal(fill(slice(1, 2))[0], filled[1])
    assert not torch.equal(fill(slice(None), order="random"), filled)


def test_each_row_depends_on_its_own_seed_only():
    """A row is the same alone, in a batch and in another order, although rows need different numbers of steps."""
    prior = prior_of(12.0)
    seeds = row_seeds(8, torch.arange(5))
    sampling = SundaeSampling(steps=60, min_steps=2, proportion=(0.3, 0.3), temperature=(0.7, 0.7), order="random")
    together = generate(prior, seeds, 3, 4, sampling)
    assert torch.equal(generate(prior, seeds.flip(0), 3, 4, sampling).flip(0), together)
    taken = []
    for row in range(5):
        steps = []
        alone = generate(prior, seeds[row : row + 1], 3, 4, sampling, lambda step, _, steps=steps: steps.append(step))
        assert torch.equal(alone[0], together[row])
        taken.append(len(steps))
    assert min(taken) < max(taken) < 60
    assert len(together.flatten(1).unique(dim=0)) > 3


def test_row_is_finished_after_its_first_step_without_change():
    prior = prior_of(12.0)
    seeds = row_seeds(9, torch.arange(16))
    least = 40  # steps, in which every position was selected
    sampling = SundaeSampling(steps=200, min_steps=least, proportion=(0.3, 0.3), temperature=(0.7, 0.7), order="random")
    history = []
    generate(prior, seeds, 3, 4, sampling, lambda _, codes: history.append(codes))
    path = torch.stack(history)  # steps b h w
    unchanged = (path[1:] == path[:-1]).flatten(2).all(-1)  # of steps 1, 2, ...
    assert len(path) < 200
    for row in range(16):
        first = next(step for step in range(least - 1, len(path)) if unchanged[step - 1, row])
        assert unchanged[first - 1 :, row].all()
    stops = (~unchanged).sum(0)
    assert len(stops.unique()) > 2
    assert len(path) == int(max(step for step in range(len(path) - 1) if not unchanged[step].all())) + 3
    # with a larger min_steps the same chain continues to change: the sampler stopped it
    running = generate(prior, seeds, 3, 4, replace(sampling, steps=len(path), min_steps=200))
    assert not torch.equal(running, path[-1])


@pytest.mark.parametrize("order", ["random", "confidence", "halton"])
def test_no_position_keeps_its_random_start(order):
    """A prior that expects code 0 everywhere, and a step that selects few of the unknown positions, or none."""
    prior = prior_of(radices=(16,))
    with torch.no_grad():
        prior.head.weight.zero_()
        prior.head.bias.copy_(torch.eye(16)[0] * 60)
    mask = torch.ones(32, 4, 6, dtype=torch.bool)
    mask[:, 0, :3] = False
    sampling = SundaeSampling(steps=200, min_steps=1, proportion=(0.1, 0.1), order=order)
    seeds, known, steps = row_seeds(14, torch.arange(32)), torch.full((32, 4, 6), 5), []
    filled = sample_sundae(
        prior, known=known, known_mask=mask, seeds=seeds, sampling=sampling, callback=lambda step, _: steps.append(step)
    )
    assert filled[~mask].eq(0).all()
    assert filled[mask].eq(5).all()
    assert len(steps) < 200


def test_seeds_and_schedules_change_the_samples():
    prior = prior_of()
    seeds = row_seeds(10, torch.arange(4))
    sampling = SundaeSampling(steps=6)
    codes = generate(prior, seeds, 4, 6, sampling)
    assert torch.equal(generate(prior, seeds, 4, 6, sampling), codes)
    assert not torch.equal(generate(prior, row_seeds(11, torch.arange(4)), 4, 6, sampling), codes)
    for change in ({"temperature": (1.0, 0.1)}, {"proportion": (0.5, 0.9)}, {"steps": 7}):
        assert not torch.equal(generate(prior, seeds, 4, 6, replace(sampling, **change)), codes)


def test_schedules_are_linear_from_first_to_last_step():
    sampling = SundaeSampling(steps=5, temperature=(1.0, 0.6), proportion=(0.2, 1.0))
    assert [sampling.at(step) for step in range(5)] == [
        pytest.approx(pair) for pair in [(1.0, 0.2), (0.9, 0.4), (0.8, 0.6), (0.7, 0.8), (0.6, 1.0)]
    ]
    assert SundaeSampling(steps=1, temperature=(0.9, 0.1)).at(0)[0] == 0.9


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "steps must be at least 1, not 0"),
        ({"min_steps": 0}, "min[-_]steps must be at least 1, not 0"),
        ({"temperature": (1.0, 0.0)}, "temperature must be at least"),
        ({"proportion": (0.0, 0.5)}, "proportion must be above 0"),
        ({"proportion": (0.5, 1.1)}, "at most 1"),
    ],
)
def test_settings_out_of_range_are_refused(changes, message):
    with pytest.raises(UserError, match=message):
        SundaeSampling(**changes)


@pytest.mark.parametrize(
    ("cls", "changes", "message"),
    [
        (SundaeSampling, {"temperature": 0.8}, r"^temperature must be two numbers, such as \(0.8, 0.8\), not 0.8$"),
        (SundaeSampling, {"proportion": 0.8}, r"^proportion must be two numbers, such as \(0.8, 0.8\), not 0.8$"),
        (SundaeSampling, {"temperature": (1, 2, 3)}, r"^temperature must be two numbers, such as \(1.0, 0.5\), not "),
        (SundaeSampling, {"proportion": ("0.5", 1)}, r"^proportion must be two numbers, such as \(1.0, 0.5\), not "),
        (SundaeSampling, {"steps": 2.5}, "^steps must be a whole number, not 2.5$"),
        (SundaeSampling, {"steps": "8"}, "^steps must be a whole number, not '8'$"),
        (SundaeSampling, {"guidance": "2"}, "^guidance must be a number, not '2'$"),
        (SundaeSampling, {"top_p": None}, "^top_p must be a number, not None$"),
        (MaskedSampling, {"temperature": 0.8}, "^temperature must be two numbers"),
        (MaskedSampling, {"choice_temperature": (1, 2)}, r"^choice_temperature must be a number, not \(1, 2\)$"),
        (AncestralSampling, {"temperature": (1.0, 0.6)}, r"^temperature must be a number, not \(1.0, 0.6\)$"),
        (AncestralFilling, {"particles": 2.5}, "^particles must be a whole number, not 2.5$"),
        (FlowSampling, {"temperature": torch.ones(2)}, "^temperature must be a number, not tensor"),
        (Filling, {"candidates": 2.5}, "^candidates must be a whole number, not 2.5$"),
        (Filling, {"largest": "4"}, "^largest must be a number, not '4'$"),
        (Filling, {"largest": nan}, "^--largest must be a finite number, not nan$"),
        (SundaeSampling, {"temperature": (nan, 1.0)}, "^--temperature must be a finite number, not nan$"),
        (SundaeSampling, {"proportion": (0.5, nan)}, "^--proportion must be a finite number, not nan$"),
        (SundaeSampling, {"temperature": [1.0, nan]}, "^--temperature must be a finite number, not nan$"),
        (SundaeSampling, {"guidance": np.float32(inf)}, "^--guidance must be a finite number, not inf$"),
        (MaskedSampling, {"guidance": nan}, "^--guidance must be a finite number, not nan$"),
        (MaskedSampling, {"choice_temperature": nan}, "^--choice-temperature must be a finite number, not nan$"),
        (AncestralSampling, {"temperature": nan}, "^--temperature must be a finite number, not nan$"),
        (AncestralSampling, {"guidance": inf}, "^--guidance must be a finite number, not inf$"),
        (FlowSampling, {"temperature": nan}, "^--temperature must be a finite number, not nan$"),
        (FitConfig, {"steps": 2.5}, "^--steps must be a whole number, not 2.5$"),
    ],
)
def test_settings_of_other_types_are_refused(cls, changes, message, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # which checks types in tests alone
    with pytest.raises(UserError, match=message):
        cls(**changes)


def test_numbers_of_other_libraries_and_integers_are_settings(monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    prior, seeds, two = prior_of(), row_seeds(10, torch.arange(2)), np.float32(2)
    given = SundaeSampling(np.int64(3), temperature=(two, torch.tensor(1)), proportion=[1, 1], guidance=1)
    plain = SundaeSampling(3, temperature=(2.0, 1.0), proportion=(1.0, 1.0), guidance=1.0)
    assert torch.equal(generate(prior, seeds, 4, 6, given), generate(prior, seeds, 4, 6, plain))


@pytest.mark.parametrize("bad", [-1, 6])
def test_known_codes_outside_the_codebook_are_refused(bad):
    known = torch.tensor([[[0, bad]]])
    with pytest.raises(UserError, match="from 0 to 5"):
        sample_sundae(prior_of(), known=known, known_mask=known == bad, seeds=row_seeds(0, torch.arange(1)))


@pytest.mark.parametrize("kind", ["hourglass", "maskgit", "pixelcnn", "transformer"])
def test_small_top_p_samples_the_likeliest_code(kind):
    """It equals a low temperature; a top-p of 1 does not."""
    torch.manual_seed(0)
    config = toys.TINY[kind]
    prior = models.class_of_kind("prior", kind)(config).eval()
    for parameter in prior.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    known = torch.zeros(3, config.height, config.width, dtype=torch.int64)
    upper = tuple(known[:, ::factor, ::factor] for factor in config.upper_factors)
    start = {"known": known, "known_mask": known.bool(), "seeds": row_seeds(5, torch.arange(3)), "upper": upper}
    sampling = prior.method.sampling
    cold = 1e-4 if isinstance(sampling().temperature, float) else (1e-4, 1e-4)
    codes = [prior.method.sampler(prior, **start, sampling=sampling(**options)) for options in ({}, {"top_p": 1e-6})]
    likeliest = prior.method.sampler(prior, **start, sampling=sampling(temperature=cold))
    assert codes[1].equal(likeliest)
    assert not codes[0].equal(likeliest)
    with pytest.raises(UserError, match="top_p must be above 0 and at most 1"):
        sampling(top_p=0.0)
