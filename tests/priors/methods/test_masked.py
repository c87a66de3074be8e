"""MaskGIT: the loss against one by hand, decoding steps against enumerated ones, and the orders of decoding."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
from helpers.toys import log_probs
from hypothesis import given, settings
from hypothesis import strategies as st

from smalti.core.errors import UserError
from smalti.core.randomness import row_seeds
from smalti.priors.methods.masked import (
    MASK_TOKEN,
    MaskedCodes,
    MaskedConfig,
    MaskedSampling,
    random_mask,
    sample_masked,
)
from smalti.priors.methods.orders import halton_ranks, ranks
from smalti.priors.networks.hourglass import HourglassConfig
from smalti.priors.networks.maskgit import MaskGIT

ALL = 10_000  # rows of a distribution


def prior_of(height: int = 2, width: int = 2, **changes) -> MaskGIT:
    """Returns an untrained prior with far from uniform predictions that depend on all positions."""
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
    inputs = {"known": known, "known_mask": known.bool(), "seeds": row_seeds(5, torch.arange(rows)), **changes}
    return sample_masked(prior, sampling=sampling, **inputs)


def test_loss_is_that_of_the_masked_codes_only():
    prior = prior_of(3, 4, radices=(3, 2), classes=2, depth=(1, 1, 1), shorten=(2,))
    codes, labels, seeds = torch.randint(6, (5, 3, 4)), torch.tensor([0, 1, -1, 0, 1]), row_seeds(2, torch.arange(5))
    loss, metrics = MaskedCodes(prior, MaskedConfig()).eval()({"codes": codes, "labels": labels, "seeds": seeds})
    masked = random_mask(seeds, 12)
    total = torch.zeros(())
    for row, column in masked.nonzero():
        inputs = torch.where(masked[row], MASK_TOKEN, codes[row].flatten()).view(1, 3, 4)
        log_p_table = log_probs(prior.head, prior.features(inputs, labels[row : row + 1]))
        total = total - log_p_table[0, column, codes[row].flatten()[column]] / masked[row].sum()
    assert torch.allclose(loss, total / 5, atol=1e-5)
    assert torch.allclose(metrics["nll_1"] + metrics["nll_2"], loss, atol=1e-5)
    assert float(metrics["hidden"]) == pytest.approx(float(masked.float().mean()))
    assert not any(value.requires_grad for value in metrics.values())


def test_masked_codes_are_not_read():
    """Otherwise copying the input would minimize the loss."""
    prior, codes = prior_of(), torch.randint(3, (6, 2, 2))
    masked = torch.rand(6, 2, 2, generator=torch.Generator().manual_seed(0)) < 0.5
    batch = {"codes": codes, "seeds": row_seeds(0, torch.arange(6))}
    MaskedCodes(prior, MaskedConfig())(batch)[0].backward()
    assert prior.hidden.grad is not None
    inputs = codes.masked_fill(masked, MASK_TOKEN)
    assert not torch.equal(prior.features(inputs), prior.features(codes))


@pytest.mark.parametrize("positions", [1, 5, 64])
def test_masking_ratio_follows_the_cosine_schedule_uniformly_over_positions(positions):
    masked = random_mask(row_seeds(1, torch.arange(20_000)), positions)
    counts = torch.bincount(masked.sum(1), minlength=positions + 1).double() / 20_000
    # ceil(cos(pi r / 2) n) <= k where r >= 2 arccos(k / n) / pi
    below = torch.tensor([1 - 2 * math.acos(count / positions) / math.pi for count in range(positions + 1)])
    assert counts[0] == 0
    assert (counts.cumsum(0) - below).abs().max() < 0.015
    assert (masked.double().mean(0) - masked.double().mean()).abs().max() < 0.02


@torch.no_grad()
def test_one_decoding_step_samples_every_code_given_the_known_ones():
    prior = prior_of()
    known_mask = torch.tensor([[[False, True], [False, False]]])
    inputs = torch.tensor([[[MASK_TOKEN, 2], [MASK_TOKEN, MASK_TOKEN]]])
    expected = log_probs(prior.head, prior.features(inputs)).exp()[0]  # 4 3
    codes = generate(
        prior,
        ALL,
        MaskedSampling(steps=1),
        known=torch.full((ALL, 2, 2), 2),
        known_mask=known_mask.expand(ALL, -1, -1),
    )
    frequencies = torch.nn.functional.one_hot(codes.flatten(1), 3).double().mean(0)
    assert (codes[:, 0, 1] == 2).all()
    assert (frequencies - expected)[[0, 2, 3]].abs().max() < 0.02


@pytest.mark.parametrize("order", ["halton", "random"])
@torch.no_grad()
def test_two_decoding_steps_follow_the_enumerated_distribution(order):
    """The second step samples floor(cos(pi / 4) 4) = 2 of the four codes again, given the two revealed ones."""
    prior = prior_of()
    grids = torch.tensor(list(itertools.product(range(3), repeat=4)))
    first = log_probs(prior.head, prior.features(torch.full((1, 2, 2), MASK_TOKEN)))[0].exp().double()  # 4 3
    pairs = list(itertools.combinations(range(4), 2))
    if order == "halton":
        pairs = [tuple(halton_ranks(2, 2).argsort()[:2].tolist())]
    expected = torch.zeros(81, dtype=torch.float64)
    for pair in pairs:
        masked = torch.tensor([position not in pair for position in range(4)])
        second = (
            log_probs(prior.head, prior.features(grids.masked_fill(masked, MASK_TOKEN).view(81, 2, 2))).exp().double()
        )
        each = torch.stack([second[:, i].gather(1, grids[:, i : i + 1])[:, 0] for i in range(4)], 1)  # 81 4
        before = torch.stack([first[i, grids[:, i]] for i in range(4)], 1)
        expected += torch.where(masked, each, before).prod(1) / len(pairs)
    codes = generate(prior, 3 * ALL, MaskedSampling(steps=2, order=order)).flatten(1)
    frequencies = torch.bincount(codes @ torch.tensor([27, 9, 3, 1]), minlength=81) / (3 * ALL)
    assert float(expected.sum()) == pytest.approx(1)
    assert (frequencies - expected).abs().sum() < 0.06
    independent = torch.stack([first[i, grids[:, i]] for i in range(4)], 1).prod(1)
    assert (frequencies - independent).abs().sum() > 0.2  # otherwise a single step would pass


@settings(max_examples=15)
@given(
    st.sampled_from(["halton", "confidence", "random"]),
    st.integers(1, 9),
    st.integers(0, 99),
    st.sampled_from([1.0, 2.0]),
)
def test_revealed_codes_stay_in_any_order(order, steps, seed, guidance):
    prior = prior_of(3, 4, classes=2)
    generator = torch.Generator().manual_seed(seed)
    known = torch.randint(3, (3, 3, 4), generator=generator)
    mask = torch.rand(3, 3, 4, generator=generator) < 0.3
    calls = []
    sampling = MaskedSampling(steps=steps, order=order, guidance=guidance)
    inputs = {"known": known, "known_mask": mask, "condition": torch.tensor([0, 1, -1])}
    inputs["seeds"] = row_seeds(seed, torch.arange(3))
    codes = sample_masked(prior, sampling=sampling, callback=lambda step, codes: calls.append((step, codes)), **inputs)
    assert torch.equal(codes[mask], known[mask])
    assert [step for step, _ in calls] == list(range(steps))
    assert torch.equal(calls[-1][1], codes)
    assert 0 <= codes.min() <= codes.max() < 3
    alone = sample_masked(prior, sampling=sampling, **{name: value[1:2] for name, value in inputs.items()})
    assert torch.equal(alone, codes[1:2])
    unknown = (~mask).sum((1, 2))
    for (step, now), (_, later) in itertools.pairwise(calls):
        same = (now == later)[~mask].sum()
        revealed = sum(int(n) - math.floor(int(n) * math.cos(math.pi / 2 * (step + 1) / steps)) for n in unknown)
        assert same >= revealed


@torch.no_grad()
def test_most_confident_codes_are_revealed_first_without_noise():
    prior, steps = prior_of(4, 4), []
    known, mask = torch.randint(3, (1, 4, 4)), torch.zeros(1, 4, 4, dtype=torch.bool)
    mask[0, 0] = True  # if all codes were masked, all positions would be alike
    sampling = MaskedSampling(steps=2, order="confidence", choice_temperature=0.0)
    generate(prior, 1, sampling, known=known, known_mask=mask, callback=lambda _, codes: steps.append(codes.flatten()))
    log_p_table = log_probs(prior.head, prior.features(torch.where(mask, known, MASK_TOKEN)))[0]
    confidence = log_p_table.gather(1, steps[0][:, None])[4:, 0]
    most_confident = 4 + confidence.argsort(descending=True)[: 12 - math.floor(12 * math.cos(math.pi / 4))]
    assert torch.equal(steps[1][most_confident], steps[0][most_confident])
    assert not torch.equal(steps[1], steps[0])


@given(st.integers(1, 9), st.integers(1, 9))
def test_halton_ranks_are_a_permutation(h, w):
    assert sorted(halton_ranks(h, w).tolist()) == list(range(h * w))


def test_every_prefix_of_the_halton_order_is_evenly_spread():
    rank = halton_ranks(8, 8).view(8, 8)
    for count in (8, 16, 32):
        quarters = (rank < count).view(2, 4, 2, 4).sum((1, 3))
        assert (quarters - count / 4).abs().max() <= 2


def test_ranks_are_indices_in_the_sorted_row():
    keys = torch.tensor([[0.3, 0.1, 0.3, 0.2]])
    assert ranks(keys).tolist() == [[2, 0, 3, 1]]


def test_trained_prior_samples_like_its_training_data():
    """Training grids have a single code each: after training so have samples, and fills agree with known codes."""
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
    samples = generate(prior, 60, MaskedSampling(steps=6)).flatten(1)
    assert ((samples == samples[:, :1]).all(1)).float().mean() > 0.9
    assert len(samples[:, 0].unique()) == 3
    known = torch.full((30, 2, 3), 2)
    mask = torch.zeros_like(known, dtype=torch.bool)
    mask[:, 1, 2] = True
    filled = generate(prior, 30, MaskedSampling(steps=4), known=known, known_mask=mask)
    assert (filled == 2).float().mean() > 0.95


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "--steps must be at least 1, not 0"),
        ({"temperature": (1.0, 0.0)}, "temperature must be at least"),
        ({"guidance": -1.0}, "guidance must not be negative"),
        ({"choice_temperature": -0.5}, "choice_temperature must not be negative, got -0.5"),
    ],
)
def test_settings_out_of_range_are_refused(changes, message):
    with pytest.raises(UserError, match=message):
        replace(MaskedSampling(), **changes)


def test_label_dropout_out_of_range_is_refused():
    with pytest.raises(UserError, match=r"label_dropout must be from 0 to 1, got 1\.5"):
        MaskedConfig(label_dropout=1.5)
