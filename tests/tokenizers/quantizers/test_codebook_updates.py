"""EMA codebook updates against the paper's sums and counts, and the revival of dead codewords.

Equality of one and several processes, for every tokenizer, is tested with the training loop.
"""

import math

import numpy as np
import pytest
import torch
from helpers import toys
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from smalti import LinkedQuantizer, UserError
from smalti.core.randomness import row_seeds
from smalti.tokenizers.quantizers import codebook_updates
from smalti.tokenizers.quantizers.codebook_updates import (
    CANDIDATES,
    SMOOTHING,
    dead_codeword_revivals,
    rank_within_node,
    scatter_rows,
)


def quantizer_of(depth: int, branching: int | tuple[int, ...], *, width: int = 3, **more) -> LinkedQuantizer:
    torch.manual_seed(0)
    return LinkedQuantizer(code_width=width, depth=depth, branching=branching, **more)


def features(b: int, h: int = 2, w: int = 3, *, width: int = 3, seed: int = 1) -> Tensor:
    return torch.randn(b, width, h, w, generator=torch.Generator().manual_seed(seed), requires_grad=True)


def as_rows(z_e: Tensor) -> np.ndarray:
    return z_e.detach().double().numpy().transpose(0, 2, 3, 1).reshape(-1, z_e.shape[1])


def step_by_hand(books, counts, sums, z_e, decay):
    """A step of VQ-VAE's App. A.1 for every codeword that is chosen, in float64, with the sums stored explicitly."""
    chosen, added = [np.zeros_like(c) for c in counts], [np.zeros_like(s) for s in sums]
    for xi in as_rows(z_e):
        node, residual = 0, xi
        for layer, book in enumerate(books):
            k = int(((residual - book[node]) ** 2).sum(1).argmin())
            chosen[layer][node, k] += 1
            added[layer][node, k] += residual
            residual, node = residual - book[node, k], node * book.shape[1] + k
    for layer, book in enumerate(books):
        for node in range(len(book)):
            counts[layer][node] = decay * counts[layer][node] + (1 - decay) * chosen[layer][node]
            total = counts[layer][node].sum()
            smoothed = (counts[layer][node] + SMOOTHING) / (total + book.shape[1] * SMOOTHING) * total
            hit = chosen[layer][node][:, None] > 0
            sums[layer][node] = decay * sums[layer][node] + (1 - decay) * added[layer][node]
            np.divide(sums[layer][node], smoothed[:, None], out=book[node], where=hit)
            sums[layer][node] = np.where(hit, sums[layer][node], book[node] * smoothed[:, None])


@given(tree=st.lists(st.integers(2, 4), min_size=1, max_size=3), decay=st.sampled_from([0.0, 0.7, 0.99]))
@settings(max_examples=15)
def test_ema_update_equals_the_papers_sums_and_counts(tree, decay):
    """Compares six steps with explicit sums and counts; every count starts as one vector at its codeword."""
    quantizer = quantizer_of(len(tree), tuple(tree), decay=decay, revive_below=0.0)
    books = [book.double().numpy().copy() for book in quantizer.codebooks]
    counts, sums = [np.ones(book.shape[:2]) for book in books], [book.copy() for book in books]
    for step in range(6):
        z_e = features(3, seed=step)
        assert set(quantizer(z_e).losses) == {"commitment"}
        quantizer.after_step()
        step_by_hand(books, counts, sums, z_e, decay)
        for layer, book in enumerate(books):
            np.testing.assert_allclose(quantizer.codebooks[layer], book, rtol=1e-3, atol=1e-4)


def test_codewords_that_no_vector_chooses_stay():
    """However long: their counts fall far below the smoothing."""
    quantizer = quantizer_of(1, (4,), decay=0.9, revive_below=0.0)
    z_e = features(3)
    z_e = z_e[:, :, :1, :1].detach().expand(-1, -1, 2, 3)
    unchosen = torch.ones(4, dtype=torch.bool).index_fill(0, quantizer.encode(z_e).unique(), False)
    before = quantizer.codebooks[0][0, unchosen].clone()
    assert len(before)
    for _ in range(300):
        quantizer(z_e)
        quantizer.after_step()
    assert quantizer.codebooks[0][0, unchosen].equal(before)


@pytest.mark.parametrize("learning", ["ema", "gradient"])
def test_micro_batches_of_a_step_equal_one_batch(learning):
    """Vectors quantized between two calls count together, in order: codewords, counts and revivals are the same."""
    z_e, seeds = features(6), row_seeds(3, torch.arange(6))
    whole, split = (quantizer_of(2, (4, 2), learning=learning, revive_below=0.9, decay=0.5) for _ in range(2))
    whole(z_e)
    for micro_batch in z_e.chunk(3):
        split(micro_batch)
    before = [book.clone() for book in whole.codebooks]
    for quantizer in (whole, split):
        quantizer.after_step(seeds)
    for name, tensor in whole.state_dict().items():
        torch.testing.assert_close(split.state_dict()[name], tensor)
    assert not all(a.equal(b) for a, b in zip(before, whole.codebooks, strict=True))


