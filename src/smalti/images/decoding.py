"""Decodes encoded images: every format that Pillow reads becomes a uint8 tensor of one size.

The bytes come from `sources.py`; sets of images are in `image_set.py`.

Legend: c channels (1 grey or 3 RGB), h w pixels.
"""

import hashlib
import struct
import sys
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from io import BytesIO
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image, ImageOps
from torch import Tensor

from smalti.core.errors import UserError
from smalti.core.files import open_regular
from smalti.images.fitting import Crop, Fit, fitted

# What Pillow's decoders raise on damaged bytes, determined by truncating files of every format and flipping bits.
DAMAGED = (
    OSError,
    ValueError,
    SyntaxError,
    RuntimeError,
    EOFError,
    LookupError,
    ArithmeticError,
    MemoryError,
    TypeError,
    struct.error,
    zlib.error,
)
_MOST_MEMORY = 200 * 10**6
"""Bytes of decoded pixels that any image may take: an 8-bit mask for the largest images, or 50 megapixels in colour."""
LONGEST_SIDE = 100_000
"""Pixels of the longer side of an image. Resampling takes memory in proportion: gigabytes for a row of 10**8 pixels."""
_MOST_COMPRESSED = 100
"""Bytes of decoded pixels per byte of the file, above which larger images are refused."""
_BYTES_PER_PIXEL = {"1": 1, "L": 1, "I;16": 2, "I;16L": 2, "I;16B": 2, "I;16N": 2}
_VALUES_AT_ONCE = 2**20
_SHOWN_BAD = 10  # images that one error names
_DEEP_GREY_MODES = ("I", "F", "I;16", "I;16L", "I;16B", "I;16N")


class BadImageError(UserError):
    """Raised for bytes that are not an image, or a damaged one; a caller that skips bad images catches it."""


def bad_images_error(bad: dict[int, str]) -> BadImageError:
    """Returns an error of one line that names all images that cannot be decoded, up to a limit."""
    if len(bad) == 1:
        return BadImageError(*bad.values())
    shown = "; ".join(list(bad.values())[:_SHOWN_BAD])
    rest = f"; and {len(bad) - _SHOWN_BAD} more" if len(bad) > _SHOWN_BAD else ""
    return BadImageError(f"{len(bad)} images cannot be decoded: {shown}{rest}")


class Decoded(NamedTuple):
    """An image of the requested size, and the size that it had, in pixels, upright."""

    pixels: UInt8[Tensor, "c h w"]
    original_height: int
    original_width: int


def decode(
    encoded: bytes, *, channels: int, height: int | None = None, width: int | None = None, fit: Fit = "crop"
) -> UInt8[Tensor, "c h w"]:
    """Decodes an image to pixels: upright, on white, 8 bits deep, grey or RGB, and of one size.

    EXIF rotation is applied, transparency is composed on white, deeper grey is scaled to 8 bits, and
    an animation gives its first frame. Then the image is fitted to `height` x `width` and resampled
    (Lanczos, antialiased). An image that already has the right size keeps its pixels exactly;
    without `height` and `width` every image does.

    Args:
        encoded: the bytes of a file in any format Pillow reads.
        channels: 1 for grey, 3 for RGB.
        height: in pixels; given together with `width` or not at all.
        width: in pixels.
        fit: what happens to an image of other proportions. `crop` fits the shorter side and cuts off
            the rest evenly; `pad` fits the longer side and adds white borders, the colour that
            transparency is composed on; `squash` fits both sides.

    Raises:
        BadImageError: if the bytes are empty, not an image, damaged, or hold more pixels than Pillow's guard against
            decompression bombs.
    """
    return decode_with_size(encoded, channels=channels, height=height, width=width, fit=fit).pixels


def decode_with_size(
    encoded: bytes, *, channels: int, height: int | None = None, width: int | None = None, fit: Fit = "crop"
) -> Decoded:
    """Decodes an image as `decode` does, with the same arguments; also returns its original size."""
    assert (height is None) == (width is None)
    flat = _decoded(encoded, channels)
    original = flat.size
    if height is not None and width is not None:
        flat = fitted(flat, height=height, width=width, fit=fit)
    return Decoded(_to_tensor(flat), original[1], original[0])


