"""Ancestral sampling: equal to the naive sampler, and to enumerated distributions; known codes are kept."""

import itertools

import jaxtyping
import pytest
import torch
from helpers.causal import OPTIONS, of_every_option, prior_of, random_conditioning
from helpers.toys import log_probs
from hypothesis import given, settings
from hypothesis import strategies as st

from smalti.benchmarks.ancestral import sample_naively
from smalti.core.errors import UserError
from smalti.core.randomness import row_seeds
from smalti.priors.methods import autoregressive
from smalti.priors.methods.autoregressive import (
    AncestralFilling,
    AncestralSampling,
    Likelihood,
    LikelihoodConfig,
    sample_ancestral,
)
from smalti.priors.networks.hourglass import Hourglass, HourglassConfig

PLAIN = AncestralSampling()
SAMPLINGS = [PLAIN, AncestralSampling(temperature=0.7), AncestralSampling(guidance=2.5)]


def draw(prior, seeds, h=4, w=8, known=None, mask=None, sampling=PLAIN, **more):
    blank = torch.zeros(len(seeds), h, w, dtype=torch.int64)
    known, mask = (blank, blank.bool()) if known is None else (known, mask)
    return sample_ancestral(prior, known=known, known_mask=mask, seeds=seeds, sampling=sampling, **more)


