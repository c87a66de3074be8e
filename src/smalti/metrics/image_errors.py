"""Errors between images: MSE, PSNR, errors within a hole, steps at its seam, and diversity of fills."""

import torch
from jaxtyping import Bool, Float, Float64
from torch import Tensor


def mse(images: Float[Tensor, "n c h w"], truth: Float[Tensor, "n c h w"]) -> Float64[Tensor, " n"]:
    """Mean squared error of each image in [-1, 1], in units of [0, 1]."""
    return (images - truth).double().square().flatten(1).mean(1) / 4


def psnr(mse: Float64[Tensor, "*n"]) -> Float64[Tensor, "*n"]:
    """Peak signal-to-noise ratio, dB, of mean squared errors in units of [0, 1]; infinite for none."""
    return -10 * mse.log10()


def masked_mse(
    images: Float[Tensor, "n c h w"], truth: Float[Tensor, "n c h w"], mask: Bool[Tensor, "n h w"]
) -> Float64[Tensor, " n"]:
    """`mse` over the pixels of each image's hole alone, of which there must be one."""
    errors = (images - truth).double().square().mean(1) / 4
    return (errors * mask).sum((1, 2)) / mask.sum((1, 2))


def seam_steps(images: Float[Tensor, "n c h w"], mask: Bool[Tensor, "n h w"]) -> Float64[Tensor, " n"]:
    """Mean step across the edge of each image's hole, in units of [0, 1]: |inside - outside| of neighbouring pixels.

    Neighbours are those above, below, left and right; 0 where a hole has no edge.
    """
    total = torch.zeros(len(images), dtype=torch.float64, device=images.device)
    pairs = torch.zeros_like(total)
    for axis in (1, 2):
        last = mask.shape[axis] - 1
        crossing = mask.narrow(axis, 0, last) ^ mask.narrow(axis, 1, last)
        steps = (images.narrow(axis + 1, 0, last) - images.narrow(axis + 1, 1, last)).double().abs().mean(1) / 2
        total += (steps * crossing).sum((1, 2))
        pairs += crossing.sum((1, 2))
    return total / pairs.clamp(min=1)


def diversity(fills: Float[Tensor, "n k c h w"], mask: Bool[Tensor, "n h w"]) -> Float64[Tensor, " n"]:
    """Root mean squared difference between two of an image's k fills, within its hole, in units of [0, 1]."""
    k = fills.shape[1]
    assert k > 1, "one fill differs from no other"
    variance = fills.double().var(dim=1, correction=1).mean(1) / 4  # half the mean squared difference of two
    return (2 * (variance * mask).sum((1, 2)) / mask.sum((1, 2))).sqrt()
