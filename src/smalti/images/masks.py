"""Masks: which pixels are a hole, which codes that makes unknown, and a few shapes to try. Filling is a sampler's work.

Everywhere True = hole for pixels, and True = keep for codes (`known_mask`).
"""

import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float, Int64
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from smalti.core.errors import UserError
from smalti.core.randomness import uniform
from smalti.images.decoding import load_image, load_transparency

DILATION_CODES = 1
"""How far around a hole codes are filled anew too: they saw the blank through the encoder's receptive field."""
MID_GREY = 127
MOST_STROKES, STROKE_POINTS = 3, 3


def load_mask(
    path: str | Path,
    *,
    height: int,
    width: int,
    invert: bool = False,
    threshold: int = MID_GREY,
    resize: bool = False,
) -> Bool[Tensor, "h w"]:
    """A mask image as a hole: where it is lighter than the threshold or, if it has transparent parts, where they are.

    Any format, depth and mode that Pillow opens. Of an image with transparency its colours do not matter: erasing what
    is to be filled makes a mask.

    Args:
        path: of the file.
        height: of the image to fill, pixels.
        width: of the same.
        invert: the hole is where it would not be.
        threshold: in [0, 254], of lightness or transparency.
        resize: fit a mask of another size to the image's.

    Raises:
        UserError: if it cannot be read, is of another size, or has no hole or nothing else.
    """
    see_through = load_transparency(path)
    light = load_image(path, channels=1)[0] if see_through is None else see_through
    if tuple(light.shape) != (height, width):
        if not resize:
            raise UserError(
                f"{path} is {light.shape[1]}x{light.shape[0]} but the image is {width}x{height}; "
                "pass --resize-mask, or give a mask of the image's size"
            )
        light = torch.from_numpy(np.array(Image.fromarray(light.numpy()).resize((width, height))))
    mask = (light > threshold) ^ invert
    kind = ("dark" if invert else "light") if see_through is None else ("opaque" if invert else "transparent")
    if not mask.any():
        paint = {"light": "paint what to fill white", "dark": "paint what to fill black"}
        raise UserError(f"{path} has no hole: no pixel is {kind}; {paint.get(kind, 'erase what to fill')}")
    if mask.all():
        raise UserError(
            f"{path} is all hole: every pixel is {kind}, and nothing is left to go by; mark less, or use --invert"
        )
    return mask


def known_codes(
    mask: Bool[Tensor, "b h w"], downsampling: int, *, dilation: int = DILATION_CODES
) -> Bool[Tensor, "b y x"]:
    """Which codes to keep: those whose every pixel is known, and whose every neighbour within `dilation` codes is."""
    unknown = rearrange(mask, "b (y s1) (x s2) -> b y x s1 s2", s1=downsampling, s2=downsampling).any(-1).any(-1)
    spread = F.max_pool2d(unknown.float().unsqueeze(1), 2 * dilation + 1, stride=1, padding=dilation).squeeze(1)
    return spread == 0


def blank(images: Float[Tensor, "b c h w"], mask: Bool[Tensor, "b h w"]) -> Float[Tensor, "b c h w"]:
    """The images with each hole in the mean colour of what is known, so that nothing hidden reaches an encoder."""
    known = ~mask.unsqueeze(1)
    mean = (images * known).sum((2, 3), keepdim=True) / known.sum((2, 3), keepdim=True).clamp_min(1)
    return torch.where(known, images, mean)


def examples(height: int, width: int) -> dict[str, Bool[Tensor, "h w"]]:
    """Holes to try on an image of this size: a box, a half, a free stroke and a letter."""
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
    return {name: torch.from_numpy(np.array(shape)) > 127 for name, shape in shapes.items()}


def strokes(seeds: Int64[Tensor, " b"], height: int, width: int) -> Bool[Tensor, "b h w"]:
    """A free-hand hole for each seed: one to three bent strokes, each a tenth to a fifth of the shorter side wide.

    In the manner of the free-form masks of arXiv 1806.03589; about a quarter of an image on average.
    """
    masks = []
    for numbers in uniform(seeds, MOST_STROKES, 2 + 2 * STROKE_POINTS).tolist():
        shape = Image.new("L", (width, height))
        draw = ImageDraw.Draw(shape)
        for _, thickness, *places in numbers[: 1 + int(numbers[0][0] * MOST_STROKES)]:
            points = [(x * width, y * height) for x, y in zip(places[::2], places[1::2], strict=True)]
            draw.line(
                points, fill=255, width=max(1, round((0.1 + 0.1 * thickness) * min(height, width))), joint="curve"
            )
        masks.append(torch.from_numpy(np.array(shape)) > MID_GREY)
    return torch.stack(masks)
