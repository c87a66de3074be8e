"""Linked codebooks: the losses of HR-VQVAE's Eqs. 5 and 6 and their gradients by hand, codes and codewords, the start.

Also the names that `smalti` itself gives, since vectors in and codes out is what one uses a quantizer for. The search
has test_search.py.
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
from smalti.tokenizers.quantizers import kmeans
from smalti.tokenizers.quantizers.kmeans import linked_kmeans
from smalti.tokenizers.quantizers.search import nearest_children

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
    """z_e, (b, d, h, w)."""
    b, h, w = grid
    return torch.randn(b, width, h, w, generator=torch.Generator().manual_seed(seed), requires_grad=True)


def by_hand(quantizer: LinkedQuantizer, z_e: Tensor) -> dict[str, np.ndarray]:
    """Vector by vector and layer by layer, in float64: e_C, digits, the losses, and the gradients of their sum.

    With N = vectors x channels, a squared norm's mean over them has the derivative 2 (a - b) / N.
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
        if len(books) == 1:  # Eq. 2: what Eq. 5 would add is there already
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
def test_codes_losses_and_gradients_are_those_of_the_equations(depth, branching, seed):
    """Beta on the commitment terms only; every layer's commitment moves z_e; codebooks move by codebook terms only."""
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


def test_gradient_passes_straight_through_to_the_encoder_only():
    quantizer, z_e = quantizer_of(2, 3), features(1, 2, 2)
    weights = torch.randn(1, WIDTH, 2, 2)
    (quantizer(z_e).z_q * weights).sum().backward()
    assert z_e.grad is not None
    assert z_e.grad.equal(weights)
    assert all(codebook.grad is None for codebook in quantizer.codebooks)


def test_one_layer_is_vq_vae():
    """Eq. 2 for a flat codebook, written with a distance matrix and stop-gradients."""
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
        found = quantizer.lookup(codes, digits)
        torch.testing.assert_close(found.permute(0, 2, 3, 1).reshape(-1, WIDTH), sums)
    assert quantizer.lookup(codes).equal(quantizer.lookup(codes, depth))


def test_lookup_of_encode_is_what_the_decoder_was_trained_on():
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
    ("change", "said"),
    [
        ({"depth": 0}, "depth"),
        ({"branching": 1}, "branching"),
        ({"code_width": 0}, "code_width"),
        ({"commitment_weight": -0.1}, "-0.1"),
        ({"depth": 31, "branching": 2}, "smaller depth or branching"),
        ({"depth": 10**9, "branching": 10**9}, "smaller depth or branching"),
    ],
)
def test_refuses_what_is_no_tree(change, said):
    with pytest.raises(UserError, match=said):
        LinkedQuantizer(**({"code_width": 4, "depth": 2, "branching": 3, "commitment_weight": BETA} | change))


@pytest.mark.parametrize("digits", [0, 3])
def test_refuses_digits_that_codes_do_not_have(digits):
    with pytest.raises(UserError, match=f"2 digits; cannot decode {digits}"):
        quantizer_of(2, 3).lookup(torch.zeros(1, 1, 1, dtype=torch.long), digits)


def clusters(centres: Tensor, each: int, spread: float) -> Tensor:
    noise = torch.randn(len(centres), each, centres.shape[1], generator=torch.Generator().manual_seed(3))
    return (centres[:, None] + spread * noise).flatten(0, 1)


def empty_books(depth: int, branching: int, width: int) -> list[Tensor]:
    return list(quantizer_of(depth, branching, width=width).codebooks)


def test_start_finds_separated_clusters_and_stays_there():
    """Nested clusters: three far apart, each of three nearer ones. All centres are the means of their members."""
    coarse = torch.tensor([[100.0, 0, 0], [0, 100, 0], [0, 0, 100]])
    fine = (coarse[:, None] + torch.eye(3) * 10).flatten(0, 1)
    vectors = clusters(fine, 20, 0.1)
    books = linked_kmeans(vectors, empty_books(2, 3, 3), seed=0)
    residual, node = vectors, torch.zeros(len(vectors), dtype=torch.long)
    for book in books:
        child = nearest_children(residual, book, node)
        for path in range(book.shape[0] * 3):
            torch.testing.assert_close(book.view(-1, 3)[path], residual[child == path].mean(0), atol=1e-4, rtol=0)
        residual, node = residual - book.view(-1, 3)[child], child
    assert node.bincount(minlength=9).tolist() == [20] * 9


