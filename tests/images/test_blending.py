"""Composition by brute force: the band, what it keeps, and colours that meet."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from smalti.images.blending import compose
from smalti.images.decoding import to_float, to_uint8
from smalti.metrics.image_errors import seam_steps

SEEDS = st.integers(0, 999)


def draw(seed, *shape):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def drawn(seed, share):
    """Images, fills and holes."""
    pixels = (draw(seed, 2, 3, 7, 9) * 256).to(torch.uint8)
    return pixels, draw(seed + 1, 2, 3, 7, 9) * 2 - 1, draw(seed + 2, 2, 7, 9) < share


@settings(max_examples=25)
@given(SEEDS, st.floats(0.02, 0.3), st.integers(0, 3))
def test_the_band_fades_evenly_and_all_beyond_it_is_exact(seed, share, feather):
    pixels, filled, hole = drawn(seed, share)
    result = compose(pixels, filled, hole, feather_pixels=feather, match_colour=False)
    for image in range(2):
        places = hole[image].nonzero()
        for y in range(7):
            for x in range(9):
                apart = min((max(abs(v - y), abs(u - x)) for v, u in places.tolist()), default=99)
                at, given_ = (image, slice(None), y, x), to_float(pixels)[image, :, y, x]
                of_fill = max(0.0, 1 - apart / (feather + 1))
                expected = to_uint8(of_fill * filled[at] + (1 - of_fill) * given_) if of_fill else pixels[at]
                assert (result[at].int() - expected.int()).abs().max() <= (0 < of_fill < 1)  # rounding of a blend


@given(SEEDS, st.floats(0.02, 0.9), st.integers(0, 2), st.booleans())
def test_what_a_hole_hides_decides_nothing(seed, share, feather, match_colour):
    pixels, filled, hole = drawn(seed, share)
    others = torch.where(hole.unsqueeze(1), 255 - pixels, pixels)
    one, other = (
        compose(each, filled, hole, feather_pixels=feather, match_colour=match_colour) for each in (pixels, others)
    )
    assert torch.equal(one, other)


def test_a_fill_whose_colours_are_off_by_a_shade_is_mended_wholly():
    """Of a smooth picture: everywhere in the hole, however far from its rim."""
    ramp = torch.linspace(-0.5, 0.5, 20).expand(1, 3, 20, 20)
    hole = torch.zeros(1, 20, 20, dtype=torch.bool)
    hole[:, 5:15, 4:16] = True
    off = ramp + torch.tensor([0.3, -0.2, 0.1]).view(1, 3, 1, 1)
    mended = compose(to_uint8(ramp), off, hole, feather_pixels=0, match_colour=True)
    assert (mended.int() - to_uint8(ramp).int()).abs().max() <= 1
    left = compose(to_uint8(ramp), off, hole, feather_pixels=0, match_colour=False)
    assert seam_steps(to_float(left), hole) > 4 * seam_steps(to_float(mended), hole)


def test_matching_is_by_inverse_cubes_of_the_distance():
    """A hole of two pixels in a row of six, by hand; the rim is the pixel on each side."""
    given_, filled = torch.tensor([0.0, 0.2, 9, 9, -0.4, 0.0]), torch.tensor([0.0, 0.0, 0.5, -0.5, 0.0, 0.0])
    hole = torch.tensor([False, False, True, True, False, False])
    pixels = to_uint8(given_.clamp(-1, 1)).view(1, 1, 1, 6)
    result = compose(pixels, filled.view(1, 1, 1, 6), hole.view(1, 1, 6), feather_pixels=0, match_colour=True)
    left, right = 0.2, -0.4
    expected = [0.5 + (left + right / 8) / 1.125, -0.5 + (left / 8 + right) / 1.125]
    assert to_float(result)[0, 0, 0, 2:4].tolist() == pytest.approx(expected, abs=0.01)
    assert torch.equal(result[..., ~hole], pixels[..., ~hole])


def test_a_hole_without_a_rim_is_taken_as_it_is():
    pixels, filled, _ = drawn(0, 0)
    everything = torch.ones(2, 7, 9, dtype=torch.bool)
    result = compose(pixels, filled, everything, feather_pixels=2, match_colour=True)
    assert torch.equal(result, to_uint8(filled))
