"""Decodes encoded images: every format that Pillow or NumPy reads becomes a tensor of integers, of one size.

The bytes come from `sources.py`; sets of images are in `image_set.py`.

Opening is in `formats/opening.py`, and channels and depths in `formats/planes.py`.

Legend: c channels, h w pixels.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int32, Integer, Shaped, UInt8
from PIL import Image
from torch import Tensor

from smalti.core.errors import UserError
from smalti.core.files import open_regular
from smalti.images.fitting import Crop, Fit, fitted
from smalti.images.formats.arrays import NPY_MAGIC, read_npy
from smalti.images.formats.opening import BadImageError, opened
from smalti.images.formats.planes import DEEP_GREY_MODES, MODES, TOP, Depth, flatten, planes_of, resampled, to_tensor

_PROFILES = {1: b"GRAY", 3: b"RGB "}
"""Colour space of an ICC profile, by the number of channels."""


class Decoded(NamedTuple):
    """An image of the requested size, and the size that it had, in pixels, upright."""

    pixels: Integer[Tensor, "c h w"]
    original_height: int
    original_width: int


def decode(
    encoded: bytes, *, channels: int, height: int | None = None, width: int | None = None, fit: Fit = "crop"
) -> UInt8[Tensor, "c h w"]:
    """Decodes an image to pixels: upright, 8 bits deep, of one size and number of channels.

    EXIF rotation is applied, deeper grey is scaled to 8 bits, and an animation gives its first frame.
    Transparency is composed on white, unless it has a channel of its own. Then the image is fitted to
    `height` x `width` and resampled (Lanczos, antialiased). An image that already has the right size
    keeps its pixels exactly; without `height` and `width` every image does.

    Args:
        encoded: the bytes of a file in any format Pillow reads, or of an array in NumPy's (`.npy`).
        channels: 1 for grey, 2 for grey and alpha, 3 for RGB, 4 for RGB and alpha; any other number for arrays, and
            files of grey pages (TIFF), that have as many.
        height: in pixels; given together with `width` or not at all.
        width: in pixels.
        fit: what happens to an image of other proportions. `crop` fits the shorter side and cuts off
            the rest evenly; `pad` fits the longer side and adds white borders, the colour that
            transparency is composed on; `squash` fits both sides.

    Raises:
        BadImageError: if the bytes are empty, not an image, damaged, or hold more pixels than Pillow's guard against
            decompression bombs, or if the image has another number of channels that cannot be converted.
    """
    return decode_with_size(encoded, channels=channels, height=height, width=width, fit=fit).pixels


def decode_with_size(
    encoded: bytes,
    *,
    channels: int,
    height: int | None = None,
    width: int | None = None,
    fit: Fit = "crop",
    depth: Depth = 8,
    limit: int | None = None,
) -> Decoded:
    """Decodes an image as `decode` does; also returns its original size.

    Args:
        encoded: as of `decode`, and so are the following ones.
        channels: of the result.
        height: in pixels.
        width: in pixels.
        fit: what happens to an image of other proportions.
        depth: 16 keeps 16 bits of each channel, as int32 from 0 to 65535.
        limit: the most pixels; None for the guards against decompression bombs.
    """
    assert (height is None) == (width is None)
    planes = planes_of(encoded, channels=channels, depth=depth, limit=limit)
    original = planes[0].size
    if height is not None and width is not None:
        planes = resampled(planes, partial(fitted, height=height, width=width, fit=fit))
    return Decoded(to_tensor(planes), original[1], original[0])


def decode_crops(
    encoded: bytes,
    crops: Sequence[Crop],
    *,
    channels: int,
    height: int,
    width: int,
    fit: Fit,
    depth: Depth = 8,
    limit: int | None = None,
) -> Integer[Tensor, "n c h w"]:
    """Decodes an image once, as `decode_with_size` does, and returns crops of it, each fitted to `height` x `width`.

    Raises:
        BadImageError: as `decode` does.
    """
    planes = planes_of(encoded, channels=channels, depth=depth, limit=limit)
    size: dict[str, Any] = {"height": height, "width": width, "fit": fit}
    return torch.stack([to_tensor(resampled(planes, partial(fitted, **size, crop=crop))) for crop in crops])


def load_image(
    path: str | Path, *, channels: int, height: int | None = None, width: int | None = None
) -> UInt8[Tensor, "c h w"]:
    """Reads and decodes one file; see `decode`.

    Raises:
        UserError: with the file's name, if it cannot be read or decoded.
    """
    with _named(path):
        return decode(_read(path), channels=channels, height=height, width=width)


def declared_pixels(path: str | Path) -> int:
    """Returns the number of pixels that a file declares, without decoding any.

    Raises:
        UserError: as `load_image` does.
    """
    with _named(path):
        encoded = _read(path)
        if encoded.startswith(NPY_MAGIC):
            return prod(read_npy(encoded, channels=1).shape[:2])
        with opened(encoded, channels=1, load=False) as image:
            return image.width * image.height


def load_transparency(path: str | Path) -> UInt8[Tensor, "h w"] | None:
    """Returns the transparency of each pixel, 255 = fully transparent; None for an opaque image.

    Raises:
        UserError: as `load_image` does.
    """
    with _named(path):
        encoded = _read(path)
        if encoded.startswith(NPY_MAGIC):
            return None
        with opened(encoded, channels=1) as image:
            alpha = _alpha(image)
            return None if alpha is None else 255 - torch.from_numpy(alpha)


class Layers(NamedTuple):
    """Properties of an image that `load_image` drops and outputs keep."""

    colours: UInt8[Tensor, "c h w"]
    """The pixels before transparency is composed on white."""
    alpha: UInt8[Tensor, "h w"] | None
    """The opacity of each pixel, 255 = opaque; None for an opaque image."""
    profile: bytes | None
    """The ICC colour profile, if it describes colours of this number of channels."""


def load_layers(path: str | Path, *, channels: int) -> Layers:
    """Reads an image's colours, opacity and colour profile.

    Raises:
        UserError: as `load_image` does.
    """
    with _named(path):
        encoded = _read(path)
        if channels not in _PROFILES or encoded.startswith(NPY_MAGIC):  # alpha is among the channels, or there is none
            return Layers(decode(encoded, channels=channels), None, None)
        with opened(encoded, channels=channels) as image:
            profile = image.info.get("icc_profile")
            if not isinstance(profile, bytes) or profile[16:20] != _PROFILES[channels]:
                profile = None
            alpha, mode = _alpha(image), MODES[channels]
            flat = flatten(image, mode) if alpha is None else image.convert("RGBA").convert("RGB").convert(mode)
            return Layers(to_tensor([flat]), None if alpha is None else torch.from_numpy(alpha), profile)


def without_halo(pixels: UInt8[Tensor, "c h w"], layers: Layers) -> UInt8[Tensor, "c h w"]:
    """Returns an image, read by `load_image`, whose partly transparent pixels have the colours that the file stores.

    A soft eraser leaves such pixels around what it erases; on white they would be a light halo.
    """
    colours, alpha, _ = layers
    return pixels if alpha is None else torch.where((alpha > 0) & (alpha < 255), colours, pixels)


def to_float(pixels: UInt8[Tensor, "*shape"] | Int32[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Maps uint8 (0..255) or int32 (0..65535) to float32 in [-1, 1], on the tensor's own device.

    Raises:
        UserError: for another dtype, whose range is not known.
    """
    if pixels.dtype not in (torch.uint8, torch.int32):
        raise UserError(f"pixels are {pixels.dtype}; give torch.uint8 from 0 to 255, or torch.int32 from 0 to 65535")
    top = TOP[8] if pixels.dtype == torch.uint8 else TOP[16]
    return pixels.float() / (top / 2) - 1