@given(
    distinct=st.integers(1, 12), copies=st.integers(1, 3), scale=st.sampled_from([1e-8, 1.0]), seed=st.integers(0, 99)
)
def test_no_two_seeds_on_one_vector(distinct, copies, scale, seed):
    """Eight seeds on eight vectors where there are as many; fewer leave the rest of the codewords as they were."""
    vectors = torch.randn(distinct, 4, generator=torch.Generator().manual_seed(seed)) * scale
    fallback = torch.full((1, 8, 4), 7.0)
    rows = vectors.repeat(copies, 1)
    seeds = kmeans._spread_seeds(rows, torch.zeros(len(rows), dtype=torch.long), fallback, seed=seed)[0]
    on = (seeds[:, None] == vectors).all(-1)  # seeds x vectors
    assert on.sum(0).max() == 1
    assert on.sum() == min(distinct, 8)
    assert (seeds[~on.any(1)] == 7).all()


def test_the_first_seed_is_uniform_and_the_second_goes_by_squared_distance():
    """2000 nodes with the same three vectors: 0, 1 and 3 on a line."""
    nodes = 2000
    vectors = torch.tensor([0.0, 1.0, 3.0]).repeat(nodes).view(-1, 1)
    node = torch.arange(nodes).repeat_interleave(3)
    first, second = kmeans._spread_seeds(vectors, node, torch.zeros(nodes, 2, 1), seed=0).squeeze(-1).unbind(1)
    for value in (0, 1, 3):
        assert abs((first == value).float().mean().item() - 1 / 3) < 0.05
    assert abs((second[first == 0] == 3).float().mean().item() - 9 / 10) < 0.05
    assert abs((second[first == 1] == 3).float().mean().item() - 4 / 5) < 0.05


def test_start_uses_the_leaves_and_is_deterministic():
    z_e = features(16, 16, 16, width=16)
    first, again, other = (quantizer_of(3, 8, width=16, seed=seed) for seed in (0, 0, 0))
    first.init_from_data(z_e)
    again.init_from_data(z_e)
    other.init_from_data(z_e, seed=1)
    used = first.encode(z_e).unique().numel() / 8**3
    assert used >= 0.9
    assert all(a.equal(b) for a, b in zip(first.codebooks, again.codebooks, strict=True))
    assert not first.codebooks[0].equal(other.codebooks[0])


@pytest.mark.parametrize("n", [1, 5])
def test_fewer_vectors_than_leaves(n):
    """Most nodes are reached by nothing; every vector still finds its own leaf."""
    quantizer, z_e = quantizer_of(3, 4), features(1, 1, n)
    quantizer.init_from_data(z_e)
    assert all(codebook.isfinite().all() for codebook in quantizer.codebooks)
    torch.testing.assert_close(quantizer.lookup(quantizer.encode(z_e)), z_e.detach(), atol=1e-5, rtol=0)


def test_start_needs_no_room_for_every_candidate_of_every_vector():
    """A flat codebook of 1024 at 20 000 vectors of width 64 would gather 5 GB; it takes a few large products."""
    z_e = features(1, 100, 200, width=64).detach()
    quantizer = quantizer_of(1, 1024, width=64)
    with torch.profiler.profile(profile_memory=True) as profiler:
        kmeans.nearest_children(z_e.flatten(2)[0].T, quantizer.codebooks[0], torch.zeros(20_000, dtype=torch.long))
    assert max(event.cpu_memory_usage for event in profiler.key_averages()) < 200e6


def test_vectors_to_codes_with_nothing_but_smalti():
    """The public names: what they are is what their modules hold, and anything else is refused."""
    for name in smalti.__all__:
        assert getattr(smalti, name) is not None
    assert set(smalti.__all__) <= set(dir(smalti))
    with pytest.raises(AttributeError, match="no attribute 'Tesserae'"):
        smalti.Tesserae  # noqa: B018 - asking is the test
    assert {name for names in smalti._MODULES.values() for name in names} == set(smalti.__all__)


def test_importing_smalti_loads_nothing():
    code = (
        "import sys, smalti; before = 'torch' in sys.modules; from smalti import Level; print(before, Level.__module__)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "smalti.core.codes"]
