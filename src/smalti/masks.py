"""Masks: which pixels are a hole, which codes that makes unknown, and a few shapes to try. Filling is a sampler's work.

Everywhere True = hole for pixels, and True = keep for codes (`known_mask`).
"""

import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from smalti.errors import UserError
from smalti.preprocess import load_image

DILATION_CODES = 1
"""How far around a hole codes are filled anew too: they saw the blank through the encoder's receptive field."""


def load_mask(path: str | Path, *, height: int, width: int, invert: bool = False) -> Bool[Tensor, "h w"]:
    """A mask image as a hole: where it is lighter than mid-grey; where it is darker, with `invert`.

    Raises:
        UserError: if it cannot be read, is not of the given size, or has no hole.
    """
    grey = load_image(path, channels=1)[0]
    if tuple(grey.shape) != (height, width):
        raise UserError(
            f"{path} is {grey.shape[1]}x{grey.shape[0]} but the image is {width}x{height}; "
            "give a mask of the image's size"
        )
    hole = (grey > 127) ^ invert
    if not hole.any():
        raise UserError(
            f"{path} has no hole: no pixel is {'dark' if invert else 'light'}; "
            f"paint what to fill {'black' if invert else 'white'}"
        )
    return hole


def known_codes(
    hole: Bool[Tensor, "b h w"], downsampling: int, *, dilation: int = DILATION_CODES
) -> Bool[Tensor, "b y x"]:
    """Which codes to keep: those whose every pixel is known, and whose every neighbour within `dilation` codes is."""
    unknown = rearrange(hole, "b (y s1) (x s2) -> b y x s1 s2", s1=downsampling, s2=downsampling).any(-1).any(-1)
    spread = F.max_pool2d(unknown.float().unsqueeze(1), 2 * dilation + 1, stride=1, padding=dilation).squeeze(1)
    return spread == 0


def blank(images: Float[Tensor, "b c h w"], hole: Bool[Tensor, "b h w"]) -> Float[Tensor, "b c h w"]:
    """The images with each hole in the mean colour of what is known, so that nothing hidden reaches an encoder."""
    known = ~hole.unsqueeze(1)
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
