"""Linked codebooks: losses of HR-VQVAE's Eqs. 2-6 and their gradients against hand computation, codes and codewords.

Also tests the public names of `smalti`. The search is tested in test_search.py, the initialization in test_kmeans.py.
"""

import itertools
import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import smalti
from smalti import Level, LinkedQuantizer, UserError

WIDTH, BETA = 3, 0.25
SEEDS = st.integers(0, 2**16)


TREES = st.lists(st.integers(2, 4), min_size=1, max_size=4)
"""Branchings, layer by layer."""


def quantizer_of(*branching: int, width: int = WIDTH, seed: int = 0, **more) -> LinkedQuantizer:
    torch.manual_seed(seed)
    settings = {"commitment_weight": BETA, "learning": "gradient", "revive_below": 0.0, **more}
    return LinkedQuantizer(code_width=width, branching=branching, **settings)


def features(*grid: int, width: int = WIDTH, seed: int = 1) -> Tensor:
    """Returns random z_e, (b, d, h, w)."""
    b, h, w = grid
    return torch.randn(b, width, h, w, generator=torch.Generator().manual_seed(seed), requires_grad=True)


def by_hand(quantizer: LinkedQuantizer, z_e: Tensor, betas: list[float], combined_beta: float) -> dict[str, np.ndarray]:
    """Computes e_C, digits, losses and the gradients of their sum vector by vector, layer by layer, in float64.

    With N = vectors x channels, the mean of squares over them has the derivative 2 (a - b) / N. The betas are those of
    Eq. 6, beta_1 to beta_n, and the combined one is Eq. 5's beta_0.
    """
    vectors = z_e.detach().double().numpy().transpose(0, 2, 3, 1).reshape(-1, z_e.shape[1])
    books = [codebook.detach().double().numpy() for codebook in quantizer.codebooks]
    found = {"codebook": 0.0, "commitment": 0.0, "z_e": np.zeros_like(vectors), "e_C": np.zeros_like(vectors)}
    digits, gradients = [], [np.zeros_like(book) for book in books]
    for i, xi_0 in enumerate(vectors):
        xi, node, path = xi_0, 0, []
        for book, beta in zip(books, betas, strict=True):
            k = int(((xi - book[node]) ** 2).sum(1).argmin())  # Eq. 3
            path.append((node, k))
            found["codebook"] += ((xi - book[node, k]) ** 2).sum() / vectors.size  # Eq. 6
            found["commitment"] += beta * ((book[node, k] - xi) ** 2).sum() / vectors.size
            found["z_e"][i] += beta * 2 * (xi - book[node, k]) / vectors.size  # the residual moves as z_e does
            gradients[len(path) - 1][node, k] += 2 * (book[node, k] - xi) / vectors.size
            found["e_C"][i] += book[node, k]  # Eq. 4
            xi, node = xi - book[node, k], node * len(book[node]) + k
        digits.append([k for _, k in path])
        if len(books) == 1:  # Eq. 2 has no terms of Eq. 5
            continue
        error = found["e_C"][i] - xi_0
        found["codebook"] += (error**2).sum() / vectors.size  # Eq. 5
        found["commitment"] += combined_beta * (error**2).sum() / vectors.size
        found["z_e"][i] -= combined_beta * 2 * error / vectors.size
        for gradient, (at, k) in zip(gradients, path, strict=True):
            gradient[at, k] += 2 * error / vectors.size
    return found | {"digits": np.array(digits), **{f"codebook {i}": g for i, g in enumerate(gradients)}}


def as_rows(grid: Tensor) -> np.ndarray:
    return grid.detach().double().numpy().transpose(0, 2, 3, 1).reshape(-1, grid.shape[1])


@given(tree=TREES, weights=st.lists(st.sampled_from([0.0, 0.1, 0.25, 2.0]), min_size=5, max_size=5), seed=SEEDS)
def test_codes_losses_and_gradients_equal_the_equations(tree, weights, seed):
    """The betas weight only commitment terms, each its own layer's or, beta_0, the sum's. These reach z_e from every
    layer; codebook terms reach only codebooks."""
    combined, betas = weights[0], weights[1 : 1 + len(tree)]
    settings = {"commitment_weight": tuple(betas), "combined_commitment_weight": combined}
    quantizer, z_e = quantizer_of(*tree, seed=seed, **settings), features(2, 2, 3, seed=seed)
    output, expected = quantizer(z_e), by_hand(quantizer, z_e, betas, combined)
    digits = Level(2, 3, tuple(tree)).split(output.codes).view(-1, len(tree))
    np.testing.assert_array_equal(digits.numpy(), expected["digits"])
    np.testing.assert_allclose(as_rows(output.z_q), expected["e_C"], atol=1e-5)
    for name, loss in output.losses.items():
        np.testing.assert_allclose(loss.item(), expected[name], rtol=1e-4)
    assert set(output.losses) == {"codebook", "commitment"}
    sum(output.losses.values()).backward()
    assert z_e.grad is not None
    np.testing.assert_allclose(as_rows(z_e.grad), expected["z_e"], rtol=1e-3, atol=1e-6)
    for layer, codebook in enumerate(quantizer.codebooks):
        np.testing.assert_allclose(codebook.grad, expected[f"codebook {layer}"], rtol=1e-3, atol=1e-6)


