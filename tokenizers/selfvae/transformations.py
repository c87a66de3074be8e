"""selfVAE's image transformations (Fig. 1): deterministic and discrete, computed in batches on the device.

Images are float in [-1, 1] with `bins` possible values, before and after. No networks here.

Legend: b batch, c channels, h w pixels.
"""

import math
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from smalti.core.config import require_choice
from smalti.core.errors import UserError
from smalti.images.decoding import visible
from smalti.tokenizers.selfvae.logistic import to_bins

Transformation: TypeAlias = Literal["downscale", "sketch", "grayscale", "bits"]

LUMA = (0.299, 0.587, 0.114)  # weights of red, green and blue (ITU-R BT.601), as in Pillow
BLUR_SHARE = 1 / 16  # standard deviation of the sketch's blur, as a share of the shorter side


@dataclass(frozen=True)
class Form:
    """Format of the images at one level.

    Attributes:
        channels: 3 for colour images, 1 for grey ones.
        halvings: how many times the size was halved.
        bins: number of possible values per channel of a pixel.
    """

    channels: int
    halvings: int = 0
    bins: int = 256


def forms(transformation: Transformation, levels: int, channels: int) -> list[Form]:
    """Returns the forms of y_0 = x, y_1, ..., each the transformation of the one before (Eq. 20).

    `downscale` halves the size, `bits` halves the bits per value (8, 4, 2, 1). `sketch` and `grayscale` give one
    channel and cannot be repeated.

    Raises:
        UserError: if `levels` is below 1, or more than the transformation allows, or there is no such transformation.
    """
    require_choice("transformation", transformation, Transformation)
    most = {"downscale": levels, "bits": 4, "sketch": 2, "grayscale": 2 if channels > 1 else 1}[transformation]
    if not 1 <= levels <= most:
        raise UserError(f"{transformation} with {channels} channel(s) allows 1 to {most} levels, not {levels}")
    result = [Form(channels)]
    for _ in range(levels - 1):
        last = result[-1]
        result.append(
            {
                "downscale": Form(channels, last.halvings + 1),
                "bits": Form(channels, bins=math.isqrt(last.bins)),
                "sketch": Form(1),
                "grayscale": Form(1),
            }[transformation]
        )
    return result


def transform(
    transformation: Transformation, images: Float[Tensor, "b c h w"], before: Form, after: Form
) -> Float[Tensor, "b _c _h _w"]:
    """Returns y_k = d(y_(k-1)) (Eq. 20), given images of form `before`, in form `after`."""
    if transformation == "bits":
        return fewer_bits(images, before.bins, after.bins)
    transformed = {"downscale": downscale, "sketch": sketch, "grayscale": grey}[transformation](images)
    return to_bins(transformed, after.bins)


def downscale(images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c _h _w"]:
    """Halves the size by antialiased bicubic interpolation."""
    size = (images.shape[2] // 2, images.shape[3] // 2)
    return F.interpolate(images, size=size, mode="bicubic", antialias=True)


def grey(images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b 1 h w"]:
    """Returns the luma of the visible channels, and grey images unchanged."""
    images = visible(images)
    if images.shape[1] == 1:
        return images
    return (images * images.new_tensor(LUMA).view(3, 1, 1)).sum(1, keepdim=True)


def sketch(images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b 1 h w"]:
    """Returns a pencil sketch (Appendix A.3): the grey image, colour-dodged by its blurred inverse.

    Colour dodge of g by m is g / (1 - m), clamped to [0, 1]. Here 1 - m is the blurred grey image.

    Deviation: the blur is Gaussian, while the paper cites an edge-preserving filter.
    """
    value = (grey(images) + 1) / 2
    return 2 * (value / _blur(value).clamp(min=1 / 255)).clamp(max=1) - 1


def fewer_bits(images: Float[Tensor, "b c h w"], before: int, after: int) -> Float[Tensor, "b c h w"]:
    """Keeps the most significant bits of each value: `before` values, a multiple of `after`, become `after`."""
    values = ((images + 1) * ((before - 1) / 2)).round()
    return (values / (before // after)).floor() * (2 / (after - 1)) - 1


def _blur(images: Tensor) -> Tensor:
    """Blurs by a Gaussian, separably, with mirrored edges."""
    deviation = BLUR_SHARE * min(images.shape[2:])
    radius = max(1, round(2 * deviation))
    kernel = (-0.5 * (torch.arange(-radius, radius + 1, device=images.device) / deviation).square()).exp()
    kernel = kernel / kernel.sum()
    padded = F.pad(images, (radius, radius, radius, radius), mode="reflect")
    return F.conv2d(F.conv2d(padded, kernel.view(1, 1, 1, -1)), kernel.view(1, 1, -1, 1))
