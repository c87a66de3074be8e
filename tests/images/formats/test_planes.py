"""Any number of channels, alpha as a channel, and 16 bits: decoding, fitting, sets, and what pictures show."""

import io
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from smalti.images.decoding import decode, decode_crops, decode_with_size, to_float, to_uint8, visible
from smalti.images.fitting import Crop
from smalti.images.formats.opening import BadImageError
from smalti.images.formats.planes import planes_of
from smalti.images.image_set import ImageRows, open_images
from smalti.images.reading import Reading, describe_pictures, read_images, read_images_for
from smalti.images.sheets import array_path, image_paths, save_image, save_sheet, to_image

RNG = np.random.default_rng(0)
FIVE = RNG.integers(0, 256, (9, 12, 5), dtype=np.uint8)
DEEP = RNG.integers(0, 65536, (9, 12), dtype=np.uint16)
RGBA = RNG.integers(0, 256, (9, 12, 4), dtype=np.uint8)


def encode(image: Image.Image | np.ndarray, kind: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    if isinstance(image, np.ndarray):
        np.save(file, image)
    else:
        image.save(file, kind, **options)
    return file.getvalue()


def pages(*arrays: np.ndarray) -> bytes:
    first, *others = map(Image.fromarray, arrays)
    return encode(first, "TIFF", save_all=True, append_images=others)


def test_alpha_is_a_channel_where_it_is_asked_for():
    encoded = encode(Image.fromarray(RGBA))
    assert (decode(encoded, channels=4).permute(1, 2, 0).numpy() == RGBA).all()
    grey_alpha = decode(encoded, channels=2)
    assert (grey_alpha[1].numpy() == RGBA[..., 3]).all()
    assert (grey_alpha[0].numpy() == np.asarray(Image.fromarray(RGBA[..., :3]).convert("L"))).all()
    opaque = decode(encode(Image.fromarray(RGBA[..., :3])), channels=4)
    assert (opaque[3] == 255).all()
    assert decode(encode(Image.fromarray(RGBA[..., 0]).convert("CMYK"), "TIFF"), channels=4).shape == (4, 9, 12)
    palette = Image.fromarray(RGBA).convert("RGBA").quantize(16)
    assert decode(encode(palette), channels=4).equal(
        torch.from_numpy(np.array(palette.convert("RGBA"))).permute(2, 0, 1)
    )


@pytest.mark.parametrize("encoded", [encode(FIVE), encode(FIVE.transpose(2, 0, 1)), pages(*FIVE.transpose(2, 0, 1))])
def test_five_channels_are_read_from_arrays_and_pages(encoded):
    assert (decode(encoded, channels=5).permute(1, 2, 0).numpy() == FIVE).all()


def test_each_channel_is_fitted_like_a_grey_image():
    for fit in ("crop", "pad", "squash"):
        five = decode(encode(FIVE), channels=5, height=6, width=6, fit=fit)
        for channel in range(5):
            grey = decode(encode(Image.fromarray(FIVE[..., channel])), channels=1, height=6, width=6, fit=fit)
            assert five[channel].equal(grey[0])


@pytest.mark.parametrize(
    ("encoded", "message"),
    [
        (encode(Image.fromarray(RGBA)), "the image has 3 channels, not 5; train with --image-channels 3"),
        (pages(*FIVE.transpose(2, 0, 1)[:3]), "the file has 3 pages, not 5; train with --image-channels 3"),
        (pages(*[RGBA[..., :3]] * 5), "its pages are not grey images of one size and depth"),
        (pages(*FIVE.transpose(2, 0, 1)[:4], FIVE[:5, :5, 0]), "its pages are not grey images of one size"),
        (encode(RGBA), "the image has 4 channels, not 5"),
    ],
)
def test_images_of_other_numbers_of_channels_are_refused(encoded, message):
    with pytest.raises(BadImageError, match=message):
        decode(encoded, channels=5)


@pytest.mark.parametrize(
    "encoded", [encode(Image.fromarray(DEEP)), encode(DEEP), encode(Image.fromarray(DEEP), "TIFF")]
)
def test_16_bits_are_kept_where_they_are_asked_for(encoded):
    pixels, height, width = decode_with_size(encoded, channels=1, depth=16)
    assert (pixels[0].numpy() == DEEP).all()
    assert (pixels.dtype, height, width) == (torch.int32, 9, 12)
    shallow = decode(encoded, channels=1)
    assert shallow.dtype == torch.uint8
    assert (shallow[0].numpy() == np.rint(DEEP / 257)).all()


def test_8_bits_at_depth_16_are_the_same_colours():
    encoded = encode(Image.fromarray(RGBA[..., :3]))
    deep = decode_with_size(encoded, channels=3, depth=16).pixels
    assert torch.allclose(to_float(deep), to_float(decode(encoded, channels=3)), atol=1e-6)
    assert to_uint8(to_float(deep)).equal(decode(encoded, channels=3))


@pytest.mark.parametrize("fit", ["crop", "pad", "squash"])
@pytest.mark.parametrize("channels", [2, 4])
def test_alpha_of_16_bits_is_resampled_like_that_of_8(channels, fit):
    """Green that is hidden by transparency does not reach the edge of the red part; Pillow computes the expected."""
    halves = np.zeros((32, 32, 4), np.uint8)
    halves[:, :14], halves[:, 14:18], halves[:, 18:] = (255, 0, 0, 255), (200, 50, 20, 90), (0, 255, 0, 0)
    size = {"channels": channels, "height": 6, "width": 10, "fit": fit}
    encoded = encode(Image.fromarray(halves))
    shallow = decode_with_size(encoded, **size).pixels
    deep = decode_with_size(encoded, **size, depth=16).pixels
    opaque = shallow[-1] > 40  # 8-bit colours are coarse where alpha is small
    assert (deep[-1] / 257 - shallow[-1]).abs().max() <= 1
    assert (deep / 257 - shallow)[:, opaque].abs().max() <= 4
    assert (deep[:-1, deep[-1] == 0] == 0).all()
    assert (deep[-1] == 0).any()
    crop = decode_crops(encoded, [Crop(1.0, 0.5, 0.5)], **{**size, "fit": "crop"}, depth=16)[0]
    assert crop.equal(decode_with_size(encoded, **{**size, "fit": "crop"}, depth=16).pixels)


def test_16_bit_images_with_alpha_of_the_right_size_keep_their_pixels():
    deep = RNG.integers(0, 65536, (9, 12, 4), dtype=np.uint16)
    deep[:3, :, 3] = 0
    pixels = decode_with_size(encode(deep), channels=4, height=9, width=12, depth=16).pixels
    assert (pixels.permute(1, 2, 0).numpy() == deep).all()


def test_16_bit_images_are_resampled_at_their_depth():
    """Against Lanczos by Pillow on floats; 8-bit resampling would lose the lower bits."""
    fitted = decode_with_size(encode(DEEP), channels=1, height=5, width=5, depth=16, fit="squash").pixels
    oracle = Image.fromarray(DEEP.astype(np.float32)).resize((5, 5), Image.Resampling.LANCZOS)
    assert np.abs(fitted[0].numpy() - np.asarray(oracle).clip(0, 65535)).max() <= 0.5
    padded = decode_with_size(encode(DEEP), channels=1, height=12, width=12, depth=16, fit="pad").pixels
    assert padded[0, 0].tolist() == [65535] * 12


def test_deep_colours_that_pillow_would_reduce_are_refused():
    colours = np.stack([DEEP] * 3, -1)
    assert (decode_with_size(encode(colours), channels=3, depth=16).pixels[1].numpy() == DEEP).all()
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in np.stack([DEEP] * 3, -1))

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", 12, 9, 16, 2, 0, 0, 0)
    png = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    assert decode(png, channels=3).shape == (3, 9, 12)
    with pytest.raises(BadImageError, match="Pillow reads 16-bit colour as 8 bits; save it as a uint16 array"):
        planes_of(png, channels=3, depth=16)


