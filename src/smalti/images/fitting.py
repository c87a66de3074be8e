"""Fits images of any proportions to one size: crops, pads or squashes them, whole or a random crop of them."""

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, TypeAlias

from jaxtyping import Int64
from PIL import Image
from torch import Tensor

from smalti.core.config import require_choice
from smalti.core.errors import UserError, whole_number
from smalti.core.randomness import Stream, derive, uniform
from smalti.images.formats.planes import Depth

Fit: TypeAlias = Literal["crop", "pad", "squash"]
"""The way in which an image of other proportions becomes one of a given size."""
_DESCRIBED_FITS: dict[Fit, str] = {
    "crop": "shorter side, centre crop",
    "pad": "longer side, white borders",
    "squash": "each side, proportions ignored",
}
SMALLEST_CROP = 0.8
"""Smallest side of a random crop, as a share of the side of the whole image's largest crop of the same proportions."""

TEN_CROP_SIDE = 1 / 1.1
"""Side of the crops of a ten-crop, as a share of the side of the whole image's largest crop."""


class Crop(NamedTuple):
    """A part of an image: its side as a share of the largest crop, and its place, each from 0 (left, top) to 1."""

    side: float
    across: float
    down: float


def random_crops(numbers: Int64[Tensor, " n"], count: int) -> list[list[Crop]]:
    """Draws `count` crops of each image: sides uniform from `SMALLEST_CROP` to 1, places uniform in the image.

    They depend on the image's number and the crop's number alone, so that every build of a set has the same ones.
    """
    draws = uniform(derive(numbers, Stream.RANDOM_CROPS), count, 3).tolist()
    return [[Crop(SMALLEST_CROP + (1 - SMALLEST_CROP) * side, x, y) for side, x, y in image] for image in draws]


def ten_crops() -> list[Crop]:
    """Returns the four corners and the centre of an image: with their mirror images, ten crops.

    They are the ten crops of AlexNet's evaluation ("ImageNet Classification with Deep Convolutional Neural Networks",
    section 4.1), which LlamaGen stores as training data, from images whose shorter side is 1.1 of the crop's.
    """
    corners = [Crop(TEN_CROP_SIDE, across, down) for down in (0.0, 1.0) for across in (0.0, 1.0)]
    return [*corners, Crop(TEN_CROP_SIDE, 0.5, 0.5)]


def fitted(image: Image.Image, *, height: int, width: int, fit: Fit, crop: Crop | None = None) -> Image.Image:
    """Resamples an image, or a crop of it, to a size (Lanczos); see `decoding.decode`.

    Cropping is one step with resampling: resizing before would make an intermediate image of 3x5000 pixels huge.
    """
    if fit == "pad":
        assert crop is None
        scale = max(image.width / width, image.height / height)
        size = (max(1, round(image.width / scale)), max(1, round(image.height / scale)))
        padded = Image.new(image.mode, (width, height), 2.0**16 - 1 if image.mode == "F" else "white")
        corner = ((width - size[0]) // 2, (height - size[1]) // 2)
        padded.paste(image.resize(size, Image.Resampling.LANCZOS), corner)
        return padded
    side, across, down = crop or Crop(1.0, 0.5, 0.5)
    scale = min(image.width / width, image.height / height)
    whole = (image.width, image.height) if fit == "squash" else (scale * width, scale * height)
    size = side * whole[0], side * whole[1]
    left, top = max(0.0, across * (image.width - size[0])), max(0.0, down * (image.height - size[1]))
    box = (left, top, min(left + size[0], image.width), min(top + size[1], image.height))  # rounding exceeds the image
    return image.resize((width, height), Image.Resampling.LANCZOS, box=box)


def require_shape(height: int, width: int, channels: int) -> None:
    """Refuses a shape of images that is no shape.

    Raises:
        UserError: for a number that is not whole, or below 1.
    """
    for name, number in {"height": height, "width": width, "channels": channels}.items():
        whole_number(name, number)
    if height < 1 or width < 1:
        raise UserError(f"images of {height}x{width} pixels are empty; give a height and width of at least 1")
    if channels < 1:
        raise UserError(f"images cannot have {channels} channels; give 1 for grey, 3 for RGB or as many as they have")


def describe(*, height: int, width: int, channels: int, fit: Fit = "crop", depth: int = 8) -> dict[str, Any]:
    """Describes what `decode` does to every image, as JSON for latent sets; keep it in step with `decode`.

    Raises:
        UserError: for a fit or a depth that there is not.
    """
    require_choice("fit", fit, Fit)
    require_choice("depth", depth, Depth)
    return {
        "height": height,
        "width": width,
        "channels": channels,
        "fit": _DESCRIBED_FITS[fit],
        "resampling": "lanczos",
        "background": "white",
        **({} if depth == 8 else {"image_depth": depth}),  # sets from before there was a choice have no such entry
    }


def recorded_fit(preprocessing: Mapping[str, Any]) -> Fit:
    """Returns the fit that `describe` recorded; models from before there was a choice cropped."""
    fits: list[Fit] = [fit for fit, text in _DESCRIBED_FITS.items() if text == preprocessing.get("fit")]
    return fits[0] if fits else "crop"
