"""Blends a fill into its image: hides the seam and keeps the known pixels exact.

The fills themselves come from `commands/inpainting.py`.

Legend: b batch, c channels, h w pixels.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, UInt8
from torch import Tensor

from smalti.images.decoding import to_float, to_uint8

RIM_POWER = 3
"""Power of the distance by which a rim pixel's weight falls. Of 2, 3 and 4 it gave the best seams on held-out emoji."""
_PIXELS_AT_ONCE = 4096  # masked pixels, each weighed against the whole rim


def compose(
    pixels: UInt8[Tensor, "b c h w"],
    filled: Float[Tensor, "b c h w"],
    mask: Bool[Tensor, "b h w"],
    *,
    feather_pixels: int,
    match_colour: bool,
) -> UInt8[Tensor, "b c h w"]:
    """Returns the images with their masked pixels filled.

    The result does not depend on the masked pixels of `pixels`. The feather band lies outside the
    mask, within `feather_pixels` of its edge (diagonals count as one): there the fill fades into the
    image in even steps. Every pixel outside mask and band stays exact.

    Args:
        pixels: the images.
        filled: the same images with their masked pixels filled, in [-1, 1]; the band is blended with it.
        mask: True = fill.
        feather_pixels: width of the band.
        match_colour: shift the fill, in mask and band, by its difference from the image at the mask's rim.
    """
    images, share = to_float(pixels), _fill_share(mask, feather_pixels)
    if match_colour:
        differences = zip(images - filled, mask, share > 0, strict=True)
        filled = filled + torch.stack([_colour_offset(*each) for each in differences])
    # `where` rather than a weighted sum: 0 times a masked pixel leaves a rounding error that depends on it
    blended = torch.where(mask.unsqueeze(1), filled, images + share.unsqueeze(1) * (filled - images))
    return torch.where(share.unsqueeze(1) > 0, to_uint8(blended), pixels)


def _fill_share(mask: Bool[Tensor, "b h w"], feather_pixels: int) -> Float[Tensor, "b h w"]:
    """Returns the fill's share of each pixel: 1 inside the mask, falling to 0 across the feather band."""
    share = mask.float()
    for _ in range(feather_pixels):
        spread = F.max_pool2d(share.unsqueeze(1), 3, stride=1, padding=1).squeeze(1)
        share = torch.where(share > 0, share, (spread - 1 / (feather_pixels + 1)) * (spread > 0))
    return share


def _colour_offset(
    difference: Float[Tensor, "c h w"], mask: Bool[Tensor, "h w"], filled: Bool[Tensor, "h w"]
) -> Float[Tensor, "c h w"]:
    """Returns the colour shift at the `filled` pixels.

    It is the mean of the differences at the known pixels on the mask's rim, weighted by a power of
    their distance (Shepard 1968).
    """
    rim = (F.max_pool2d(mask[None, None].float(), 3, stride=1, padding=1)[0, 0] > 0) & ~mask
    offset = torch.zeros_like(difference)
    if not rim.any():
        return offset
    rim_positions, rim_differences = rim.nonzero().float(), difference[:, rim].T  # (rim, 2), (rim, c)
    for positions in filled.nonzero().split(_PIXELS_AT_ONCE):
        weights = torch.cdist(positions.float(), rim_positions).clamp(min=1) ** -RIM_POWER
        offset[:, positions[:, 0], positions[:, 1]] = ((weights @ rim_differences) / weights.sum(1, keepdim=True)).T
    return offset