def to_8_bits(pixels: UInt8[Tensor, "*shape"] | Int32[Tensor, "*shape"]) -> UInt8[Tensor, "*shape"]:
    """Returns uint8 pixels as they are, and scales int32 pixels of 16 bits to 8."""
    return pixels if pixels.dtype == torch.uint8 else to_uint8(to_float(pixels))


def visible(images: Shaped[Tensor, "*b c h w"]) -> Shaped[Tensor, "*b _shown h w"]:
    """Returns the channels that pictures and feature extractors show: the first of two, the first three of more."""
    return images[..., : 1 if images.shape[-3] < 3 else 3, :, :]


def to_uint8(images: Float[Tensor, "*shape"]) -> UInt8[Tensor, "*shape"]:
    """Maps [-1, 1] to 0..255, rounded and clamped. The exact inverse of `to_float` at 8 bits."""
    return ((images.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


@contextmanager
def _named(path: str | Path) -> Iterator[None]:
    """Adds the file's name to errors."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); give the path of an image file") from error
    except BadImageError as error:
        raise BadImageError(f"{path}: {error}") from error


def _read(path: str | Path) -> bytes:
    with open_regular(Path(path)) as file:
        return file.read()


def _alpha(image: Image.Image) -> np.ndarray | None:
    """Returns the opacity of each pixel; None if the image is opaque, or of a deep grey with one transparent value."""
    if not image.has_transparency_data or image.mode in DEEP_GREY_MODES:
        return None
    alpha = np.array(image.getchannel("A") if "A" in image.getbands() else image.convert("RGBA").getchannel("A"))
    return alpha if alpha.min(initial=255) < 255 else None
