"""Residual VQ: a search stage by stage by hand, losses and gradients, EMA of own and shared codebooks, processes.

This file is also the program of the two processes.
"""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from smalti import UserError
from smalti.core.codes import Level
from smalti.core.randomness import row_seeds
from smalti.tokenizers.quantizers.codebook_updates import SMOOTHING
from smalti.tokenizers.quantizers.residual import ResidualQuantizer

D = 3
of_both = pytest.mark.parametrize("shared", [False, True], ids=["own", "shared"])


def residual_of(stages=3, k=4, *, seed=0, **more):
    torch.manual_seed(seed)
    return ResidualQuantizer(code_width=D, stages=stages, codebook_size=k, **more)


def features(b=4, h=2, w=3, *, seed=1):
    return torch.randn(b, D, h, w, generator=torch.Generator().manual_seed(seed), requires_grad=True)


def books_of(quantizer):
    """The codebook of each stage, in float64."""
    books = [book.codebooks[0][0].detach().double().numpy() for book in quantizer.books]
    return books * (len(quantizer.radices) if quantizer.shared else 1)


def by_hand(quantizer, z_e):
    """Returns residuals (s n d), digits (s n) and codewords (s n d), with a loop over vectors."""
    vectors = z_e.detach().double().numpy().transpose(0, 2, 3, 1).reshape(-1, D)
    residuals, digits, chosen = [], [], []
    for book in books_of(quantizer):
        digit = np.array([((vector - book) ** 2).sum(1).argmin() for vector in vectors])
        residuals.append(vectors)
        digits.append(digit)
        chosen.append(book[digit])
        vectors = vectors - book[digit]
    return np.stack(residuals), np.stack(digits), np.stack(chosen)


def grid(rows, z_e):
    b, _, h, w = z_e.shape
    return rows.reshape(b, h, w, D).transpose(0, 3, 1, 2)


@given(stages=st.integers(1, 4), k=st.integers(2, 6), shared=st.booleans(), seed=st.integers(0, 999))
@settings(max_examples=30)
def test_stages_take_the_nearest_codeword_to_what_is_left(stages, k, shared, seed):
    quantizer, z_e = residual_of(stages, k, shared=shared, seed=seed, learning="gradient"), features(2, seed=seed)
    residuals, digits, chosen = by_hand(quantizer, z_e)
    output = quantizer(z_e)
    assert np.array_equal(Level(1, 1, (k,) * stages).split(output.codes).flatten(0, 2).T, digits)
    assert quantizer.encode(z_e).equal(output.codes)
    np.testing.assert_allclose(output.z_q.detach(), grid(chosen.sum(0), z_e), atol=1e-5)
    for first in range(1, stages + 1):
        expected = grid(chosen[:first].sum(0), z_e)
        np.testing.assert_allclose(quantizer.lookup(output.codes, first).detach(), expected, atol=1e-5)
    term = ((residuals - chosen) ** 2).mean((1, 2)).sum()
    assert output.losses["codebook"].item() == pytest.approx(term, rel=1e-4)
    assert output.losses["commitment"].item() == pytest.approx(0.25 * term, rel=1e-4)


@of_both
def test_gradients_of_the_losses_by_hand(shared):
    """Commitment: each stage pulls z_e, 2 beta / (n d) times what it left. Codewords: the mean of what they miss."""
    quantizer, z_e = residual_of(shared=shared, learning="gradient"), features()
    residuals, digits, chosen = by_hand(quantizer, z_e)
    sum(quantizer(z_e).losses.values()).backward()
    missed = residuals - chosen
    scale = 2 / missed[0].size
    np.testing.assert_allclose(z_e.grad, grid(0.25 * scale * missed.sum(0), z_e), atol=1e-6)
    expected = [np.zeros((4, D)) for _ in quantizer.books]
    for stage in range(3):
        np.subtract.at(expected[0 if shared else stage], digits[stage], scale * missed[stage])
    for book, gradient in zip(quantizer.books, expected, strict=True):
        np.testing.assert_allclose(book.codebook_0.grad[0], gradient, atol=1e-6)


@pytest.mark.parametrize("gradient", ["straight-through", "rotation"])
def test_gradient_of_the_sum_reaches_the_encoder_alone(gradient):
    quantizer, z_e = residual_of(learning="gradient", gradient=gradient), features()
    upstream = torch.randn(z_e.shape)
    (quantizer(z_e).z_q * upstream).sum().backward()
    assert all(book.codebook_0.grad is None for book in quantizer.books)
    assert z_e.grad.equal(upstream) == (gradient == "straight-through")


@of_both
def test_ema_averages_the_residuals_of_each_codebook(shared):
    """A step of VQ-VAE's App. A.1 by hand; a shared codebook averages the residuals of all stages."""
    quantizer, z_e = residual_of(shared=shared, decay=0.8, revive_below=0.0), features()
    residuals, digits, _ = by_hand(quantizer, z_e)
    before = books_of(quantizer)
    assert set(quantizer(z_e).losses) == {"commitment"}
    quantizer.after_step()
    for stage, book in enumerate(quantizer.books):
        vectors, chosen = (residuals.reshape(-1, D), digits.ravel()) if shared else (residuals[stage], digits[stage])
        counts, sums = np.ones(4) * 0.8, 0.8 * before[stage].copy()
        np.add.at(counts, chosen, 0.2)
        np.add.at(sums, chosen, 0.2 * vectors)
        smoothed = (counts + SMOOTHING) / (counts.sum() + 4 * SMOOTHING) * counts.sum()
        expected = np.where(counts[:, None] > 0.8, sums / smoothed[:, None], before[stage])
        np.testing.assert_allclose(book.codebooks[0][0], expected, rtol=1e-4, atol=1e-5)