def test_one_weight_counts_for_every_layer_and_for_their_sum():
    z_e, weights = features(1, 3, 3), {"commitment_weight": (0.3,) * 3, "combined_commitment_weight": 0.3}
    one, each = quantizer_of(4, 2, 3, commitment_weight=0.3), quantizer_of(4, 2, 3, **weights)
    expected = by_hand(one, z_e, [0.3] * 3, 0.3)["commitment"]
    assert one(z_e).losses["commitment"].item() == pytest.approx(expected, rel=1e-5)
    assert one(z_e).losses["commitment"].equal(each(z_e).losses["commitment"])
    first = quantizer_of(4, 2, 3, commitment_weight=(0.3, 1.0, 0.0))  # the sum's weight is the first layer's
    expected = by_hand(first, z_e, [0.3, 1.0, 0.0], 0.3)["commitment"]
    assert first(z_e).losses["commitment"].item() == pytest.approx(expected, rel=1e-5)


def test_straight_through_gradient_reaches_only_the_encoder():
    quantizer, z_e = quantizer_of(3, 3), features(1, 2, 2)
    weights = torch.randn(1, WIDTH, 2, 2)
    (quantizer(z_e).z_q * weights).sum().backward()
    assert z_e.grad is not None
    assert z_e.grad.equal(weights)
    assert all(codebook.grad is None for codebook in quantizer.codebooks)


def test_one_layer_equals_vq_vae():
    """Compares with Eq. 2 for a flat codebook, written with a distance matrix and stop-gradients."""
    quantizer, z_e = quantizer_of(7), features(2, 3, 3)
    codebook = quantizer.codebooks[0]
    z = z_e.permute(0, 2, 3, 1).reshape(-1, WIDTH)
    codes = torch.cdist(z, codebook[0]).argmin(1)
    e = codebook[0][codes]
    vq_vae = (z.detach() - e).square().mean() + BETA * (e.detach() - z).square().mean()
    expected = torch.autograd.grad(vq_vae, [z_e, codebook])
    output = quantizer(z_e)
    assert output.codes.flatten().equal(codes)
    loss = output.losses["codebook"] + output.losses["commitment"]
    torch.testing.assert_close(loss, vq_vae)
    torch.testing.assert_close(torch.autograd.grad(loss, [z_e, codebook]), expected)


@given(tree=TREES, chosen=st.tuples(st.integers(0, 3), st.integers(1, 4)), seed=SEEDS)
def test_lookup_sums_the_chosen_codewords_on_the_path(tree, chosen, seed):
    quantizer, leaves = quantizer_of(*tree, seed=seed), math.prod(tree)
    codes = torch.arange(leaves).view(1, tree[0], -1)
    first, end = min(chosen[0], len(tree) - 1), min(chosen[1], len(tree))
    digits = slice(first, max(end, first + 1))
    sums = torch.zeros(leaves, WIDTH)
    for leaf, path in enumerate(itertools.product(*map(range, tree))):
        node = 0
        for layer, (book, digit) in enumerate(zip(quantizer.codebooks, path, strict=True)):
            if digits.start <= layer < digits.stop:
                sums[leaf] += book[node, digit]
            node = node * len(book[node]) + digit
    combined = quantizer.lookup(codes, digits)
    torch.testing.assert_close(combined.permute(0, 2, 3, 1).reshape(-1, WIDTH), sums)
    assert quantizer.lookup(codes, end).equal(quantizer.lookup(codes, slice(0, end)))
    assert quantizer.lookup(codes).equal(quantizer.lookup(codes, len(tree)))


@given(tree=TREES, at=st.integers(1, 3), seed=SEEDS)
def test_first_and_remaining_digits_add_up_to_the_whole(tree, at, seed):
    quantizer = quantizer_of(*tree, 2, seed=seed)  # two layers or more
    codes, at = torch.arange(2 * math.prod(tree)).view(1, 2, -1), min(at, len(tree))
    parts = quantizer.lookup(codes, at) + quantizer.lookup(codes, slice(at, None))
    torch.testing.assert_close(parts, quantizer.lookup(codes))


