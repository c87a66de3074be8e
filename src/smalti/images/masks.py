"""Masks: loading them, the codes that a mask leaves known, blanking, and random or example shapes.

A pixel mask is True = fill. A `known_mask` of codes is True = keep. Filling is in
`commands/inpainting.py`.
"""

import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float, Int64, UInt8
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from smalti.core.errors import UserError
from smalti.core.randomness import uniform
from smalti.images.decoding import declared_pixels, load_image, load_layers, load_transparency

DILATION_CODES = 1
"""Width of the ring of codes around a mask that is sampled too: their receptive field includes blanked pixels."""
MID_GREY = 127
_BLACK, _WHITE = 15, 240
"""Values up to the first count as black, from the second on as white."""
_MASK_SHARE, _PHOTO_SHARE = 0.99, 0.5
"""A mask is black or white in at least the first share of its pixels, a photograph in less than the second."""
MOST_RESIZED_PIXELS = 50 * 10**6
"""Pixels of a mask that is larger than its image. More would take memory for nothing."""
_PHOTO_GREYS = 32
"""A photograph has more than so many greys, each in more than a thousandth of its pixels."""
MOST_STROKES, STROKE_POINTS = 3, 3


def load_mask(
    path: str | Path,
    *,
    height: int,
    width: int,
    invert: bool = False,
    threshold: int = MID_GREY,
    resize: bool = False,
    erased: bool = False,
) -> Bool[Tensor, "h w"]:
    """Loads a mask image: its light pixels or, if it has transparency, its transparent pixels are masked.

    It may have any format, depth and mode that Pillow reads. An image with transparency is masked by
    its transparency alone, so erasing a part of an image makes a mask. White paint on a transparent
    layer is the exception: there the paint is masked.

    Args:
        path: the mask file.
        height: height of the image to fill, in pixels.
        width: width of the image to fill, in pixels.
        invert: swap masked and known pixels.
        threshold: lightness or transparency, in [0, 254], above which a pixel is masked.
        resize: resize a mask of another size to the image's size.
        erased: the file is the image itself, so that white in it is never paint.

    Raises:
        UserError: if the file cannot be read, is a photograph, has another size, or masks no pixel or every pixel.
    """
    if (pixels := declared_pixels(path)) > max(MOST_RESIZED_PIXELS, height * width):
        raise UserError(f"{path} has {pixels} pixels but the image is {width}x{height}; shrink the mask to that size")
    transparency = load_transparency(path)
    painted = transparency is not None and not erased and is_white_paint(path)
    if transparency is None:
        values = load_image(path, channels=1)[0]
        _refuse_photograph(values, path)
    else:
        values = 255 - transparency if painted else transparency
    if tuple(values.shape) != (height, width):
        if not resize:
            raise UserError(
                f"{path} is {values.shape[1]}x{values.shape[0]} but the image is {width}x{height}; "
                "pass --resize-mask, or give a mask of the image's size"
            )
        values = torch.from_numpy(np.array(Image.fromarray(values.numpy()).resize((width, height))))
    mask = (values > threshold) ^ invert
    kind = ("dark" if invert else "light") if transparency is None else ("opaque" if invert else "transparent")
    if painted:
        kind = "unpainted" if invert else "painted"
    if not mask.any():
        remedy = {"light": "paint what to fill white", "dark": "paint what to fill black"}
        raise UserError(f"{path} masks nothing: no pixel is {kind}; {remedy.get(kind, 'erase what to fill')}")
    if mask.all():
        raise UserError(
            f"{path} masks the whole image: every pixel is {kind}, so no pixel is known; mask less, or use --invert"
        )
    return mask


def is_white_paint(path: str | Path) -> bool:
    """Returns whether an image is white paint on a transparent layer, as image editors export masks.

    Raises:
        UserError: if the file cannot be read.
    """
    colours, alpha, _ = load_layers(path, channels=3)
    if alpha is None:
        return False
    visible = alpha > MID_GREY
    return bool(visible.any()) and float((colours >= _WHITE).all(0)[visible].float().mean()) >= _MASK_SHARE


def refuse_swapped(image: Path, pixels: UInt8[Tensor, "c h w"], mask: Path) -> None:
    """Refuses an image and a mask in each other's place: only the image is all black and white.

    Raises:
        UserError: if they seem swapped.
    """
    if _black_or_white_share(pixels) < _MASK_SHARE or load_transparency(mask) is not None:
        return
    if _black_or_white_share(load_image(mask, channels=3)) < _PHOTO_SHARE:
        raise UserError(
            f"--image {image} is all black and white and --mask {mask} is not: they seem to be swapped; swap --image "
            "and --mask"
        )


