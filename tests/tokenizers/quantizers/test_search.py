"""The linked search against brute force in float64, eager and compiled, and what happens where nothing compiles.

What the codes are for is in test_linked.py.
"""

import os
import shutil
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch._inductor.exc import InductorError

from smalti.tokenizers.quantizers import search
from smalti.tokenizers.quantizers.search import (
    BLOCK_VECTORS,
    DENSE_CODEWORDS,
    EAGER_VECTORS,
    nearest_children,
    nearest_paths,
)

WIDTH = 5
needs_compiler = pytest.mark.skipif(
    not shutil.which(os.environ.get("CXX", "g++")), reason="no C++ compiler: the search cannot be compiled here"
)


def problem(n: int, depth: int, branching: int, *, seed: int = 0, width: int = WIDTH) -> tuple[Tensor, list[Tensor]]:
    """Vectors, and codebooks that shrink as residuals do."""
    draw = torch.Generator().manual_seed(seed)
    books = [torch.randn(branching**i, branching, width, generator=draw) * 0.5**i for i in range(depth)]
    return torch.randn(n, width, generator=draw), books


def assert_greedy(paths: Tensor, vectors: Tensor, codebooks: list[Tensor]) -> None:
    """Each digit is the nearest child of the node before it, by differences in float64 over every child of that node.

    Compared by distance, not by number: of two children that tie within float32 rounding either will do.
    """
    residual, books = vectors.double().numpy(), [codebook.double().numpy() for codebook in codebooks]
    branching = books[0].shape[1]
    node = np.zeros(len(residual), dtype=np.int64)
    for layer, book in enumerate(books):
        children = ((residual[:, None] - book[node]) ** 2).sum(-1)
        path = paths.numpy() // branching ** (len(books) - 1 - layer)
        assert (path // branching == node).all()
        chosen = np.take_along_axis(children, (path % branching)[:, None], axis=1)[:, 0]
        scale = (residual**2).sum(-1) + (book**2).sum(-1).max()
        assert (chosen - children.min(1) <= 1e-6 * scale).all()
        node, residual = path, residual - book.reshape(-1, book.shape[-1])[path]


def agreement(paths: Tensor, others: Tensor) -> float:
    return (paths == others).float().mean().item()


@given(
    n=st.integers(0, 40),
    depth=st.integers(1, 3),
    branching=st.integers(2, 8),
    spread=st.sampled_from([1e-4, 1.0, 1e4]),
    seed=st.integers(0, 2**16),
)
def test_takes_the_nearest_child_at_every_layer(n, depth, branching, spread, seed):
    vectors, books = problem(n, depth, branching, seed=seed)
    vectors, books = vectors * spread, [book * spread for book in books]
    assert_greedy(nearest_paths(vectors, books, compiled=False), vectors, books)


@pytest.mark.parametrize(("depth", "branching"), [(2, 20), (3, 7), (1, 2 * DENSE_CODEWORDS)])
def test_layers_that_gather_and_layers_that_do_not(depth, branching):
    """More codewords than `DENSE_CODEWORDS` in the last layer, over several blocks of which the last is not full."""
    vectors, books = problem(2 * EAGER_VECTORS + 3, depth, branching)
    assert books[-1].shape[0] * branching > DENSE_CODEWORDS
    assert_greedy(nearest_paths(vectors, books, compiled=False), vectors, books)


def test_a_large_flat_codebook_goes_tile_by_tile(monkeypatch):
    """The last tile is not full; of equally near codewords in several tiles the first is taken, as without tiles."""
    vectors, (book,) = problem(EAGER_VECTORS + 3, 1, 120)
    book = torch.cat([book, book], 1)  # each codeword twice, most pairs in two tiles
    whole = nearest_paths(vectors, [book], compiled=False)
    monkeypatch.setattr(search, "TILE_CODEWORDS", 50)
    tiled = nearest_paths(vectors, [book], compiled=False)
    assert_greedy(tiled, vectors, [book])
    assert tiled.equal(whole)
    assert whole.max() < 120


def test_a_large_flat_codebook_gathers_no_candidates(monkeypatch):
    """A single node is one matrix product however large; gathered, each vector would have a copy of the codebook."""
    vectors, books = problem(EAGER_VECTORS, 1, 4 * DENSE_CODEWORDS)
    monkeypatch.setattr(torch, "baddbmm", None)
    assert_greedy(nearest_paths(vectors, books), vectors, books)


@pytest.mark.parametrize("branching", [4, 20])
def test_nearest_children_are_one_layer_of_the_search(branching):
    vectors, books = problem(EAGER_VECTORS + 1, 2, branching)
    first = nearest_paths(vectors, books[:1])
    residual = vectors - books[0].view(-1, WIDTH)[first]
    assert nearest_children(residual, books[1], first).equal(nearest_paths(vectors, books))


def test_searches_in_float32_whatever_it_is_given_and_whatever_autocast_says():
    vectors, books = problem(600, 3, 8, width=64)
    half = vectors.bfloat16()
    expected = nearest_paths(half.float(), books)
    with torch.autocast("cpu", torch.bfloat16):
        assert nearest_paths(half.float(), books).equal(expected)
        first = nearest_paths(half.float(), books[:1])
        assert nearest_children(half.float(), books[0], torch.zeros_like(first)).equal(first)
    assert nearest_paths(half, books).equal(expected)
    rounded = nearest_paths(half, [book.bfloat16() for book in books])
    assert agreement(rounded, expected) < 1  # bfloat16 codebooks are others: this problem could have shown a difference


def test_small_and_dense_searches_are_not_compiled(monkeypatch):
    asked = []
    monkeypatch.setattr(search, "_fused", lambda: lambda *block: asked.append(len(block[0])) or search._eager(*block))
    gathering, dense = problem(search.COMPILED_FROM_VECTORS, 3, 16), problem(BLOCK_VECTORS, 2, 16)
    few_leaves = problem(search.COMPILED_FROM_VECTORS, 3, 8)
    nearest_paths(gathering[0][1:], gathering[1])
    nearest_paths(*dense)
    nearest_paths(*few_leaves)
    assert asked == []
    nearest_paths(*gathering)
    assert asked == [BLOCK_VECTORS]  # padded to the one shape that is compiled


@pytest.fixture
def fused(monkeypatch):
    """Compiles anew: nothing that another test left, and small blocks, padded like the large ones."""
    monkeypatch.setattr(search, "BLOCK_VECTORS", 64)
    search._fused.cache_clear()
    yield
    search._fused.cache_clear()


@needs_compiler
@pytest.mark.parametrize(("depth", "branching"), [(3, 2), (2, 16)])
def test_compiled_search_is_the_eager_one(fused, depth, branching):
    """Unrolled at a branching of 2, reduced at 16; three blocks of which the last is padded, and none at all."""
    vectors, books = problem(2 * 64 + 5, depth, branching)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*unfused")  # no falling back
        paths = nearest_paths(vectors, books, compiled=True)
    assert_greedy(paths, vectors, books)
    assert nearest_paths(vectors[:0], books, compiled=True).shape == (0,)


@pytest.mark.parametrize("branching", [2, 8, 16])
def test_what_is_compiled_takes_the_nearest_child_too(branching):
    """The function that the compiler is given, run as it is written: every branching without the wait."""
    vectors, books = problem(300, 2, branching)
    offsets = search._offsets(books)
    assert_greedy(search._fusable(vectors, books, offsets), vectors, books)


def test_falls_back_with_one_warning(fused, monkeypatch):
    attempts = []

    def broken(*_):
        attempts.append(1)
        raise InductorError(RuntimeError("no compiler here"), None)

    monkeypatch.setattr(torch, "compile", lambda *_, **__: broken)
    vectors, books = problem(200, 2, 3)
    with pytest.warns(UserWarning, match="unfused") as warned:
        found = [nearest_paths(vectors, books, compiled=True) for _ in range(2)]
    assert len(warned) == 1
    assert len(attempts) == 1
    for paths in found:
        assert_greedy(paths, vectors, books)


def test_falls_back_without_a_compiler(tmp_path):
    """For real, in a process whose C++ compiler is not there and whose compiled code is not cached."""
    code = """
import warnings, torch
from smalti.tokenizers import search
search.BLOCK_VECTORS = 64
books = [torch.randn(1, 3, 4), torch.randn(3, 3, 4)]
vectors = torch.randn(100, 4)
with warnings.catch_warnings(record=True) as warned:
    warnings.simplefilter("always")
    paths = [search.nearest_paths(vectors, books, compiled=True) for _ in range(2)]
assert [w.category for w in warned if "unfused" in str(w.message)] == [UserWarning], [str(w.message) for w in warned]
assert paths[0].equal(search.nearest_paths(vectors, books, compiled=False)) and paths[1].equal(paths[0])
print("same codes")
"""
    environment = {**os.environ, "CXX": "/nonexistent/c++", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300)
    assert done.stdout.strip() == "same codes", done.stderr
