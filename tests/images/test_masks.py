"""Masks against brute force; masked pixels have no influence on blanked images."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageFilter

from smalti.core.errors import UserError
from smalti.core.randomness import row_seeds
from smalti.images.masks import blank, examples, is_white_paint, known_codes, load_mask, strokes

SMALL = st.integers(1, 4)
SIZES = {"rows": SMALL, "columns": SMALL, "side": SMALL, "seed": st.integers(0, 999)}


def draw(seed, *shape):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


@given(**SIZES, dilation=st.integers(0, 2), share=st.floats(0, 0.4))
def test_known_codes_have_no_masked_pixel_near_them(rows, columns, side, seed, dilation, share):
    mask = draw(seed, 2, rows * side, columns * side) < share
    known = known_codes(mask, side, dilation=dilation)
    assert known.shape == (2, rows, columns)
    for image in range(2):
        for y in range(rows):
            for x in range(columns):
                top, left = max(0, y - dilation) * side, max(0, x - dilation) * side
                near = mask[image, top : (y + dilation + 1) * side, left : (x + dilation + 1) * side]
                assert bool(known[image, y, x]) == (not near.any())


def test_codes_beside_a_mask_are_unknown_by_default():
    mask = torch.zeros(1, 20, 20, dtype=torch.bool)
    mask[0, 9, 9] = True  # within code (2, 2) of 5 x 5
    known = known_codes(mask, 4)
    assert (~known).nonzero()[:, 1:].tolist() == [[y, x] for y in (1, 2, 3) for x in (1, 2, 3)]


@given(**SIZES, channels=st.sampled_from([1, 3]), share=st.floats(0, 1))
def test_blanked_images_do_not_depend_on_masked_pixels(rows, columns, side, seed, channels, share):
    height, width = rows * side, columns * side
    mask = draw(seed, 2, height, width) < share
    images, others = (draw(seed + i, 2, channels, height, width) * 2 - 1 for i in (1, 2))
    others = torch.where(mask.unsqueeze(1), others, images)
    blanked = blank(images, mask)
    assert torch.equal(blanked, blank(others, mask))
    assert torch.equal(blanked.where(~mask.unsqueeze(1), images), images)  # known pixels stay exact
    for image in range(2):
        for channel in range(channels):
            known = images[image, channel][~mask[image]]
            filled = blanked[image, channel][mask[image]]
            torch.testing.assert_close(filled, (known.mean() if len(known) else torch.tensor(0.0)).expand_as(filled))


def save(path, grey):
    Image.fromarray(np.array(grey, dtype=np.uint8)).save(path)
    return path


def test_light_pixels_are_masked(tmp_path):
    path = save(tmp_path / "mask.png", [[0, 127, 128], [255, 10, 200]])
    light = torch.tensor([[False, False, True], [True, False, True]])
    assert torch.equal(load_mask(path, height=2, width=3), light)
    assert torch.equal(load_mask(path, height=2, width=3, invert=True), ~light)


def test_masks_may_be_in_colour_or_one_bit(tmp_path):
    mask = torch.tensor([[True, False]])
    Image.fromarray(np.array([[[250, 250, 250], [5, 5, 5]]], dtype=np.uint8)).save(tmp_path / "colour.png")
    Image.fromarray(mask.numpy()).save(tmp_path / "bits.png")
    for name in ("colour.png", "bits.png"):
        assert torch.equal(load_mask(tmp_path / name, height=1, width=2), mask)


def test_unusable_masks_are_refused_in_one_line(tmp_path):
    black, white = save(tmp_path / "black.png", [[0, 0, 0]]), save(tmp_path / "white.png", [[255, 255, 255]])
    (tmp_path / "text.png").write_text("not an image")
    for path, size, invert, message in [
        (black, (1, 3), False, "masks nothing: no pixel is light; paint what to fill white"),
        (white, (1, 3), True, "masks nothing: no pixel is dark; paint what to fill black"),
        (white, (1, 3), False, "masks the whole image: every pixel is light, so no pixel is known"),
        (black, (1, 3), True, "masks the whole image: every pixel is dark"),
        (white, (3, 1), False, "is 3x1 but the image is 1x3; pass --resize-mask"),
        (tmp_path / "missing.png", (1, 3), False, "cannot be read"),
        (tmp_path / "text.png", (1, 3), False, "not an image"),
    ]:
        with pytest.raises(UserError, match=message) as caught:
            load_mask(path, height=size[0], width=size[1], invert=invert)
        assert "\n" not in str(caught.value)
        assert str(path) in str(caught.value)


def test_the_threshold_applies_to_lightness(tmp_path):
    path = save(tmp_path / "mask.png", [[0, 9, 10, 11, 255]])
    assert load_mask(path, height=1, width=5, threshold=10).tolist() == [[False, False, False, True, True]]
    assert load_mask(path, height=1, width=5, threshold=0).tolist() == [[False, True, True, True, True]]


def test_a_mask_with_transparency_ignores_colours(tmp_path):
    """EXIF rotation is applied; an opaque alpha channel does not count as transparency."""
    rgba = np.zeros((2, 3, 4), np.uint8)
    rgba[..., 3] = [[255, 200, 0], [255, 255, 100]]
    rgba[0, 0, :3] = 255
    mask = torch.tensor([[False, False, True], [False, False, True]])
    Image.fromarray(rgba).save(tmp_path / "alpha.png")
    assert torch.equal(load_mask(tmp_path / "alpha.png", height=2, width=3), mask)
    assert torch.equal(load_mask(tmp_path / "alpha.png", height=2, width=3, invert=True), ~mask)
    turned = Image.Exif()
    turned[274] = 6  # rotated to the right
    Image.fromarray(rgba).save(tmp_path / "turned.png", exif=turned)
    assert torch.equal(load_mask(tmp_path / "turned.png", height=3, width=2), mask.rot90(-1))
    rgba[..., 3] = 255
    Image.fromarray(rgba).save(tmp_path / "opaque.png")
    assert load_mask(tmp_path / "opaque.png", height=2, width=3).nonzero().tolist() == [[0, 0]]


FORMATS = [
    *(("png", mode) for mode in ("1", "L", "P", "LA", "RGB", "I;16")),
    *(("jpg", mode) for mode in ("1", "L", "RGB", "CMYK")),
    ("tiff", "CMYK"),
]


@pytest.mark.parametrize(("kind", "mode"), FORMATS)
def test_masks_may_have_any_mode_and_format(tmp_path, mode, kind):
    square = Image.new("L", (24, 16))
    square.paste(255, (8, 8, 16, 16))
    image = Image.fromarray(np.array(square).astype(np.uint16) * 257) if mode == "I;16" else square.convert(mode)
    image.save(tmp_path / f"mask.{kind}", **({"quality": 60} if kind == "jpg" else {}))
    mask = load_mask(tmp_path / f"mask.{kind}", height=16, width=24)
    assert torch.equal(mask, torch.from_numpy(np.array(square)) > 0)


def test_a_mask_of_another_size_is_resized_on_request(tmp_path):
    path = save(tmp_path / "mask.png", np.kron(np.eye(2), np.ones((4, 6))) * 255)
    mask = load_mask(path, height=2, width=2, resize=True)
    assert mask.tolist() == [[True, False], [False, True]]


def test_a_mask_far_larger_than_its_image_is_refused_before_it_is_decoded(tmp_path, monkeypatch):
    Image.new("L", (7_500, 7_500)).save(tmp_path / "mask.png")
    with monkeypatch.context() as patch:
        patch.setattr("PIL.ImageFile.ImageFile.load", None)
        with pytest.raises(UserError, match=r"has 56250000 pixels but the image is 30x20; shrink the mask"):
            load_mask(tmp_path / "mask.png", height=20, width=30, resize=True)
    with pytest.raises(UserError, match="masks nothing"):
        load_mask(tmp_path / "mask.png", height=7_500, width=7_500)


@given(st.integers(0, 999), st.integers(4, 40), st.integers(4, 40))
def test_strokes_depend_on_their_seed_and_leave_known_pixels(seed, height, width):
    masks = strokes(row_seeds(seed, torch.arange(3)), height, width)
    assert masks.shape == (3, height, width)
    assert torch.equal(strokes(row_seeds(seed, torch.arange(1, 2)), height, width), masks[1:2])
    assert masks.flatten(1).any(1).all()
    assert not masks.flatten(1).all(1).any()


def test_strokes_differ_and_cover_about_a_quarter():
    masks = strokes(row_seeds(0, torch.arange(300)), 32, 32)
    assert len(masks.flatten(1).unique(dim=0)) == 300
    assert 0.2 < float(masks.float().mean()) < 0.3


@pytest.mark.parametrize(("height", "width"), [(8, 8), (32, 32), (32, 48), (256, 256)])
def test_example_masks_leave_known_pixels_and_differ(height, width):
    masks = examples(height, width)
    assert list(masks) == ["box", "half", "stroke", "letter"]
    assert all(mask.shape == (height, width) for mask in masks.values())
    shares = {name: float(mask.float().mean()) for name, mask in masks.items()}
    assert all(0.05 < share < 0.6 for share in shares.values()), shares
    assert len({mask.numpy().tobytes() for mask in masks.values()}) == 4
    assert shares["half"] == 0.5
    assert masks["half"][:, width // 2 :].all()


def test_a_photograph_is_no_mask(tmp_path):
    """Soft and faint masks, and masks saved as JPEG, are masks."""
    smooth = Image.effect_noise((64, 48), 60).resize((96, 72))
    smooth.save(tmp_path / "photo.jpg")
    with pytest.raises(
        UserError, match=r"photo.jpg seems to be a photograph, not a mask: \d+% of its pixels"
    ) as refused:
        load_mask(tmp_path / "photo.jpg", height=72, width=96)
    assert "\n" not in str(refused.value)
    square = Image.new("L", (96, 72))
    square.paste(255, (20, 20, 60, 50))
    soft, faint = square.filter(ImageFilter.GaussianBlur(6)), square.point(lambda value: value // 2 + 40)
    for name, image in {"soft.png": soft, "faint.png": faint, "square.jpg": square}.items():
        image.save(tmp_path / name)
        assert load_mask(tmp_path / name, height=72, width=96, threshold=100)[35, 40]


def test_white_paint_on_a_transparent_layer_is_masked(tmp_path):
    """The paint may have soft edges; a picture with an erased part stays masked by its transparency."""
    alpha = np.zeros((12, 10), np.uint8)
    alpha[2:9, 3:8], alpha[1, 3:8] = 255, 60
    paint = torch.from_numpy(alpha > 127)
    layer, colours = np.full((12, 10, 3), 255, np.uint8), np.random.default_rng(0).integers(0, 255, (12, 10, 3))
    for name, values in {"layer.png": layer, "picture.png": colours.astype(np.uint8)}.items():
        Image.fromarray(np.dstack([values, alpha])).save(tmp_path / name)
    size = {"height": 12, "width": 10}
    assert is_white_paint(tmp_path / "layer.png")
    assert torch.equal(load_mask(tmp_path / "layer.png", **size), paint)
    assert torch.equal(load_mask(tmp_path / "layer.png", **size, invert=True), ~paint)
    assert torch.equal(load_mask(tmp_path / "layer.png", **size, erased=True), ~paint)
    assert not is_white_paint(tmp_path / "picture.png")
    assert torch.equal(load_mask(tmp_path / "picture.png", **size), ~paint)
    Image.fromarray(np.dstack([layer, np.zeros_like(alpha)])).save(tmp_path / "empty.png")
    with pytest.raises(UserError, match="masks the whole image: every pixel is transparent"):
        load_mask(tmp_path / "empty.png", **size)


def test_large_mask_takes_little_memory(tmp_path):
    """A one-bit mask of 100 megapixels takes 100 MB as bytes; a program of its own measures the peak of memory."""
    shape = Image.new("1", (10_000, 10_000))
    shape.paste(1, (0, 0, 5_000, 10_000))
    shape.save(tmp_path / "mask.png")
    program = (
        "import resource, sys; from smalti.images.masks import load_mask; peak = lambda: "
        "resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10; before = peak(); "
        "load_mask(sys.argv[1], height=10_000, width=10_000); print(peak() - before)"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "mask.png")]
    assert int(subprocess.run(command, capture_output=True, text=True, check=True).stdout) < 600
