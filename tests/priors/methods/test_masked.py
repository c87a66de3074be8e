"""Masked codes: the objective against its loss by hand, decoding against its rounds enumerated, and its orders."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from smalti.core.errors import UserError
from smalti.core.randomness import row_seeds
from smalti.priors.methods.masked import HIDDEN, MaskedCodes, MaskedConfig, MaskedSampling, hide, sample_masked
from smalti.priors.methods.orders import halton_ranks, ranks
from smalti.priors.networks.hourglass import HourglassConfig
from smalti.priors.networks.maskgit import MaskGIT

ALL = 10_000  # rows of a distribution


def prior_of(height: int = 2, width: int = 2, **changes) -> MaskGIT:
    """With strong opinions that depend on all positions, without training."""
    torch.manual_seed(1)
    config = dict(radices=(3,), model_width=16, heads=2, depth=(1,), shorten=())
    prior = MaskGIT(HourglassConfig(height, width, **{**config, **changes})).eval()
    with torch.no_grad():
        prior.head.weight.mul_(2 / prior.head.weight.norm(dim=1, keepdim=True))
        for matrix in (parameter for parameter in prior.body.parameters() if parameter.ndim == 2):
            matrix.mul_(3)
        prior.hidden.normal_()
        if prior.of_class:
            prior.of_class.vectors.weight.normal_()
    return prior


def generate(prior: MaskGIT, rows: int, sampling: MaskedSampling, **changes) -> torch.Tensor:
    known = torch.zeros(rows, prior.level.height, prior.level.width, dtype=torch.int64)
    given = {"known": known, "known_mask": known.bool(), "seeds": row_seeds(5, torch.arange(rows)), **changes}
    return sample_masked(prior, sampling=sampling, **given)


def test_the_loss_is_that_of_the_hidden_codes_only():
    prior = prior_of(3, 4, radices=(3, 2), classes=2, depth=(1, 1, 1), shorten=(2,))
    codes, labels, seeds = torch.randint(6, (5, 3, 4)), torch.tensor([0, 1, -1, 0, 1]), row_seeds(2, torch.arange(5))
    loss, metrics = MaskedCodes(prior, MaskedConfig()).eval()({"codes": codes, "labels": labels, "seeds": seeds})
    hidden = hide(seeds, 12)
    total = torch.zeros(())
    for row, column in hidden.nonzero():
        shown = torch.where(hidden[row], HIDDEN, codes[row].flatten()).view(1, 3, 4)
        log_probs = prior.head.log_probs(prior.features(shown, labels[row : row + 1]))
        total = total - log_probs[0, column, codes[row].flatten()[column]] / hidden[row].sum()
    assert torch.allclose(loss, total / 5, atol=1e-5)
    assert torch.allclose(metrics["nll_1"] + metrics["nll_2"], loss, atol=1e-5)
    assert float(metrics["hidden"]) == pytest.approx(float(hidden.float().mean()))
    assert not any(value.requires_grad for value in metrics.values())


def test_what_is_hidden_is_not_read():
    """Or the objective would be a copy."""
    prior, codes = prior_of(), torch.randint(3, (6, 2, 2))
    hidden = torch.rand(6, 2, 2, generator=torch.Generator().manual_seed(0)) < 0.5
    batch = {"codes": codes, "seeds": row_seeds(0, torch.arange(6))}
    MaskedCodes(prior, MaskedConfig())(batch)[0].backward()
    assert prior.hidden.grad is not None
    shown = codes.masked_fill(hidden, HIDDEN)
    assert not torch.equal(prior.features(shown), prior.features(codes))


@pytest.mark.parametrize("positions", [1, 5, 64])
def test_the_share_hidden_follows_the_cosine_and_places_are_alike(positions):
    hidden = hide(row_seeds(1, torch.arange(20_000)), positions)
    counts = torch.bincount(hidden.sum(1), minlength=positions + 1).double() / 20_000
    # ceil(cos(pi r / 2) n) <= k where r >= 2 arccos(k / n) / pi
    below = torch.tensor([1 - 2 * math.acos(count / positions) / math.pi for count in range(positions + 1)])
    assert counts[0] == 0
    assert (counts.cumsum(0) - below).abs().max() < 0.015
    assert (hidden.double().mean(0) - hidden.double().mean()).abs().max() < 0.02


@torch.no_grad()
def test_one_round_draws_every_code_given_what_is_known():
    prior = prior_of()
    known_mask = torch.tensor([[[False, True], [False, False]]])
    shown = torch.tensor([[[HIDDEN, 2], [HIDDEN, HIDDEN]]])
    expected = prior.head.log_probs(prior.features(shown)).exp()[0]  # 4 3
    codes = generate(
        prior,
        ALL,
        MaskedSampling(steps=1),
        known=torch.full((ALL, 2, 2), 2),
        known_mask=known_mask.expand(ALL, -1, -1),
    )
    found = torch.nn.functional.one_hot(codes.flatten(1), 3).double().mean(0)
    assert (codes[:, 0, 1] == 2).all()
    assert (found - expected)[[0, 2, 3]].abs().max() < 0.02


@pytest.mark.parametrize("order", ["halton", "random"])
@torch.no_grad()
def test_two_rounds_are_the_enumerated_ones(order):
    """Of four codes floor(cos(pi / 4) 4) = 2 are drawn anew in the second round, given the two that were shown."""
    prior = prior_of()
    grids = torch.tensor(list(itertools.product(range(3), repeat=4)))
    first = prior.head.log_probs(prior.features(torch.full((1, 2, 2), HIDDEN)))[0].exp().double()  # 4 3
    pairs = list(itertools.combinations(range(4), 2))
    if order == "halton":
        pairs = [tuple(halton_ranks(2, 2).argsort()[:2].tolist())]
    expected = torch.zeros(81, dtype=torch.float64)
    for pair in pairs:
        hidden = torch.tensor([position not in pair for position in range(4)])
        second = prior.head.log_probs(prior.features(grids.masked_fill(hidden, HIDDEN).view(81, 2, 2))).exp().double()
        each = torch.stack([second[:, i].gather(1, grids[:, i : i + 1])[:, 0] for i in range(4)], 1)  # 81 4
        before = torch.stack([first[i, grids[:, i]] for i in range(4)], 1)
        expected += torch.where(hidden, each, before).prod(1) / len(pairs)
    codes = generate(prior, 3 * ALL, MaskedSampling(steps=2, order=order)).flatten(1)
    found = torch.bincount(codes @ torch.tensor([27, 9, 3, 1]), minlength=81) / (3 * ALL)
    assert float(expected.sum()) == pytest.approx(1)
    assert (found - expected).abs().sum() < 0.06
    independent = torch.stack([first[i, grids[:, i]] for i in range(4)], 1).prod(1)
    assert (found - independent).abs().sum() > 0.2  # or one round would pass


@settings(max_examples=15)
@given(
    st.sampled_from(["halton", "confidence", "random"]),
    st.integers(1, 9),
    st.integers(0, 99),
    st.sampled_from([1.0, 2.0]),
)
def test_what_is_shown_stays_in_any_order(order, steps, seed, guidance):
    prior = prior_of(3, 4, classes=2)
    draw = torch.Generator().manual_seed(seed)
    known, mask = torch.randint(3, (3, 3, 4), generator=draw), torch.rand(3, 3, 4, generator=draw) < 0.3
    seen = []
    sampling = MaskedSampling(steps=steps, order=order, guidance=guidance)
    given = {"known": known, "known_mask": mask, "labels": torch.tensor([0, 1, -1])}
    given["seeds"] = row_seeds(seed, torch.arange(3))
    codes = sample_masked(prior, sampling=sampling, callback=lambda step, codes: seen.append((step, codes)), **given)
    assert torch.equal(codes[mask], known[mask])
    assert [step for step, _ in seen] == list(range(steps))
    assert torch.equal(seen[-1][1], codes)
    assert 0 <= codes.min() <= codes.max() < 3
    alone = sample_masked(prior, sampling=sampling, **{name: value[1:2] for name, value in given.items()})
    assert torch.equal(alone, codes[1:2])
    unknown = (~mask).sum((1, 2))
    for (step, now), (_, later) in itertools.pairwise(seen):
        same = (now == later)[~mask].sum()
        shown = sum(int(n) - math.floor(int(n) * math.cos(math.pi / 2 * (step + 1) / steps)) for n in unknown)
        assert same >= shown


@torch.no_grad()
def test_without_noise_the_surest_codes_are_shown_first():
    prior, seen = prior_of(4, 4), []
    known, mask = torch.randint(3, (1, 4, 4)), torch.zeros(1, 4, 4, dtype=torch.bool)
    mask[0, 0] = True  # all hidden, every place would look alike
    sampling = MaskedSampling(steps=2, order="confidence", choice_temperature=0.0)
    generate(prior, 1, sampling, known=known, known_mask=mask, callback=lambda _, codes: seen.append(codes.flatten()))
    log_probs = prior.head.log_probs(prior.features(torch.where(mask, known, HIDDEN)))[0]
    sureness = log_probs.gather(1, seen[0][:, None])[4:, 0]
    surest = 4 + sureness.argsort(descending=True)[: 12 - math.floor(12 * math.cos(math.pi / 4))]
    assert torch.equal(seen[1][surest], seen[0][surest])
    assert not torch.equal(seen[1], seen[0])


@given(st.integers(1, 9), st.integers(1, 9))
def test_halton_places_are_a_permutation(h, w):
    assert sorted(halton_ranks(h, w).tolist()) == list(range(h * w))


def test_a_prefix_of_the_halton_order_is_spread_evenly():
    places = halton_ranks(8, 8).view(8, 8)
    for shown in (8, 16, 32):
        quarters = (places < shown).view(2, 4, 2, 4).sum((1, 3))
        assert (quarters - shown / 4).abs().max() <= 2


def test_ranks_are_places_in_the_sorted_row():
    keys = torch.tensor([[0.3, 0.1, 0.3, 0.2]])
    assert ranks(keys).tolist() == [[2, 0, 3, 1]]


def test_a_trained_one_draws_what_it_was_shown():
    """Rows are one code all over: after training, so are samples, and fills go with what is known."""
    torch.manual_seed(0)
    prior = MaskGIT(HourglassConfig(2, 3, radices=(3,), model_width=32, heads=2, depth=(1,), shorten=()))
    objective = MaskedCodes(prior, MaskedConfig())
    optimizer = torch.optim.Adam(objective.parameters(), 1e-2)
    codes = (torch.arange(48) % 3).view(-1, 1, 1).expand(-1, 2, 3).contiguous()
    for step in range(80):
        loss, _ = objective({"codes": codes, "seeds": row_seeds(step, torch.arange(48))})
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    prior.eval()
    drawn = generate(prior, 60, MaskedSampling(steps=6)).flatten(1)
    assert ((drawn == drawn[:, :1]).all(1)).float().mean() > 0.9
    assert len(drawn[:, 0].unique()) == 3
    known = torch.full((30, 2, 3), 2)
    mask = torch.zeros_like(known, dtype=torch.bool)
    mask[:, 1, 2] = True
    filled = generate(prior, 30, MaskedSampling(steps=4), known=known, known_mask=mask)
    assert (filled == 2).float().mean() > 0.95


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"temperature": (1.0, 0.0)}, "temperature must be above 0"),
        ({"guidance": -1.0}, "choice_temperature and guidance must not be negative"),
        ({"choice_temperature": -0.5}, "choice_temperature and guidance must not be negative"),
    ],
)
def test_values_outside_their_ranges_are_refused(changes, said):
    with pytest.raises(UserError, match=said):
        replace(MaskedSampling(), **changes)


def test_a_share_that_is_none_is_refused():
    with pytest.raises(UserError, match=r"label_dropout must be from 0 to 1, got 1\.5"):
        MaskedConfig(label_dropout=1.5)
