"""The rate-distortion function of a Gaussian source against its definition, solved by scipy."""

import math

import pytest
import torch
from helpers.image_toys import write_patches
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import brentq

from smalti.images.image_set import ImageRows, open_images
from smalti.studies.hr_vqvae.rate_distortion import gaussian_distortion, pixel_variances

variances = st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=8)


@given(variances, st.floats(0, 60))
def test_the_water_level_spends_all_bits(values, bits):
    def rate(level):
        return sum(max(0.0, math.log2(value / level) / 2) for value in values) - bits

    level = brentq(rate, 1e-40, max(values), xtol=1e-45, rtol=1e-14) if bits else max(values)
    expected = sum(min(level, value) for value in values) / len(values)
    assert gaussian_distortion(torch.tensor(values), bits) == pytest.approx(expected, rel=1e-6)


def test_equal_components_share_the_bits_and_empty_ones_cost_nothing():
    assert gaussian_distortion(torch.tensor([4.0, 4.0]), 6.0) == pytest.approx(4 * 2 ** (-2 * 3))
    assert gaussian_distortion(torch.tensor([4.0, 0.0]), 3.0) == pytest.approx(4 * 2 ** (-2 * 3) / 2)
    assert gaussian_distortion(torch.zeros(3), 5.0) == 0


def test_variances_sum_to_that_of_the_pixels(tmp_path):
    write_patches(tmp_path / "img", 30)
    images = open_images(str(tmp_path / "img"), height=8, width=8)
    rows = ImageRows(images, split="train", flips=False)
    pixels = rows.__getitems__(range(len(rows)))["images"].flatten(1).double() / 255
    expected = torch.linalg.svdvals(pixels - pixels.mean(0)).square() / len(rows)
    found = torch.tensor(pixel_variances(images), dtype=torch.float64).flip(0)[: len(expected)]
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9)