def test_lookup_of_encode_equals_z_q_of_forward():
    quantizer, z_e = quantizer_of(4, 2, 3), features(2, 3, 5)
    output = quantizer(z_e)
    codes = quantizer.encode(z_e)
    assert codes.shape == (2, 3, 5)
    assert codes.equal(output.codes)
    torch.testing.assert_close(quantizer.lookup(codes), output.z_q, atol=1e-6, rtol=0)


def test_losses_are_float32_under_autocast():
    quantizer, z_e = quantizer_of(8, 4, 16, width=64), features(4, 8, 8, width=64)
    plain = quantizer(z_e)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = quantizer(z_e)
    assert mixed.codes.equal(plain.codes)
    assert all(loss.dtype == torch.float32 and loss.equal(plain.losses[name]) for name, loss in mixed.losses.items())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"depth": 0}, "depth"),
        ({"branching": 1}, "branching"),
        ({"code_width": 0}, "code_width"),
        ({"branching": (3, 1)}, "branching at least 2, not 2 and 3 1"),
        ({"branching": (), "depth": 1}, "not 0 and no value"),
        ({"branching": (3, 4, 5)}, "branching 3 4 5 has one value for each of 3 layers, but depth is 2"),
        ({"branching": (2,) * 40, "depth": 40}, "in 40 layers makes more than 2147483647 leaves"),
        ({"commitment_weight": -0.1}, "-0.1"),
        ({"commitment_weight": (0.1, -0.2)}, "-0.2"),
        ({"commitment_weight": (0.1, 0.1, 0.1)}, "3 values, but codes have 2 layers"),
        ({"combined_commitment_weight": -0.3}, "combined_commitment_weight must not be negative, got -0.3"),
        ({"depth": 31, "branching": 2}, "smaller depth or branching"),
        ({"depth": 10**9, "branching": 10**9}, "smaller depth or branching"),
    ],
)
def test_invalid_settings_are_refused(change, message):
    with pytest.raises(UserError, match=message):
        LinkedQuantizer(**({"code_width": 4, "depth": 2, "branching": 3, "commitment_weight": BETA} | change))


@pytest.mark.parametrize("digits", [0, 3, -1, slice(2, None), slice(1, 1), slice(0, 3)])
def test_lookup_refuses_digits_that_codes_do_not_have(digits):
    with pytest.raises(UserError, match="2 digits; give a number from 1 to 2, or a slice within them"):
        quantizer_of(3, 3).lookup(torch.zeros(1, 1, 1, dtype=torch.long), digits)


def test_one_branching_for_all_layers_equals_one_for_each():
    torch.manual_seed(0)
    one = LinkedQuantizer(code_width=WIDTH, depth=3, branching=4)
    torch.manual_seed(0)
    each = LinkedQuantizer(code_width=WIDTH, branching=[4, 4, 4])
    assert one.radices == each.radices == (4, 4, 4)
    assert all(torch.equal(a, b) for a, b in zip(one.codebooks, each.codebooks, strict=True))


@pytest.mark.parametrize(
    ("start", "bounds"),
    [
        ("uniform", (1.0, 0.5, 0.25)),
        ("unit-variance", (math.sqrt(3 / 50),) * 3),
        ("scaled", (1 / 16, 1 / 4, 1 / 8)),
    ],
)
def test_codewords_start_uniform_in_the_range_of_their_layer(start, bounds):
    for codebook, bound in zip(quantizer_of(16, 4, 8, width=50, start=start).codebooks, bounds, strict=True):
        assert codebook.abs().max() <= bound
        assert codebook.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05)  # of a uniform distribution
        assert codebook.mean().abs() < 0.05 * bound
    squared_length = quantizer_of(512, width=50, start="unit-variance").codebooks[0].square().sum(-1).mean()
    assert squared_length.item() == pytest.approx(1, rel=0.02)


def test_public_names_of_smalti_resolve():
    """Every exported name resolves to its module's object; other names raise AttributeError."""
    for name in smalti.__all__:
        assert getattr(smalti, name) is not None
    assert set(smalti.__all__) <= set(dir(smalti))
    with pytest.raises(AttributeError, match="no attribute 'Tesserae'"):
        smalti.Tesserae  # noqa: B018 - access is tested
    assert {name for names in smalti._MODULES.values() for name in names} == set(smalti.__all__)


def test_importing_smalti_does_not_import_torch():
    code = (
        "import sys, smalti; before = 'torch' in sys.modules; from smalti import Level; print(before, Level.__module__)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "smalti.core.codes"]