def test_a_prior_that_sees_every_code_does_not_learn_autoregressively(monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # which checks types in tests alone
    prior = Hourglass(HourglassConfig(4, 4, (5,), model_width=8, heads=1))
    with pytest.raises(UserError, match=r"^Hourglass cannot learn autoregressively; derive it from CausalPrior$"):
        Likelihood(prior, LikelihoodConfig())


@of_every_option
@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_cached_sampler_equals_naive_sampler(options, sampling):
    """Also with known codes. The naive sampler recomputes the features of the whole grid at each position."""
    prior, seeds = prior_of(**options), row_seeds(3, torch.arange(6))
    conditioning = random_conditioning(prior, 6, 4, 8)
    known, shares = torch.randint(6, (6, 4, 8)), torch.tensor([0.0, 0.0, 0.1, 0.3, 0.6, 1.0])
    mask = torch.rand(6, 4, 8) < shares[:, None, None]
    cached = draw(prior, seeds, known=known, mask=mask, sampling=sampling, **conditioning)
    assert torch.equal(cached, sample_naively(prior, known, mask, seeds, sampling, **conditioning))
    assert len(cached[:2].unique()) > 1


def test_cached_sampler_equals_naive_sampler_on_a_larger_grid():
    prior, seeds = prior_of(12, 12, kernel=5, radices=(8, 8)), row_seeds(4, torch.arange(3))
    blank = torch.zeros(3, 12, 12, dtype=torch.int64)
    naive = sample_naively(prior, blank, blank.bool(), seeds, AncestralSampling())
    assert torch.equal(draw(prior, seeds, 12, 12), naive)


def grids_and_probabilities(prior, temperature=1.0):
    """Returns all 2x2 grids of 3 codes `(81, 4)` and log-probabilities of their codes, as the head enumerates them."""
    grids = torch.tensor(list(itertools.product(range(3), repeat=4)))
    log_p_table = (log_probs(prior.head, prior.features(grids.view(81, 2, 2))) / temperature).log_softmax(-1)
    return grids, log_p_table.gather(-1, grids[..., None])[..., 0].double()


def chi_square_fits(counts, probabilities):
    expected = probabilities * counts.sum()
    cells = expected > 5
    statistic = ((counts - expected) ** 2 / expected)[cells].sum()
    degrees = int(cells.sum()) - 1
    return statistic < degrees + 5 * (2 * degrees) ** 0.5


def counts_of(codes):
    return torch.bincount(codes.flatten(1) @ torch.tensor([27, 9, 3, 1]), minlength=81)


@torch.no_grad()
def test_samples_follow_the_enumerated_distribution():
    prior = prior_of(2, 2, radices=(3,), layers=2)
    seeds = row_seeds(7, torch.arange(20_000))
    for temperature in (1.0, 0.5):
        _, log_p = grids_and_probabilities(prior, temperature)
        counts = counts_of(draw(prior, seeds, 2, 2, sampling=AncestralSampling(temperature=temperature)))
        assert chi_square_fits(counts, log_p.sum(-1).exp())


@torch.no_grad()
def test_many_particles_sample_the_posterior():
    """The last code is known: one particle ignores it, of many particles one from the posterior is kept."""
    prior = prior_of(2, 2, radices=(3,), layers=2)
    grids, log_p = grids_and_probabilities(prior, 0.8)
    consistent = grids[:, 3] == 2
    before = torch.where(consistent, log_p[:, :3].sum(-1).exp(), 0)
    posterior = torch.where(consistent, log_p.sum(-1).exp(), 0)
    posterior = posterior / posterior.sum()
    known = torch.full((4_000, 2, 2), 2)
    mask = torch.tensor([[False, False], [False, True]]).expand(4_000, -1, -1)
    seeds, counts = row_seeds(8, torch.arange(4_000)), {}
    for particles in (1, 40):
        sampling = AncestralFilling(temperature=0.8, particles=particles)
        counts[particles] = counts_of(draw(prior, seeds, 2, 2, known, mask, sampling))
    assert chi_square_fits(counts[1], before)
    assert chi_square_fits(counts[40], posterior)
    assert not chi_square_fits(counts[1], posterior)  # otherwise the test could not distinguish the two


@torch.no_grad()
def test_resampling_samples_the_posterior_where_known_codes_alternate(monkeypatch):
    """Enumerated, with a known right column; where that is unlikely, nearer than by weights at the end only."""
    prior, unknown = prior_of(4, 2, radices=(3,), layers=2), torch.tensor(list(itertools.product(range(3), repeat=4)))

    def counts_and_posterior(right, n, sampling):
        grids = torch.stack([unknown, torch.tensor(right).expand(81, -1)], dim=-1)  # 81 4 2
        nll = prior.head.nll(prior.features(grids), grids.flatten(1), temperature=sampling.temperature)
        known, mask = grids[:1].expand(n, -1, -1), torch.tensor([False, True]).expand(n, 4, 2)
        filled = draw(prior, row_seeds(9, torch.arange(n)), 4, 2, known, mask, sampling)
        counts = torch.bincount(filled[..., 0] @ torch.tensor([27, 9, 3, 1]), minlength=81)
        return counts, (-nll.sum(-1)).double().softmax(0)

    def distance():
        unlikely = counts_and_posterior([2, 0, 2, 1], 500, AncestralFilling(particles=32, temperature=2.0))
        return float((unlikely[0] / 500 - unlikely[1]).abs().sum() / 2)  # total variation

    assert chi_square_fits(*counts_and_posterior([0, 1, 1, 2], 1_000, AncestralFilling(particles=64)))
    resampled = distance()
    monkeypatch.setattr(
        autoregressive,
        "_resampled",
        lambda _, run_ends, __: (torch.arange(len(run_ends)), torch.zeros_like(run_ends)),
    )
    assert resampled < 0.7 * distance()


@pytest.mark.parametrize("options", [OPTIONS["everything"], OPTIONS["transformer, everything"]])
def test_resampled_fills_depend_on_their_own_row_only(options):
    """Whatever the masks of the other rows, with guidance, coarser levels and classes."""
    prior, seeds, sampling = prior_of(**options), row_seeds(5, torch.arange(4)), AncestralFilling(guidance=2.0)
    conditioning, generator = random_conditioning(prior, 4, 4, 8), torch.Generator().manual_seed(2)
    known = torch.randint(6, (4, 4, 8), generator=generator)
    mask = torch.rand(4, 4, 8, generator=generator) < torch.tensor([0.0, 0.3, 0.5, 0.8])[:, None, None]
    together = draw(prior, seeds, known=known, mask=mask, sampling=sampling, **conditioning)
    for row in range(4):
        one = slice(row, row + 1)
        upper = tuple(coarser[one] for coarser in conditioning["upper"])
        more = {"condition": conditioning["condition"][one], "upper": upper}
        assert torch.equal(draw(prior, seeds[one], 4, 8, known[one], mask[one], sampling, **more), together[one])


def test_systematic_resampling_continues_particles_in_proportion_to_their_weights():
    """Rounded up or down; even weights, and rows whose known codes go on, are left as they are."""
    weights = torch.tensor([[0.7, 0.1, 0.1, 0.1], [0.25, 0.25, 0.25, 0.25], [0.97, 0.01, 0.01, 0.01]])
    ends = torch.tensor([True, True, False]).repeat_interleave(4)[:, None]
    for uniforms in (torch.zeros(3), torch.full((3,), 0.5), torch.full((3,), 1 - 2.0**-24)):
        taken, uneven = autoregressive._resampled(weights.log().view(-1, 1), ends, uniforms)
        assert uneven.flatten().tolist() == [True] * 4 + [False] * 8
        assert taken[4:].tolist() == list(range(4, 12))
        counts = torch.bincount(taken[:4], minlength=4)
        assert counts[0] in (2, 3)
        assert (counts[1:] <= 1).all()
        assert counts.sum() == 4


@settings(max_examples=12)
@given(data=st.data(), options=st.sampled_from(list(OPTIONS.values())), particles=st.integers(1, 3))
def test_known_codes_are_kept_and_unknown_values_ignored(data, options, particles):
    prior, cells = prior_of(**options), 2 * 4 * 4
    conditioning = random_conditioning(prior, 2, 4, 4)
    mask = torch.tensor(data.draw(st.lists(st.booleans(), min_size=cells, max_size=cells))).view(2, 4, 4)
    codes = torch.tensor(data.draw(st.lists(st.integers(0, 5), min_size=cells, max_size=cells))).view(2, 4, 4)
    seeds, sampling = row_seeds(0, torch.arange(2)), AncestralSampling(particles=particles)
    filled = draw(prior, seeds, known=codes, mask=mask, sampling=sampling, **conditioning)
    assert torch.equal(filled[mask], codes[mask])
    assert ((filled >= 0) & (filled < 6)).all()
    hidden = torch.where(mask, codes, -1)
    assert torch.equal(draw(prior, seeds, known=hidden, mask=mask, sampling=sampling, **conditioning), filled)


def test_each_row_depends_on_its_own_seed_only():
    prior, seeds = prior_of(), row_seeds(8, torch.arange(5))
    together = draw(prior, seeds)
    assert torch.equal(draw(prior, seeds.flip(0)).flip(0), together)
    assert torch.equal(torch.cat([draw(prior, seed.view(1)) for seed in seeds]), together)
    assert len(together.flatten(1).unique(dim=0)) == 5
    assert not torch.equal(draw(prior, seeds + 1), together)


def test_callback_is_called_for_every_position_in_order():
    prior, seeds, calls = prior_of(), row_seeds(0, torch.arange(2)), []
    samples = draw(prior, seeds, callback=lambda position, codes: calls.append((position, codes)))
    assert [position for position, _ in calls] == list(range(AncestralSampling().calls(4, 8)))
    assert torch.equal(calls[-1][1], samples)
    for position, codes in calls:
        assert torch.equal(codes.flatten(1)[:, : position + 1], samples.flatten(1)[:, : position + 1])


def test_sampling_is_float32_under_autocast():
    prior, seeds = prior_of(), row_seeds(0, torch.arange(4))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(draw(prior, seeds), draw(prior, seeds))
        inside = draw(prior, seeds)
    assert torch.equal(inside, draw(prior, seeds))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"temperature": 0.0}, "temperature must be at least 0.000001, not 0.0; use 0.01"),
        ({"temperature": 1e-38}, "temperature must be at least 0.000001"),  # logits divided by it overflow
        ({"guidance": -1.0}, "guidance must not be negative"),
        ({"particles": 0}, "particles must be at least 1"),
    ],
)
def test_settings_out_of_range_are_refused(changes, message):
    with pytest.raises(UserError, match=message):
        AncestralSampling(**changes)


def test_codes_outside_the_codebook_and_unknown_labels_are_refused():
    prior, seeds, everything = prior_of(), row_seeds(0, torch.arange(1)), torch.ones(1, 4, 8, dtype=torch.bool)
    with pytest.raises(UserError, match="from 0 to 5, got 6 to 6"):
        draw(prior, seeds, known=torch.full((1, 4, 8), 6), mask=everything)
    with pytest.raises(UserError, match="labels must be from -1"):
        draw(prior, seeds, condition=torch.tensor([0]))