@of_both
def test_start_from_data_and_revival_use_every_codeword(shared):
    quantizer = residual_of(2, 8, shared=shared, decay=0.5, revive_below=0.1)
    z_e = features(40)
    quantizer.init_from_data(z_e)
    start = (quantizer.lookup(quantizer.encode(z_e)) - z_e).square().mean()
    assert start < (residual_of(2, 8, shared=shared)(z_e).z_q - z_e).square().mean()
    with torch.no_grad():
        for book in quantizer.books:
            book.codebook_0[0, 1:] += 1000
    for _ in range(20):
        quantizer(z_e)
        quantizer.after_step(torch.arange(40))
    digits = Level(1, 1, (8, 8)).split(quantizer.encode(z_e))
    assert len(digits.unique()) == 8
    assert (quantizer.lookup(quantizer.encode(z_e)) - z_e).square().mean() < 2 * start


@of_both
def test_micro_batches_of_a_step_equal_one_batch(shared):
    z_e, seeds = features(6), row_seeds(3, torch.arange(6))
    whole, split = (residual_of(shared=shared, revive_below=0.9, decay=0.5) for _ in range(2))
    whole(z_e)
    for micro_batch in z_e.chunk(3):
        split(micro_batch)
    before = {name: tensor.clone() for name, tensor in whole.state_dict().items()}
    for quantizer in (whole, split):
        quantizer.after_step(seeds)
    for name, tensor in whole.state_dict().items():
        torch.testing.assert_close(split.state_dict()[name], tensor)
        assert not before[name].equal(tensor)


@of_both
def test_equals_vector_quantize_pytorch(shared):
    library = pytest.importorskip("vector_quantize_pytorch")
    quantizer, z_e = residual_of(shared=shared), features()
    theirs = library.ResidualVQ(
        dim=D,
        num_quantizers=3,
        codebook_size=4,
        shared_codebook=shared,
        commitment_weight=0.25,
        rotation_trick=False,
    ).train()
    for layer, book in zip(theirs.layers, list(quantizer.books) * (3 if shared else 1), strict=True):
        layer._codebook.embed.data.copy_(book.codebook_0)
        layer._codebook.embed_avg.data.copy_(book.codebook_0)
        layer._codebook.initted.fill_(True)
    x = z_e.detach().clone().requires_grad_()
    output, (z_q, codes, losses) = quantizer(z_e), theirs(x.movedim(1, -1).flatten(1, 2), freeze_codebook=True)
    assert Level(1, 1, (4, 4, 4)).split(output.codes).flatten(1, 2).equal(codes)
    torch.testing.assert_close(output.z_q.movedim(1, -1).flatten(1, 2), z_q, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(output.losses["commitment"], losses.sum(), atol=1e-5, rtol=1e-5)
    output.losses["commitment"].backward()
    losses.sum().backward()
    torch.testing.assert_close(z_e.grad, x.grad, atol=1e-6, rtol=1e-4)


def trained_alone(shared, rows=slice(None)):
    """Three steps of eight images, of which this process has `rows`."""
    quantizer = residual_of(shared=shared, revive_below=0.9, decay=0.5)
    for step in range(3):
        quantizer(features(8, seed=step).detach()[rows].requires_grad_())
        quantizer.after_step(row_seeds(step, torch.arange(8))[rows])
    return quantizer.state_dict()


def test_two_processes_equal_one(tmp_path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, str(tmp_path)]
    processes = [subprocess.Popen([*command, str(rank)], env=environment, stderr=subprocess.PIPE) for rank in (0, 1)]
    for process in processes:
        _, err = process.communicate(timeout=300)
        assert process.returncode == 0, err.decode()
    for shared in (False, True):
        first, second = (torch.load(tmp_path / f"{shared}-{rank}.pt", weights_only=True) for rank in (0, 1))
        for name, tensor in trained_alone(shared).items():
            assert first[name].equal(second[name])
            torch.testing.assert_close(first[name], tensor, atol=1e-5, rtol=1e-5)
            assert not tensor.equal(residual_of(shared=shared).state_dict()[name])


def test_impossible_sizes_are_refused():
    with pytest.raises(UserError, match="at least 1 stage"):
        residual_of(0)
    with pytest.raises(UserError, match="more than 2147483647 leaves"):
        residual_of(4, 2**9)
    with pytest.raises(UserError, match="one size for all stages, not 4 2"):
        ResidualQuantizer(code_width=3, stages=2, codebook_size=(4, 2), shared=True)
    with pytest.raises(UserError, match="3 stages need as many codebook sizes, or one for all, not 2"):
        ResidualQuantizer(code_width=3, stages=3, codebook_size=(4, 2))


def test_stages_may_differ_in_size_and_weight():
    quantizer = ResidualQuantizer(code_width=3, stages=2, codebook_size=(4, 2), commitment_weight=(1.0, 0.0)).eval()
    z_e = torch.randn(2, 3, 4, 5)
    output = quantizer(z_e)
    assert quantizer.radices == (4, 2)
    assert int(output.codes.max()) < 8
    first = quantizer.lookup(output.codes, digits=1)
    torch.testing.assert_close(output.losses["commitment"], (z_e - first).square().mean())
    second = quantizer.lookup(output.codes, digits=slice(1, 2))
    torch.testing.assert_close(first + second, quantizer.lookup(output.codes))


if __name__ == "__main__":
    folder, number = sys.argv[1], int(sys.argv[2])
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=number, world_size=2)
    for each in (False, True):
        torch.save(trained_alone(each, slice(4 * number, 4 * number + 4)), f"{folder}/{each}-{number}.pt")
    torch.distributed.destroy_process_group()
