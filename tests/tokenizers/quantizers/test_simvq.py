"""SimVQ: brute-force search, gradients of the map by finite differences and by another library, the start from data."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from smalti import UserError
from smalti.tokenizers.quantizers.simvq import SimVQ

D = 4


def simvq_of(k=7, *, seed=0, **more):
    torch.manual_seed(seed)
    quantizer = SimVQ(code_width=D, codebook_size=k, **{"commitment_weight": 0.25, **more})
    torch.nn.init.normal_(quantizer.map.weight)
    return quantizer


def features(b=2, h=3, w=2, seed=1):
    return torch.randn(b, D, h, w, generator=torch.Generator().manual_seed(seed), requires_grad=True)


def mapped(quantizer):
    return quantizer.frozen_codebook.double().numpy() @ quantizer.map.weight.detach().double().numpy().T


@given(k=st.integers(2, 30), seed=st.integers(0, 999))
@settings(max_examples=30)
def test_codes_are_the_nearest_mapped_codewords(k, seed):
    quantizer, z_e = simvq_of(k, seed=seed), features(seed=seed)
    vectors = z_e.detach().double().numpy().transpose(0, 2, 3, 1)
    distances = ((vectors[..., None, :] - mapped(quantizer)) ** 2).sum(-1)
    codes = quantizer.encode(z_e)
    chosen = np.take_along_axis(distances, codes.numpy()[..., None], -1)[..., 0]
    np.testing.assert_allclose(chosen, distances.min(-1), atol=1e-5)
    output = quantizer(z_e)
    assert output.codes.equal(codes)
    np.testing.assert_allclose(
        quantizer.lookup(codes).detach(), mapped(quantizer)[codes].transpose(0, 3, 1, 2), atol=1e-5
    )
    torch.testing.assert_close(output.z_q, quantizer.lookup(codes), atol=1e-5, rtol=1e-5)


def test_only_the_map_learns_and_moves_every_codeword():
    quantizer = simvq_of()
    assert [name for name, _ in quantizer.named_parameters()] == ["map.weight"]
    before, optimizer = quantizer.codebook.detach(), torch.optim.SGD(quantizer.parameters(), 0.1)
    sum(quantizer(features()).losses.values()).backward()
    optimizer.step()
    assert ((quantizer.codebook - before).abs().sum(1) > 0).all()


def test_codebook_gradient_by_finite_differences():
    quantizer, z_e = simvq_of(), features().detach()
    quantizer(z_e).losses["codebook"].backward()
    codes, step = quantizer.encode(z_e).flatten(), 1e-6
    vectors = z_e.double().numpy().transpose(0, 2, 3, 1).reshape(-1, D)
    frozen, weight = quantizer.frozen_codebook.double().numpy()[codes], quantizer.map.weight.detach().double().numpy()

    def loss(w):
        return ((frozen @ w.T - vectors) ** 2).mean()

    for index in np.ndindex(D, D):
        moved = weight.copy()
        moved[index] += step
        assert quantizer.map.weight.grad[index] == pytest.approx((loss(moved) - loss(weight)) / step, abs=1e-4)


@pytest.mark.parametrize("gradient", ["straight-through", "rotation"])
def test_values_losses_and_gradients_equal_vector_quantize_pytorch(gradient):
    library = pytest.importorskip("vector_quantize_pytorch")
    quantizer, z_e, weights = simvq_of(20, gradient=gradient), features(3, 4, 4), torch.randn(3, D, 4, 4)
    theirs = library.SimVQ(dim=D, codebook_size=20, channel_first=True, rotation_trick=gradient == "rotation")
    theirs.load_state_dict(
        {"frozen_codebook": quantizer.frozen_codebook, "code_transform.weight": quantizer.map.weight.detach()}
    )
    y = z_e.detach().clone().requires_grad_()
    output, (z_q, codes, loss) = quantizer(z_e), theirs(y)
    assert output.codes.equal(codes)
    torch.testing.assert_close(output.z_q, z_q, atol=1e-5, rtol=1e-5)
    total = sum(output.losses.values())
    torch.testing.assert_close(total, loss)
    ((output.z_q * weights).sum() + total).backward()
    ((z_q * weights).sum() + loss).backward()
    torch.testing.assert_close(z_e.grad, y.grad, atol=1e-5, rtol=1e-4)
    if gradient == "straight-through":  # theirs lets the rotation's length reach the codebook
        torch.testing.assert_close(quantizer.map.weight.grad, theirs.code_transform.weight.grad)


def test_start_from_data_gives_codewords_the_moments_of_the_vectors():
    torch.manual_seed(0)
    quantizer = SimVQ(code_width=D, codebook_size=20_000, commitment_weight=0.25)
    z_e = torch.randn(50, D, 8, 8) @ torch.randn(8, 8) / 3
    z_e = torch.einsum("bdhw,de->behw", z_e, torch.randn(D, D))
    quantizer.init_from_data(z_e)
    vectors, codebook = z_e.movedim(1, -1).reshape(-1, D), quantizer.codebook.detach()
    moments, expected = codebook.T @ codebook / len(codebook), vectors.T @ vectors / len(vectors)
    assert (moments - expected).norm() < 0.05 * expected.norm()


@pytest.mark.parametrize("change", [{"k": 1}, {"commitment_weight": -0.1}])
def test_impossible_settings_are_refused(change):
    with pytest.raises(UserError, match="at least 2 codewords"):
        simvq_of(**change)
