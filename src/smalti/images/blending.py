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
SHADE_DIFFERENCE = 0.25
"""Largest difference that is another shade, not other content: root mean square over channels, of images in [-1, 1]."""
_PIXELS_AT_ONCE = 4096  # masked pixels, each weighed against the whole rim
_EXACT_AREA = 256 * 256
"""Images of at most this many pixels are matched exactly; larger ones by `_multilevel_offset`."""
_CUTOFF = 4
"""Distance, in pixels of a coarse grid, from which its kernel is exact. Larger is more accurate and slower."""
_COARSEST = 12
"""Height and width, in pixels, at which the coarsest grid is summed directly."""
_STRIP_ROWS = 128


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
    options = {"feather_pixels": feather_pixels, "match_colour": match_colour}
    if mask[0].numel() <= _EXACT_AREA:
        return _compose(pixels, filled, mask, **options)
    result = pixels.clone()
    for index in range(len(mask)):  # one at a time and cropped, to bound the memory
        if mask[index].any():
            rows, columns = _bounding_box(mask[index], margin=feather_pixels + 1)
            box = (slice(index, index + 1), slice(None), rows, columns)
            result[box] = _compose(pixels[box], filled[box], mask[index : index + 1, rows, columns], **options)
    return result


def restore_transparency(
    result: UInt8[Tensor, "c h w"],
    pixels: UInt8[Tensor, "c h w"],
    mask: Bool[Tensor, "h w"],
    *,
    colours: UInt8[Tensor, "c h w"],
    alpha: UInt8[Tensor, "h w"],
) -> UInt8[Tensor, "c_and_alpha h w"]:
    """Returns a fill with the transparency of its image; the masked pixels become opaque.

    Args:
        result: the fill of `pixels`.
        pixels: the image on white.
        mask: True = fill.
        colours: the image's colours before they were composed on white.
        alpha: the image's opacity.
    """
    filled = mask | ((result != pixels).any(0) & (alpha == 255))  # the feather band changes opaque pixels only
    return torch.cat([torch.where(filled, result, colours), alpha.masked_fill(filled, 255)[None]])


def _compose(
    pixels: UInt8[Tensor, "b c h w"],
    filled: Float[Tensor, "b c h w"],
    mask: Bool[Tensor, "b h w"],
    *,
    feather_pixels: int,
    match_colour: bool,
) -> UInt8[Tensor, "b c h w"]:
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
        if (share > 0).all():
            break
        spread = F.max_pool2d(share.unsqueeze(1), 3, stride=1, padding=1).squeeze(1)
        share = torch.where(share > 0, share, (spread - 1 / (feather_pixels + 1)) * (spread > 0))
    return share


def _colour_offset(
    difference: Float[Tensor, "c h w"], mask: Bool[Tensor, "h w"], filled: Bool[Tensor, "h w"]
) -> Float[Tensor, "c h w"]:
    """Returns the colour shift at the `filled` pixels.

    It is the median of the differences at the known pixels on the mask's rim, and the mean of what they differ from it,
    weighted by a power of their distance (Shepard 1968). Where that is more than `SHADE_DIFFERENCE`, the fill has other
    content than the image, such as another outline, which the shift would smear over the fill: it counts less, and
    from twice as much on not at all.
    """
    rim = (F.max_pool2d(mask[None, None].float(), 3, stride=1, padding=1)[0, 0] > 0) & ~mask
    offset = torch.zeros_like(difference)
    if not rim.any():
        return offset
    median = difference[:, rim].median(1).values[:, None, None]
    rest = difference - median
    rest = rest * (2 - rest.square().mean(0).sqrt() / SHADE_DIFFERENCE).clamp(0, 1)
    if mask.numel() > _EXACT_AREA:
        return (median + _multilevel_offset(rest, rim)) * filled
    rim_positions, rim_differences = rim.nonzero().float(), rest[:, rim].T  # (rim, 2), (rim, c)
    for positions in filled.nonzero().split(_PIXELS_AT_ONCE):
        weights = torch.cdist(positions.float(), rim_positions).clamp(min=1) ** -RIM_POWER
        offset[:, positions[:, 0], positions[:, 1]] = ((weights @ rim_differences) / weights.sum(1, keepdim=True)).T
    return offset + median * filled


