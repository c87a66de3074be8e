"""Cosine-similarity codebooks (ViT-VQGAN): search, losses, gradients and updates against formulas on unit vectors."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from smalti import VQGAN, LinkedQuantizer, UserError, VQGANConfig
from smalti.tokenizers.quantizers.codebook_updates import ema_update

K, D, BETA = 7, 3, 0.25


def quantizer_of(**more):
    torch.manual_seed(0)
    return LinkedQuantizer(
        code_width=D, branching=K, commitment_weight=BETA, cosine=True, **{"learning": "gradient", **more}
    )


def features(seed=1):
    return torch.randn(2, D, 4, 5, generator=torch.Generator().manual_seed(seed), requires_grad=True)


def directions(rows):
    """Unit vectors, computed in float64."""
    rows = rows.detach().double().numpy()
    return rows / np.sqrt((rows**2).sum(-1, keepdims=True))


@given(seed=st.integers(0, 2**16), length=st.floats(0.01, 100))
@settings(max_examples=20)
def test_search_takes_the_largest_cosine_at_any_vector_length(seed, length):
    quantizer, z_e = quantizer_of(), features(seed)
    cosines = directions(z_e.permute(0, 2, 3, 1)) @ directions(quantizer.codebook_0[0]).T
    codes = quantizer.encode(z_e)
    assert np.array_equal(codes, cosines.argmax(-1))
    assert quantizer.encode(z_e * length).equal(codes)
    expected = directions(quantizer.codebook_0[0])[codes].transpose(0, 3, 1, 2)
    np.testing.assert_allclose(quantizer.lookup(codes).detach(), expected, atol=1e-6)


def test_losses_and_gradients_equal_formulas_on_unit_vectors():
    """The straight-through gradient of z_q reaches z_e through its scaling to length 1."""
    quantizer, z_e, weights = quantizer_of(), features(), torch.randn(2, D, 4, 5)
    output = quantizer(z_e)
    ((output.z_q * weights).sum() + sum(output.losses.values())).backward()
    ours, z_e.grad = [z_e.grad, quantizer.codebook_0.grad.clone()], None
    book = quantizer.codebook_0.detach().clone().requires_grad_()
    vectors = z_e / z_e.square().sum(1, keepdim=True).sqrt()
    unit = (book[0] / book[0].square().sum(1, keepdim=True).sqrt())[output.codes].permute(0, 3, 1, 2)
    terms = (vectors.detach() - unit).square().mean(), BETA * (vectors - unit.detach()).square().mean()
    torch.testing.assert_close([output.losses[name] for name in ("codebook", "commitment")], list(terms))
    ((vectors * weights).sum() + sum(terms)).backward()
    torch.testing.assert_close(ours, [z_e.grad, book.grad])
    torch.testing.assert_close(output.z_q, unit)


def test_codeword_is_the_direction_of_the_moving_average():
    quantizer = quantizer_of(learning="ema", decay=0.8, revive_below=0.0)
    before, counts, z_e = quantizer.codebook_0.clone(), quantizer.counts_0.clone(), features()
    codes = quantizer(z_e).codes.flatten()
    quantizer.after_step()
    vectors = torch.tensor(directions(z_e.permute(0, 2, 3, 1).reshape(-1, D))).float()
    chosen = F.one_hot(codes, K).float()
    means, _ = ema_update(before, counts, chosen=chosen.sum(0)[None], sums=(chosen.T @ vectors)[None], decay=0.8)
    assert not torch.allclose(means, before)
    np.testing.assert_allclose(quantizer.codebooks[0], directions(means), atol=1e-6)


def test_initial_and_revived_codewords_are_directions_of_vectors():
    """All vectors lie on three lines, so every codeword in use must be near one of them."""
    quantizer = quantizer_of(learning="ema", revive_below=0.6)
    lines = torch.eye(D)[torch.arange(60) % D]
    z_e = (lines * torch.linspace(0.1, 9, 60)[:, None]).T.reshape(1, D, 6, 10)
    quantizer.init_from_data(z_e)
    for _ in range(3):
        quantizer(z_e)
        quantizer.after_step()
    codewords = quantizer.lookup(quantizer.encode(z_e))
    torch.testing.assert_close(codewords, F.normalize(z_e, dim=1), atol=1e-4, rtol=0)


def test_vqgan_with_cosine_codebook():
    torch.manual_seed(0)
    config = {"widths": (4, 6), "norm_groups": 2, "latent_width": 5, "code_width": D, "branching": K}
    tokenizer = VQGAN(VQGANConfig(**config, quantizer="cosine")).eval()
    images = torch.rand(2, 3, 8, 12) * 2 - 1
    tokenizer.init_from_data(images)
    (codes,), output = tokenizer.encode(images), tokenizer(images)
    assert codes.equal(output.codes[0])
    assert len(codes.unique()) > 2
    torch.testing.assert_close(tokenizer.decode((codes,)), output.reconstruction.clamp(-1, 1), atol=1e-5, rtol=0)
    with pytest.raises(UserError, match="one layer; use depth 1 and one branching, not 2 layers"):
        VQGAN(VQGANConfig(**config, quantizer="cosine", depth=2))