def test_a_limit_of_pixels_has_a_flag(tmp_path):
    Image.new("RGB", (64, 640)).save(tmp_path / "a.png")
    images = open_images(str(tmp_path), most_pixels=64 * 640)
    assert not images.check().errors
    images = open_images(str(tmp_path), most_pixels=64 * 640 - 1)
    assert (
        "64x640 pixels, and more than 40959 are not read; shrink or remove it, or raise --most-pixels"
        in (images.check().errors[0])
    )
    np.save(tmp_path / "a.npy", np.zeros((64, 640), np.uint8))
    assert "raise --most-pixels" in open_images(str(tmp_path / "a.npy"), most_pixels=100).check().errors[0]


@pytest.mark.parametrize("cached", [True, False])
def test_sets_of_deep_and_of_many_channels(cached, tmp_path):
    many = RNG.integers(0, 65536, (12, 8, 8, 5), dtype=np.uint16)
    np.save(tmp_path / "x.npy", many)
    kind = {"height": 8, "width": 8, "channels": 5, "depth": 16, "cache_bytes": 2**20 if cached else 0}
    images = open_images(str(tmp_path / "x.npy"), **kind)
    rows = ImageRows(images, split="all", flips=True)
    batch = rows.__getitems__([4, 5])["images"]
    assert batch.dtype == torch.int32
    assert (batch[0].permute(1, 2, 0).numpy() == many[2]).all()
    assert batch[1].equal(batch[0].flip(-1))
    crops = images.crops([3], 2)
    assert crops.shape == (1, 2, 5, 8, 8)
    assert crops.dtype == torch.int32
    assert images.preprocessing["image_depth"] == 16
    assert "image_depth" not in open_images(str(tmp_path / "x.npy"), **{**kind, "depth": 8}).preprocessing


