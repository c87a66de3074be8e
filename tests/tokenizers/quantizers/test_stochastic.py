"""HQA's stochastic quantizer: posterior and losses against hand computation, samples, resets of dead codewords."""

import math

import numpy as np
import pytest
import torch

from smalti.core.randomness import row_seeds
from smalti.tokenizers.quantizers.stochastic import RESET_NOISE, RESET_STEPS, StochasticQuantizer, sample_codes

D, K = 3, 5


def seeds_of(count: int, seed: int = 0) -> torch.Tensor:
    return row_seeds(seed, torch.arange(count))


def vectors_of(z_e: torch.Tensor) -> np.ndarray:
    return z_e.detach().double().numpy().transpose(0, 2, 3, 1).reshape(-1, D)


def quantizer_of(**more) -> StochasticQuantizer:
    torch.manual_seed(0)
    return StochasticQuantizer(code_width=D, codebook_size=K, **more)


def features(b: int = 2, h: int = 2, w: int = 3) -> torch.Tensor:
    return torch.randn(b, D, h, w, generator=torch.Generator().manual_seed(1))


def posterior(z: np.ndarray, codebook: np.ndarray) -> np.ndarray:
    """Posterior of one vector (Eq. 3)."""
    unnormalized = np.array([math.exp(-sum((a - b) ** 2 for a, b in zip(z, e, strict=True))) for e in codebook])
    return unnormalized / unnormalized.sum()


def test_losses_equal_eq_4_and_their_sum_the_mixture_density():
    """Computes entropy and commitment position by position.

    Their sum is the negative log-density of a uniform mixture of Gaussians of variance 1/2 at the codewords, up to
    log k + d/2 log pi (Appendix B).
    """
    quantizer, z_e = quantizer_of(weight=0.3).eval(), features()
    codebook = quantizer.codebook.detach().double().numpy()
    entropies, commitments, densities = [], [], []
    for z in vectors_of(z_e):
        q, squares = posterior(z, codebook), ((codebook - z) ** 2).sum(1)
        entropies.append(-sum(p * math.log(p) for p in q))
        commitments.append(sum(p * square for p, square in zip(q, squares, strict=True)))
        gaussians = [math.exp(-square / (2 * 0.5)) / (2 * math.pi * 0.5) ** (D / 2) for square in squares]
        densities.append(-math.log(sum(gaussians) / K))
    losses = quantizer(z_e, seeds_of(2), torch.zeros(2)).losses
    assert losses["entropy"].item() == pytest.approx(-0.3 * np.mean(entropies), rel=1e-5)
    assert losses["commitment"].item() == pytest.approx(0.3 * np.mean(commitments), rel=1e-5)
    constant = math.log(K) + D / 2 * math.log(math.pi)
    total = sum(loss.item() for loss in losses.values()) / 0.3
    assert total == pytest.approx(np.mean(densities) - constant, rel=1e-5)


def test_gradients_of_the_losses_equal_hand_computation():
    """The gradient of the sum is sum_k q_k 2 (z - e_k) for z_e, and minus its terms for the codewords."""
    quantizer, z_e = quantizer_of().eval(), features().requires_grad_()
    sum(quantizer(z_e, seeds_of(2), torch.zeros(2)).losses.values()).backward()
    codebook, vectors = quantizer.codebook.detach().double().numpy(), vectors_of(z_e)
    codebook_gradient = np.zeros_like(codebook)
    for z, gradient in zip(vectors, vectors_of(z_e.grad), strict=True):
        terms = 2 * posterior(z, codebook)[:, None] * (z - codebook) / len(vectors)
        np.testing.assert_allclose(gradient, terms.sum(0), rtol=1e-4, atol=1e-6)
        codebook_gradient -= terms
    np.testing.assert_allclose(quantizer.codebook.grad, codebook_gradient, rtol=1e-4, atol=1e-6)


def test_deterministic_losses_equal_eq_2():
    quantizer, z_e = quantizer_of(probabilistic=False, weight=2.0), features()
    codebook = quantizer.codebook.detach().double().numpy()
    square = np.mean([((codebook - z) ** 2).sum(1).min() for z in vectors_of(z_e)])
    losses = quantizer(z_e, seeds_of(2), torch.zeros(2)).losses
    assert losses["codebook"].item() == pytest.approx(2 * square, rel=1e-5)
    assert losses["commitment"].item() == pytest.approx(2 * 0.25 * square, rel=1e-5)