def decode_crops(
    encoded: bytes, crops: Sequence[Crop], *, channels: int, height: int, width: int, fit: Fit
) -> UInt8[Tensor, "n c h w"]:
    """Decodes an image once, as `decode` does, and returns crops of it, each fitted to `height` x `width`.

    Raises:
        BadImageError: as `decode` does.
    """
    flat = _decoded(encoded, channels)
    return torch.stack([_to_tensor(fitted(flat, height=height, width=width, fit=fit, crop=crop)) for crop in crops])


def _decoded(encoded: bytes, channels: int) -> Image.Image:
    assert channels in (1, 3)
    with _opened(encoded, channels=channels) as image:
        return _flatten(image, mode="L" if channels == 1 else "RGB")


def load_image(
    path: str | Path, *, channels: int, height: int | None = None, width: int | None = None
) -> UInt8[Tensor, "c h w"]:
    """Reads and decodes one file; see `decode`.

    Raises:
        UserError: with the file's name, if it cannot be read or decoded.
    """
    with _named(path):
        return decode(_read(path), channels=channels, height=height, width=width)


def image_sha256(path: str | Path) -> str:
    """Returns the SHA-256 of a file's bytes in hexadecimal; raises `UserError` as `load_image` does."""
    with _named(path):
        return hashlib.sha256(_read(path)).hexdigest()


def declared_pixels(path: str | Path) -> int:
    """Returns the number of pixels that a file declares, without decoding any.

    Raises:
        UserError: as `load_image` does.
    """
    with _named(path), _opened(_read(path), channels=1, load=False) as image:
        return image.width * image.height


def load_transparency(path: str | Path) -> UInt8[Tensor, "h w"] | None:
    """Returns the transparency of each pixel, 255 = fully transparent; None for an opaque image.

    Raises:
        UserError: as `load_image` does.
    """
    with _named(path), _opened(_read(path), channels=1) as image:
        alpha = _alpha(image)
        return None if alpha is None else 255 - torch.from_numpy(alpha)


class UnreadableImageError(BadImageError):
    """Raised for an image whose bytes cannot be read, or that is missing in its row."""


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
    with _named(path), _opened(_read(path), channels=channels) as image:
        profile = image.info.get("icc_profile")
        if not isinstance(profile, bytes) or profile[16:20] != {1: b"GRAY", 3: b"RGB "}[channels]:
            profile = None
        alpha = _alpha(image)
        mode = "L" if channels == 1 else "RGB"
        flat = _flatten(image, mode) if alpha is None else image.convert("RGBA").convert("RGB").convert(mode)
        return Layers(_to_tensor(flat), None if alpha is None else torch.from_numpy(alpha), profile)


