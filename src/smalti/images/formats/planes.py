"""Images as planes: any number of channels, 8 or 16 bits deep, from whatever Pillow or NumPy holds.

The images that Pillow has a mode for (grey, RGB, and either with alpha) stay one image, 8 bits deep. Others
become one Pillow image for each channel, which are fitted alike by `resampled`.

Legend: h w pixels, c channels.
"""

from collections.abc import Callable, Sequence
from typing import Literal, TypeAlias

import numpy as np
import torch
from jaxtyping import Int32, UInt8
from PIL import Image, ImageSequence
from torch import Tensor

from smalti.images.formats.arrays import NPY_MAGIC, read_npy
from smalti.images.formats.opening import BadImageError, opened

Depth: TypeAlias = Literal[8, 16]
"""Bits of a pixel's channel."""
MODES = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}
"""Pillow's mode for a number of channels."""
DEEP_GREY_MODES = ("I", "F", "I;16", "I;16L", "I;16B", "I;16N")
TOP: dict[Depth, int] = {8: 2**8 - 1, 16: 2**16 - 1}
"""Largest value of a pixel, which stands for white."""
_VALUES_AT_ONCE = 2**20
_LUMA = np.array([19595, 38470, 7471], np.uint32)  # in 1/65536, as Pillow converts RGB to grey


def planes_of(encoded: bytes, *, channels: int, depth: Depth = 8, limit: int | None = None) -> list[Image.Image]:
    """Decodes an image to planes: one image of mode L, LA, RGB or RGBA, or one of mode L or F for each channel.

    Args:
        encoded: the bytes of a file that Pillow reads, or of NumPy's format.
        channels: 1 grey, 2 grey and alpha, 3 RGB, 4 RGB and alpha; any other number for images that have as many:
            arrays, and files of as many grey pages, such as TIFF.
        depth: bits. Images of another depth are scaled to it.
        limit: the most pixels; see `opening.opened`.

    Raises:
        BadImageError: if the image is damaged or too large, has another number of channels, or if Pillow reads fewer
            bits than it has.
    """
    if encoded.startswith(NPY_MAGIC):
        return _array_planes(read_npy(encoded, channels, limit), channels, depth)
    with opened(encoded, channels=channels, limit=limit, load=channels in MODES) as image:
        if channels not in MODES:
            return _array_planes(_pages(image, channels), channels, depth)
        if depth == 8:
            return [flatten(image, MODES[channels])]
        if image.mode in DEEP_GREY_MODES:
            return _array_planes(_deep_grey(image, 16)[..., None], channels, depth)
        if _has_deep_colour(image, encoded):
            raise BadImageError(
                "Pillow reads 16-bit colour as 8 bits; save it as a uint16 array (.npy), or leave --image-depth out"
            )
        return _array_planes(_rows(np.asarray(flatten(image, MODES[channels]))), channels, depth)


def resampled(planes: Sequence[Image.Image], resample: Callable[[Image.Image], Image.Image]) -> list[Image.Image]:
    """Resamples the planes of an image by one function; what is transparent has no part in the colours.

    Pillow multiplies the colours of LA and RGBA by alpha before it resamples, and divides them by it afterwards. This
    does the same for two or four planes of 16 bits, the last of which is alpha. Transparent pixels become black.
    """
    fitted = [resample(plane) for plane in planes]
    if planes[0].mode != "F" or len(planes) not in (2, 4):
        return fitted
    alpha, fitted_alpha = (np.asarray(each[-1]) for each in (planes, fitted))
    if alpha.min() == alpha.max() or np.array_equal(alpha, fitted_alpha):  # all pixels count alike, or none was changed
        return fitted
    visible = fitted_alpha >= 0.5  # Lanczos overshoots, so alpha may be negative
    share = np.where(visible, fitted_alpha, TOP[16]) / TOP[16]
    weighted = [resample(Image.fromarray(np.asarray(plane) * (alpha / TOP[16]))) for plane in planes[:-1]]
    colours = [Image.fromarray(np.where(visible, np.asarray(plane) / share, 0)) for plane in weighted]
    return [*colours, fitted[-1]]


def to_tensor(planes: Sequence[Image.Image]) -> UInt8[Tensor, "c h w"] | Int32[Tensor, "c h w"]:
    """Returns the pixels of planes: uint8, or int32 from 0 to 65535 for planes of mode F."""
    arrays = [_rows(np.array(plane)) for plane in planes]  # a copy: torch must own writable memory
    pixels = arrays[0] if len(arrays) == 1 else np.concatenate(arrays, -1)
    if planes[0].mode == "F":
        pixels = np.rint(pixels).clip(0, TOP[16]).astype(np.int32)
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


def flatten(image: Image.Image, mode: str) -> Image.Image:
    """Converts to L, LA, RGB or RGBA, 8 bits deep; composes transparency on white unless the mode keeps it."""
    if image.mode in DEEP_GREY_MODES:
        image = Image.fromarray(_deep_grey(image, 8))
    if image.mode == "La":  # premultiplied, which converts to nothing else
        image = image.convert("LA")
    if mode in ("LA", "RGBA"):
        transparent = image.mode == "P" or image.has_transparency_data
        rgba = (image if transparent else image.convert("RGB")).convert("RGBA")
        return rgba if mode == "RGBA" else rgba.convert("LA")
    if image.mode == "P" or image.has_transparency_data:  # checked last: it fails on palettes that Pillow left unread
        rgba = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    if image.mode == "1":
        image = image.convert("L")
    if image.mode != mode:
        image = image.convert("RGB").convert(mode)  # not every mode converts straight to "L"
    return image


