"""Errors between images and their originals: MSE, PSNR, errors and seams of inpainted regions, diversity of fills.

Not here: SSIM (`baselines.py`), the Fréchet distance (`frechet.py`), and LPIPS (`smalti.tokenizers.vqgan.perceptual`).

Legend: n images, k fills of an image, c channels, h w pixels. A mask is True where a pixel is filled.
"""

import torch
from jaxtyping import Bool, Float, Float64, Integer, Shaped
from torch import Tensor

from smalti.core.errors import UserError
from smalti.images.decoding import to_float

_IMAGES_AT_ONCE = 64
MOST_DECIBELS = 100.0
"""The PSNR of exact images. That of images which are exact but for rounding to 8 bits is 59 dB."""


def mse(images: Float[Tensor, "n c h w"], truth: Float[Tensor, "n c h w"]) -> Float64[Tensor, " n"]:
    """Computes the mean squared error of each image; inputs are in [-1, 1], the error is in units of [0, 1]."""
    return _differences(images, truth).square().flatten(1).mean(1) / 4


def mse_of_pixels(images: Integer[Tensor, "n c h w"], truth: Integer[Tensor, "n c h w"]) -> Float64[Tensor, " n"]:
    """Computes `mse` of the pixels of many images, in batches: all of them as floats would need much memory."""
    batches = zip(images.split(_IMAGES_AT_ONCE), truth.split(_IMAGES_AT_ONCE), strict=True)
    return torch.cat([mse(to_float(batch), to_float(true)) for batch, true in batches])


def psnr(mse: Float64[Tensor, "*n"]) -> Float64[Tensor, "*n"]:
    """Computes the peak signal-to-noise ratio, in dB, from errors in units of [0, 1].

    It is at most `MOST_DECIBELS`, so that one exact image does not make the mean of many infinite.
    """
    return (-10 * mse.log10()).clamp(max=MOST_DECIBELS)


def masked_mse(
    images: Float[Tensor, "n c h w"], truth: Float[Tensor, "n c h w"], mask: Bool[Tensor, "n h w"]
) -> Float64[Tensor, " n"]:
    """Computes the MSE over the masked pixels of each image, in units of [0, 1]; NaN if no pixel is masked."""
    errors = _differences(images, truth).square().mean(1) / 4
    return (errors * mask).sum((1, 2)) / mask.sum((1, 2))


def seam_steps(images: Float[Tensor, "n c h w"], mask: Bool[Tensor, "n h w"]) -> Float64[Tensor, " n"]:
    """Computes the mean step |masked - unmasked| over neighbouring pixels at the edge of each image's mask.

    Neighbours are those above, below, left and right. Steps are in units of [0, 1]; 0 if the mask has no edge.
    """
    total = torch.zeros(len(images), dtype=torch.float64, device=images.device)
    pairs = torch.zeros_like(total)
    for axis in (1, 2):
        last = mask.shape[axis] - 1
        crossing = mask.narrow(axis, 0, last) ^ mask.narrow(axis, 1, last)
        steps = _differences(images.narrow(axis + 1, 0, last), images.narrow(axis + 1, 1, last)).abs().mean(1) / 2
        total += (steps * crossing).sum((1, 2))
        pairs += crossing.sum((1, 2))
    return total / pairs.clamp(min=1)


def diversity(fills: Float[Tensor, "n k c h w"], mask: Bool[Tensor, "n h w"]) -> Float64[Tensor, " n"]:
    """Computes the root mean squared difference between two of an image's k fills over masked pixels, in [0, 1]."""
    k = fills.shape[1]
    assert k > 1, "diversity needs at least 2 fills"
    variance = fills.double().var(dim=1, correction=1).mean(1) / 4  # half the mean squared difference of two fills
    return (2 * (variance * mask).sum((1, 2)) / mask.sum((1, 2))).sqrt()


def _differences(images: Shaped[Tensor, "*shape"], others: Shaped[Tensor, "*shape"]) -> Float64[Tensor, "*shape"]:
    """Subtracts images.

    Raises:
        UserError: for pixels from 0 to 255, which have another range, and whose differences would wrap around.
    """
    for each in (images, others):
        if not each.is_floating_point():
            raise UserError(f"images are {each.dtype}; give floats in [-1, 1], as smalti.images.decoding.to_float does")
    return (images - others).double()