def to_float(pixels: UInt8[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Maps 0..255 to float32 in [-1, 1], on the tensor's own device."""
    return pixels.float() / 127.5 - 1


def to_uint8(images: Float[Tensor, "*shape"]) -> UInt8[Tensor, "*shape"]:
    """Maps [-1, 1] to 0..255, rounded and clamped. The exact inverse of `to_float`."""
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


def most_pixels() -> int:
    """Returns the largest number of pixels of an image that Pillow opens."""
    return 2 * (Image.MAX_IMAGE_PIXELS or sys.maxsize)


@contextmanager
def _opened(encoded: bytes, *, channels: int, load: bool = True) -> Iterator[Image.Image]:
    """Opens an image; errors of its bytes, here or in the `with` block, become `BadImageError`.

    `channels` is the number that the caller needs, which decides how much memory it takes. With `load`, the image is
    loaded and upright.
    """
    if not encoded:
        raise BadImageError("the image is empty (0 bytes); repair or remove it")
    try:
        with Image.open(BytesIO(encoded)) as image:
            _refuse_bomb(image, len(encoded), channels)
            yield _upright(image) if load else image
    except BadImageError:
        raise
    except Image.UnidentifiedImageError as error:
        raise BadImageError(
            f"these {len(encoded)} bytes are not an image of a known format; save it as PNG or JPEG, or remove it"
        ) from error
    except Image.DecompressionBombError as error:
        raise BadImageError(
            f"the image has more than {most_pixels()} pixels, the most that are read; shrink or remove it"
        ) from error
    except DAMAGED as error:
        raise BadImageError(f"the image cannot be decoded ({_one_line(error)}); repair or remove it") from error


def _refuse_bomb(image: Image.Image, file_size: int, channels: int) -> None:
    """Refuses an image whose declared size needs much memory and far exceeds the file's, before it is decoded.

    Raises:
        BadImageError: in that case, or if a side is longer than `LONGEST_SIDE`. Photographs of other sizes pass: they
            do not compress that well.
    """
    if max(image.size) > LONGEST_SIDE:
        raise BadImageError(
            f"the image is {image.width}x{image.height} pixels, and a side of more than {LONGEST_SIDE} is not read; "
            "shrink or remove it"
        )
    depth = max(_BYTES_PER_PIXEL.get(image.mode, 4), 4 if channels == 3 else 1)
    memory = image.width * image.height * depth
    if memory > _MOST_MEMORY and memory > _MOST_COMPRESSED * file_size:
        raise BadImageError(
            f"the image declares {image.width}x{image.height} pixels in {file_size} bytes, a decompression bomb "
            "perhaps; shrink or remove it"
        )


def _upright(image: Image.Image) -> Image.Image:
    """Applies the EXIF rotation in place. Damaged pixels are an error; a damaged EXIF block is ignored."""
    if image.format == "EPS":
        raise ValueError("EPS is a program, which is not run; convert it to PNG")
    image.load()
    if image.mode in ("P", "PA") and image.palette is None:
        raise ValueError("it has no palette")
    with suppress(*DAMAGED):
        ImageOps.exif_transpose(image, in_place=True)
    return image


def _flatten(image: Image.Image, mode: str) -> Image.Image:
    """Composes transparency on white and converts to `mode`, "L" or "RGB"."""
    if image.mode in _DEEP_GREY_MODES:
        image = _to_8_bits(image)
    if image.mode == "P" or image.has_transparency_data:  # checked last: it fails on palettes that Pillow left unread
        rgba = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    if image.mode == "1":
        image = image.convert("L")
    if image.mode != mode:
        image = image.convert("RGB").convert(mode)  # not every mode converts straight to "L"
    return image


def _to_8_bits(image: Image.Image) -> Image.Image:
    """Converts grey of more than 8 bits to "L". Pillow's own conversion clips at 255, so most 16-bit images turn white.

    Integers are scaled from 16 bits, or from 31 bits if they exceed 16. Floats are scaled from the
    smallest of 1, 255 and 65535 that is not below their maximum. Negative values, infinities and NaN
    become black; the one grey that a 16-bit PNG may declare transparent becomes white.
    """
    values = np.asarray(image)
    rows = max(1, _VALUES_AT_ONCE // max(1, image.width))  # in strips, as float64 takes eight times the memory
    strips = range(0, image.height, rows)
    peak = max(float(_non_negative(values[top : top + rows]).max()) for top in strips)
    scales = (1.0, 255.0, 65535.0) if image.mode == "F" else (65535.0, 2.0**31 - 1)
    scale = next((scale for scale in scales if peak <= scale), peak)
    grey = np.empty(values.shape, dtype=np.uint8)
    transparent = image.info.get("transparency")
    for top in strips:
        strip = _non_negative(values[top : top + rows])
        grey[top : top + rows] = np.rint(strip * (255 / scale)).astype(np.uint8)
        if isinstance(transparent, int):
            grey[top : top + rows][strip == transparent] = 255
    return Image.fromarray(grey)


def _non_negative(values: np.ndarray) -> np.ndarray:
    return np.nan_to_num(values.astype(np.float64), nan=0.0, posinf=0.0, neginf=0.0).clip(min=0)


def _alpha(image: Image.Image) -> np.ndarray | None:
    """Returns the opacity of each pixel; None if the image is opaque, or of a deep grey with one transparent value."""
    if not image.has_transparency_data or image.mode in _DEEP_GREY_MODES:
        return None
    alpha = np.array(image.getchannel("A") if "A" in image.getbands() else image.convert("RGBA").getchannel("A"))
    return alpha if alpha.min(initial=255) < 255 else None


def _to_tensor(image: Image.Image) -> UInt8[Tensor, "c h w"]:
    pixels = torch.from_numpy(np.array(image))  # a copy: torch must own writable memory
    return pixels.unsqueeze(0) if pixels.ndim == 2 else pixels.permute(2, 0, 1).contiguous()


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
