"""Writes pictures: sheets of captioned rows, plain grids, animations and single images; reads their settings.

Pictures have 8 bits and show grey or RGB: the first channel of two, and the first three of more.
"""

import json
import math
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from itertools import cycle, islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from einops import rearrange, repeat
from jaxtyping import Float, UInt8
from PIL import Image, ImageDraw, ImageFont, PngImagePlugin
from torch import Tensor
from torch.nn import functional as F

from smalti.core.errors import UserError
from smalti.core.files import open_regular, whole_file
from smalti.images.decoding import to_uint8, visible
from smalti.images.formats.arrays import npy_bytes
from smalti.images.formats.opening import DAMAGED

GAP = 4  # pixels between pictures
SMALLEST_SHOWN = 96  # pixels; smaller pictures are enlarged by a whole factor, so that their pixels stay visible
LARGEST_SHOWN = 1024  # pixels of the longer side; `reduced` leaves larger pictures at most this size
CAPTION_SIZE = 16
_BAND = CAPTION_SIZE + 2 * GAP  # height of a caption
MOST_PIXELS = 2**30 // 12
"""Pixels of a sheet that shows as many images as fit, such as 64 of 1024x1024. Pillow warns of larger pictures
(decompression bombs)."""
MOST_PNG_CHANNELS = 4
SETTINGS_KEY = "smalti"  # text chunk of our PNGs
FRAME_MILLISECONDS, LAST_FRAME_MILLISECONDS = 100, 2000


def save_sheet(
    path: Path,
    rows: Mapping[str, Float[Tensor, "_b _c _h _w"] | UInt8[Tensor, "_b _c _h _w"]],
    *,
    settings: Mapping[str, Any] | None = None,
) -> None:
    """Saves rows of images, float in [-1, 1] or uint8, below each other.

    Each row has its caption, which names the channels if not all are shown.
    """
    captioned = [
        (caption + _describe_shown(images), images, _cell(*images.shape[2:])) for caption, images in rows.items()
    ]
    width = max(max(len(images) * cell.width, _caption_width(caption)) for caption, images, cell in captioned)
    sheet = Image.new("RGB", (width, sum(cell.height + _BAND for *_, cell in captioned)), "white")
    draw, top = ImageDraw.Draw(sheet), 0
    for caption, images, cell in captioned:
        draw.text((GAP, top + GAP), caption, fill="#444444", font=_font())
        sheet.paste(_strip(images), (0, top + _BAND))
        top += _BAND + cell.height
    save_png(path, sheet, settings)


def save_grid(
    path: Path,
    images: Float[Tensor, "b _c _h _w"] | UInt8[Tensor, "b _c _h _w"],
    *,
    settings: Mapping[str, Any] | None = None,
) -> None:
    """Saves images, float in [-1, 1] or uint8, as a grid about twice as wide as high."""
    save_png(path, _grid(images), settings)


