"""The factorized head against its definition in loops, and its samples against its probabilities."""

import itertools
import math
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from helpers.toys import log_probs
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from smalti.core.codes import Level
from smalti.core.errors import UserError
from smalti.core.randomness import row_seeds, uniform
from smalti.priors.head import DENSE_NODES, FactorizedHead, inverse_cdf, node_products, nucleus

WIDTH = 6
TREES = [(5,), (2, 3), (3, 2, 4), (DENSE_NODES + 2, 2), (2, DENSE_NODES, 3)]  # the last two are not all dense


def head_of(radices: tuple[int, ...], seed: int = 0) -> FactorizedHead:
    """Returns a head whose probabilities are far from uniform."""
    torch.manual_seed(seed)
    head = FactorizedHead(radices, WIDTH)
    with torch.no_grad():
        head.weight.normal_(std=0.7)
        head.bias.normal_(std=0.5)
    return head


def features_and_codes(head: FactorizedHead, b: int = 2, n: int = 7) -> tuple[Tensor, Tensor]:
    features = torch.randn(b, n, WIDTH, requires_grad=True)
    return features, torch.randint(head.codebook_size, (b, n))


def rows_of(radices: tuple[int, ...], code: int) -> list[int]:
    """Returns the table rows on a code's path, one for each digit, by numbering the tree node by node."""
    numbered = {}
    for depth in range(1, len(radices) + 1):
        for prefix in itertools.product(*map(range, radices[:depth])):
            numbered[prefix] = len(numbered)
    leaf = next(itertools.islice(itertools.product(*map(range, radices)), code, None))
    return [numbered[leaf[:depth]] for depth in range(1, len(radices) + 1)]


def log_prob_by_definition(head: FactorizedHead, feature: Tensor, code: int) -> Tensor:
    """Sums the log softmax among siblings over the path; `digit` siblings precede a row."""
    total = torch.zeros(())
    for depth, row in enumerate(rows_of(head.radices, code)):
        radix = head.radices[depth]
        digit = code // math.prod(head.radices[depth + 1 :]) % radix
        siblings = torch.stack(
            [head.weight[row - digit + i] @ feature + head.bias[row - digit + i] for i in range(radix)]
        )
        total = total + siblings.log_softmax(0)[digit]
    return total


@given(n=st.integers(0, 40), p=st.integers(1, 9), r=st.integers(1, 3), some=st.integers(1, 9), seed=st.integers(0, 99))
def test_node_products_equal_a_loop_over_positions(n, p, r, some, seed):
    generator = torch.Generator().manual_seed(seed)
    features, weights, cotangent = (
        torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((n, 4), (p, r, 4), (n, r))
    )
    nodes = torch.randint(min(some, p), (n,), generator=generator)  # nodes from `some` on are reached by no position
    inputs = features.requires_grad_(), weights.requires_grad_()
    products = node_products(*inputs, nodes)
    expected = torch.stack([weights[nodes[i]] @ features[i] for i in range(n)]) if n else products.new_zeros(0, r)
    torch.testing.assert_close(products, expected)
    if n:
        gradients = torch.autograd.grad(products, inputs, cotangent)
        torch.testing.assert_close(gradients, torch.autograd.grad(expected, inputs, cotangent))


@pytest.mark.parametrize("radices", TREES)
def test_probabilities_of_all_codes_sum_to_one(radices):
    head = head_of(radices)
    features, _ = features_and_codes(head)
    assert torch.allclose(log_probs(head, features).exp().sum(-1), torch.ones(2, 7), atol=1e-5)


@pytest.mark.parametrize("radices", TREES)
def test_nll_is_that_of_the_definition(radices):
    head = head_of(radices)
    features, codes = features_and_codes(head)
    nll = head.nll(features, codes)
    by_leaf = -log_probs(head, features).gather(-1, codes[..., None])[..., 0]
    assert torch.allclose(nll, by_leaf, atol=1e-5)
    for row, position in itertools.product(range(2), range(2)):
        expected = -log_prob_by_definition(head, features[row, position], int(codes[row, position]))
        assert torch.allclose(nll[row, position], expected, atol=1e-5)
    assert torch.allclose(head.score(features, codes)[0].sum(-1), nll)


