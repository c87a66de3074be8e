"""How codewords learn other than by gradients, against what the papers' sums say when kept apart, and revival.

That two processes end with the codebooks of one is in test_fit_processes.py, for every kind.
"""

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from helpers import toys
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from smalti import LinkedQuantizer, UserError
from smalti.core.randomness import row_seeds
from smalti.tokenizers.quantizers import codebook_updates
from smalti.tokenizers.quantizers.codebook_updates import CANDIDATES, SMOOTHING, put_at, revival
from smalti.tokenizers.quantizers.drawing import turns


def quantizer_of(depth: int, branching: int, *, width: int = 3, **more) -> LinkedQuantizer:
    torch.manual_seed(0)
    return LinkedQuantizer(code_width=width, depth=depth, branching=branching, **more)


def features(b: int, h: int = 2, w: int = 3, *, width: int = 3, seed: int = 1) -> Tensor:
    return torch.randn(b, width, h, w, generator=torch.Generator().manual_seed(seed), requires_grad=True)


def as_rows(z_e: Tensor) -> np.ndarray:
    return z_e.detach().double().numpy().transpose(0, 2, 3, 1).reshape(-1, z_e.shape[1])


def step_by_hand(books, counts, sums, z_e, decay):
    """A step of App. A.1 of VQ-VAE in every node that is reached, in float64: the sums are kept, not implied."""
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
            if chosen[layer][node].any():
                sums[layer][node] = decay * sums[layer][node] + (1 - decay) * added[layer][node]
                book[node] = sums[layer][node] / smoothed[:, None]
            else:
                sums[layer][node] = book[node] * smoothed[:, None]


