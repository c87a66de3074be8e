"""Canvases larger than the grids in training: windows cover them, and codes follow the average of the windows'
distributions, computed by hand."""

import itertools

import pytest
import torch
from helpers.toys import log_probs
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from smalti.commands.generating import generate_codes
from smalti.commands.sample import Sample, _grids
from smalti.core.errors import UserError
from smalti.core.randomness import row_seeds
from smalti.priors.methods import canvas
from smalti.priors.methods.canvas import canvas_features, window_shares, window_starts
from smalti.priors.methods.sundae import SundaeSampling, sample_sundae
from smalti.priors.networks.hourglass import Hourglass, HourglassConfig
from smalti.tokenizers.vq.hrvq import HRVQ, HRVQConfig


def prior_of(height: int = 2, width: int = 3, **changes) -> Hourglass:
    torch.manual_seed(1)
    config = dict(radices=(3,), classes=2, model_width=16, heads=2, depth=(1,), shorten=())
    prior = Hourglass(HourglassConfig(height, width, **{**config, **changes})).eval()
    with torch.no_grad():
        prior.head.weight.mul_(3 / prior.head.weight.norm(dim=1, keepdim=True))
        for matrix in (parameter for parameter in prior.body.parameters() if parameter.ndim == 2):
            matrix.mul_(4)  # otherwise attention to the rest of the window would hardly matter
        if prior.of_class:
            prior.of_class.vectors.weight.normal_()
    return prior


