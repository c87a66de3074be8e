"""Networks of causal priors are causal, their probabilities sum to one, and stepwise decoding equals `features`."""

import itertools

import pytest
import torch
from helpers.causal import OPTIONS, of_every_option, prior_of, random_conditioning, receptive_field
from helpers.toys import log_probs
from hypothesis import given, settings
from hypothesis import strategies as st

from smalti.core.errors import UserError
from smalti.core.randomness import row_seeds
from smalti.priors.row_caches import RowCaches


@of_every_option
def test_features_depend_on_earlier_positions_only(options):
    prior = prior_of(**options)
    conditioning = random_conditioning(prior, 1, 4, 8)
    for position in range(32):
        seen = receptive_field(prior, position, **conditioning).flatten()
        assert not seen[position:].any()
        assert not position or seen.any()


@of_every_option
@torch.no_grad()
def test_probabilities_of_all_grids_sum_to_one(options):
    prior = prior_of(2, 2, **{**options, "radices": (2, 2), "upper_radices": (), "upper_factors": ()})
    grids = torch.tensor(list(itertools.product(range(4), repeat=4))).view(-1, 2, 2)
    labels = torch.full((256,), 1) if prior.classes else None
    log_p = -prior.head.nll(prior.features(grids, labels), grids.flatten(1)).sum(-1)
    assert abs(float(log_p.double().exp().sum()) - 1) < 1e-5
    assert log_p.exp().max() > 4 / 256  # not the uniform distribution, which sums to one trivially


@of_every_option
@torch.no_grad()
def test_classes_and_coarser_codes_affect_every_position(options):
    prior = prior_of(**options)
    conditioning, codes = random_conditioning(prior, 3, 4, 8), torch.randint(6, (3, 4, 8))
    features = prior.features(codes, **conditioning)
    if prior.classes:
        other = (conditioning["condition"] + 2) % (prior.classes + 1) - 1
        assert ((prior.features(codes, other, conditioning["upper"]) - features).abs().amax(-1) > 1e-4).all()
    if prior.condition_width:  # the first row has no vector
        other = conditioning["condition"].nan_to_num() + 1
        assert ((prior.features(codes, other, conditioning["upper"]) - features).abs().amax(-1) > 1e-4).all()
    for level, (radices, factor) in enumerate(zip(prior.config.upper_radices, prior.config.upper_factors, strict=True)):
        upper = list(conditioning["upper"])
        upper[level] = (upper[level] + 1) % int(torch.tensor(radices).prod())
        changed = (prior.features(codes, conditioning["condition"], tuple(upper)) - features).abs().amax(-1) > 1e-4
        assert changed.all()
        upper[level][:, 1:] = conditioning["upper"][level][:, 1:]  # now only the first row differs
        first = (prior.features(codes, conditioning["condition"], tuple(upper)) - features).abs().amax(-1).view(3, 4, 8)
        assert (first[:, :factor] > 1e-4).all()


@settings(max_examples=12)
@given(
    options=st.sampled_from(list(OPTIONS.values())),
    b=st.integers(1, 3),
    h=st.integers(1, 2).map(lambda x: 4 * x),
    w=st.integers(1, 2).map(lambda x: 4 * x),
)
@torch.no_grad()
def test_stepwise_decoding_equals_features_of_the_whole_grid(options, b, h, w):
    prior = prior_of(**options)
    conditioning, codes = random_conditioning(prior, b, h, w), torch.randint(6, (b, h, w))
    flat = codes.flatten(1)
    steps = prior.decode_stepwise(b, h, w, **conditioning)
    stepwise = [next(steps)] + [steps.send(flat[:, i : i + 1]) for i in range(h * w - 1)]
    assert torch.allclose(torch.cat(stepwise, 1), prior.features(codes, **conditioning), atol=1e-5)


@of_every_option
@pytest.mark.parametrize("side", [8, 12], ids=["trained size", "larger canvas"])
@torch.no_grad()
def test_rows_can_be_exchanged_between_positions(options, side):
    """The features of the next position are then those of the exchanged grids."""
    prior, caches, positions = prior_of(8, 8, **options), RowCaches(), side * side
    conditioning = random_conditioning(prior, 1, side, side)
    condition, upper = conditioning["condition"], tuple(each.repeat(3, 1, 1) for each in conditioning["upper"])
    condition = None if condition is None else condition.repeat_interleave(3, 0)
    generator = torch.Generator().manual_seed(0)
    steps, codes = prior.decode_stepwise(3, side, side, condition, upper, caches), torch.zeros(3, positions).long()
    next(steps)
    for position in range(positions - 1):
        codes[:, position] = torch.randint(6, (3,), generator=generator)
        exchanged = position % 7 == 5
        if exchanged:
            rows = torch.randint(3, (3,), generator=generator)
            codes = codes[rows]
            caches.take(rows)
        features = steps.send(codes[:, position : position + 1])
        if exchanged or position == positions - 2:
            whole = prior.features(codes.view(3, side, side), condition, upper)
            torch.testing.assert_close(features[:, 0], whole[:, position + 1], atol=1e-4, rtol=1e-4)


def test_loss_is_the_negative_log_likelihood():
    """In nats and in bits; labels are dropped in training only."""
    prior = prior_of(classes=3)
    objective = prior.method.objective(prior, prior.method.objective_config(label_dropout=1.0))
    codes, labels = torch.randint(6, (5, 4, 8)), torch.tensor([0, 1, 2, -1, 0])
    batch = {"codes": codes, "labels": labels, "seeds": row_seeds(0, torch.arange(5))}
    for mode, used in ((True, None), (False, labels)):
        log_p_table = log_probs(prior.head, prior.features(codes, used))
        expected = -log_p_table.gather(-1, codes.flatten(1)[..., None]).mean()
        loss, metrics = objective.train(mode)(batch)
        assert torch.allclose(loss, expected, atol=1e-5)
        assert torch.allclose(metrics["bits_per_code"], expected / torch.tensor(2.0).log(), atol=1e-5)
        assert torch.allclose(metrics["nll_1"] + metrics["nll_2"], expected, atol=1e-5)
        digits = prior.level.split(
            codes
        )  # first the likeliest digit, then the likeliest second one given the true first
        by_first = log_p_table.exp().unflatten(-1, (3, 2)).sum(-1)
        below = log_p_table.unflatten(-1, (3, 2))
        first, second = digits.flatten(1, 2).unbind(-1)
        taken = below.gather(-2, first[..., None, None].expand(-1, -1, -1, 2))[..., 0, :]
        hit = (by_first.argmax(-1) == first) & (taken.argmax(-1) == second)
        assert torch.allclose(metrics["accuracy"], hit.float().mean())


def test_coarser_levels_that_do_not_fit_are_refused():
    prior, codes = prior_of(**OPTIONS["upper level"]), torch.zeros(1, 4, 8, dtype=torch.int64)
    with pytest.raises(UserError, match=r"conditioned on 1 coarser level\(s\), but 0 were given"):
        prior.features(codes)
    with pytest.raises(UserError, match="the coarser levels fit a grid of 4x4 codes, not 4x8"):
        prior.features(codes, upper=(torch.zeros(1, 2, 2, dtype=torch.int64),))
