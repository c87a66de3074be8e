"""Linked codebooks: losses of HR-VQVAE's Eqs. 2-6 and their gradients against hand computation, codes and codewords.

Also tests the public names of `smalti`. The search is tested in test_search.py, the initialization in test_kmeans.py.
"""

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


def quantizer_of(depth: int, branching: int, *, width: int = WIDTH, seed: int = 0) -> LinkedQuantizer:
    torch.manual_seed(seed)
    return LinkedQuantizer(
        code_width=width,
        depth=depth,
        branching=branching,
        commitment_weight=BETA,
        learning="gradient",
        revive_below=0.0,
    )


def features(*grid: int, width: int = WIDTH, seed: int = 1) -> Tensor:
    """Returns random z_e, (b, d, h, w)."""
    b, h, w = grid
    return torch.randn(b, width, h, w, generator=torch.Generator().manual_seed(seed), requires_grad=True)


def by_hand(quantizer: LinkedQuantizer, z_e: Tensor) -> dict[str, np.ndarray]:
    """Computes e_C, digits, losses and the gradients of their sum vector by vector, layer by layer, in float64.

    With N = vectors x channels, the mean of squares over them has the derivative 2 (a - b) / N.
    """
    vectors = z_e.detach().double().numpy().transpose(0, 2, 3, 1).reshape(-1, z_e.shape[1])
    books = [codebook.detach().double().numpy() for codebook in quantizer.codebooks]
    found = {"codebook": 0.0, "commitment": 0.0, "z_e": np.zeros_like(vectors), "e_C": np.zeros_like(vectors)}
    digits, gradients = [], [np.zeros_like(book) for book in books]
    for i, xi_0 in enumerate(vectors):
        xi, node, path = xi_0, 0, []
        for book in books:
            k = int(((xi - book[node]) ** 2).sum(1).argmin())  # Eq. 3
            path.append((node, k))
            found["codebook"] += ((xi - book[node, k]) ** 2).sum() / vectors.size  # Eq. 6
            found["commitment"] += BETA * ((book[node, k] - xi) ** 2).sum() / vectors.size
            found["z_e"][i] += BETA * 2 * (xi - book[node, k]) / vectors.size  # the residual moves as z_e does
            gradients[len(path) - 1][node, k] += 2 * (book[node, k] - xi) / vectors.size
            found["e_C"][i] += book[node, k]  # Eq. 4
            xi, node = xi - book[node, k], node * quantizer.branching + k
        digits.append([k for _, k in path])
        if len(books) == 1:  # Eq. 2 has no terms of Eq. 5
            continue
        error = found["e_C"][i] - xi_0
        found["codebook"] += (error**2).sum() / vectors.size  # Eq. 5
        found["commitment"] += BETA * (error**2).sum() / vectors.size
        found["z_e"][i] -= BETA * 2 * error / vectors.size
        for gradient, (at, k) in zip(gradients, path, strict=True):
            gradient[at, k] += 2 * error / vectors.size
    return found | {"digits": np.array(digits), **{f"codebook {i}": g for i, g in enumerate(gradients)}}


def as_rows(grid: Tensor) -> np.ndarray:
    return grid.detach().double().numpy().transpose(0, 2, 3, 1).reshape(-1, grid.shape[1])


@given(depth=st.integers(1, 3), branching=st.integers(2, 4), seed=st.integers(0, 2**16))
def test_codes_losses_and_gradients_equal_the_equations(depth, branching, seed):
    """Beta weights only commitment terms, which reach z_e from every layer; codebook terms reach only codebooks."""
    quantizer, z_e = quantizer_of(depth, branching, seed=seed), features(2, 2, 3, seed=seed)
    output, expected = quantizer(z_e), by_hand(quantizer, z_e)
    digits = Level(2, 3, (branching,) * depth).split(output.codes).view(-1, depth)
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


def test_straight_through_gradient_reaches_only_the_encoder():
    quantizer, z_e = quantizer_of(2, 3), features(1, 2, 2)
    weights = torch.randn(1, WIDTH, 2, 2)
    (quantizer(z_e).z_q * weights).sum().backward()
    assert z_e.grad is not None
    assert z_e.grad.equal(weights)
    assert all(codebook.grad is None for codebook in quantizer.codebooks)


def test_one_layer_equals_vq_vae():
    """Compares with Eq. 2 for a flat codebook, written with a distance matrix and stop-gradients."""
    quantizer, z_e = quantizer_of(1, 7), features(2, 3, 3)
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


@given(depth=st.integers(1, 4), branching=st.integers(2, 4), seed=st.integers(0, 2**16))
def test_lookup_sums_the_codewords_on_the_path(depth, branching, seed):
    quantizer = quantizer_of(depth, branching, seed=seed)
    codes = torch.arange(branching**depth).view(1, branching, -1)
    paths = Level(1, 1, (branching,) * depth).split(codes.flatten())
    for digits in range(1, depth + 1):
        sums = torch.zeros(branching**depth, WIDTH)
        for leaf, path in enumerate(paths.tolist()):
            node = 0
            for book, digit in zip(list(quantizer.codebooks)[:digits], path, strict=False):
                sums[leaf] += book[node, digit]
                node = node * branching + digit
        combined = quantizer.lookup(codes, digits)
        torch.testing.assert_close(combined.permute(0, 2, 3, 1).reshape(-1, WIDTH), sums)
    assert quantizer.lookup(codes).equal(quantizer.lookup(codes, depth))


def test_lookup_of_encode_equals_z_q_of_forward():
    quantizer, z_e = quantizer_of(3, 4), features(2, 3, 5)
    output = quantizer(z_e)
    codes = quantizer.encode(z_e)
    assert codes.shape == (2, 3, 5)
    assert codes.equal(output.codes)
    torch.testing.assert_close(quantizer.lookup(codes), output.z_q, atol=1e-6, rtol=0)


def test_losses_are_float32_under_autocast():
    quantizer, z_e = quantizer_of(3, 8, width=64), features(4, 8, 8, width=64)
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
        ({"commitment_weight": -0.1}, "-0.1"),
        ({"depth": 31, "branching": 2}, "smaller depth or branching"),
        ({"depth": 10**9, "branching": 10**9}, "smaller depth or branching"),
    ],
)
def test_invalid_settings_are_refused(change, message):
    with pytest.raises(UserError, match=message):
        LinkedQuantizer(**({"code_width": 4, "depth": 2, "branching": 3, "commitment_weight": BETA} | change))


@pytest.mark.parametrize("digits", [0, 3])
def test_lookup_refuses_digits_that_codes_do_not_have(digits):
    with pytest.raises(UserError, match=f"2 digits; cannot decode {digits}"):
        quantizer_of(2, 3).lookup(torch.zeros(1, 1, 1, dtype=torch.long), digits)


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
