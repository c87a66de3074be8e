"""k-means initialization of linked codebooks: nested clusters, k-means++ seeding, few vectors, memory."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from smalti import LinkedQuantizer
from smalti.tokenizers.quantizers import kmeans
from smalti.tokenizers.quantizers.kmeans import linked_kmeans
from smalti.tokenizers.quantizers.search import nearest_children

WIDTH = 3


def quantizer_of(depth: int, branching: int, *, width: int = WIDTH, seed: int = 0) -> LinkedQuantizer:
    torch.manual_seed(seed)
    return LinkedQuantizer(code_width=width, depth=depth, branching=branching, learning="gradient", revive_below=0.0)


def features(*grid: int, width: int = WIDTH, seed: int = 1) -> Tensor:
    """Returns random z_e, (b, d, h, w)."""
    b, h, w = grid
    return torch.randn(b, width, h, w, generator=torch.Generator().manual_seed(seed), requires_grad=True)


def clusters(centres: Tensor, each: int, spread: float) -> Tensor:
    noise = torch.randn(len(centres), each, centres.shape[1], generator=torch.Generator().manual_seed(3))
    return (centres[:, None] + spread * noise).flatten(0, 1)


@pytest.mark.parametrize(("outer", "inner"), [(3, 3), (3, 2), (2, 3)])
def test_kmeans_finds_nested_clusters(outer, inner):
    """A few clusters far apart each consist of nearer ones. Every centre must be the mean of its members."""
    coarse = torch.tensor([[100.0, 0, 0], [0, 100, 0], [0, 0, 100]])[:outer]
    fine = (coarse[:, None] + torch.eye(3)[:inner] * 10).flatten(0, 1)
    vectors = clusters(fine, 20, 0.1)
    books = linked_kmeans(vectors, [torch.zeros(1, outer, 3), torch.zeros(outer, inner, 3)], seed=0)
    residual, node = vectors, torch.zeros(len(vectors), dtype=torch.long)
    for book in books:
        child = nearest_children(residual, book, node)
        for path in range(book.shape[0] * book.shape[1]):
            torch.testing.assert_close(book.view(-1, 3)[path], residual[child == path].mean(0), atol=1e-4, rtol=0)
        residual, node = residual - book.view(-1, 3)[child], child
    assert node.bincount(minlength=outer * inner).tolist() == [20] * outer * inner


@given(
    distinct=st.integers(1, 12), copies=st.integers(1, 3), scale=st.sampled_from([1e-8, 1.0]), seed=st.integers(0, 99)
)
def test_kmeans_plus_plus_seeds_are_distinct_vectors(distinct, copies, scale, seed):
    """Eight seeds are eight distinct vectors; with fewer vectors, the rest of the codewords stay as they were."""
    vectors = torch.randn(distinct, 4, generator=torch.Generator().manual_seed(seed)) * scale
    fallback = torch.full((1, 8, 4), 7.0)
    rows = vectors.repeat(copies, 1)
    seeds = kmeans._kmeans_plus_plus(rows, torch.zeros(len(rows), dtype=torch.long), fallback, seed=seed)[0]
    equal = (seeds[:, None] == vectors).all(-1)  # seeds x vectors
    assert equal.sum(0).max() == 1
    assert equal.sum() == min(distinct, 8)
    assert (seeds[~equal.any(1)] == 7).all()


def test_first_seed_is_uniform_and_second_in_proportion_to_squared_distance():
    """Uses 2000 nodes with the same three vectors: 0, 1 and 3 on a line."""
    nodes = 2000
    vectors = torch.tensor([0.0, 1.0, 3.0]).repeat(nodes).view(-1, 1)
    node = torch.arange(nodes).repeat_interleave(3)
    first, second = kmeans._kmeans_plus_plus(vectors, node, torch.zeros(nodes, 2, 1), seed=0).squeeze(-1).unbind(1)
    for value in (0, 1, 3):
        assert abs((first == value).float().mean().item() - 1 / 3) < 0.05
    assert abs((second[first == 0] == 3).float().mean().item() - 9 / 10) < 0.05
    assert abs((second[first == 1] == 3).float().mean().item() - 4 / 5) < 0.05


def test_initialization_uses_most_leaves_and_is_deterministic():
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
def test_initialization_with_fewer_vectors_than_leaves(n):
    """Most nodes are reached by no vector; every vector still gets its own leaf."""
    quantizer, z_e = quantizer_of(3, 4), features(1, 1, n)
    quantizer.init_from_data(z_e)
    assert all(codebook.isfinite().all() for codebook in quantizer.codebooks)
    torch.testing.assert_close(quantizer.lookup(quantizer.encode(z_e)), z_e.detach(), atol=1e-5, rtol=0)


def test_initialization_does_not_gather_candidates_in_memory():
    """Gathering 1024 codewords of width 64 for 20 000 vectors would take 5 GB."""
    z_e = features(1, 100, 200, width=64).detach()
    quantizer = quantizer_of(1, 1024, width=64)
    with torch.profiler.profile(profile_memory=True) as profiler:
        kmeans.nearest_children(z_e.flatten(2)[0].T, quantizer.codebooks[0], torch.zeros(20_000, dtype=torch.long))
    assert max(event.cpu_memory_usage for event in profiler.key_averages()) < 200e6