@given(depth=st.integers(1, 3), branching=st.integers(2, 4), decay=st.sampled_from([0.0, 0.7, 0.99]))
@settings(max_examples=15)
def test_running_means_are_the_paper_s(depth, branching, decay):
    """With sums and counts kept apart, over six steps; every count starts as one vector at its codeword."""
    quantizer = quantizer_of(depth, branching, decay=decay, revive_below=0.0)
    books = [book.double().numpy().copy() for book in quantizer.codebooks]
    counts, sums = [np.ones(book.shape[:2]) for book in books], [book.copy() for book in books]
    for step in range(6):
        z_e = features(3, seed=step)
        assert set(quantizer(z_e).losses) == {"commitment"}
        quantizer.after_step()
        step_by_hand(books, counts, sums, z_e, decay)
        for layer, book in enumerate(books):
            np.testing.assert_allclose(quantizer.codebooks[layer], book, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("way", ["ema", "gradient"])
def test_slices_of_a_step_are_one_step(way):
    """What is quantized between two calls counts together, in order: codewords, counts and who is revived."""
    z_e, seeds = features(6), row_seeds(3, torch.arange(6))
    whole, sliced = (quantizer_of(2, 3, learning=way, revive_below=0.9, decay=0.5) for _ in range(2))
    whole(z_e)
    for part in z_e.chunk(3):
        sliced(part)
    before = [book.clone() for book in whole.codebooks]
    for quantizer in (whole, sliced):
        quantizer.after_step(seeds)
    for name, tensor in whole.state_dict().items():
        torch.testing.assert_close(sliced.state_dict()[name], tensor)
    assert not all(a.equal(b) for a, b in zip(before, whole.codebooks, strict=True))


def test_what_is_not_training_teaches_nothing():
    quantizer, z_e = quantizer_of(2, 3), features(4)
    before = {name: tensor.clone() for name, tensor in quantizer.state_dict().items()}
    with torch.no_grad():
        quantizer(z_e)
    quantizer.eval()(z_e)
    quantizer.encode(z_e)
    quantizer.after_step()
    assert all(tensor.equal(before[name]) for name, tensor in quantizer.state_dict().items())


def test_a_step_that_does_not_count_moves_no_parameter():
    """Buffers are put back by whoever says that it does not count; parameters must not have moved."""
    quantizer, z_e = quantizer_of(1, 8, learning="gradient", revive_below=0.9, decay=0.1), features(8)
    before = quantizer.codebooks[0].detach().clone()
    quantizer(z_e)
    quantizer.after_step(bad=torch.tensor(True))
    assert quantizer.codebooks[0].equal(before)
    quantizer(z_e)
    quantizer.after_step(bad=torch.tensor(False))
    assert not quantizer.codebooks[0].equal(before)


def test_codewords_and_counts_stay_float32_whatever_the_features():
    quantizer = quantizer_of(2, 3)
    with torch.autocast("cpu", torch.bfloat16):
        quantizer(features(4).bfloat16())
    quantizer.after_step()
    assert {tensor.dtype for tensor in quantizer.state_dict().values()} == {torch.float32}


@given(nodes=st.lists(st.integers(0, 3), min_size=1, max_size=20), seed=st.integers(0, 99))
def test_turns_are_ranks_within_each_node(nodes, seed):
    keys = torch.randn(len(nodes), generator=torch.Generator().manual_seed(seed))
    expected = [
        sum(key > own for key, other in zip(keys, nodes, strict=True) if other == node)
        for own, node in zip(keys, nodes, strict=True)
    ]
    assert turns(torch.tensor(nodes), keys).tolist() == [int(rank) for rank in expected]


def candidates(n: int, nodes: int, seed: int = 0) -> dict[str, Tensor]:
    """`n` vectors of width 2 on their way to `nodes` nodes."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "vectors": torch.randn(n, 2, generator=generator),
        "nodes": torch.randint(nodes, (n,), generator=generator),
        "errors": torch.rand(n, generator=generator),
        "noise": torch.rand(n, generator=generator),
    }


def revived_of(counts: Tensor, **given) -> tuple[Tensor, Tensor, Tensor]:
    """What `revival` says of codewords, without those candidates that revive none."""
    places, vectors, restart = revival(counts, **given)
    some = places < counts.numel()
    assert (places[~some] == counts.numel()).all()
    return places[some], vectors[some], restart[some]


@given(rows=st.integers(1, 6), width=st.integers(0, 2), seed=st.integers(0, 99))
def test_what_has_no_place_is_left_out(rows, width, seed):
    generator = torch.Generator().manual_seed(seed)
    table = torch.randn(rows, *[3] * width, generator=generator)
    places = torch.randperm(rows, generator=generator)[: rows // 2 + 1].repeat_interleave(2)
    places[::2] = rows  # of any two, one goes nowhere
    values = torch.randn(len(places), *[3] * width, generator=generator)
    values[0] = torch.nan
    expected = table.clone()
    for place, value in zip(places.tolist(), values, strict=True):
        if place < rows:
            expected[place] = value
    assert put_at(places, values, table).equal(expected)


@given(n=st.integers(1, 40), nodes=st.integers(1, 4), m=st.integers(2, 6), seed=st.integers(0, 99))
def test_the_dead_of_each_node_come_back_at_vectors_of_their_own(n, nodes, m, seed):
    given = candidates(n, nodes, seed)
    counts = torch.rand(nodes, m, generator=torch.Generator().manual_seed(seed)) ** 4
    dead = counts < 0.3 * counts.mean(1, keepdim=True)
    revived, places, restart = revived_of(counts, below=0.3, **given)
    assert len(set(revived.tolist())) == len(revived)
    assert dead.flatten()[revived].all()
    for node in range(nodes):
        here = revived // m == node
        there = given["vectors"][given["nodes"] == node]
        assert here.sum() == min(int(dead[node].sum()), len(there))
        rows = [(place == there).all(1).nonzero().item() for place in places[here]]
        assert len(set(rows)) == len(rows)
        torch.testing.assert_close(restart[here], counts[node].mean().expand(int(here.sum())))


def test_vectors_are_drawn_by_their_squared_errors():
    """3000 nodes of a dead codeword, each with the same two vectors, one with three times the error."""
    count = 3000
    counts = torch.tensor([[1.0, 0.0]]).expand(count, 2)
    generator = torch.Generator().manual_seed(0)
    drawn = []
    for part in range(0, count, 100):  # no more than are revived at once
        nodes = torch.arange(100).repeat_interleave(2)
        errors, noise = torch.tensor([1.0, 3.0]).repeat(100), torch.rand(200, generator=generator)
        vectors = torch.tensor([[0.0], [1.0]]).repeat(100, 1)
        given = {"vectors": vectors, "nodes": nodes, "errors": errors, "noise": noise}
        drawn.append(revived_of(counts[part : part + 100], below=0.5, **given)[1])
    assert abs(torch.cat(drawn).mean().item() - 3 / 4) < 0.04


def test_what_fits_exactly_or_is_no_number_is_not_drawn():
    counts = torch.tensor([[1.0, 0.0, 0.0, 0.0]])
    given = {"vectors": torch.ones(3, 2), "nodes": torch.zeros(3, dtype=torch.long), "noise": torch.full((3,), 0.5)}
    revived, _, _ = revived_of(counts, below=0.5, errors=torch.tensor([0.0, torch.nan, 1.0]), **given)
    assert len(revived) <= 1
    assert len(revived_of(counts, below=0.5, errors=torch.zeros(3), **given)[0]) == 0


def test_two_processes_revive_what_one_does(monkeypatch):
    """More candidates than are sent: of the largest of each process, the largest are those of all vectors."""
    given, counts = candidates(3 * CANDIDATES, 5), torch.rand(5, 200, generator=torch.Generator().manual_seed(1)) ** 4
    whole = revived_of(counts, below=0.5, **given)
    assert len(whole[0]) == CANDIDATES
    halves = [{name: tensor[part::2] for name, tensor in given.items()} for part in (0, 1)]
    sent = []
    monkeypatch.setattr(codebook_updates, "collected", lambda tensor: sent.append(tensor) or tensor)
    revival(counts, below=0.5, **halves[1])
    others = iter(sent)
    monkeypatch.setattr(codebook_updates, "collected", lambda tensor: torch.cat([tensor, next(others)]))
    for one, two in zip(whole, revived_of(counts, below=0.5, **halves[0]), strict=True):
        assert one.equal(two)


@pytest.mark.parametrize("way", ["ema", "gradient"])
def test_revived_codewords_stay_alive(way):
    """All codewords but one far away from all vectors: in use a step after they are revived, and for good."""
    quantizer = quantizer_of(1, 16, learning=way, decay=0.5)
    with torch.no_grad():
        quantizer.codebooks[0][0, 1:] += 1000
    z_e, used = features(64), []
    for _ in range(20):
        used.append(quantizer(z_e).codes.unique().numel())
        quantizer.after_step()
    assert used[0] == 1
    assert min(used[used.index(16) :]) == 16
    assert used.index(16) < 10


def test_without_revival_the_dead_stay_dead():
    quantizer = quantizer_of(1, 16, revive_below=0.0)
    with torch.no_grad():
        quantizer.codebooks[0][0, 1:] += 1000
    for _ in range(20):
        assert quantizer(features(64)).codes.unique().numel() == 1
        quantizer.after_step()


def test_a_dead_subtree_comes_back_along_the_path():
    """Two of three codewords of the first layer are out of reach, and all below them: in the end every leaf is used."""
    quantizer = quantizer_of(3, 3, decay=0.5)
    with torch.no_grad():
        quantizer.codebooks[0][0, 1:] += 1000
        quantizer.codebooks[1][1:] -= 500
    z_e = features(200)
    for _ in range(60):
        quantizer(z_e)
        quantizer.after_step()
    assert quantizer(z_e).codes.unique().numel() == 27


@pytest.mark.parametrize(
    ("change", "said"), [({"decay": 1.0}, "decay must be from 0"), ({"revive_below": -0.1}, "not -0.1")]
)
def test_shares_out_of_range_are_refused(change, said):
    with pytest.raises(UserError, match=said):
        quantizer_of(2, 3, **change)


@pytest.mark.parametrize("kind", ["vqvae", "hrvq", "vqvae2"])
def test_the_loop_teaches_every_kind_s_codebooks_and_revives(kind, tmp_path, monkeypatch):
    """Besides the gradients; so the tests of processes, kills and slices prove something of it."""
    revivals = []
    whole = codebook_updates.revival

    def counted(*args, **options):
        found = whole(*args, **options)
        revivals.append(int((found[0] < args[0].numel()).sum()))
        return found

    monkeypatch.setattr("smalti.tokenizers.quantizers.linked.revival", counted)
    AcceleratorState._reset_state(reset_partial_state=True)
    toys.train(tmp_path, lambda: toys.make("tokenizer", kind))
    assert len(revivals) == toys.CONFIG.steps * {"vqvae": 1, "hrvq": 2, "vqvae2": 2}[kind]
    assert sum(revivals) > 0
