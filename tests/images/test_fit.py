"""Images of other proportions than the requested ones: cropped, padded or squashed."""

import io

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from smalti.images.decoding import decode, decode_crops
from smalti.images.fitting import Crop, describe, fitted, random_crops, recorded_fit, ten_crops

RGB = np.random.default_rng(0).integers(0, 256, (6, 9, 3), dtype=np.uint8)


def encode(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("portrait", [False, True])
def test_padding_keeps_the_whole_image_between_white_borders(portrait, channels):
    """Six by nine pixels fit into nine by nine without resampling."""
    pixels = RGB.swapaxes(0, 1) if portrait else RGB
    pixels = pixels if channels == 3 else pixels[..., :1].repeat(3, 2)
    padded = decode(encode(Image.fromarray(pixels)), channels=channels, height=9, width=9, fit="pad")
    padded = padded.transpose(1, 2) if portrait else padded
    expected = torch.full((channels, 9, 9), 255, dtype=torch.uint8)
    expected[:, 1:7] = torch.from_numpy(RGB).permute(2, 0, 1)[:channels]
    assert padded.equal(expected)


def test_squashing_ignores_the_proportions():
    """A linear ramp of 16 columns becomes one of 8, each the mean of two."""
    ramp = np.broadcast_to((10 * np.arange(16, dtype=np.uint8))[None, :, None], (8, 16, 3))
    squashed = decode(encode(Image.fromarray(ramp)), channels=3, height=8, width=8, fit="squash").float()
    assert (squashed - (20 * torch.arange(8) + 5)).abs().max() <= 2


@pytest.mark.parametrize("fit", ["crop", "pad", "squash"])
@pytest.mark.parametrize("size", [(1, 3000), (3000, 1)])
def test_the_thinnest_images_fit(fit, size):
    decoded = decode(encode(Image.new("RGB", size, "red")), channels=3, height=8, width=8, fit=fit)
    assert decoded.shape == (3, 8, 8)
    assert (decoded[1] == 0).any()


def test_the_fit_is_read_from_its_description():
    for fit in ("crop", "pad", "squash"):
        assert recorded_fit(describe(height=8, width=8, channels=3, fit=fit)) == fit
    assert recorded_fit({}) == recorded_fit({"fit": 3}) == "crop"


@given(
    size=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    target=st.tuples(st.integers(1, 12), st.integers(1, 12)),
    crop=st.builds(Crop, st.floats(0.8, 1), st.floats(0, 1), st.floats(0, 1)),
    fit=st.sampled_from(["crop", "squash"]),
)
def test_crops_have_the_size_and_never_leave_the_image(size, target, crop, fit):
    """Pillow refuses a box outside the image."""
    image = Image.new("RGB", size, "red")
    cropped = fitted(image, height=target[0], width=target[1], fit=fit, crop=crop)
    assert cropped.size == target[::-1]
    assert cropped.getcolors() == [(target[0] * target[1], (255, 0, 0))]


def test_rounding_does_not_make_a_box_larger_than_the_image():
    """The largest crop of 7:5 is 14 femtopixels wider than this image."""
    assert fitted(Image.new("L", (253, 295)), height=5, width=7, fit="crop").size == (7, 5)


def test_crops_are_parts_of_the_original_image():
    """A crop of half the side of 12x18 pixels, at the right and in the middle, is a box of 6x6 of its pixels."""
    pixels = np.random.default_rng(0).integers(0, 256, (12, 18, 3), dtype=np.uint8)
    crops = [Crop(0.5, 1.0, 0.5), Crop(1.0, 0.5, 0.5)]
    size = {"channels": 3, "height": 6, "width": 6}
    right, whole = decode_crops(encode(Image.fromarray(pixels)), crops, **size, fit="crop")
    assert right.equal(torch.from_numpy(pixels[3:9, 12:]).permute(2, 0, 1))
    assert whole.equal(decode(encode(Image.fromarray(pixels)), **size))


def test_the_ten_crops_are_corners_and_centre_of_the_original_image():
    pixels = np.random.default_rng(0).integers(0, 256, (22, 30, 3), dtype=np.uint8)
    size = {"channels": 3, "height": 20, "width": 20}
    crops = decode_crops(encode(Image.fromarray(pixels)), ten_crops(), **size, fit="crop")
    corners = [(0, 0), (0, 10), (2, 0), (2, 10), (1, 5)]  # top and left
    for crop, (top, left) in zip(crops, corners, strict=True):
        assert crop.equal(torch.from_numpy(pixels[top : top + 20, left : left + 20]).permute(2, 0, 1))


def test_random_crops_depend_on_image_and_number_and_are_spread():
    crops = random_crops(torch.arange(500), 4)
    assert random_crops(torch.tensor([7]), 2) == [crops[7][:2]]
    sides, across, down = torch.tensor(crops).flatten(0, 1).T
    assert 0.8 <= sides.min() < 0.81
    assert 0.99 < sides.max() <= 1
    for place in (across, down):
        assert abs(float(place.mean()) - 0.5) < 0.03
        assert abs(float(torch.corrcoef(torch.stack([place, sides]))[0, 1])) < 0.1