def _refuse_photograph(values: UInt8[Tensor, "h w"], path: str | Path) -> None:
    """Refuses a mask that is mostly neither black nor white and has many greys.

    Raises:
        UserError: if it seems to be a photograph.
    """
    counts = torch.tensor(Image.fromarray(values.numpy()).histogram())  # takes no memory, however large the mask
    share = 1 - float(counts[: _BLACK + 1].sum() + counts[_WHITE:].sum()) / values.numel()
    greys = counts > values.numel() / 1000
    if share > 1 - _PHOTO_SHARE and greys.sum() > _PHOTO_GREYS:
        raise UserError(
            f"{path} seems to be a photograph, not a mask: {share:.0%} of its pixels are neither black nor white; "
            "paint what to fill white and the rest black"
        )


def _black_or_white_share(pixels: UInt8[Tensor, "c h w"]) -> float:
    extreme = (pixels <= _BLACK) | (pixels >= _WHITE)
    return float(extreme.all(0).float().mean())


def known_codes(
    mask: Bool[Tensor, "b h w"], downsampling: int, *, dilation: int = DILATION_CODES
) -> Bool[Tensor, "b y x"]:
    """Returns which codes to keep: those without masked pixels in themselves or any code within `dilation`."""
    unknown = rearrange(mask, "b (y s1) (x s2) -> b y x s1 s2", s1=downsampling, s2=downsampling).any(-1).any(-1)
    spread = F.max_pool2d(unknown.float().unsqueeze(1), 2 * dilation + 1, stride=1, padding=dilation).squeeze(1)
    return spread == 0


def blank(images: Float[Tensor, "b c h w"], mask: Bool[Tensor, "b h w"]) -> Float[Tensor, "b c h w"]:
    """Replaces masked pixels by the mean colour of the known ones, so that none reaches an encoder."""
    known = ~mask.unsqueeze(1)
    mean = (images * known).sum((2, 3), keepdim=True) / known.sum((2, 3), keepdim=True).clamp_min(1)
    return torch.where(known, images, mean)


def examples(height: int, width: int) -> dict[str, Bool[Tensor, "h w"]]:
    """Returns example masks for an image of this size: a box, a half, a free stroke and a letter."""
    shapes: dict[str, Image.Image] = {
        name: Image.new("L", (width, height)) for name in ("box", "half", "stroke", "letter")
    }
    draw = {name: ImageDraw.Draw(shape) for name, shape in shapes.items()}
    draw["box"].rectangle((0.3 * width, 0.3 * height, 0.7 * width, 0.7 * height), fill=255)
    draw["half"].rectangle((0.5 * width, 0, width, height), fill=255)
    wave = [(width * (0.08 + 0.84 * t / 40), height * (0.5 + 0.3 * math.sin(2 * math.pi * t / 40))) for t in range(41)]
    draw["stroke"].line(wave, fill=255, width=max(2, round(0.12 * height)), joint="curve")
    font = ImageFont.load_default(round(0.95 * height))
    draw["letter"].text(
        (width / 2, height / 2), "S", fill=255, font=font, anchor="mm", stroke_width=max(1, height // 32)
    )
    return {name: torch.from_numpy(np.array(shape)) > MID_GREY for name, shape in shapes.items()}


def strokes(seeds: Int64[Tensor, " b"], height: int, width: int) -> Bool[Tensor, "b h w"]:
    """Returns a free-form mask for each seed: one to three bent strokes, as in arXiv 1806.03589.

    A stroke is a tenth to a fifth of the shorter side wide; a mask covers about a quarter of the
    image on average.
    """
    masks = []
    for numbers in uniform(seeds, MOST_STROKES, 2 + 2 * STROKE_POINTS).tolist():
        shape = Image.new("L", (width, height))
        draw = ImageDraw.Draw(shape)
        for _, thickness, *coordinates in numbers[: 1 + int(numbers[0][0] * MOST_STROKES)]:
            points = [(x * width, y * height) for x, y in zip(coordinates[::2], coordinates[1::2], strict=True)]
            draw.line(
                points, fill=255, width=max(1, round((0.1 + 0.1 * thickness) * min(height, width))), joint="curve"
            )
        masks.append(torch.from_numpy(np.array(shape)) > MID_GREY)
    return torch.stack(masks)
