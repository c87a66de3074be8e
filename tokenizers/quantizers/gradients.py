"""Gradient estimators of quantization: how the gradient of a quantized vector reaches the vector that it replaced.

Rounding to a codeword has no useful gradient. The quantizers with a nearest codeword choose one of these estimators.
"""

from typing import Literal, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

Gradient: TypeAlias = Literal["straight-through", "rotation"]

SHORTEST = 1e-6
"""Length under which a vector has no direction to rotate."""


def with_gradient(
    vectors: Float[Tensor, "n d"], quantized: Float[Tensor, "n d"], gradient: Gradient
) -> Float[Tensor, "n d"]:
    """Returns the quantized vectors, with a gradient for `vectors` and none for `quantized`.

    `straight-through` copies the gradient (VQ-VAE, arXiv 1711.00937, Sec. 3.2). `rotation` treats the quantized vector
    as a rotation and scaling of the vector that are constants (the rotation trick, arXiv 2410.06424, Sec. 4.2), so the
    gradient is rotated and scaled too: vectors of one codeword get different gradients. Without a direction, where one
    of the two is shorter than `SHORTEST`, the gradient is copied.
    """
    estimate = vectors
    if gradient == "rotation":
        length, quantized_length = (each.norm(dim=1, keepdim=True).detach() for each in (vectors, quantized))
        turned = _rotated(vectors, quantized, length, quantized_length)
        estimate = torch.where(torch.minimum(length, quantized_length) > SHORTEST, turned, vectors)
    return estimate + (quantized - estimate).detach()


def _rotated(vectors: Tensor, quantized: Tensor, length: Tensor, quantized_length: Tensor) -> Tensor:
    """Rotates and scales each vector onto its quantized vector, by two reflections: I - 2 r r' + 2 q u'."""
    u = vectors.detach() / length.clamp_min(SHORTEST)
    q = quantized.detach() / quantized_length.clamp_min(SHORTEST)
    r = torch.nn.functional.normalize(u + q, dim=1)
    reflected = vectors - 2 * (vectors * r).sum(1, keepdim=True) * r + 2 * (vectors * u).sum(1, keepdim=True) * q
    return quantized_length / length.clamp_min(SHORTEST) * reflected
