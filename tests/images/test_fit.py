"""Images of other proportions than the requested ones: cropped, padded or squashed."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from smalti.images.decoding import decode, describe, recorded_fit

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
