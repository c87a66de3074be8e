"""The PixelCNN is causal without blind spots, its probabilities sum to one, and stepwise decoding equals `features`."""

import itertools

import pytest
import torch
from helpers.pixelcnn import OPTIONS, of_every_option, prior_of, told_of
from hypothesis import given, settings
from hypothesis import strategies as st

from smalti.core.errors import UserError
from smalti.core.randomness import row_seeds
from smalti.priors.networks.pixelcnn import PixelCNN


def receptive_field(prior: PixelCNN, position: int, **conditioning) -> torch.Tensor:
    """Returns `(h, w)`: whether the features of a position have a gradient with respect to each embedded code."""
    h, w = prior.level.height, prior.level.width
    embedded = torch.randn(1, h * w, prior.config.model_width, requires_grad=True)
    prior.head.embed = lambda _: embedded
    prior.features(torch.zeros(1, h, w, dtype=torch.int64), **conditioning)[0, position].square().sum().backward()
    assert embedded.grad is not None
    return (embedded.grad[0] != 0).any(-1).view(h, w)


@of_every_option
def test_features_depend_on_earlier_positions_only(options):
    prior = prior_of(**options)
    conditioning = told_of(prior, 1, 4, 8)
    for position in range(32):
        seen = receptive_field(prior, position, **conditioning).flatten()
        assert not seen[position:].any()
        assert not position or seen.any()


@of_every_option
def test_there_is_no_blind_spot(options):
    """The receptive field has all rows above, on both sides, and the row on the left, as far as the layers reach."""
    prior = prior_of(height=8, width=8, **options)
    side, layers = prior.config.kernel // 2, prior.config.layers
    seen = receptive_field(prior, 6 * 8 + 3, **told_of(prior, 1, 8, 8))
    rows, columns = torch.arange(8)[:, None], torch.arange(8)
    before = (rows < 6) | ((rows == 6) & (columns < 3))
    # the codes are shifted by one before the first layer
    near = ((rows == 6) & (columns >= 2 - side * layers)) | (
        (rows < 6) & (rows >= 5 - side * layers) & ((columns - 3).abs() <= 2 * side * layers)
    )
    near[5, 7] |= 3 - side * layers <= 0  # the code before the row's first
    unlimited = prior.config.attention_every > 0
    assert torch.equal(seen, before if unlimited else before & near)


def test_receptive_field_of_a_single_layer():
    """With one layer of kernel 3 it is these eight codes; so the test above can fail."""
    seen = receptive_field(prior_of(height=5, width=7, layers=1), 3 * 7 + 3)
    assert seen.nonzero().tolist() == [[1, 2], [1, 3], [1, 4], [2, 2], [2, 3], [2, 4], [3, 1], [3, 2]]


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
    conditioning, codes = told_of(prior, 3, 4, 8), torch.randint(6, (3, 4, 8))
    features = prior.features(codes, **conditioning)
    if prior.classes:
        other = (conditioning["labels"] + 2) % (prior.classes + 1) - 1
        assert ((prior.features(codes, other, conditioning["upper"]) - features).abs().amax(-1) > 1e-4).all()
    for level, (radices, factor) in enumerate(zip(prior.config.upper_radices, prior.config.upper_factors, strict=True)):
        upper = list(conditioning["upper"])
        upper[level] = (upper[level] + 1) % int(torch.tensor(radices).prod())
        changed = (prior.features(codes, conditioning["labels"], tuple(upper)) - features).abs().amax(-1) > 1e-4
        assert changed.all()
        upper[level][:, 1:] = conditioning["upper"][level][:, 1:]  # now only the first row differs
        first = (prior.features(codes, conditioning["labels"], tuple(upper)) - features).abs().amax(-1).view(3, 4, 8)
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
    conditioning, codes = told_of(prior, b, h, w), torch.randint(6, (b, h, w))
    flat = codes.flatten(1)
    steps = prior.decode_stepwise(b, h, w, **conditioning)
    stepwise = [next(steps)] + [steps.send(flat[:, i : i + 1]) for i in range(h * w - 1)]
    assert torch.allclose(torch.cat(stepwise, 1), prior.features(codes, **conditioning), atol=1e-5)


def test_loss_is_the_negative_log_likelihood():
    """In nats and in bits; labels are dropped in training only."""
    prior = prior_of(classes=3)
    objective = prior.method.objective(prior, prior.method.objective_config(label_dropout=1.0))
    codes, labels = torch.randint(6, (5, 4, 8)), torch.tensor([0, 1, 2, -1, 0])
    batch = {"codes": codes, "labels": labels, "seeds": row_seeds(0, torch.arange(5))}
    for mode, used in ((True, None), (False, labels)):
        log_probs = prior.head.log_probs(prior.features(codes, used))
        expected = -log_probs.gather(-1, codes.flatten(1)[..., None]).mean()
        loss, metrics = objective.train(mode)(batch)
        assert torch.allclose(loss, expected, atol=1e-5)
        assert torch.allclose(metrics["bits_per_code"], expected / torch.tensor(2.0).log(), atol=1e-5)
        assert torch.allclose(metrics["nll_1"] + metrics["nll_2"], expected, atol=1e-5)
        digits = prior.level.split(
            codes
        )  # first the likeliest digit, then the likeliest second one given the true first
        by_first = log_probs.exp().unflatten(-1, (3, 2)).sum(-1)
        below = log_probs.unflatten(-1, (3, 2))
        first, second = digits.flatten(1, 2).unbind(-1)
        taken = below.gather(-2, first[..., None, None].expand(-1, -1, -1, 2))[..., 0, :]
        hit = (by_first.argmax(-1) == first) & (taken.argmax(-1) == second)
        assert torch.allclose(metrics["accuracy"], hit.float().mean())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kernel": 4}, "kernel must be odd and at least 3, got 4"),
        ({"kernel": 1}, "kernel must be odd"),
        ({"layers": 0}, "layers must be at least 1"),
        ({"model_width": 0}, "model_width"),
        ({"classes": -1}, "classes must not be negative"),
        ({"attention_every": 5}, r"from 0 to layers \(4\), got 5"),
        ({"attention_every": 1, "heads": 3}, "multiple of 4 x heads"),
        ({"upper_radices": ((2,),)}, "each coarser level needs radices and a factor"),
        ({"upper_radices": ((2,),), "upper_factors": (0,)}, "factor of at least 1"),
    ],
)
def test_configs_that_make_no_network_are_refused(changes, message):
    with pytest.raises(UserError, match=message):
        prior_of(**changes)


def test_coarser_levels_that_do_not_fit_are_refused():
    prior, codes = prior_of(**OPTIONS["upper level"]), torch.zeros(1, 4, 8, dtype=torch.int64)
    with pytest.raises(UserError, match=r"conditioned on 1 coarser level\(s\), but 0 were given"):
        prior.features(codes)
    with pytest.raises(UserError, match="the coarser levels fit a grid of 4x4 codes, not 4x8"):
        prior.features(codes, upper=(torch.zeros(1, 2, 2, dtype=torch.int64),))
