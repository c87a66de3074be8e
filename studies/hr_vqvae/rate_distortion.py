"""The error that an ideal transform coder would reach: the rate-distortion function of a Gaussian source.

A line below which a model's error shows that it has learned more than the covariance of the pixels.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from smalti.images.image_set import ImageRows, ImageSet

COVARIANCE_IMAGES = 20_000
"""Most training images that the covariance is estimated from."""
_IMAGES_AT_ONCE = 1_000


def gaussian_distortion(variances: Float[Tensor, " d"], bits: float) -> float:
    """Returns the least mean squared error at which `bits` can describe a sample of a Gaussian source.

    Reverse water-filling (Cover and Thomas, Elements of Information Theory, Theorem 10.3.3): every component keeps
    min(theta, variance), with theta such that the others' rates, half the logarithm of variance / theta, sum to `bits`.

    Args:
        variances: of the source's components: the eigenvalues of its covariance.
        bits: for one sample of all components.

    Returns:
        The error per component, in the variances' unit.
    """
    ordered = variances.double()[variances > 0].sort(descending=True).values
    if not len(ordered):
        return 0.0
    counts = torch.arange(1, len(ordered) + 1, dtype=torch.float64)
    theta = ((ordered.log2().cumsum(0) - 2 * bits) / counts).exp2()  # if the first 1, 2, ... components get bits
    active = int((theta < ordered).sum())  # those above the water are the first ones
    level = float(theta[active - 1]) if active else float(ordered[0])
    return (active * level + float(ordered[active:].sum())) / len(variances)


def pixel_variances(images: ImageSet) -> list[float]:
    """Returns the eigenvalues of the covariance of the training images' pixels, in units of [0, 1] squared."""
    rows = ImageRows(images, split="train", flips=False)
    chosen = torch.arange(min(len(rows), COVARIANCE_IMAGES))
    total, products = 0.0, 0.0
    for indices in chosen.split(_IMAGES_AT_ONCE):
        pixels = rows.__getitems__(indices.tolist())["images"].flatten(1).double() / 255
        total, products = total + pixels.sum(0), products + pixels.T @ pixels
    mean = total / len(chosen)
    covariance = products / len(chosen) - torch.outer(torch.as_tensor(mean), torch.as_tensor(mean))
    return torch.linalg.eigvalsh(covariance).clamp(min=0).tolist()


def bits_of(positions: int, leaves: int) -> float:
    """Returns the bits of an image's codes."""
    return positions * math.log2(leaves)
