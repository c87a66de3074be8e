"""Blending against brute force: the feather band, exact pixels and matched colours."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from smalti.core.randomness import row_seeds
from smalti.images import blending
from smalti.images.blending import compose
from smalti.images.decoding import to_float, to_uint8
from smalti.images.masks import strokes
from smalti.metrics.image_errors import seam_steps

SEEDS = st.integers(0, 999)


def draw(seed, *shape):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def example(seed, share):
    """Returns random images, fills and masks."""
    pixels = (draw(seed, 2, 3, 7, 9) * 256).to(torch.uint8)
    return pixels, draw(seed + 1, 2, 3, 7, 9) * 2 - 1, draw(seed + 2, 2, 7, 9) < share


@settings(max_examples=25)
@given(SEEDS, st.floats(0.02, 0.3), st.integers(0, 3))
def test_the_feather_band_fades_evenly_and_other_pixels_are_exact(seed, share, feather):
    pixels, filled, mask = example(seed, share)
    result = compose(pixels, filled, mask, feather_pixels=feather, match_colour=False)
    for image in range(2):
        masked = mask[image].nonzero()
        for y in range(7):
            for x in range(9):
                distance = min((max(abs(v - y), abs(u - x)) for v, u in masked.tolist()), default=99)
                index, original = (image, slice(None), y, x), to_float(pixels)[image, :, y, x]
                fill = max(0.0, 1 - distance / (feather + 1))
                expected = to_uint8(fill * filled[index] + (1 - fill) * original) if fill else pixels[index]
                assert (result[index].int() - expected.int()).abs().max() <= (0 < fill < 1)  # rounding of a blend


@given(SEEDS, st.floats(0.02, 0.9), st.integers(0, 2), st.booleans())
def test_masked_pixels_do_not_affect_the_result(seed, share, feather, match_colour):
    pixels, filled, mask = example(seed, share)
    others = torch.where(mask.unsqueeze(1), 255 - pixels, pixels)
    one, other = (
        compose(each, filled, mask, feather_pixels=feather, match_colour=match_colour) for each in (pixels, others)
    )
    assert torch.equal(one, other)


def test_a_constant_colour_offset_is_removed_everywhere():
    """The image is smooth, so the fill must match it at any distance from the mask's rim."""
    ramp = torch.linspace(-0.5, 0.5, 20).expand(1, 3, 20, 20)
    mask = torch.zeros(1, 20, 20, dtype=torch.bool)
    mask[:, 5:15, 4:16] = True
    fill = ramp + torch.tensor([0.3, -0.2, 0.1]).view(1, 3, 1, 1)
    matched = compose(to_uint8(ramp), fill, mask, feather_pixels=0, match_colour=True)
    assert (matched.int() - to_uint8(ramp).int()).abs().max() <= 1
    unmatched = compose(to_uint8(ramp), fill, mask, feather_pixels=0, match_colour=False)
    assert seam_steps(to_float(unmatched), mask) > 4 * seam_steps(to_float(matched), mask)


def test_rim_weights_are_inverse_cubes_of_the_distance():
    """Two masked pixels in a row of six, computed by hand; the rim is the pixel on each side.

    The differences are shades, so their median makes no difference.
    """
    image, filled = torch.tensor([0.0, 0.2, 9, 9, -0.04, 0.0]), torch.tensor([0.0, 0.0, 0.5, -0.5, 0.0, 0.0])
    mask = torch.tensor([False, False, True, True, False, False])
    pixels = to_uint8(image.clamp(-1, 1)).view(1, 1, 1, 6)
    result = compose(pixels, filled.view(1, 1, 1, 6), mask.view(1, 1, 6), feather_pixels=0, match_colour=True)
    left, right = 0.2, -0.04
    expected = [0.5 + (left + right / 8) / 1.125, -0.5 + (left / 8 + right) / 1.125]
    assert to_float(result)[0, 0, 0, 2:4].tolist() == pytest.approx(expected, abs=0.01)
    assert torch.equal(result[..., ~mask], pixels[..., ~mask])