def test_inference_does_not_update_codebooks():
    quantizer, z_e = quantizer_of(2, 3), features(4)
    before = {name: tensor.clone() for name, tensor in quantizer.state_dict().items()}
    with torch.no_grad():
        quantizer(z_e)
    quantizer.eval()(z_e)
    quantizer.encode(z_e)
    quantizer.after_step()
    assert all(tensor.equal(before[name]) for name, tensor in quantizer.state_dict().items())


def test_bad_step_changes_no_parameter():
    """The caller restores buffers after a bad step; parameters must not change in the first place."""
    quantizer, z_e = quantizer_of(1, 8, learning="gradient", revive_below=0.9, decay=0.1), features(8)
    before = quantizer.codebooks[0].detach().clone()
    quantizer(z_e)
    quantizer.after_step(bad=torch.tensor(True))
    assert quantizer.codebooks[0].equal(before)
    quantizer(z_e)
    quantizer.after_step(bad=torch.tensor(False))
    assert not quantizer.codebooks[0].equal(before)


def test_codewords_and_counts_stay_float32_under_autocast():
    quantizer = quantizer_of(2, 3)
    with torch.autocast("cpu", torch.bfloat16):
        quantizer(features(4).bfloat16())
    quantizer.after_step()
    assert {tensor.dtype for tensor in quantizer.state_dict().values()} == {torch.float32}


@given(nodes=st.lists(st.integers(0, 3), min_size=1, max_size=20), seed=st.integers(0, 99))
def test_rank_within_node_counts_larger_keys_of_the_node(nodes, seed):
    keys = torch.randn(len(nodes), generator=torch.Generator().manual_seed(seed))
    expected = [
        sum(key > own for key, other in zip(keys, nodes, strict=True) if other == node)
        for own, node in zip(keys, nodes, strict=True)
    ]
    assert rank_within_node(torch.tensor(nodes), keys).tolist() == [int(rank) for rank in expected]


