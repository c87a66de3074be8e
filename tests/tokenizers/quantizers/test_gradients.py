"""Gradient estimators: against a rotation matrix built by hand, another library, and the directions they promise."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from smalti.tokenizers.quantizers.gradients import with_gradient


def pair(n, d, seed, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    vectors = torch.randn(n, d, generator=generator, dtype=torch.float64) * scale
    return vectors.requires_grad_(), torch.randn(n, d, generator=generator, dtype=torch.float64)


def rotation(u, q):
    """The rotation in the plane of two unit vectors that takes u to q, by Rodrigues' formula; identity elsewhere."""
    cosine = u @ q
    normal = q - cosine * u
    normal /= np.linalg.norm(normal)
    sine, plane = np.sqrt(1 - cosine**2), np.stack([u, normal])
    turn = np.array([[cosine, -sine], [sine, cosine]])
    return np.eye(len(u)) + plane.T @ (turn - np.eye(2)) @ plane


@given(n=st.integers(1, 4), d=st.integers(2, 6), seed=st.integers(0, 999))
def test_rotation_applies_the_transposed_rotation_to_gradients(n, d, seed):
    vectors, quantized = pair(n, d, seed)
    upstream = torch.randn(n, d, generator=torch.Generator().manual_seed(seed + 1), dtype=torch.float64)
    output = with_gradient(vectors, quantized, "rotation")
    torch.testing.assert_close(output.detach(), quantized)
    (output * upstream).sum().backward()
    for x, target, received, gradient in zip(vectors.detach(), quantized, upstream, vectors.grad, strict=True):
        x, target, received = x.numpy(), target.numpy(), received.numpy()
        lengths = np.linalg.norm(x), np.linalg.norm(target)
        expected = lengths[1] / lengths[0] * (rotation(x / lengths[0], target / lengths[1]).T @ received)
        np.testing.assert_allclose(gradient, expected, atol=1e-9)


@given(seed=st.integers(0, 999), gradient=st.sampled_from(["straight-through", "rotation"]))
def test_values_are_the_quantized_vectors_and_get_no_gradient(seed, gradient):
    vectors, quantized = pair(3, 4, seed)
    quantized.requires_grad_()
    output = with_gradient(vectors, quantized, gradient)
    torch.testing.assert_close(output.detach(), quantized.detach())
    output.sum().backward()
    assert quantized.grad is None
    assert vectors.grad.isfinite().all()


def test_straight_through_copies_the_gradient():
    vectors, quantized = pair(3, 4, 0)
    upstream = torch.randn(3, 4, dtype=torch.float64)
    (with_gradient(vectors, quantized, "straight-through") * upstream).sum().backward()
    assert vectors.grad.equal(upstream)


@pytest.mark.parametrize("short", ["vectors", "quantized", "both"])
def test_vectors_without_direction_copy_the_gradient(short):
    vectors, quantized = (torch.zeros(2, 3) if short in (name, "both") else torch.ones(2, 3) for name in SHORT)
    vectors.requires_grad_()
    output = with_gradient(vectors, quantized, "rotation")
    assert output.detach().equal(quantized)
    output.sum().backward()
    assert vectors.grad.equal(torch.ones(2, 3))


SHORT = ("vectors", "quantized")


def test_opposite_vectors_are_turned_round():
    vectors = torch.tensor([[1.0, 0.0, 0.0]], requires_grad=True)
    output = with_gradient(vectors, torch.tensor([[-2.0, 0.0, 0.0]]), "rotation")
    output[0, 0].backward()
    torch.testing.assert_close(vectors.grad, torch.tensor([[-2.0, 0.0, 0.0]]))


def test_rotation_equals_vector_quantize_pytorch():
    library = pytest.importorskip("vector_quantize_pytorch.vector_quantize_pytorch")
    vectors, quantized = (each.detach().float() for each in pair(50, 8, 3))
    ours, theirs = vectors.clone().requires_grad_(), vectors.clone().requires_grad_()
    upstream = torch.randn(50, 8)
    output, expected = with_gradient(ours, quantized, "rotation"), library.rotate_to(theirs, quantized)
    torch.testing.assert_close(output, expected, atol=1e-5, rtol=1e-5)
    (output * upstream).sum().backward()
    (expected * upstream).sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-5, rtol=1e-4)