@pytest.mark.parametrize("exact_area", [0, blending._EXACT_AREA])
def test_other_content_at_the_rim_is_not_smeared_over_the_fill(monkeypatch, exact_area):
    """The image has a black stripe that the fill lacks; the fill is shifted by its shade alone."""
    monkeypatch.setattr(blending, "_EXACT_AREA", exact_area)
    image = torch.full((1, 3, 24, 24), 0.4)
    image[..., 10:13] = -1.0
    mask = torch.zeros(1, 24, 24, dtype=torch.bool)
    mask[:, 6:18, 4:20] = True
    fill = torch.full((1, 3, 24, 24), 0.4) + torch.tensor([0.1, -0.1, 0.05]).view(1, 3, 1, 1)
    result = to_float(compose(to_uint8(image), fill, mask, feather_pixels=0, match_colour=True))
    assert (result[0, :, mask[0]] - 0.4).abs().max() < 0.02
    assert result[0, :, ~mask[0]].equal(to_float(to_uint8(image))[0, :, ~mask[0]])


@settings(max_examples=25)
@given(SEEDS, st.floats(0.05, 0.5))
def test_small_differences_are_interpolated_whole(seed, share):
    """A mean of the rim's differences by brute force, without the median that the method splits off."""
    pixels, _, mask = example(seed, share)
    filled = to_float(pixels) + 0.1 * (draw(seed + 3, 2, 3, 7, 9) - 0.5)
    result = to_float(compose(pixels, filled, mask, feather_pixels=0, match_colour=True))
    for image in range(2):
        rim = [
            (y, x)
            for y, x in (~mask[image]).nonzero().tolist()
            if mask[image, max(0, y - 1) : y + 2, max(0, x - 1) : x + 2].any()
        ]
        for y, x in mask[image].nonzero().tolist() if rim else []:
            weights = torch.tensor([max(1.0, (v - y) ** 2 + (u - x) ** 2) ** -1.5 for v, u in rim])
            differences = torch.stack([to_float(pixels)[image, :, v, u] - filled[image, :, v, u] for v, u in rim])
            expected = filled[image, :, y, x] + (weights[:, None] * differences).sum(0) / weights.sum()
            assert (result[image, :, y, x] - expected.clamp(-1, 1)).abs().max() < 0.01


def test_a_mask_of_the_whole_image_returns_the_fill():
    pixels, filled, _ = example(0, 0)
    everything = torch.ones(2, 7, 9, dtype=torch.bool)
    result = compose(pixels, filled, everything, feather_pixels=2, match_colour=True)
    assert torch.equal(result, to_uint8(filled))


def smooth(seed, count, side):
    """Returns smooth random images in [-1, 1]."""
    return torch.nn.functional.interpolate(draw(seed, count, 3, 6, 6) * 2 - 1, (side, side), mode="bicubic").clamp(
        -1, 1
    )


@pytest.mark.parametrize("feather", [0, 3])
def test_large_images_are_matched_like_small_ones(monkeypatch, feather):
    """The method for large images against the exact weights: nearly equal colours, and seams no worse."""
    images, mask = smooth(0, 3, 90), strokes(row_seeds(0, torch.arange(3)), 90, 90)
    pixels, filled = to_uint8(images), images + 0.3 * smooth(1, 3, 90) + 0.1 * draw(2, 3, 3, 90, 90)
    options = {"feather_pixels": feather, "match_colour": True}
    exact = compose(pixels, filled, mask, **options)
    monkeypatch.setattr(blending, "_EXACT_AREA", 0)
    fast = compose(pixels, filled, mask, **options)
    differences = (exact.int() - fast.int()).abs()
    assert 0 < differences.max() <= 6
    assert differences[mask.unsqueeze(1).expand_as(differences)].float().mean() < 0.5
    exact_seams, fast_seams = (seam_steps(to_float(each), mask).mean() for each in (exact, fast))
    assert fast_seams < 1.01 * exact_seams
    others = torch.where(mask.unsqueeze(1), 255 - pixels, pixels)
    assert torch.equal(fast, compose(others, filled, mask, **options))


def test_time_of_colour_matching_grows_with_the_pixels(monkeypatch):
    """Counts the products of the convolutions: four times the pixels take about four times as many."""
    products = []
    convolve = torch.nn.functional.conv2d

    def counted(images, kernel):
        products.append(images.numel() * kernel.numel())
        return convolve(images, kernel)

    monkeypatch.setattr(blending.F, "conv2d", counted)
    monkeypatch.setattr(blending.torch, "cdist", None)  # the exact method
    counts = []
    for side in (500, 1000):
        products.clear()
        everywhere = draw(side, 1, side, side) < 0.3
        pixels = torch.zeros(1, 3, side, side, dtype=torch.uint8)
        compose(pixels, torch.ones(1, 3, side, side), everywhere, feather_pixels=0, match_colour=True)
        counts.append(sum(products))
    assert counts[1] < 4.2 * counts[0]