@pytest.mark.parametrize("radices", TREES)
def test_gradients_are_those_of_the_enumerated_probabilities(radices):
    head = head_of(radices)
    features, codes = features_and_codes(head)
    inputs = [features, head.weight, head.bias]
    gradients = torch.autograd.grad(head.nll(features, codes).sum(), inputs)
    expected = torch.autograd.grad(-log_probs(head, features).gather(-1, codes[..., None]).sum(), inputs)
    for ours, theirs in zip(gradients, expected, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-4)


@pytest.mark.parametrize("radices", TREES)
def test_embedding_of_a_code_is_the_sum_over_its_path(radices):
    head = head_of(radices)
    codes = torch.randint(head.codebook_size, (2, 2, 3))
    embedded = head.embed(codes)
    assert embedded.shape == (2, 6, WIDTH)
    for row, position in itertools.product(range(2), range(6)):
        path = rows_of(radices, int(codes[row].flatten()[position]))
        assert torch.allclose(embedded[row, position], head.embedding[path].sum(0), atol=1e-6)


def test_one_radix_is_an_ordinary_embedding_and_softmax():
    head = head_of((11,))
    features, codes = features_and_codes(head)
    logits = F.linear(features, head.weight, head.bias)
    assert torch.allclose(head.nll(features, codes), F.cross_entropy(logits.mT, codes, reduction="none"), atol=1e-6)
    assert torch.equal(head.embed(codes), F.embedding(codes, head.embedding))


@pytest.mark.parametrize("radices", [(5,), (3, 2, 4), (DENSE_NODES + 2, 2)])
@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_samples_follow_the_probabilities(radices, temperature):
    """On a regular lattice of uniforms each code has its share of the points, up to the lattice's spacing."""
    head = head_of(radices)
    feature = torch.randn(1, 1, WIDTH)
    spacing = [40_000] if len(radices) == 1 else [900, 40] if len(radices) == 2 else [60, 40, 60]
    axes = [(torch.arange(n) + 0.5) / n for n in spacing]
    lattice = torch.stack([axis.flatten() for axis in torch.meshgrid(*axes, indexing="ij")], -1)[None]
    samples = head.sample(feature.expand(1, lattice.shape[1], -1), lattice, temperature)
    with torch.no_grad():  # a head with scaled logits is the head at that temperature
        head.weight /= temperature
        head.bias /= temperature
    shares = torch.bincount(samples[0], minlength=head.codebook_size) / lattice.shape[1]
    expected = log_probs(head, feature)[0, 0].exp()
    assert (shares - expected).abs().sum() / 2 < sum(r / n for r, n in zip(radices, spacing, strict=True)) / 2
    assert (shares - expected.roll(1)).abs().sum() / 2 > 0.2  # the bound distinguishes distributions


@given(
    weights=st.lists(st.one_of(st.just(0.0), st.floats(1e-9, 1.0)), min_size=2, max_size=9).filter(
        lambda w: max(w) > 0.01
    ),
    grains=st.lists(st.integers(0, 2**24 - 1), max_size=20),
)
def test_inverse_cdf_never_returns_an_impossible_index(weights, grains):
    probabilities = torch.tensor(weights) / sum(weights)
    uniforms = torch.tensor([0, 2**24 - 1, *grains], dtype=torch.float64).mul(2.0**-24).float()
    samples = inverse_cdf(probabilities.expand(len(uniforms), -1), uniforms)
    assert (probabilities[samples] > 0).all()
    exact = probabilities.double().cumsum(0)
    below = torch.where(samples > 0, exact[(samples - 1).clamp(min=0)], 0.0)
    assert (below - 1e-6 <= uniforms).all()
    assert (uniforms <= exact[samples] + 1e-6).all()


