"""Fills without a model: what scikit-image and OpenCV compute, in the masked pixels only."""

import numpy as np
import pytest
import torch
from skimage.filters import gaussian
from skimage.restoration import inpaint_biharmonic
from torch import Tensor

from smalti.metrics.baselines import TELEA_RADIUS, biharmonic, ssim, telea


def smooth_images(channels: int = 3) -> Tensor:
    noise = np.random.default_rng(0).random((3, channels, 12, 16))
    return torch.from_numpy((255 * gaussian(noise, 2, channel_axis=1)).astype(np.uint8))


def hole() -> Tensor:
    mask = torch.zeros(3, 12, 16, dtype=torch.bool)
    mask[:, 2:7, 3:9] = True
    return mask


def test_biharmonic_fill_equals_scikit_image_and_keeps_other_pixels():
    images, masks = smooth_images(), hole()
    filled = biharmonic(images, masks)
    for image, mask, result in zip(images, masks, filled, strict=True):
        assert torch.equal(result[:, ~mask], image[:, ~mask])
        expected = inpaint_biharmonic(image.permute(1, 2, 0).numpy(), mask.numpy(), channel_axis=-1)
        difference = result.permute(1, 2, 0).numpy() / 255 - expected
        assert np.abs(difference).max() < 0.003
    assert ssim(filled, filled) == 1


def test_telea_fill_equals_that_of_whole_images_and_keeps_other_pixels():
    cv2 = pytest.importorskip("cv2")
    images, masks = smooth_images(), hole()
    filled = telea(images, masks)
    assert not torch.equal(filled, images)
    for image, mask, result in zip(images, masks, filled, strict=True):
        assert torch.equal(result[:, ~mask], image[:, ~mask])
        colour = np.ascontiguousarray(image.permute(1, 2, 0).numpy())
        expected = cv2.inpaint(colour, mask.byte().numpy(), TELEA_RADIUS, cv2.INPAINT_TELEA)
        assert np.array_equal(result.permute(1, 2, 0).numpy(), expected)


@pytest.mark.parametrize("channels", [1, 2, 4])
def test_telea_takes_any_number_of_channels(channels):
    pytest.importorskip("cv2")
    assert telea(smooth_images(channels), hole()).shape == (3, channels, 12, 16)