@pytest.mark.parametrize("method", ["encode", "training"])
def test_codes_are_sampled_from_the_posterior(method):
    """Frequencies over many images of one vector are Eq. 3's, for inverse-CDF and Gumbel-softmax samples alike."""
    quantizer, count = quantizer_of(), 4000
    quantizer.codebook.data.mul_(0.3)  # near each other, so that no code is certain
    z_e = (0.3 * features(1, 1, 1)).expand(count, D, 1, 1)
    codes = (
        quantizer.encode(z_e, seeds_of(count))
        if method == "encode"
        else quantizer(z_e, seeds_of(count), torch.zeros(count)).codes
    )
    expected = posterior(vectors_of(z_e[:1])[0], quantizer.codebook.detach().double().numpy())
    frequencies = np.bincount(codes.flatten(), minlength=K) / count
    np.testing.assert_allclose(frequencies, expected, atol=4 * math.sqrt(0.25 / count))
    assert expected.max() < 0.5


def test_samples_depend_on_the_seed_and_not_on_the_batch():
    logits, seeds = torch.randn(6, 2, 2, K, generator=torch.Generator().manual_seed(0)), seeds_of(6)
    together = sample_codes(logits, seeds)
    assert together.equal(torch.cat([sample_codes(logits[i : i + 1], seeds[i : i + 1]) for i in range(6)]))
    assert not together.equal(sample_codes(logits, seeds_of(6, seed=1)))
    assert sample_codes(logits, None).equal(logits.argmax(-1))


def test_gumbel_softmax_hardens_with_training_progress():
    """At the end of training z_q is the sampled codeword; at the start it is a mixture of codewords."""
    quantizer, z_e = quantizer_of(temperature=2.0), features()
    soft, hard = (quantizer(z_e, seeds_of(2), torch.full((2,), progress)) for progress in (0.0, 1.0))
    torch.testing.assert_close(hard.z_q, quantizer.lookup(hard.codes), atol=1e-4, rtol=0)
    assert soft.codes.equal(hard.codes)  # the noise is the same
    assert not soft.z_q.allclose(hard.z_q, atol=0.1)
    halfway = quantizer._temperature(torch.tensor([0.5]))
    assert halfway.item() == pytest.approx(2.0 * 0.5 + 1e-3 * 0.5)


def test_reset_moves_only_dead_codewords_and_only_when_due():
    """Dead codewords move next to different codewords in use; a bad step moves none."""
    for due in (False, True):
        quantizer = quantizer_of()
        quantizer.use.copy_(torch.tensor([2.0, 1e-9, 1.0, 1e-9, 2.0]))
        quantizer.steps.fill_(RESET_STEPS - 1 if due else 0)
        quantizer._used.append(torch.tensor([2.0, 0.0, 1.0, 0.0, 2.0]))
        before = quantizer.codebook.detach().clone()
        quantizer.after_step(seeds_of(2))
        moved = (quantizer.codebook != before).any(1)
        assert moved.tolist() == ([False, True, False, True, False] if due else [False] * K)
        if due:
            gaps = torch.cdist(quantizer.codebook[moved], before[[0, 2, 4]])
            assert gaps.min(1).values.max() < 6 * RESET_NOISE * math.sqrt(D)
            assert gaps.argmin(1).unique().numel() == 2  # no codeword is the target twice
            assert (quantizer.use > 0.03 * quantizer.use.max()).all()  # reset codewords are not dead at once
    bad = quantizer_of()
    bad.steps.fill_(RESET_STEPS - 1)
    bad._used.append(torch.tensor([2.0, 0.0, 1.0, 0.0, 2.0]))
    bad.use.copy_(torch.tensor([2.0, 1e-9, 1.0, 1e-9, 2.0]))
    before = bad.codebook.detach().clone()
    bad.after_step(seeds_of(2), torch.tensor(True))
    assert bad.codebook.equal(before)


def effective_rate(reset_below: float) -> float:
    """Entropy in bits of a trained quantizer's codes, if all codewords but one started far away."""
    torch.manual_seed(0)
    quantizer = StochasticQuantizer(code_width=D, codebook_size=16, reset_below=reset_below)
    quantizer.codebook.data[1:] += 30
    optimizer = torch.optim.Adam(quantizer.parameters(), lr=0.05)
    z_e = 2 * torch.randn(256, D, 1, 1)
    for step in range(200):
        output = quantizer(z_e, seeds_of(256, step), torch.full((256,), step / 200))
        optimizer.zero_grad()
        ((output.z_q - z_e).square().mean() + sum(output.losses.values())).backward()
        optimizer.step()
        quantizer.after_step(seeds_of(256, step))
    shares = torch.bincount(quantizer.encode(z_e).flatten(), minlength=16) / 256
    return -sum(p * math.log2(p) for p in shares.tolist() if p)


def test_resets_prevent_codebook_collapse():
    without, reset = effective_rate(0.0), effective_rate(0.03)
    print(f"effective rate of 16 codes: {without:.2f} bits without resets, {reset:.2f} with")
    assert without < 1
    assert reset > 2.5