def _bounding_box(mask: Bool[Tensor, "h w"], *, margin: int) -> tuple[slice, slice]:
    """Returns the rows and columns that hold all true pixels of a mask that has some, and a margin around them."""
    ends = []
    for size, line in zip(mask.shape, (mask.any(1), mask.any(0)), strict=True):
        inside = line.nonzero()
        ends.append(slice(max(0, int(inside[0]) - margin), min(size, int(inside[-1]) + 1 + margin)))
    return ends[0], ends[1]


def _multilevel_offset(difference: Float[Tensor, "c h w"], rim: Bool[Tensor, "h w"]) -> Float[Tensor, "c h w"]:
    """Computes the weighted means of the exact method at every pixel in time proportional to the pixels.

    Multilevel summation (Brandt and Lubrecht 1990): the weights 1 / distance**3 are split into a kernel of a few
    pixels and a smooth rest. The rest is summed the same way on a grid of half the resolution, and interpolated.
    """
    sums = _kernel_sums(torch.cat([difference * rim, rim[None].float()]), level=0)
    return sums[:-1] / sums[-1:]


def _kernel_sums(sources: Float[Tensor, "n h w"], level: int) -> Float[Tensor, "n h w"]:
    """Returns, at each pixel, the sum of all sources weighted by the kernel of this level."""
    height, width = sources.shape[1:]
    if max(height, width) <= _COARSEST:
        return _convolve(sources, _kernel(max(height, width), level))
    near = 2 * _CUTOFF - 1  # from 2 * _CUTOFF on the kernel equals that of the coarser level
    sums = _convolve(sources, _kernel(near, level) - _kernel(near, level + 1, pixel=0.5))
    even = F.pad(sources, (0, width % 2, 0, height % 2))
    coarse = _kernel_sums(F.avg_pool2d(even[None], 2)[0] * 4, level + 1)
    size = (2 * coarse.shape[1], 2 * coarse.shape[2])
    return sums.add_(F.interpolate(coarse[None], size, mode="bilinear")[0, :, :height, :width])


def _kernel(radius: int, level: int, *, pixel: float = 1.0) -> Float[Tensor, "s s"]:
    """Returns the weights of sources up to `radius` pixels away.

    At level 0 they are 1 / distance**3, of a distance of at least 1 pixel. At coarser levels, whose pixels are 2**level
    pixels wide, they are the same from `_CUTOFF` pixels on, and a quadratic in the squared distance below.

    Args:
        radius: in pixels.
        level: the level whose kernel is returned.
        pixel: the width of the pixels that `radius` counts, in pixels of that level.
    """
    axis = torch.arange(-radius, radius + 1, dtype=torch.float64) * pixel
    squares = axis[:, None] ** 2 + axis**2
    if level == 0:
        return (squares.clamp(min=1) ** (-RIM_POWER / 2)).float()
    squares = squares / _CUTOFF**2
    below = 1 - (power := RIM_POWER / 2) * (squares - 1) + power * (power + 1) / 2 * (squares - 1) ** 2  # Taylor's
    values = torch.where(squares < 1, below, squares.clamp(min=1) ** -power)
    return (values * float(_CUTOFF * 2**level) ** -RIM_POWER).float()


def _convolve(images: Float[Tensor, "n h w"], kernel: Float[Tensor, "s s"]) -> Float[Tensor, "n h w"]:
    """Convolves each image with a symmetric kernel in strips of rows; rows without a source nearby are skipped."""
    result, radius = torch.zeros_like(images), len(kernel) // 2
    for top in range(0, images.shape[1], _STRIP_ROWS):
        bottom = min(top + _STRIP_ROWS, images.shape[1])
        first, last = max(0, top - radius), min(images.shape[1], bottom + radius)
        columns = (images[-1, first:last] != 0).any(0).nonzero()
        if not len(columns):
            continue
        left = max(0, int(columns[0]) - radius)
        right = min(images.shape[2], int(columns[-1]) + 1 + radius)
        padding = (radius, radius, radius - (top - first), radius - (last - bottom))
        strip = F.pad(images[:, None, first:last, left:right], padding)
        result[:, top:bottom, left:right] = F.conv2d(strip, kernel[None, None])[:, 0]
    return result
