"""Decoding: unusual kinds of images, resampling against plain numpy, and damaged files."""

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image

from smalti.core.errors import UserError
from smalti.images.decoding import (
    decode,
    load_image,
    load_layers,
    load_transparency,
    to_float,
    to_uint8,
)
from smalti.images.formats import opening, planes
from smalti.images.formats.opening import BadImageError

RNG = np.random.default_rng(0)
RGB = RNG.integers(0, 256, (6, 9, 3), dtype=np.uint8)
GREY = RGB[..., 0]


def encode(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def pixels_of(encoded: bytes, channels: int = 3) -> np.ndarray:
    return decode(encoded, channels=channels).permute(1, 2, 0).numpy()


def on_white(colour: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    alpha = alpha[..., None] / 255
    return colour * alpha + 255 * (1 - alpha)


@given(pixels=arrays(np.uint8, st.tuples(st.integers(1, 40), st.integers(1, 40), st.just(3))))
def test_an_image_of_the_right_size_keeps_its_pixels(pixels):
    height, width, _ = pixels.shape
    encoded = encode(Image.fromarray(pixels))
    expected = torch.from_numpy(pixels).permute(2, 0, 1)
    assert decode(encoded, channels=3, height=height, width=width).equal(expected)
    assert decode(encoded, channels=3).equal(expected)


def test_grey_becomes_three_equal_channels():
    encoded = encode(Image.fromarray(GREY))
    assert (pixels_of(encoded) == GREY[..., None]).all()
    assert (pixels_of(encoded, channels=1)[..., 0] == GREY).all()


def test_colour_becomes_luma():
    luma = pixels_of(encode(Image.fromarray(RGB)), channels=1)[..., 0]
    assert np.abs(luma - RGB @ [0.299, 0.587, 0.114]).max() <= 1


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
def test_16_bit_grey_is_scaled_and_not_clipped(kind):
    deep = RNG.integers(0, 65536, (6, 9), dtype=np.uint16)
    assert (pixels_of(encode(Image.fromarray(deep), kind), channels=1)[..., 0] == np.rint(deep / 257)).all()
    widened = GREY.astype(np.uint16) * 257
    assert (pixels_of(encode(Image.fromarray(widened), kind), channels=1)[..., 0] == GREY).all()


def test_big_endian_16_bit_and_31_bit_grey():
    deep = RNG.integers(0, 65536, (6, 9), dtype=np.uint16)
    big_endian = b"".join(  # a TIFF by hand, since Pillow writes only the machine's own order
        [b"MM\0*\0\0\0\x08\0\x08"]
        + [
            np.array([tag, kind], ">u2").tobytes() + np.array([1], ">u4").tobytes() + np.array(value, ">u2").tobytes()
            for tag, kind, value in [
                (256, 3, (9, 0)),
                (257, 3, (6, 0)),
                (258, 3, (16, 0)),
                (259, 3, (1, 0)),
                (262, 3, (1, 0)),
                (273, 4, (0, 110)),
                (278, 3, (6, 0)),
                (279, 4, (0, 108)),
            ]
        ]
        + [b"\0\0\0\0", deep.astype(">u2").tobytes()]
    )
    assert (pixels_of(big_endian, channels=1)[..., 0] == np.rint(deep / 257)).all()
    deeper = np.array([[0, 2**30, 2**31 - 1, -5]], dtype=np.int32)
    assert pixels_of(encode(Image.fromarray(deeper), "TIFF"), channels=1).ravel().tolist() == [0, 128, 255, 0]


@pytest.mark.parametrize(("scale", "peak"), [(1, 1.0), (255, 2.0), (255, 255.0), (65535, 300.0), (70000, 70000.0)])
def test_floats_are_read_on_the_smallest_scale_that_holds_them(scale, peak):
    values = np.array([[0, peak / 3, peak, -1, np.nan, np.inf]], dtype=np.float32)
    expected = np.rint(np.array([0, peak / 3, peak, 0, 0, 0], np.float32) * (255 / scale))
    assert pixels_of(encode(Image.fromarray(values), "TIFF"), channels=1).ravel().tolist() == expected.tolist()


def test_transparency_is_composed_on_white():
    alpha = RNG.integers(0, 256, (6, 9), dtype=np.uint8)
    rgba = encode(Image.fromarray(np.dstack([RGB, alpha])))
    assert np.abs(pixels_of(rgba) - on_white(RGB, alpha)).max() <= 1
    grey_alpha = encode(Image.fromarray(np.dstack([GREY, alpha])))
    assert Image.open(io.BytesIO(grey_alpha)).mode == "LA"
    assert np.abs(pixels_of(grey_alpha, channels=1) - on_white(GREY[..., None], alpha)).max() <= 1


@pytest.mark.parametrize("transparency", [3, bytes([255, 255, 255, 0])])
def test_a_transparent_entry_of_a_palette_is_white(transparency):
    colours = RNG.integers(0, 200, (6, 3), dtype=np.uint8)
    indices = RNG.integers(0, 6, (6, 9), dtype=np.uint8)
    image = Image.fromarray(indices)
    image.putpalette(colours.tobytes())
    assert image.mode == "P"
    expected = colours[indices]
    assert (pixels_of(encode(image)) == expected).all()
    expected[indices == 3] = 255
    assert (pixels_of(encode(image, transparency=transparency)) == expected).all()


def test_a_declared_transparent_colour_is_white():
    colour = encode(Image.fromarray(RGB), transparency=tuple(map(int, RGB[2, 3])))
    assert (pixels_of(colour)[2, 3] == 255).all()
    assert (pixels_of(colour)[0, 0] == RGB[0, 0]).all()
    deep = np.full((4, 4), 5140, np.uint16)
    deep[1, 2] = 7000
    grey = pixels_of(encode(Image.fromarray(deep), transparency=7000), channels=1)[..., 0]
    assert grey[1, 2] == 255
    assert (np.delete(grey.ravel(), 6) == 20).all()


def test_cmyk_one_bit_and_animated_images():
    cmyk = Image.new("CMYK", (16, 16), (0, 255, 255, 0))
    assert np.abs(pixels_of(encode(cmyk, "JPEG")) - [255.0, 0, 0]).max() <= 6
    bits = GREY > 128
    assert (pixels_of(encode(Image.fromarray(bits)), channels=1)[..., 0] == bits * 255).all()
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "lime", "blue")]
    animated = encode(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert (pixels_of(animated) == [255, 0, 0]).all()


# Undoes, with numpy, the position of row 0 and column 0 that EXIF declares (EXIF 2.32, 4.6.4).
UPRIGHT = {
    1: lambda x: x,
    2: np.fliplr,
    3: lambda x: np.rot90(x, 2),
    4: np.flipud,
    5: lambda x: x.transpose(1, 0, 2),
    6: lambda x: np.rot90(x, -1),
    7: lambda x: np.rot90(x.transpose(1, 0, 2), 2),
    8: np.rot90,
}


@pytest.mark.parametrize("orientation", UPRIGHT)
def test_exif_rotation_is_applied(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    assert (pixels_of(encode(Image.fromarray(RGB), exif=exif)) == UPRIGHT[orientation](RGB)).all()
    smooth = Image.fromarray(RGB).resize((48, 32))
    rotated = pixels_of(encode(smooth, "JPEG", exif=exif, quality=95, subsampling=0)).astype(float)
    assert np.abs(rotated - UPRIGHT[orientation](np.asarray(smooth))).mean() < 3


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_a_damaged_exif_block_is_ignored():
    assert (pixels_of(encode(Image.fromarray(RGB), exif=b"Exif\0\0II*\0\xff\xff\xff\xff")) == RGB).all()


def lanczos(size: int, new_size: int, start: float, end: float) -> np.ndarray:
    """Returns the weights of an antialiased Lanczos filter (a = 3) from pixels [start, end) of `size` to `new_size`."""
    scale = max((end - start) / new_size, 1)
    centres = start + (np.arange(new_size) + 0.5) * (end - start) / new_size
    distance = (np.arange(size) + 0.5 - centres[:, None]) / scale
    weights = np.where(np.abs(distance) < 3, np.sinc(distance) * np.sinc(distance / 3), 0)
    return weights / weights.sum(1, keepdims=True)


@pytest.mark.parametrize(
    ("shape", "size"), [((64, 64), (32, 32)), ((50, 90), (20, 20)), ((90, 50), (16, 32)), ((7, 7), (21, 21))]
)
def test_resizing_crops_the_centre_and_filters_by_lanczos(shape, size):
    values = RNG.integers(60, 190, shape, dtype=np.uint8)  # no clipping at 0 and 255 between the two passes
    scale = min(shape[0] / size[0], shape[1] / size[1])
    kept = [((n - scale * m) / 2, (n + scale * m) / 2) for n, m in zip(shape, size, strict=True)]
    rows, columns = (lanczos(n, m, *box) for n, m, box in zip(shape, size, kept, strict=True))
    pixels = decode(encode(Image.fromarray(values)), channels=1, height=size[0], width=size[1])
    assert pixels.shape == (1, *size)
    assert np.abs(pixels[0].numpy() - (rows @ values @ columns.T)).max() <= 2


@pytest.mark.parametrize(("height", "width"), [(1, 1), (3, 5000), (5000, 3), (1, 33)])
def test_extreme_shapes(height, width):
    encoded = encode(Image.new("RGB", (width, height), (10, 20, 30)))
    pixels = decode(encoded, channels=3, height=32, width=48)
    assert pixels.shape == (3, 32, 48)
    assert (pixels == torch.tensor([10, 20, 30]).view(3, 1, 1)).all()


def test_the_middle_of_a_long_image_is_kept():
    thirds = np.repeat(np.eye(3, dtype=np.uint8) * 255, 20, axis=0)[None].repeat(20, axis=0)  # red, green, blue squares
    pixels = decode(encode(Image.fromarray(thirds)), channels=3, height=10, width=10)
    inner = pixels[:, :, 3:-3]  # the filter is 3 pixels wide, so outer pixels mix with the cropped squares
    assert (inner == torch.tensor([0, 255, 0]).view(3, 1, 1)).all()


@pytest.mark.parametrize(
    ("encoded", "reason"),
    [
        (b"", "0 bytes"),
        (b"hello, world" * 9, "not an image"),
        (encode(Image.effect_noise((64, 64), 50))[:-900], "truncated"),
        (encode(Image.effect_noise((64, 64), 50), "JPEG")[:-900], "truncated"),
    ],
)
def test_bad_images_are_refused_in_one_line(encoded, reason, tmp_path):
    with pytest.raises(BadImageError, match=reason) as refused:
        decode(encoded, channels=3)
    assert "\n" not in str(refused.value)
    path = tmp_path / "bad.png"
    path.write_bytes(encoded)
    with pytest.raises(BadImageError, match=f"bad.png: .*{reason}"):
        load_image(path, channels=3)


def test_decompression_bombs_are_refused(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 20)
    with pytest.raises(BadImageError, match="more than 40 pixels, the most that are read"):
        decode(encode(Image.fromarray(RGB)), channels=3)


Image.init()
KINDS = {"PNG", "JPEG", "GIF", "TIFF", "WEBP", "BMP", "TGA", "ICO", "AVIF"} & set(Image.SAVE)  # a Pillow may lack some
WHOLE = [encode(image, kind) for kind in sorted(KINDS) for image in (Image.fromarray(RGB), Image.fromarray(GREY))]


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::PIL.Image.DecompressionBombWarning")
@given(data=st.data())
def test_damaged_files_give_pixels_or_a_one_line_error(data):
    encoded = bytearray(data.draw(st.sampled_from(WHOLE)))
    for position in data.draw(st.lists(st.integers(0, min(len(encoded), 300) - 1), max_size=5)):
        encoded[position] = data.draw(st.integers(0, 255))
    try:
        outcome = decode(bytes(encoded[: data.draw(st.integers(1, len(encoded)))]), channels=3, height=8, width=8)
    except BadImageError as error:
        outcome = str(error)
    assert "\n" not in outcome if isinstance(outcome, str) else outcome.shape == (3, 8, 8)


def test_floats_and_bytes_are_exact_inverses():
    every = torch.arange(256, dtype=torch.uint8)
    floats = to_float(every)
    assert (floats.min(), floats.max()) == (-1, 1)
    assert to_uint8(floats).equal(every)
    assert to_uint8(torch.tensor([-3.0, -1.0, 0.003, 1.0, 9.0])).tolist() == [0, 0, 128, 255, 255]
    assert to_uint8(torch.tensor([-1.0, 1.0], dtype=torch.bfloat16)).tolist() == [0, 255]


def test_a_single_file_keeps_its_size_by_default(tmp_path: Path):
    path = tmp_path / "one.png"
    path.write_bytes(encode(Image.fromarray(RGB)))
    assert (load_image(path, channels=3).permute(1, 2, 0).numpy() == RGB).all()
    assert load_image(str(path), channels=1, height=5, width=4).shape == (1, 5, 4)
    with pytest.raises(UserError, match=r"none\.png cannot be read \(No such file"):
        load_image(tmp_path / "none.png", channels=3)
    with pytest.raises(UserError, match="is a folder"):
        load_image(tmp_path, channels=3)


def png_of_zeros(width, height, depth, colour_type, bits):
    """Returns a PNG of zeros, compressed a thousandfold, without making its pixels."""
    compressor, row = zlib.compressobj(9), bytes(1 + (width * bits + 7) // 8)
    pixels = b"".join(compressor.compress(row) for _ in range(height)) + compressor.flush()
    header = struct.pack(">IIBBBBB", width, height, depth, colour_type, 0, 0, 0)

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("width", "height", "depth", "colour_type", "bits"),
    [(8000, 7000, 8, 6, 32), (11000, 10000, 16, 0, 16), (8000, 7000, 8, 2, 24), (90_000, 700, 1, 0, 1)],
)
def test_declared_sizes_are_checked_before_pixels_are_decoded(monkeypatch, width, height, depth, colour_type, bits):
    encoded = png_of_zeros(width, height, depth, colour_type, bits)
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", None)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 178_956_970)  # without Pillow's warning
    with pytest.raises(BadImageError, match=f"declares {width}x{height} pixels in {len(encoded)} bytes") as refused:
        decode(encoded, channels=3, height=8, width=8)
    assert "\n" not in str(refused.value)


def test_large_images_are_decoded_if_they_hold_what_they_declare(monkeypatch):
    """A photograph is not compressed as much as a bomb, and a flat mask of 12 megapixels is not large."""
    monkeypatch.setattr(opening, "_MOST_MEMORY", 1000)
    assert decode(encode(Image.effect_noise((64, 64), 50)), channels=3).shape == (3, 64, 64)
    with pytest.raises(BadImageError, match="declares 64x640 pixels"):
        decode(encode(Image.new("RGB", (64, 640))), channels=3)
    monkeypatch.undo()
    assert decode(png_of_zeros(4032, 3024, 8, 0, 8), channels=1).shape == (1, 3024, 4032)


def test_deep_grey_is_scaled_in_strips(monkeypatch):
    deep = RNG.integers(0, 65536, (50, 7), dtype=np.uint16)
    deep[20, 3] = 65535
    whole = pixels_of(encode(Image.fromarray(deep)), channels=1)
    monkeypatch.setattr(planes, "_VALUES_AT_ONCE", 20)
    assert (pixels_of(encode(Image.fromarray(deep)), channels=1) == whole).all()
    deeper = deep.astype(np.int32)
    deeper[49, 6] = 2**31 - 1  # the peak in the last strip sets the scale of all
    assert pixels_of(encode(Image.fromarray(deeper), "TIFF"), channels=1)[:49].max() == 0


def test_layers_hold_what_composing_on_white_loses(tmp_path):
    alpha = RNG.integers(0, 255, (6, 9), dtype=np.uint8)
    profile = bytes(16) + b"RGB " + bytes(108)
    Image.fromarray(np.dstack([RGB, alpha])).save(tmp_path / "soft.png", icc_profile=profile)
    colours, opacity, kept = load_layers(tmp_path / "soft.png", channels=3)
    assert (colours.permute(1, 2, 0).numpy() == RGB).all()
    assert (opacity.numpy() == alpha).all()
    assert kept == profile
    assert load_layers(tmp_path / "soft.png", channels=1).profile is None  # it describes colours
    Image.fromarray(RGB).save(tmp_path / "opaque.png")
    assert load_layers(tmp_path / "opaque.png", channels=3)[1:] == (None, None)
    deep = np.full((4, 4), 5140, np.uint16)
    Image.fromarray(deep).save(tmp_path / "deep.png", transparency=5140)
    assert load_layers(tmp_path / "deep.png", channels=3).alpha is None
    assert load_transparency(tmp_path / "deep.png") is None


def test_programs_and_images_without_palette_are_refused():
    file = io.BytesIO()
    Image.new("P", (4, 4)).save(file, "PNG")
    content = file.getvalue()
    start = content.index(b"PLTE") - 4
    without = content[:start] + content[start + 12 + int.from_bytes(content[start : start + 4], "big") :]
    program = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 4 4\n%%EndComments\n"
    for encoded, message in ((without, "it has no palette"), (program, "EPS is a program")):
        with pytest.raises(BadImageError, match=message):
            decode(encoded, channels=1)
