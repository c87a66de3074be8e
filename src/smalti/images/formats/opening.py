"""Opens encoded images with Pillow, and refuses what is damaged, or too large for its bytes, before it is decoded."""

import struct
import sys
import threading
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import BytesIO

from PIL import Image, ImageOps

from smalti.core.errors import UserError, one_line

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
_LOCK = threading.Lock()
_raised_limits: list[int] = []  # Pillow's own limit, then those of the images that are open; empty without these
_SHOWN_BAD = 10  # images that one error names


class BadImageError(UserError):
    """Raised for bytes that are not an image, or a damaged one; a caller that skips bad images catches it."""


class UnreadableImageError(BadImageError):
    """Raised for an image whose bytes cannot be read, or that is missing in its row."""


class TooLargeError(BadImageError):
    """Raised for an image with too many pixels, or more than its bytes may hold."""


def bad_images_error(bad: dict[int, str]) -> BadImageError:
    """Returns an error of one line that names all images that cannot be decoded, up to a limit."""
    if len(bad) == 1:
        return BadImageError(*bad.values())
    shown = "; ".join(list(bad.values())[:_SHOWN_BAD])
    rest = f"; and {len(bad) - _SHOWN_BAD} more" if len(bad) > _SHOWN_BAD else ""
    return BadImageError(f"{len(bad)} images cannot be decoded: {shown}{rest}")


def most_pixels() -> int:
    """Returns the largest number of pixels of an image that Pillow opens."""
    return 2 * (Image.MAX_IMAGE_PIXELS or sys.maxsize)


@contextmanager
def opened(encoded: bytes, *, channels: int, load: bool = True, limit: int | None = None) -> Iterator[Image.Image]:
    """Opens an image; errors of its bytes, here or in the `with` block, become `BadImageError`.

    Args:
        encoded: the bytes of a file.
        channels: the number that the caller needs, which decides how much memory it takes.
        load: whether the image is loaded and upright.
        limit: the most pixels; None for the guards against decompression bombs, Pillow's and `refuse_expansion`.
    """
    if not encoded:
        raise BadImageError("the image is empty (0 bytes); repair or remove it")
    try:
        with _pillow_opens(limit or 0), Image.open(BytesIO(encoded)) as image:
            _refuse_size(image, len(encoded), channels, limit)
            yield _upright(image) if load else image
    except BadImageError:
        raise
    except Image.UnidentifiedImageError as error:
        raise BadImageError(
            f"these {len(encoded)} bytes are not an image of a known format; save it as PNG or JPEG, or remove it"
        ) from error
    except Image.DecompressionBombError as error:
        raise TooLargeError(
            f"the image has more than {max(limit or 0, most_pixels())} pixels, the most that are read; shrink or "
            "remove it"
        ) from error
    except DAMAGED as error:
        raise BadImageError(f"the image cannot be decoded ({one_line(error)}); repair or remove it") from error


@contextmanager
def _pillow_opens(limit: int) -> Iterator[None]:
    """Lets Pillow open images of so many pixels within the block, if it refuses them; smaller limits are checked later.

    Pillow has one limit for the process. Images are opened on several threads, the last of which puts it back.
    """
    with _LOCK:
        own = _raised_limits[0] if _raised_limits else Image.MAX_IMAGE_PIXELS or sys.maxsize
        if raised := limit > 2 * own:
            _raised_limits[:] = [*(_raised_limits or [own]), limit]
            Image.MAX_IMAGE_PIXELS = max(_raised_limits)
    try:
        yield
    finally:
        if raised:
            with _LOCK:
                _raised_limits.remove(limit)
                Image.MAX_IMAGE_PIXELS = max(_raised_limits)
                if len(_raised_limits) == 1:
                    _raised_limits.clear()


def _refuse_size(image: Image.Image, file_size: int, channels: int, limit: int | None) -> None:
    """Refuses an image of too many pixels, before it is decoded.

    Without a limit it refuses one whose declared size needs much memory and far exceeds the file's. Photographs pass:
    they do not compress that well.

    Raises:
        TooLargeError: in that case, or if a side is longer than `LONGEST_SIDE`.
    """
    pixels = image.width * image.height
    if limit is not None:
        if pixels > limit:
            raise TooLargeError(
                f"the image is {image.width}x{image.height} pixels, and more than {limit} are not read; shrink or "
                "remove it"
            )
        return
    if max(image.size) > LONGEST_SIDE:
        raise TooLargeError(
            f"the image is {image.width}x{image.height} pixels, and a side of more than {LONGEST_SIDE} is not read; "
            "shrink or remove it"
        )
    depth = max(_BYTES_PER_PIXEL.get(image.mode, 4), 1 if channels < 3 else 4)
    if _expands(pixels * depth, file_size):
        raise TooLargeError(
            f"the image declares {image.width}x{image.height} pixels in {file_size} bytes, a decompression bomb "
            "perhaps; shrink or remove it"
        )


def refuse_expansion(size: int, stored: int) -> None:
    """Refuses compressed bytes that would expand to far more, a decompression bomb perhaps.

    Args:
        size: number of bytes after decompression.
        stored: number of compressed bytes.

    Raises:
        UnreadableImageError: in that case.
    """
    if _expands(size, stored):
        raise UnreadableImageError(
            f"{stored} compressed bytes declare {size}, a decompression bomb perhaps; store it without compression, or "
            "remove it"
        )


def _expands(size: int, stored: int) -> bool:
    return size > _MOST_MEMORY and size > _MOST_COMPRESSED * stored


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