@given(st.integers(1, 20), st.integers(0, 90))
def test_windows_cover_the_canvas_and_overlap_by_half(window, more):
    size = window + more
    starts = window_starts(size, window).tolist()
    assert (starts[0], starts[-1]) == (0, size - window)
    gaps = [after - before for before, after in itertools.pairwise(starts)]
    assert all(0 < gap <= max(1, window // 2) for gap in gaps)
    first, few = window_shares(torch.tensor(starts), size, window)
    assert torch.allclose(few.sum(1), torch.ones(size))
    shares = torch.zeros(size, len(starts) + few.shape[1])
    shares.scatter_(1, first[:, None] + torch.arange(few.shape[1]), few)
    assert not shares[:, len(starts) :].any()
    shares = shares[:, : len(starts)]
    covered = [[start <= position < start + window for start in starts] for position in range(size)]
    assert torch.equal(shares > 0, torch.tensor(covered))


@pytest.mark.parametrize(("h", "w"), [(2, 4), (3, 3), (4, 7)])
@torch.no_grad()
def test_codes_follow_the_average_of_the_windows(h, w):
    """The expected distribution is summed window by window, with weights by hand."""
    prior, rows = prior_of(), 20_000
    grid, labels = torch.randint(3, (1, h, w)), torch.tensor([1])
    total, weights = torch.zeros(h, w, 3), torch.zeros(h, w, 1)
    for top in window_starts(h, 2).tolist():
        for left in window_starts(w, 3).tolist():
            probabilities = log_probs(prior.head, prior.features(grid[:, top : top + 2, left : left + 3], labels)).exp()
            share = torch.tensor([1.0, 1.0])[:, None] * torch.tensor([1.0, 2.0, 1.0])  # distances to the nearer edges
            total[top : top + 2, left : left + 3] += share[..., None] * probabilities.view(2, 3, 3)
            weights[top : top + 2, left : left + 3] += share[..., None]
    expected = total / weights

    seeds = row_seeds(3, torch.arange(rows))
    samples = torch.zeros(rows, h * w, dtype=torch.int64)
    for part in torch.arange(rows).split(2000):
        features = canvas_features(prior, grid.expand(len(part), -1, -1), labels.expand(len(part)), (), seeds[part])
        uniforms = torch.rand(len(part), h * w, 1, generator=torch.Generator().manual_seed(int(part[0])))
        samples[part] = prior.head.sample(features, uniforms)
    frequencies = F.one_hot(samples, 3).float().mean(0).view(h, w, 3)
    assert (frequencies - expected).abs().max() < 0.02
    one_window = log_probs(prior.head, prior.features(grid, labels)).exp().view(h, w, 3)
    assert (one_window - expected).abs().max() > 0.05  # otherwise the windows would not matter


@torch.no_grad()
def test_windows_computed_in_batches_give_the_same_features(monkeypatch):
    prior, codes = prior_of(), torch.randint(3, (3, 5, 9))
    arguments = (codes, torch.tensor([0, 1, -1]), (), row_seeds(0, torch.arange(3)))
    whole = canvas_features(prior, *arguments)
    monkeypatch.setattr(canvas, "POSITIONS_AT_ONCE", 14)  # two windows and a rest
    assert torch.allclose(canvas_features(prior, *arguments), whole, atol=1e-5)


@torch.no_grad()
def test_memory_grows_with_the_canvas_and_not_with_its_square():
    """A list of all windows for every position would have 2**34 entries."""
    prior = prior_of(depth=(1,), model_width=8, heads=1)
    codes = torch.zeros((1, 1, 2**17), dtype=torch.int64)
    prior.features = lambda grids, condition=None, upper=(): grids.flatten(1)[..., None].float()
    assert canvas_features(prior, codes, None, (), row_seeds(0, torch.arange(1))).shape == (1, 2**17, 1)


@torch.no_grad()
def test_small_canvas_is_a_single_window():
    prior, codes = prior_of(), torch.randint(3, (4, 2, 2))
    seeds = row_seeds(0, torch.arange(4))
    assert torch.equal(canvas_features(prior, codes, None, (), seeds), prior.features(codes))


@settings(max_examples=10)
@given(st.integers(1, 5), st.integers(1, 7), st.integers(0, 99))
def test_known_codes_are_kept_and_rows_are_independent_on_any_rectangle(h, w, seed):
    prior = prior_of()
    generator = torch.Generator().manual_seed(seed)
    known = torch.randint(3, (3, h, w), generator=generator)
    mask = torch.rand(3, h, w, generator=generator) < 0.4
    seeds, labels = row_seeds(seed, torch.arange(3)), torch.tensor([0, 1, -1])
    sampling = SundaeSampling(steps=3, min_steps=2, guidance=2.0)
    both = sample_sundae(prior, known=known, known_mask=mask, seeds=seeds, condition=labels, sampling=sampling)
    assert torch.equal(both[mask], known[mask])
    alone = sample_sundae(
        prior, known=known[1:2], known_mask=mask[1:2], seeds=seeds[1:2], condition=labels[1:2], sampling=sampling
    )
    assert torch.equal(alone, both[1:2])


def test_sample_size_is_in_pixels():
    prior = prior_of()
    tokenizer = HRVQ(HRVQConfig(4, 6, widths=(6,), residual_blocks=1, code_width=5, depth=1, branching=3))
    assert _grids(Sample(None), [prior], tokenizer) == [(2, 3)]
    assert _grids(Sample(None, width=10), [prior], tokenizer) == [(2, 5)]
    codes = generate_codes(prior, torch.arange(2), None, grid=(2, 5), seed=0, sampling=SundaeSampling(steps=2))
    assert tokenizer.decode((codes,)).shape == (2, 3, 4, 10)
    for wrong in (Sample(None, height=5), Sample(None, height=0)):
        with pytest.raises(UserError, match=f"--height must be a multiple of 2 pixels, not {wrong.height}"):
            _grids(wrong, [prior], tokenizer)


@torch.no_grad()
def test_windows_align_with_codes_of_coarser_levels():
    """Each position has the features of one of its windows, computed with the coarser codes of that window."""
    prior = prior_of(height=4, width=4, upper_radices=((5,),), upper_factors=(2,))
    codes, upper = torch.randint(3, (1, 8, 6)), torch.randint(5, (1, 4, 3))
    features = canvas_features(prior, codes, None, (upper,), row_seeds(0, torch.arange(1))).view(8, 6, -1)
    matched = torch.zeros(8, 6, dtype=torch.bool)
    for top, left in itertools.product((0, 2, 4), (0, 2)):
        coarser = upper[:, top // 2 : top // 2 + 2, left // 2 : left // 2 + 2]
        window = prior.features(codes[:, top : top + 4, left : left + 4], upper=(coarser,)).view(4, 4, -1)
        matched[top : top + 4, left : left + 4] |= torch.isclose(
            features[top : top + 4, left : left + 4], window, atol=1e-5
        ).all(-1)
    assert matched.all()