def test_hits_are_those_of_greedy_decoding():
    head = head_of((3, 2, 4))
    features, _ = features_and_codes(head, n=50)
    every = log_probs(head, features).exp().view(2, 50, 3, 2, 4)
    first = every.sum((-1, -2)).argmax(-1)
    second = every.sum(-1).gather(2, first[..., None, None].expand(-1, -1, 1, 2))[:, :, 0].argmax(-1)
    third = (
        every.flatten(2, 3).gather(2, (first * 2 + second)[..., None, None].expand(-1, -1, 1, 4))[:, :, 0].argmax(-1)
    )
    greedy = first * 8 + second * 4 + third
    other = (greedy + torch.arange(50) % 2) % 24
    assert torch.equal(head.score(features, other)[1], other == greedy)


@pytest.mark.parametrize("radices", [(3, 2, 4), (DENSE_NODES + 2, 2)])
def test_losses_and_samples_are_float32_under_autocast(radices):
    head = head_of(radices)
    features, codes = features_and_codes(head, n=40)
    uniforms = uniform(row_seeds(0, torch.arange(2)), 40, len(radices))
    with torch.autocast("cpu", torch.bfloat16):
        nll, samples = head.nll(features, codes), head.sample(features, uniforms)
    assert nll.dtype == torch.float32
    assert torch.allclose(nll, head.nll(features, codes), atol=0.1)
    assert (samples == head.sample(features, uniforms)).float().mean() > 0.9


def test_untrained_head_predicts_nearly_uniformly():
    head = FactorizedHead((8, 8, 8), 64)
    features, codes = torch.randn(4, 100, 64), torch.randint(512, (4, 100))
    assert abs(head.nll(features, codes).mean() - math.log(512)) < 0.1


def test_random_codes_are_uniform_and_depend_on_each_rows_seed():
    head = head_of((3, 2))
    seeds = row_seeds(5, torch.arange(2000))
    codes = head.random_codes(seeds, 3, 4)
    counts = torch.bincount(codes.flatten(), minlength=6)
    assert len(counts) == 6
    assert ((counts - 4000).abs() < 5 * 4000**0.5).all()
    assert torch.equal(codes[7:9], head.random_codes(seeds[7:9], 3, 4))


def test_radices_that_make_no_codebook_are_refused():
    with pytest.raises(UserError, match="at least 2"):
        FactorizedHead((8, 1), WIDTH)


@given(
    st.lists(st.integers(1, 50), min_size=2, max_size=9).map(lambda counts: torch.tensor(counts) / sum(counts)),
    st.floats(0.01, 0.999),
)
def test_nucleus_is_the_smallest_likeliest_set(probabilities, top_p):
    kept = nucleus(probabilities, top_p)
    count = int((kept > 0).sum())
    ordered = probabilities.sort(descending=True).values
    assert kept.sort(descending=True).values[:count].equal(ordered[:count])
    assert kept[kept > 0].equal(probabilities[kept > 0])
    assert ordered[: count - 1].sum() < top_p + 1e-6
    assert ordered[:count].sum() >= top_p - 1e-6


@pytest.mark.parametrize("top_p", [1e-3, 1e-46])  # the second is 0 in float32
def test_nucleus_has_the_likeliest_value_however_small_the_share(top_p):
    kept = nucleus(torch.tensor([[0.2, 0.5, 0.3], [0.1, 0.1, 0.8]]), top_p)
    assert kept.equal(torch.tensor([[0.0, 0.5, 0.0], [0.0, 0.0, 0.8]]))


@pytest.mark.parametrize("radices", [(3, 2, 4), (32,) * 5, (1024,) * 3])
def test_random_codes_take_every_value_of_every_digit(radices):
    """Also of codes with more bits than a float32 draw has. Nothing is computed with the head's tables."""
    seeds, level = row_seeds(0, torch.arange(16)), Level(64, 64, radices)
    drawn = FactorizedHead.random_codes(cast(Any, SimpleNamespace(codebook_size=level.codebook_size)), seeds, 64, 64)
    assert 0 <= drawn.min() <= drawn.max() < level.codebook_size
    for digit, radix in enumerate(radices):
        counts = level.digit(drawn, digit).flatten().bincount(minlength=radix).double()
        expected = drawn.numel() / radix
        assert ((counts - expected) ** 2 / expected).sum() < radix - 1 + 6 * math.sqrt(2 * (radix - 1))