def candidates(n: int, nodes: int, seed: int = 0) -> dict[str, Tensor]:
    """Arguments of a revival: `n` vectors of width 2 that arrive at `nodes` nodes."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "vectors": torch.randn(n, 2, generator=generator),
        "nodes": torch.randint(nodes, (n,), generator=generator),
        "errors": torch.rand(n, generator=generator),
        "noise": torch.rand(n, generator=generator),
    }


def revived_of(counts: Tensor, **arguments) -> tuple[Tensor, Tensor, Tensor]:
    """`dead_codeword_revivals` without its unused rows."""
    indices, vectors, new_counts = dead_codeword_revivals(counts, **arguments)
    used = indices < counts.numel()
    assert (indices[~used] == counts.numel()).all()
    return indices[used], vectors[used], new_counts[used]


@given(rows=st.integers(1, 6), width=st.integers(0, 2), seed=st.integers(0, 99))
def test_scatter_rows_drops_values_past_the_last_row(rows, width, seed):
    generator = torch.Generator().manual_seed(seed)
    table = torch.randn(rows, *[3] * width, generator=generator)
    indices = torch.randperm(rows, generator=generator)[: rows // 2 + 1].repeat_interleave(2)
    indices[::2] = rows  # every second value is dropped
    values = torch.randn(len(indices), *[3] * width, generator=generator)
    values[0] = torch.nan
    expected = table.clone()
    for index, value in zip(indices.tolist(), values, strict=True):
        if index < rows:
            expected[index] = value
    assert scatter_rows(indices, values, table).equal(expected)


@given(n=st.integers(1, 40), nodes=st.integers(1, 4), m=st.integers(2, 6), seed=st.integers(0, 99))
def test_dead_codewords_move_to_distinct_vectors_of_their_node(n, nodes, m, seed):
    arguments = candidates(n, nodes, seed)
    counts = torch.rand(nodes, m, generator=torch.Generator().manual_seed(seed)) ** 4
    dead = counts < 0.3 * counts.mean(1, keepdim=True)
    indices, vectors, new_counts = revived_of(counts, below=0.3, **arguments)
    assert len(set(indices.tolist())) == len(indices)
    assert dead.flatten()[indices].all()
    for node in range(nodes):
        in_node = indices // m == node
        node_vectors = arguments["vectors"][arguments["nodes"] == node]
        assert in_node.sum() == min(int(dead[node].sum()), len(node_vectors))
        rows = [(vector == node_vectors).all(1).nonzero().item() for vector in vectors[in_node]]
        assert len(set(rows)) == len(rows)
        torch.testing.assert_close(new_counts[in_node], counts[node].mean().expand(int(in_node.sum())))


def test_revival_samples_vectors_in_proportion_to_squared_error():
    """Uses 3000 nodes with one dead codeword each and the same two vectors, one with three times the error."""
    count = 3000
    counts = torch.tensor([[1.0, 0.0]]).expand(count, 2)
    generator = torch.Generator().manual_seed(0)
    sampled = []
    for first in range(0, count, 100):  # at most as many as are revived at once
        nodes = torch.arange(100).repeat_interleave(2)
        errors, noise = torch.tensor([1.0, 3.0]).repeat(100), torch.rand(200, generator=generator)
        vectors = torch.tensor([[0.0], [1.0]]).repeat(100, 1)
        arguments = {"vectors": vectors, "nodes": nodes, "errors": errors, "noise": noise}
        sampled.append(revived_of(counts[first : first + 100], below=0.5, **arguments)[1])
    assert abs(torch.cat(sampled).mean().item() - 3 / 4) < 0.04


def test_revival_never_samples_zero_or_nan_errors():
    counts = torch.tensor([[1.0, 0.0, 0.0, 0.0]])
    nodes, noise = torch.zeros(3, dtype=torch.long), torch.full((3,), 0.5)
    arguments = {"vectors": torch.ones(3, 2), "nodes": nodes, "noise": noise}
    indices, _, _ = revived_of(counts, below=0.5, errors=torch.tensor([0.0, torch.nan, 1.0]), **arguments)
    assert len(indices) <= 1
    assert len(revived_of(counts, below=0.5, errors=torch.zeros(3), **arguments)[0]) == 0


def test_two_processes_revive_the_same_as_one(monkeypatch):
    """There are more candidates than a process exchanges: the largest of each are enough to find the largest of all."""
    arguments, counts = (
        candidates(3 * CANDIDATES, 5),
        torch.rand(5, 200, generator=torch.Generator().manual_seed(1)) ** 4,
    )
    whole = revived_of(counts, below=0.5, **arguments)
    assert len(whole[0]) == CANDIDATES
    halves = [{name: tensor[half::2] for name, tensor in arguments.items()} for half in (0, 1)]
    exchanged = []
    monkeypatch.setattr(codebook_updates, "collected", lambda tensor: exchanged.append(tensor) or tensor)
    dead_codeword_revivals(counts, below=0.5, **halves[1])
    others = iter(exchanged)
    monkeypatch.setattr(codebook_updates, "collected", lambda tensor: torch.cat([tensor, next(others)]))
    for one, two in zip(whole, revived_of(counts, below=0.5, **halves[0]), strict=True):
        assert one.equal(two)


@pytest.mark.parametrize("learning", ["ema", "gradient"])
def test_revived_codewords_stay_in_use(learning):
    """All codewords but one start far from all vectors; once revived they are used in every later step."""
    quantizer = quantizer_of(1, 16, learning=learning, decay=0.5)
    with torch.no_grad():
        quantizer.codebooks[0][0, 1:] += 1000
    z_e, used = features(64), []
    for _ in range(20):
        used.append(quantizer(z_e).codes.unique().numel())
        quantizer.after_step()
    assert used[0] == 1
    assert min(used[used.index(16) :]) == 16
    assert used.index(16) < 10


def test_without_revival_dead_codewords_stay_dead():
    quantizer = quantizer_of(1, 16, revive_below=0.0)
    with torch.no_grad():
        quantizer.codebooks[0][0, 1:] += 1000
    for _ in range(20):
        assert quantizer(features(64)).codes.unique().numel() == 1
        quantizer.after_step()


@pytest.mark.parametrize("tree", [(3, 3, 3), (3, 2, 4)])
def test_dead_subtree_is_revived_from_its_root(tree):
    """Two of three subtrees start out of reach; in the end every leaf is used."""
    quantizer = quantizer_of(3, tree, decay=0.5)
    with torch.no_grad():
        quantizer.codebooks[0][0, 1:] += 1000
        quantizer.codebooks[1][1:] -= 500
    z_e = features(200)
    for _ in range(60):
        quantizer(z_e)
        quantizer.after_step()
    assert quantizer(z_e).codes.unique().numel() == math.prod(tree)


@pytest.mark.parametrize(
    ("change", "message"), [({"decay": 1.0}, "decay must be from 0"), ({"revive_below": -0.1}, "not -0.1")]
)
def test_shares_out_of_range_are_refused(change, message):
    with pytest.raises(UserError, match=message):
        quantizer_of(2, 3, **change)


@pytest.mark.parametrize("kind", ["vqvae", "hrvq", "vqvae2"])
def test_training_loop_updates_and_revives_codewords(kind, tmp_path, monkeypatch):
    """Without revivals here, the tests of resumed runs and of several processes would not cover them."""
    revivals = []

    def counted(*args, **options):
        result = dead_codeword_revivals(*args, **options)
        revivals.append(int((result[0] < args[0].numel()).sum()))
        return result

    monkeypatch.setattr("smalti.tokenizers.quantizers.linked.dead_codeword_revivals", counted)
    toys.train(tmp_path, lambda: toys.make("tokenizer", kind))
    assert len(revivals) == toys.CONFIG.steps * {"vqvae": 1, "hrvq": 2, "vqvae2": 2}[kind]
    assert sum(revivals) > 0
