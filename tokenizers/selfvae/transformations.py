"""What selfVAE learns images through: deterministic, discrete transformations of them (Fig. 1), batched on the device.

Images are float in [-1, 1] of `bins` possible values; so is what they become. No network here.
"""

import math
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from smalti.core.errors import UserError
from smalti.tokenizers.selfvae.logistic import to_bins

Transformation: TypeAlias = Literal["downscale", "sketch", "grayscale", "bits"]

LUMA = (0.299, 0.587, 0.114)  # of red, green and blue, ITU-R BT.601, as Pillow's
BLUR_SHARE = 1 / 16  # standard deviation of the sketch's blur, as a share of the shorter side


@dataclass(frozen=True)
class Form:
    """What images are like.

    Attributes:
        channels: 3 for colour, 1 for grey.
        halvings: how often the size was halved.
        bins: values of a pixel's channel.
    """

    channels: int
    halvings: int = 0
    bins: int = 256


def forms(transformation: Transformation, levels: int, channels: int) -> list[Form]:
    """Of y_0 = x, y_1, ...: each the transformation of the one before (Eq. 20).

    `downscale` halves the size, `bits` the bits of a value (8, 4, 2, 1); `sketch` and `grayscale` leave one channel and
    nothing to do again.

    Raises:
        UserError: for fewer than one level, or more than the transformation goes on.
    """
    most = {"downscale": levels, "bits": 4, "sketch": 2, "grayscale": 2 if channels > 1 else 1}[transformation]
    if not 1 <= levels <= most:
        raise UserError(f"{transformation} of {channels} channel(s) has 1 to {most} levels, not {levels}")
    found = [Form(channels)]
    for _ in range(levels - 1):
        last = found[-1]
        found.append(
            {
                "downscale": Form(channels, last.halvings + 1),
                "bits": Form(channels, bins=math.isqrt(last.bins)),
                "sketch": Form(1),
                "grayscale": Form(1),
            }[transformation]
        )
    return found


def transform(
    transformation: Transformation, images: Float[Tensor, "b c h w"], before: Form, after: Form
) -> Float[Tensor, "b _c _h _w"]:
    """y_k = d(y_(k-1)) (Eq. 20), from images of the one form to those of the next."""
    if transformation == "bits":
        return fewer_bits(images, before.bins, after.bins)
    made = {"downscale": downscale, "sketch": sketch, "grayscale": grey}[transformation](images)
    return to_bins(made, after.bins)


def downscale(images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c _h _w"]:
    """Bicubic, antialiased, half the size."""
    size = (images.shape[2] // 2, images.shape[3] // 2)
    return F.interpolate(images, size=size, mode="bicubic", antialias=True)


def grey(images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b 1 h w"]:
    """The luma of colour; grey as it is."""
    if images.shape[1] == 1:
        return images
    return (images * images.new_tensor(LUMA).view(3, 1, 1)).sum(1, keepdim=True)


def sketch(images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b 1 h w"]:
    """A pencil drawing (Appendix A.3): grey, dodged by its blurred inverse.

    Dodging g by m is g / (1 - m) in [0, 1], white at most; the inverse of the blurred inverse is the blurred grey
    itself.
    """
    value = (grey(images) + 1) / 2
    return 2 * (value / _blur(value).clamp(min=1 / 255)).clamp(max=1) - 1


def fewer_bits(images: Float[Tensor, "b c h w"], before: int, after: int) -> Float[Tensor, "b c h w"]:
    """The first bits of each value: `before` possible values, a multiple of `after`, become `after`."""
    values = ((images + 1) * ((before - 1) / 2)).round()
    return (values / (before // after)).floor() * (2 / (after - 1)) - 1


def _blur(images: Tensor) -> Tensor:
    """Gaussian, one axis after the other; edges are mirrored."""
    deviation = BLUR_SHARE * min(images.shape[2:])
    radius = max(1, round(2 * deviation))
    kernel = (-0.5 * (torch.arange(-radius, radius + 1, device=images.device) / deviation).square()).exp()
    kernel = kernel / kernel.sum()
    padded = F.pad(images, (radius, radius, radius, radius), mode="reflect")
    return F.conv2d(F.conv2d(padded, kernel.view(1, 1, 1, -1)), kernel.view(1, 1, -1, 1))
