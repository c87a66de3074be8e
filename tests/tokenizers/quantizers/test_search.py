"""Linked codebook search, eager and compiled, against brute force in float64; fallback without a compiler.

Losses and lookup are tested in test_linked.py.
"""

import math
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
    part_of_job,
)

WIDTH = 5
needs_compiler = pytest.mark.skipif(
    not shutil.which(os.environ.get("CXX", "g++")), reason="no C++ compiler: the search cannot be compiled"
)


def problem(n: int, *tree: int, seed: int = 0, width: int = WIDTH) -> tuple[Tensor, list[Tensor]]:
    """Random vectors, and codebooks that shrink with depth as residuals do; the tree is the branching of each layer."""
    generator = torch.Generator().manual_seed(seed)
    books = [torch.randn(math.prod(tree[:i]), m, width, generator=generator) * 0.5**i for i, m in enumerate(tree)]
    return torch.randn(n, width, generator=generator), books


def assert_greedy(paths: Tensor, vectors: Tensor, codebooks: list[Tensor]) -> None:
    """Asserts that each digit is the nearest child of its node, by float64 differences to every child.

    Distances are compared, not indices: of two children that tie within float32 rounding, either is correct.
    """
    residual, books = vectors.double().numpy(), [codebook.double().numpy() for codebook in codebooks]
    node = np.zeros(len(residual), dtype=np.int64)
    for layer, book in enumerate(books):
        children = ((residual[:, None] - book[node]) ** 2).sum(-1)
        path = paths.numpy() // math.prod(each.shape[1] for each in books[layer + 1 :])
        assert (path // book.shape[1] == node).all()
        chosen = np.take_along_axis(children, (path % book.shape[1])[:, None], axis=1)[:, 0]
        scale = (residual**2).sum(-1) + (book**2).sum(-1).max()
        assert (chosen - children.min(1) <= 1e-6 * scale).all()
        node, residual = path, residual - book.reshape(-1, book.shape[-1])[path]


def agreement(paths: Tensor, others: Tensor) -> float:
    return (paths == others).float().mean().item()


@given(
    n=st.integers(0, 40),
    tree=st.lists(st.integers(2, 8), min_size=1, max_size=4),
    spread=st.sampled_from([1e-4, 1.0, 1e4]),
    seed=st.integers(0, 2**16),
)
def test_search_takes_the_nearest_child_at_every_layer(n, tree, spread, seed):
    vectors, books = problem(n, *tree, seed=seed)
    vectors, books = vectors * spread, [book * spread for book in books]
    assert_greedy(nearest_paths(vectors, books, compiled=False), vectors, books)
    if len(vectors):  # what the compiler gets: layers of up to 8 are unrolled, layer by layer
        assert_greedy(search._fusable(vectors, books, search._offsets(books)), vectors, books)


@pytest.mark.parametrize("tree", [(20, 20), (7, 7, 7), (2 * DENSE_CODEWORDS,), (3, 17, 2, 5), (100, 2, 4)])
def test_gathering_and_dense_layers_take_the_nearest_child(tree):
    """The last layer has more than `DENSE_CODEWORDS` codewords; the last block of vectors is not full."""
    vectors, books = problem(2 * EAGER_VECTORS + 3, *tree)
    assert math.prod(tree) > DENSE_CODEWORDS
    assert_greedy(nearest_paths(vectors, books, compiled=False), vectors, books)


def test_large_flat_codebook_is_searched_tile_by_tile(monkeypatch):
    """The last tile is not full. Of equally near codewords in several tiles the first is taken, as without tiles."""
    vectors, (book,) = problem(EAGER_VECTORS + 3, 120)
    book = torch.cat([book, book], 1)  # each codeword twice, most pairs in two tiles
    whole = nearest_paths(vectors, [book], compiled=False)
    monkeypatch.setattr(search, "TILE_CODEWORDS", 50)
    tiled = nearest_paths(vectors, [book], compiled=False)
    assert_greedy(tiled, vectors, [book])
    assert tiled.equal(whole)
    assert whole.max() < 120


def test_large_flat_codebook_gathers_no_candidates(monkeypatch):
    """A single node is one matrix product. Gathering would copy the whole codebook for each vector."""
    vectors, books = problem(EAGER_VECTORS, 4 * DENSE_CODEWORDS)
    monkeypatch.setattr(torch, "baddbmm", None)
    assert_greedy(nearest_paths(vectors, books), vectors, books)


@pytest.mark.parametrize("branching", [4, 20])
def test_nearest_children_is_one_layer_of_the_search(branching):
    vectors, books = problem(EAGER_VECTORS + 1, branching, branching)
    first = nearest_paths(vectors, books[:1])
    residual = vectors - books[0].view(-1, WIDTH)[first]
    assert nearest_children(residual, books[1], first).equal(nearest_paths(vectors, books))


def test_search_is_float32_for_any_dtype_and_under_autocast():
    vectors, books = problem(600, 8, 8, 8, width=64)
    half = vectors.bfloat16()
    expected = nearest_paths(half.float(), books)
    with torch.autocast("cpu", torch.bfloat16):
        assert nearest_paths(half.float(), books).equal(expected)
        first = nearest_paths(half.float(), books[:1])
        assert nearest_children(half.float(), books[0], torch.zeros_like(first)).equal(first)
    assert nearest_paths(half, books).equal(expected)
    rounded = nearest_paths(half, [book.bfloat16() for book in books])
    assert agreement(rounded, expected) < 1  # rounded codebooks change paths, so this problem is sensitive to rounding


def test_only_large_searches_in_large_jobs_are_compiled(monkeypatch):
    """Compiling takes longer than the search of some hundred thousand images."""
    compiled = []
    monkeypatch.setattr(
        search, "_fused", lambda: lambda *block: compiled.append(len(block[0])) or search._eager(*block)
    )
    gathering, dense = problem(search.COMPILED_FROM_VECTORS, 16, 16, 16), problem(BLOCK_VECTORS, 16, 16)
    nearest_paths(*gathering)
    with part_of_job(search.COMPILED_FROM_JOB - 1):
        nearest_paths(*gathering)
    with part_of_job(search.COMPILED_FROM_JOB):
        nearest_paths(gathering[0][1:], gathering[1])
        nearest_paths(*dense)
    nearest_paths(*gathering)
    assert compiled == []
    with part_of_job(search.COMPILED_FROM_JOB):
        nearest_paths(*gathering)
    assert compiled == [BLOCK_VECTORS]  # padded to the one compiled shape


@pytest.fixture
def fused(monkeypatch):
    """Clears the compiled search before and after the test, and uses small blocks, padded like large ones."""
    monkeypatch.setattr(search, "BLOCK_VECTORS", 64)
    search._fused.cache_clear()
    yield
    search._fused.cache_clear()


@needs_compiler
@pytest.mark.parametrize("tree", [(2, 2, 2), (16, 16), (3, 16, 2)])
def test_compiled_search_equals_brute_force(fused, tree):
    """Covers the unrolled form (branching 2) and the reduction (16), alone and in one tree, a padded last block, and no
    vectors at all."""
    vectors, books = problem(2 * 64 + 5, *tree)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*runs eagerly")  # no fallback
        paths = nearest_paths(vectors, books, compiled=True)
    assert_greedy(paths, vectors, books)
    assert nearest_paths(vectors[:0], books, compiled=True).shape == (0,)


@pytest.mark.parametrize("tree", [(2, 2), (8, 8), (16, 16), (20, 4, 9)])
def test_compiler_input_takes_the_nearest_child(tree):
    """Runs the function that is compiled without compiling it, which is quick for every branching."""
    vectors, books = problem(300, *tree)
    offsets = search._offsets(books)
    assert_greedy(search._fusable(vectors, books, offsets), vectors, books)


def test_failed_compilation_falls_back_with_one_warning(fused, monkeypatch):
    attempts = []

    def broken(*_):
        attempts.append(1)
        raise InductorError(RuntimeError("no compiler"), None)

    monkeypatch.setattr(torch, "compile", lambda *_, **__: broken)
    vectors, books = problem(200, 3, 3)
    with pytest.warns(UserWarning, match="runs eagerly") as warned:
        results = [nearest_paths(vectors, books, compiled=True) for _ in range(2)]
    assert len(warned) == 1
    assert len(attempts) == 1
    for paths in results:
        assert_greedy(paths, vectors, books)


def test_search_works_without_a_compiler(tmp_path):
    """Runs a process without a C++ compiler and without cached compiled code."""
    code = """
import warnings, torch
from smalti.tokenizers.quantizers import search
search.BLOCK_VECTORS = 64
books = [torch.randn(1, 3, 4), torch.randn(3, 3, 4)]
vectors = torch.randn(100, 4)
with warnings.catch_warnings(record=True) as warned:
    warnings.simplefilter("always")
    paths = [search.nearest_paths(vectors, books, compiled=True) for _ in range(2)]
messages = [str(w.message) for w in warned]
assert [w.category for w in warned if "runs eagerly" in str(w.message)] == [UserWarning], messages
assert paths[0].equal(search.nearest_paths(vectors, books, compiled=False)) and paths[1].equal(paths[0])
print("same codes")
"""
    environment = {**os.environ, "CXX": "/nonexistent/c++", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300)
    assert done.stdout.strip() == "same codes", done.stderr