def most_on_sheet(height: int, width: int, captions: Sequence[str] = ()) -> int:
    """Returns how many images of a size fit on a grid of `MOST_PIXELS`, enlarged and with gaps; at least one.

    With captions, the images fill the rows of a sheet in turn.
    """
    cell = _cell(height, width)
    caption_width = max(map(_caption_width, {*captions}), default=0)

    def pixels(count: int) -> int:
        if not captions:
            columns = _columns(count)
            return columns * cell.width * -(-count // columns) * cell.height
        rows = Counter(islice(cycle(captions), count))
        return max(max(rows.values()) * cell.width, caption_width) * len(rows) * (_BAND + cell.height)

    counts = range(1, MOST_PIXELS // (cell.height * cell.width) + 1)
    return max(1, bisect_right(counts, MOST_PIXELS, key=pixels))


def save_animation(
    path: Path, frames: Sequence[Float[Tensor, "b _c _h _w"]], *, settings: Mapping[str, Any] | None = None
) -> None:
    """Saves grids of the same images, step by step, as an animation that holds the last frame and loops.

    The format is PNG, or GIF if the name ends in .gif, with the settings as a comment; a GIF has 256 colours.
    """
    sheets = [_grid(images) for images in frames]
    shown = [FRAME_MILLISECONDS] * (len(sheets) - 1) + [LAST_FRAME_MILLISECONDS]
    options: dict[str, Any] = {"save_all": True, "append_images": sheets[1:], "duration": shown, "loop": 0}
    if path.suffix.lower() == ".gif":
        comment = json.dumps(dict(settings or {}), default=str)
        with whole_file(path) as partial:
            sheets[0].save(partial, format="GIF", comment=comment, **options)
    else:
        save_png(path, sheets[0], settings, **options)


def _grid(images: Tensor) -> Image.Image:
    columns, cell = _columns(len(images)), _cell(*images.shape[2:])
    lines = images.split(columns)
    sheet = Image.new("RGB", (columns * cell.width, len(lines) * cell.height), "white")
    for index, line in enumerate(lines):
        sheet.paste(_strip(line), (0, index * cell.height))
    return sheet


def _columns(count: int) -> int:
    """Returns the number of images of a grid that are side by side."""
    return min(count, max(1, round(math.sqrt(2 * count))))


def require_png(path: Path, flag: str = "--out") -> None:
    """Checks that a file's name, which `flag` sets, ends in .png.

    Raises:
        UserError: if it does not.
    """
    if path.suffix.lower() != ".png":
        raise UserError(
            f"{flag} {path} is not the name of a PNG; pictures are written as PNGs, give one ending in .png"
        )


def save_png(path: Path, image: Image.Image, settings: Mapping[str, Any] | None = None, **options: Any) -> None:
    """Writes a PNG atomically, with its settings as JSON in the text chunk `smalti`.

    The options are those of Pillow's PNG writer.
    """
    info = PngImagePlugin.PngInfo()
    if settings:
        info.add_itxt(SETTINGS_KEY, json.dumps(dict(settings), default=str))
    with whole_file(path) as partial:
        image.save(partial, format="PNG", pnginfo=info, **options)


def embedded_settings(path: Path) -> dict[str, Any]:
    """Returns the settings that `save_png` embedded in a file; empty for any other file.

    No pixel is decoded, so pictures of any size are read; `Image.open` would refuse large ones.
    """
    try:
        with open_regular(path) as file, PngImagePlugin.PngImageFile(file) as image:
            settings = json.loads(image.info[SETTINGS_KEY])
    except (UserError, *DAMAGED):  # a foreign or damaged file is not one of ours
        return {}
    return settings if isinstance(settings, dict) else {}


def save_image(
    path: Path, image: UInt8[Tensor, "c h w"], settings: Mapping[str, Any] | None = None, **options: Any
) -> None:
    """Writes one image as `save_png` does; one of more than four channels also as an array, in `array_path(path)`."""
    save_png(path, to_image(image), settings, **options)
    if len(image) > MOST_PNG_CHANNELS:
        with whole_file(array_path(path)) as partial:
            partial.write_bytes(npy_bytes(rearrange(image, "c h w -> h w c").cpu().numpy()))


def image_paths(pngs: Iterable[Path], channels: int) -> dict[Path, Path]:
    """Returns the files that `save_image` writes for each PNG: the keys, with the PNG that holds their settings."""
    pngs = list(pngs)
    arrays = {array_path(png): png for png in pngs} if channels > MOST_PNG_CHANNELS else {}
    return {**{png: png for png in pngs}, **arrays}


def array_path(path: Path) -> Path:
    """Returns the file of an image's array, beside the PNG that shows it."""
    return path.with_suffix(".npy")


def reduced(images: UInt8[Tensor, "n c h w"]) -> UInt8[Tensor, "n c _h _w"]:
    """Returns images, large ones reduced to every kth pixel so that no side is longer than `LARGEST_SHOWN`."""
    step = -(-max(images.shape[2:]) // LARGEST_SHOWN)
    return images[:, :, ::step, ::step]


def to_image(image: Float[Tensor, "c h w"] | UInt8[Tensor, "c h w"]) -> Image.Image:
    """Converts an image, float in [-1, 1] or uint8, to a Pillow image; two and four channels are grey or RGB and alpha.

    Of more channels the first three are shown.
    """
    pixels = _as_uint8(image).cpu()
    pixels = pixels if len(pixels) <= MOST_PNG_CHANNELS else visible(pixels)
    return Image.fromarray(pixels[0].numpy() if len(pixels) == 1 else rearrange(pixels, "c h w -> h w c").numpy())


def _describe_shown(images: Tensor) -> str:
    channels = images.shape[1]
    return "" if channels in (1, 3) else f" (channel{' 1' if channels < 3 else 's 1-3'} of {channels})"


@cache
def _font() -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(CAPTION_SIZE)


def _caption_width(caption: str) -> int:
    return math.ceil(_font().getlength(caption)) + 2 * GAP


class _Cell(NamedTuple):
    """The place of an image on a sheet: the factor that it is enlarged by, and the size with gaps, in pixels."""

    factor: int
    height: int
    width: int


def _cell(height: int, width: int) -> _Cell:
    factor = max(1, math.ceil(SMALLEST_SHOWN / max(height, width)))
    return _Cell(factor, height * factor + 2 * GAP, width * factor + 2 * GAP)


def _as_uint8(images: Tensor) -> Tensor:
    return images if images.dtype == torch.uint8 else to_uint8(images)


def _strip(images: Tensor) -> Image.Image:
    factor = _cell(*images.shape[2:]).factor
    pixels = repeat(_as_uint8(visible(images)), "b c h w -> b c (h f1) (w f2)", f1=factor, f2=factor)
    pixels = F.pad(pixels, (GAP, GAP, GAP, GAP), value=255)
    return to_image(rearrange(pixels, "b c h w -> c h (b w)"))
