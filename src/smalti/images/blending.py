"""Putting a fill into its image, so that the seam does not show and what is known stays. Fills are a sampler's work.

Legend: b batch, c channels, h w pixels.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, UInt8
from torch import Tensor

from smalti.images.decoding import to_float, to_uint8

RIM_POWER = 3
"""Of the distance, in the weights that carry colours from the rim inwards. On held-out emoji under random strokes, a
feather of 0, steps across the edge against the true picture's, and the fill's squared error: power 2, 1.34 and 0.039;
3, 1.02 and 0.034; 4, 0.91 and 0.034; not matched at all, 2.56 and 0.080."""
_PIXELS_AT_ONCE = 4096  # of the hole, each against the whole rim


def compose(
    pixels: UInt8[Tensor, "b c h w"],
    filled: Float[Tensor, "b c h w"],
    mask: Bool[Tensor, "b h w"],
    *,
    feather_pixels: int,
    match_colour: bool,
) -> UInt8[Tensor, "b c h w"]:
    """The images with what was filled in their holes. What the holes hide in `pixels` decides nothing.

    The feather band lies outside the hole, within `feather_pixels` of its edge (diagonals count as one): there the fill
    fades into the image, in even steps. Every pixel outside hole and band comes back exactly.

    Args:
        pixels: the images.
        filled: the same images with their holes filled, in [-1, 1]; the band is blended with it.
        hole: True = to take from `filled`.
        feather_pixels: width of the band.
        match_colour: shift the fill, in its hole and its band, by what it is off the image at the hole's rim.
    """
    given, share = to_float(pixels), _share(mask, feather_pixels)
    if match_colour:
        off = torch.stack([_offset(*each) for each in zip(given - filled, mask, share > 0, strict=True)])
        filled = filled + off
    # not a sum of shares alone: 0 times what is hidden would leave the rounding of it, and the known would be rounded
    blended = torch.where(mask.unsqueeze(1), filled, given + share.unsqueeze(1) * (filled - given))
    return torch.where(share.unsqueeze(1) > 0, to_uint8(blended), pixels)


def _share(mask: Bool[Tensor, "b h w"], feather_pixels: int) -> Float[Tensor, "b h w"]:
    """How much of the fill each pixel takes: 1 in the hole, then less with every pixel of the band, then 0."""
    share = mask.float()
    for _ in range(feather_pixels):
        spread = F.max_pool2d(share.unsqueeze(1), 3, stride=1, padding=1).squeeze(1)
        share = torch.where(share > 0, share, (spread - 1 / (feather_pixels + 1)) * (spread > 0))
    return share


def _offset(
    difference: Float[Tensor, "c h w"], mask: Bool[Tensor, "h w"], wanted: Bool[Tensor, "h w"]
) -> Float[Tensor, "c h w"]:
    """What is to be added at the wanted pixels: the differences of the known pixels at the hole's rim, each weighted
    by a power of its distance (Shepard 1968)."""
    rim = (F.max_pool2d(mask[None, None].float(), 3, stride=1, padding=1)[0, 0] > 0) & ~mask
    offset = torch.zeros_like(difference)
    if not rim.any():
        return offset
    places, at_rim = wanted.nonzero(), rim.nonzero().float()
    values = difference[:, rim].T  # (rim, c)
    for some in places.split(_PIXELS_AT_ONCE):
        weights = torch.cdist(some.float(), at_rim).clamp(min=1) ** -RIM_POWER
        offset[:, some[:, 0], some[:, 1]] = ((weights @ values) / weights.sum(1, keepdim=True)).T
    return offset
