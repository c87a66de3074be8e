"""Sheets: they hold every pixel of every picture at the right position, and the settings."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from smalti.images.decoding import to_float
from smalti.images.sheets import (
    CAPTION_SIZE,
    GAP,
    SMALLEST_SHOWN,
    embedded_settings,
    most_on_sheet,
    save_grid,
    save_png,
    save_sheet,
    to_image,
)


def pictures(count, channels, height, width, seed=0):
    return torch.randint(
        256, (count, channels, height, width), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed)
    )


def crop(sheet, top, left, image, factor):
    """Returns the part of a sheet that should hold an image, at its own size, as (c, h, w)."""
    _, height, width = image.shape
    box = np.array(sheet)[top : top + height * factor : factor, left : left + width * factor : factor]
    return torch.from_numpy(box.transpose(2, 0, 1).copy())


@settings(max_examples=30)
@given(count=st.integers(1, 9), channels=st.sampled_from([1, 3]), height=st.integers(30, 99), width=st.integers(30, 99))
def test_a_grid_holds_every_picture(tmp_path_factory, count, channels, height, width):
    images = pictures(count, channels, height, width)
    path = tmp_path_factory.mktemp("grid") / "grid.png"
    save_grid(path, to_float(images))
    sheet = Image.open(path).convert("RGB")
    factor = -(-SMALLEST_SHOWN // max(height, width))
    across, down = width * factor + 2 * GAP, height * factor + 2 * GAP
    columns = sheet.width // across
    assert sheet.size == (columns * across, -(-count // columns) * down)
    for index, image in enumerate(images):
        y, x = divmod(index, columns)
        shown = crop(sheet, y * down + GAP, x * across + GAP, image, factor)
        assert torch.equal(shown, image.expand_as(shown))


def test_a_sheet_has_a_caption_above_every_row(tmp_path):
    rows = {"first row": pictures(3, 3, 96, 48), "second": pictures(2, 3, 96, 48, seed=1)}
    save_sheet(tmp_path / "sheet.png", {caption: to_float(images) for caption, images in rows.items()})
    sheet = Image.open(tmp_path / "sheet.png")
    band, height, across = CAPTION_SIZE + 2 * GAP, 96 + 2 * GAP, 48 + 2 * GAP
    assert sheet.size == (3 * across, 2 * (band + height))
    for row, images in enumerate(rows.values()):
        top = row * (band + height)
        written = np.array(sheet)[top : top + band]
        assert written.min() < 128 < written.max() == 255  # ink on white
        for index, image in enumerate(images):
            assert torch.equal(crop(sheet, top + band + GAP, index * across + GAP, image, 1), image)


@settings(max_examples=20)
@given(
    height=st.integers(1, 150),
    width=st.integers(1, 150),
    captions=st.lists(st.sampled_from(["a", "b", "c", "a long caption of a row"]), max_size=5),
    most=st.integers(50_000, 400_000),
)
def test_as_many_images_fit_on_a_sheet_as_its_pixels_allow(tmp_path_factory, height, width, captions, most):
    def pixels_of(count):
        turns = [captions[number % len(captions)] for number in range(count)] if captions else []
        path = tmp_path_factory.mktemp("sheet") / "sheet.png"
        images = torch.zeros(count, 1, height, width, dtype=torch.uint8)
        if captions:
            save_sheet(path, {row: images[: turns.count(row)] for row in dict.fromkeys(turns)})
        else:
            save_grid(path, images)
        with Image.open(path) as sheet:
            return sheet.width * sheet.height

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("smalti.images.sheets.MOST_PIXELS", most)
        count = most_on_sheet(height, width, captions)
    assert count == 1 or pixels_of(count) <= most
    assert pixels_of(count + 1 if captions else 2 * count + 2) > most  # a grid has whole lines


def test_a_sheet_is_as_wide_as_its_longest_caption(tmp_path):
    """Captions that differ at their end must be told apart."""
    for number in range(2):
        rows = {f"conditional generation, draw {number}": to_float(pictures(1, 3, 96, 48))}
        save_sheet(tmp_path / f"{number}.png", rows)
    first, second = (np.array(Image.open(tmp_path / f"{number}.png")) for number in range(2))
    assert not np.array_equal(first, second)
    assert first.shape[1] > 48 + 2 * GAP


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (3, "RGB")])
def test_a_png_holds_the_exact_image_and_its_settings(tmp_path, channels, mode):
    (image,) = pictures(1, channels, 5, 7)
    settings = {"seed": 3, "prior": "größe", "path": tmp_path}
    save_png(tmp_path / "image.png", to_image(image), settings)
    read = Image.open(tmp_path / "image.png")
    assert read.mode == mode
    expected = image[0] if channels == 1 else image.permute(1, 2, 0)
    assert np.array_equal(np.array(read), expected.numpy())
    assert json.loads(read.text["smalti"]) == {**settings, "path": str(tmp_path)}
    assert np.array_equal(np.array(to_image(to_float(image))), expected.numpy())


def test_settings_are_read_of_pictures_of_any_size(tmp_path, monkeypatch):
    """Pillow's guard against decompression bombs is an error above twice its number of pixels."""
    save_png(tmp_path / "large.png", to_image(pictures(1, 3, 20, 30)[0]), {"command": "sample"})
    Image.new("L", (20, 30)).save(tmp_path / "other.png")
    Image.new("L", (20, 30)).save(tmp_path / "other.jpg")
    (tmp_path / "text.png").write_text("no picture")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    assert embedded_settings(tmp_path / "large.png") == {"command": "sample"}
    for name in ("other.png", "other.jpg", "text.png", "missing.png"):
        assert embedded_settings(tmp_path / name) == {}