def test_a_model_keeps_the_depth_of_its_training(tmp_path):
    np.save(tmp_path / "x.npy", np.stack([DEEP] * 6))
    size = {"height": 9, "width": 12, "channels": 1}
    trained = read_images(str(tmp_path / "x.npy"), Reading(image_depth=16, limit=2), **size)
    provenance = {
        "image_source": str(tmp_path / "x.npy"),
        "image_fingerprint": trained.fingerprint,
        "preprocessing": trained.preprocessing,
    }
    again = read_images_for(provenance, "it", None, Reading(), **size)
    assert again.preprocessing == trained.preprocessing
    assert len(again) == 2
    other = read_images_for(provenance, "it", str(tmp_path / "x.npy"), Reading(), **size)
    assert (other.preprocessing["image_depth"], len(other)) == (16, 6)


@pytest.mark.parametrize(
    ("channels", "depth", "note"),
    [
        (1, 8, None),
        (3, 8, None),
        (1, 16, "pictures show grey, in 8 of 16 bits"),
        (2, 8, "pictures show the first of 2 channels, as grey"),
        (5, 16, "pictures show the first three of 5 channels, as red, green and blue, in 8 of 16 bits"),
    ],
)
def test_what_pictures_show_is_said(channels, depth, note):
    assert describe_pictures({"channels": channels, "image_depth": depth}) == note


@pytest.mark.parametrize("suffix", ["png", "PNG"])
def test_the_array_of_a_picture_has_its_settings(tmp_path, suffix):
    picture = tmp_path / f"a.b.{suffix}"
    save_image(picture, torch.from_numpy(FIVE).permute(2, 0, 1), {"x": 1})
    assert set(tmp_path.iterdir()) == {picture, tmp_path / "a.b.npy"}
    assert image_paths([picture], channels=5) == {picture: picture, tmp_path / "a.b.npy": picture}
    assert image_paths([picture], channels=4) == {picture: picture}


def test_pictures_show_the_first_three_channels_and_arrays_hold_all(tmp_path):
    five = torch.from_numpy(FIVE).permute(2, 0, 1)
    save_image(tmp_path / "a.png", five, {"x": 1})
    with Image.open(tmp_path / "a.png") as shown:
        assert (np.asarray(shown) == FIVE[..., :3]).all()
    assert (np.load(array_path(tmp_path / "a.png")) == FIVE).all()
    save_image(tmp_path / "b.png", five[:4])
    with Image.open(tmp_path / "b.png") as kept:
        assert (np.asarray(kept) == FIVE[..., :4]).all()
    assert not array_path(tmp_path / "b.png").exists()
    assert to_image(five[:2]).mode == "LA"
    assert visible(five[:2]).shape == (1, 9, 12)
    save_sheet(tmp_path / "five.png", {"original": to_float(five[None])})
    save_sheet(tmp_path / "three.png", {"original (channels 1-3 of 5)": to_float(five[None, :3])})
    with Image.open(tmp_path / "five.png") as sheet, Image.open(tmp_path / "three.png") as expected:
        assert (np.asarray(sheet) == np.asarray(expected)).all()


def test_crops_of_many_channels_are_those_of_each(tmp_path):
    np.save(tmp_path / "x.npy", FIVE)
    five = open_images(str(tmp_path / "x.npy"), height=4, width=4, channels=5)
    assert len(five) == 1
    for channel in (0, 4):
        Image.fromarray(FIVE[..., channel]).save(tmp_path / f"{channel}.png")
        grey = open_images(str(tmp_path / f"{channel}.png"), height=4, width=4, channels=1)
        assert five.crops([0], 3)[:, :, channel].equal(grey.crops([0], 3)[:, :, 0])
