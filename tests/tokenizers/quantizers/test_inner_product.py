"""Quantizer of the largest inner product: brute-force search, the straight-through gradient, the terms of the loss."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from smalti import UserError
from smalti.tokenizers.quantizers import search
from smalti.tokenizers.quantizers.inner_product import InnerProductQuantizer


def quantizer_of(k=7, d=3, **more):
    torch.manual_seed(0)
    return InnerProductQuantizer(
        code_width=d, codebook_size=k, **{"commitment_weight": 0.25, "entropy_weight": 0.5, **more}
    )


@pytest.mark.parametrize("weight", ["commitment_weight", "entropy_weight"])
@pytest.mark.parametrize("value", [-1.0, float("nan")])
def test_negative_weights_are_refused(weight, value):
    quantizer_of(**{weight: 0.0})
    with pytest.raises(UserError, match=f"commitment_weight and entropy_weight must be at least 0, not .*{value}"):
        quantizer_of(**{weight: value})


@given(k=st.integers(2, 40), b=st.integers(1, 3), tile=st.integers(1, 9), seed=st.integers(0, 2**16))
def test_codes_have_the_largest_inner_product(k, b, tile, seed):
    """Compares with every codeword, for search tiles of any size; `forward` and `encode` agree."""
    quantizer = quantizer_of(k)
    z_e = torch.randn(b, 3, 2, 5, generator=torch.Generator().manual_seed(seed))
    products = (z_e[:, None] * quantizer.codebook[None, :, :, None, None]).sum(2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(search, "TILE_CODEWORDS", tile)
        patch.setattr(search, "EAGER_VECTORS", 4)
        codes = quantizer.encode(z_e)
    assert codes.equal(products.argmax(1))
    output = quantizer(z_e)
    assert output.codes.equal(codes)
    torch.testing.assert_close(output.z_q, quantizer.lookup(codes))
    with pytest.raises(UserError, match="1 digit; give a number"):
        quantizer.lookup(codes, 2)


def test_first_of_equal_codewords_is_chosen():
    quantizer = quantizer_of()
    quantizer.codebook.data[:] = 1
    assert quantizer.encode(torch.ones(1, 3, 1, 2)).equal(torch.zeros(1, 1, 2, dtype=torch.long))


def test_straight_through_gradient_reaches_every_codeword():
    """The backward pass is that of the softmax of the products, plus the chosen codewords' own."""
    quantizer, z_e, weights = quantizer_of(), torch.randn(2, 3, 2, 2, requires_grad=True), torch.randn(2, 3, 2, 2)
    (quantizer(z_e).z_q * weights).sum().backward()
    ours, codebook_gradient = z_e.grad, quantizer.codebook.grad
    z_e.grad = quantizer.codebook.grad = None
    soft = torch.einsum("bdhw,kd->bkhw", z_e, quantizer.codebook).softmax(1)
    codewords = quantizer.codebook.detach()
    (torch.einsum("bkhw,kd->bdhw", soft, codewords) * weights).sum().backward()
    hard = F.one_hot(quantizer.encode(z_e), 7).float()
    expected = quantizer.codebook.grad + torch.einsum("bhwk,bdhw->kd", hard, weights)
    torch.testing.assert_close(ours, z_e.grad)
    torch.testing.assert_close(codebook_gradient, expected)
    assert (codebook_gradient.abs().sum(1) > 0).all()


def test_losses_are_weighted_terms():
    quantizer, z_e = quantizer_of(), torch.randn(2, 3, 4, 4)
    losses, codewords = quantizer(z_e).losses, quantizer.lookup(quantizer.encode(z_e))
    error = (codewords - z_e).square().mean()
    for name, weight in {"quantization": 1, "codebook": 1, "commitment": 0.25}.items():
        torch.testing.assert_close(losses[name], weight * error)
    p = (torch.einsum("bdhw,kd->bhwk", z_e, quantizer.codebook) / 0.01).softmax(-1).flatten(0, 2).double()
    entropy = torch.distributions.Categorical
    expected = 0.5 * (entropy(p).entropy().mean() - entropy(p.mean(0)).entropy())
    torch.testing.assert_close(losses["entropy"].double(), expected, atol=1e-5, rtol=1e-5)


def test_entropy_loss_spreads_the_codes():
    """Vectors that all choose one codeword choose several after training."""
    quantizer = quantizer_of(k=8, entropy_weight=1.0)
    z_e = torch.randn(4, 3, 4, 4) / 10 + 2
    before = quantizer.encode(z_e).unique().numel()
    optimizer = torch.optim.Adam(quantizer.parameters(), 0.02)
    for _ in range(100):
        optimizer.zero_grad()
        sum(quantizer(z_e).losses.values()).backward()
        optimizer.step()
    assert quantizer.encode(z_e).unique().numel() > before