def _rows(pixels: np.ndarray) -> np.ndarray:
    """Returns `(h, w)` or `(h, w, c)` as `(h, w, c)`."""
    return pixels[..., None] if pixels.ndim == 2 else pixels


def _array_planes(pixels: np.ndarray, channels: int, depth: Depth) -> list[Image.Image]:
    """Returns `(h, w, c)`, uint8 or uint16, as planes of the requested channels and depth."""
    if pixels.shape[-1] != channels:
        pixels = _converted(pixels, channels)
    if depth == 16:
        scale = TOP[16] // TOP[8] if pixels.dtype == np.uint8 else 1
        return [Image.fromarray(pixels[..., index].astype(np.float32) * scale) for index in range(channels)]
    if pixels.dtype != np.uint8:
        pixels = np.rint(pixels * (TOP[8] / TOP[16])).astype(np.uint8)
    if channels in MODES:
        return [Image.fromarray(np.ascontiguousarray(pixels[..., 0] if channels == 1 else pixels))]
    return [Image.fromarray(np.ascontiguousarray(pixels[..., index])) for index in range(channels)]


def _converted(pixels: np.ndarray, channels: int) -> np.ndarray:
    """Converts grey to RGB, or RGB to grey as Pillow does.

    Raises:
        BadImageError: for other numbers of channels.
    """
    own = pixels.shape[-1]
    if (own, channels) == (1, 3):
        return pixels.repeat(3, -1)
    if (own, channels) == (3, 1):
        grey = (pixels.astype(np.uint32) @ _LUMA + 0x8000) >> 16
        return grey.astype(pixels.dtype)[..., None]
    raise BadImageError(
        f"the image has {own} channel{'s' * (own != 1)}, not {channels}; train with --image-channels {own}"
    )


def _pages(image: Image.Image, channels: int) -> np.ndarray:
    """Returns the channels of an image that Pillow has no mode for: the grey pages of its file, or its own bands."""
    count = getattr(image, "n_frames", 1)
    if count not in (1, channels):
        raise BadImageError(f"the file has {count} pages, not {channels}; train with --image-channels {count}")
    pages = [np.array(_plain(page)) for page in ImageSequence.Iterator(image)]
    if len({(page.shape, page.dtype) for page in pages}) > 1 or (count > 1 and pages[0].ndim == 3):
        raise BadImageError("its pages are not grey images of one size and depth; save it as an array (.npy)")
    return np.stack(pages, -1) if pages[0].ndim == 2 else pages[0]


def _plain(page: Image.Image) -> np.ndarray | Image.Image:
    if page.mode in DEEP_GREY_MODES:
        return _deep_grey(page, 16)
    return page if page.mode == "L" else page.convert("L" if page.mode == "1" else "RGB")


def _has_deep_colour(image: Image.Image, encoded: bytes) -> bool:
    """Returns whether a PNG or TIFF has 16 bits a channel, whose lower 8 Pillow drops from colours."""
    if len(image.getbands()) == 1:
        return False
    if image.format == "TIFF":
        bits_per_sample = image.tag_v2.get(258, (8,))  # pyright: ignore[reportAttributeAccessIssue] - of every TIFF
        return max(bits_per_sample) > 8
    return image.format == "PNG" and encoded[24:25] == b"\x10"


def _deep_grey(image: Image.Image, depth: Depth) -> np.ndarray:
    """Scales grey of more than 8 bits to a depth. Pillow's own conversion to "L" clips most 16-bit images to white.

    Integers are scaled from 16 bits, or from 31 bits if they exceed 16. Floats are scaled from the
    smallest of 1, 255 and 65535 that is not below their maximum. Negative values, infinities and NaN
    become black; the one grey that a 16-bit PNG may declare transparent becomes white.
    """
    values, top = np.asarray(image), TOP[depth]
    rows = max(1, _VALUES_AT_ONCE // max(1, image.width))  # in strips, as float64 takes eight times the memory
    strips = range(0, image.height, rows)
    peak = max(float(_non_negative(values[start : start + rows]).max()) for start in strips)
    scales = (1.0, 255.0, 65535.0) if image.mode == "F" else (65535.0, 2.0**31 - 1)
    scale = next((scale for scale in scales if peak <= scale), peak)
    grey = np.empty(values.shape, dtype=np.uint8 if depth == 8 else np.uint16)
    transparent = image.info.get("transparency")
    for start in strips:
        strip = _non_negative(values[start : start + rows])
        grey[start : start + rows] = np.rint(strip * (top / scale)).astype(grey.dtype)
        if isinstance(transparent, int):
            grey[start : start + rows][strip == transparent] = top
    return grey


def _non_negative(values: np.ndarray) -> np.ndarray:
    return np.nan_to_num(values.astype(np.float64), nan=0.0, posinf=0.0, neginf=0.0).clip(min=0)
