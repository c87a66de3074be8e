"""The PixelCNN sees what it may and all of it, its probabilities sum to one, a walk gives what the grid gives."""

import itertools

import pytest
import torch
from helpers.pixelcnn import OPTIONS, of_every_option, prior_of, told_of
from hypothesis import given, settings
from hypothesis import strategies as st

from smalti.core.errors import UserError
from smalti.core.randomness import row_seeds
from smalti.priors.networks.pixelcnn import PixelCNN


def seen(prior: PixelCNN, position: int, **told) -> torch.Tensor:
    """Whether the features of a position have a gradient towards the embedded code of each `(h, w)`."""
    h, w = prior.level.height, prior.level.width
    embedded = torch.randn(1, h * w, prior.config.model_width, requires_grad=True)
    prior.head.embed = lambda _: embedded
    prior.features(torch.zeros(1, h, w, dtype=torch.int64), **told)[0, position].square().sum().backward()
    assert embedded.grad is not None
    return (embedded.grad[0] != 0).any(-1).view(h, w)


@of_every_option
def test_a_position_sees_those_before_it_only(options):
    prior = prior_of(**options)
    told = told_of(prior, 1, 4, 8)
    for position in range(32):
        found = seen(prior, position, **told).flatten()
        assert not found[position:].any()
        assert not position or found.any()


@of_every_option
def test_there_is_no_blind_spot(options):
    """All within reach is seen: as far as the layers carry, rows above on both sides, the row itself on the left."""
    prior = prior_of(height=8, width=8, **options)
    side, layers = prior.config.kernel // 2, prior.config.layers
    found = seen(prior, 6 * 8 + 3, **told_of(prior, 1, 8, 8))
    rows, columns = torch.arange(8)[:, None], torch.arange(8)
    before = (rows < 6) | ((rows == 6) & (columns < 3))
    # the codes were moved on by one before the first layer
    near = ((rows == 6) & (columns >= 2 - side * layers)) | (
        (rows < 6) & (rows >= 5 - side * layers) & ((columns - 3).abs() <= 2 * side * layers)
    )
    near[5, 7] |= 3 - side * layers <= 0  # the code before the row's first
    everything = prior.config.attention_every > 0
    assert torch.equal(found, before if everything else before & near)


def test_a_narrow_reach_ends_where_it_should():
    """That the test above can fail: with one layer of kernel 3 a position sees four codes and no more."""
    found = seen(prior_of(height=5, width=7, layers=1), 3 * 7 + 3)
    assert found.nonzero().tolist() == [[1, 2], [1, 3], [1, 4], [2, 2], [2, 3], [2, 4], [3, 1], [3, 2]]


@of_every_option
@torch.no_grad()
def test_the_probabilities_of_all_grids_sum_to_one(options):
    prior = prior_of(2, 2, **{**options, "radices": (2, 2), "upper_radices": (), "upper_factors": ()})
    grids = torch.tensor(list(itertools.product(range(4), repeat=4))).view(-1, 2, 2)
    labels = torch.full((256,), 1) if prior.classes else None
    log_p = -prior.head.nll(prior.features(grids, labels), grids.flatten(1)).sum(-1)
    assert abs(float(log_p.double().exp().sum()) - 1) < 1e-5
    assert log_p.exp().max() > 4 / 256  # not the uniform distribution, which would sum to one unseen


@of_every_option
@torch.no_grad()
def test_classes_and_upper_codes_matter_at_every_position(options):
    prior = prior_of(**options)
    told, codes = told_of(prior, 3, 4, 8), torch.randint(6, (3, 4, 8))
    features = prior.features(codes, **told)
    if prior.classes:
        other = (told["labels"] + 2) % (prior.classes + 1) - 1
        assert ((prior.features(codes, other, told["upper"]) - features).abs().amax(-1) > 1e-4).all()
    for level, (radices, factor) in enumerate(zip(prior.config.upper_radices, prior.config.upper_factors, strict=True)):
        upper = list(told["upper"])
        upper[level] = (upper[level] + 1) % int(torch.tensor(radices).prod())
        changed = (prior.features(codes, told["labels"], tuple(upper)) - features).abs().amax(-1) > 1e-4
        assert changed.all()
        upper[level][:, 1:] = told["upper"][level][:, 1:]  # only the first row now differs: its first patch sees that
        first = (prior.features(codes, told["labels"], tuple(upper)) - features).abs().amax(-1).view(3, 4, 8)
        assert (first[:, :factor] > 1e-4).all()


@settings(max_examples=12)
@given(
    options=st.sampled_from(list(OPTIONS.values())),
    b=st.integers(1, 3),
    h=st.integers(1, 2).map(lambda x: 4 * x),
    w=st.integers(1, 2).map(lambda x: 4 * x),
)
@torch.no_grad()
def test_a_walk_gives_what_the_whole_grid_gives(options, b, h, w):
    prior = prior_of(**options)
    told, codes = told_of(prior, b, h, w), torch.randint(6, (b, h, w))
    flat = codes.flatten(1)
    decode_stepwise = prior.decode_stepwise(b, h, w, **told)
    walked = [next(decode_stepwise)] + [decode_stepwise.send(flat[:, i : i + 1]) for i in range(h * w - 1)]
    assert torch.allclose(torch.cat(walked, 1), prior.features(codes, **told), atol=1e-5)


def test_it_is_trained_by_its_likelihood():
    """The loss is that of the codes, in nats and bits; classes are dropped in training only."""
    prior = prior_of(classes=3)
    objective = prior.method.objective(prior, prior.method.objective_config(label_dropout=1.0))
    codes, labels = torch.randint(6, (5, 4, 8)), torch.tensor([0, 1, 2, -1, 0])
    batch = {"codes": codes, "labels": labels, "seeds": row_seeds(0, torch.arange(5))}
    for mode, told in ((True, None), (False, labels)):
        log_probs = prior.head.log_probs(prior.features(codes, told))
        expected = -log_probs.gather(-1, codes.flatten(1)[..., None]).mean()
        loss, metrics = objective.train(mode)(batch)
        assert torch.allclose(loss, expected, atol=1e-5)
        assert torch.allclose(metrics["bits_per_code"], expected / torch.tensor(2.0).log(), atol=1e-5)
        assert torch.allclose(metrics["nll_1"] + metrics["nll_2"], expected, atol=1e-5)
        digits = prior.level.split(codes)  # the likeliest first digit, then the likeliest second below the true first
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
        ({"upper_radices": ((2,),)}, "needs radices and a factor"),
        ({"upper_radices": ((2,),), "upper_factors": (0,)}, "factor of at least 1"),
    ],
)
def test_configs_that_make_no_network_are_refused(changes, message):
    with pytest.raises(UserError, match=message):
        prior_of(**changes)


def test_upper_levels_that_do_not_fit_are_refused():
    prior, codes = prior_of(**OPTIONS["upper level"]), torch.zeros(1, 4, 8, dtype=torch.int64)
    with pytest.raises(UserError, match=r"draws below 1 level\(s\), but 0 were given"):
        prior.features(codes)
    with pytest.raises(UserError, match="belong to a grid of 4x4 codes, not 4x8"):
        prior.features(codes, upper=(torch.zeros(1, 2, 2, dtype=torch.int64),))
