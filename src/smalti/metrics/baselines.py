"""Structural similarity (SSIM) and fills without a model, by other libraries.

scikit-image, of the extra `metrics`, has SSIM and the biharmonic fill; OpenCV, of the extra `opencv`, has Telea's.
"""

from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from jaxtyping import Bool, UInt8
from torch import Tensor

from smalti.core.errors import UserError
from smalti.core.progress import SLOW_SECONDS, bar
from smalti.images.decoding import to_uint8
from smalti.metrics.extractors import EXTRA

SSIM_WINDOW = 7  # pixels; scikit-image's default
TELEA_RADIUS = 3  # pixels; that of OpenCV's examples


def ssim(images: UInt8[Tensor, "n c h w"], truth: UInt8[Tensor, "n c h w"]) -> float:
    """Computes the mean structural similarity over uniform windows of 7x7 pixels.

    Raises:
        UserError: if the images are smaller than a window, or the extra is not installed.
    """
    if min(images.shape[2:]) < SSIM_WINDOW:
        raise UserError(f"SSIM needs images of at least 7x7 pixels, not {images.shape[3]}x{images.shape[2]}")
    similarity = _scikit_image().metrics.structural_similarity
    pairs = zip(images.numpy(), truth.numpy(), strict=True)
    return sum(float(similarity(a, b, channel_axis=0, data_range=255)) for a, b in pairs) / len(images)


def biharmonic(pixels: UInt8[Tensor, "n c h w"], mask: Bool[Tensor, "n h w"]) -> UInt8[Tensor, "n c h w"]:
    """Fills the masked pixels of each image smoothly from the pixels around them, by the biharmonic equation.

    Raises:
        UserError: if the extra is not installed.
    """
    inpaint = _scikit_image().restoration.inpaint_biharmonic
    pairs = list(zip(pixels.numpy(), mask.numpy(), strict=True))
    progress = bar(pairs, what="biharmonic fills", unit="image", delay_seconds=SLOW_SECONDS)
    filled = [torch.from_numpy(inpaint(image, image_mask, channel_axis=0)) for image, image_mask in progress]
    return torch.where(mask.unsqueeze(1), to_uint8(torch.stack(filled) * 2 - 1), pixels)


def telea_is_installed() -> bool:
    """Returns whether OpenCV, which has `telea`, is installed."""
    return find_spec("cv2") is not None


def telea(pixels: UInt8[Tensor, "n c h w"], mask: Bool[Tensor, "n h w"]) -> UInt8[Tensor, "n c h w"]:
    """Fills the masked pixels of each image from the edge of the mask inwards, by the fast marching method.

    Source: Telea, An image inpainting technique based on the fast marching method, 2004; as OpenCV has it, with a
    neighbourhood of `TELEA_RADIUS`.

    Raises:
        ImportError: if OpenCV is not installed.
    """
    cv2 = import_module("cv2")
    filled = [
        torch.stack(
            [torch.from_numpy(cv2.inpaint(channel, image_mask, TELEA_RADIUS, cv2.INPAINT_TELEA)) for channel in image]
        )
        for image, image_mask in zip(pixels.numpy(), mask.byte().numpy(), strict=True)
    ]
    return torch.stack(filled)


def _scikit_image() -> Any:
    try:
        import skimage
    except ImportError as error:
        raise UserError(f"scikit-image is not installed; {EXTRA}") from error
    return skimage
