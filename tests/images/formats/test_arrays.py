"""Arrays of images: sets in `.npy` and `.npz`, single images, and what is refused."""

import io
import zipfile

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from PIL import Image

from smalti.core.errors import UserError
from smalti.images.decoding import decode
from smalti.images.formats.arrays import npy_bytes, read_npy
from smalti.images.formats.opening import BadImageError
from smalti.images.image_set import open_images

RNG = np.random.default_rng(0)
COLOUR = RNG.integers(0, 256, (6, 8, 8, 3), dtype=np.uint8)
SIZE = {"height": 8, "width": 8}


def saved(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


@given(arrays(st.sampled_from([np.uint8, np.uint16]), array_shapes(min_dims=2, max_dims=3, max_side=5)))
def test_bytes_of_an_image_are_those_of_numpy(array):
    assert npy_bytes(array) == saved(array)


@pytest.mark.parametrize("form", ["npy", "npz", "npz compressed", "channels first", "folder of arrays", "big endian"])
def test_arrays_in_every_form_are_one_set(form, tmp_path):
    np.save(tmp_path / "x.npy", COLOUR)
    expected = open_images(str(tmp_path / "x.npy"), **SIZE)
    source = tmp_path / "other.npz"
    if form == "npy":
        source = tmp_path / "x.npy"
    elif form == "npz":
        np.savez(source, images=COLOUR)
    elif form == "npz compressed":
        np.savez_compressed(source, anything=COLOUR)
    elif form == "folder of arrays":
        source = tmp_path / "folder"
        source.mkdir()
        for number, image in enumerate(COLOUR):
            np.save(source / f"{number}.npy", image)
    elif form == "channels first":
        np.savez(source, x=COLOUR.transpose(0, 3, 1, 2))
    else:
        np.savez(source, x=COLOUR.astype(">u2") // np.uint16(1))
        assert open_images(str(source), depth=16, **SIZE).pixels([0]).tolist() == (
            COLOUR[:1].transpose(0, 3, 1, 2).tolist()
        )
        return
    images = open_images(str(source), **SIZE)
    assert images.fingerprint == expected.fingerprint
    assert (images.pixels(range(6)).numpy() == COLOUR.transpose(0, 3, 1, 2)).all()


def test_grey_arrays_and_their_labels_are_read(tmp_path):
    grey = COLOUR[..., 0]
    np.savez(tmp_path / "x.npz", images=grey, y=np.array([10, 9, -1, 10, 9, 9]))
    images = open_images(str(tmp_path / "x.npz"), channels=1, **SIZE)
    assert images.labels.tolist() == [1, 0, -1, 1, 0, 0]
    assert images.label_names == ("9", "10")
    assert (images.pixels(range(6))[:, 0].numpy() == grey).all()
    np.savez(tmp_path / "y.npz", images=grey, labels=np.array([*"abcabc"]))
    assert open_images(str(tmp_path / "y.npz"), channels=1, **SIZE).label_names == ("a", "b", "c")
    np.save(tmp_path / "z.npy", grey)
    images = open_images(str(tmp_path / "z.npy"), **SIZE)  # as colours
    assert (images.pixels([2]).numpy() == grey[2]).all()


def test_a_single_image_is_an_array_of_rank_two_or_three(tmp_path):
    np.save(tmp_path / "x.npy", COLOUR[0])
    assert len(open_images(str(tmp_path / "x.npy"), **SIZE)) == 1
    assert decode(saved(COLOUR[0]), channels=3).equal(torch.from_numpy(COLOUR[0]).permute(2, 0, 1))
    assert decode(saved(COLOUR[0].transpose(2, 0, 1)), channels=3).equal(decode(saved(COLOUR[0]), channels=3))
    assert decode(saved(np.asfortranarray(COLOUR[0])), channels=3).equal(decode(saved(COLOUR[0]), channels=3))


def test_colours_become_grey_as_pillow_makes_them():
    encoded = io.BytesIO()
    Image.fromarray(COLOUR[0]).save(encoded, "PNG")
    assert decode(saved(COLOUR[0]), channels=1).equal(decode(encoded.getvalue(), channels=1))


def bomb(path):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x.npy", bytes(201 * 10**6))


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda path: np.savez(path, x=COLOUR / 255), r"x\.npz holds images of float64; save pixels as uint8"),
        (
            lambda path: np.savez(path, x=COLOUR[None]),
            r"holds an array of shape \(1, 6, 8, 8, 3\); images are \(n, h, w\)",
        ),
        (lambda path: np.savez(path, x=COLOUR[:0]), r"holds an array of shape \(0, 8, 8, 3\)"),
        (
            lambda path: np.savez(path, x=RNG.integers(0, 9, (2, 8, 8, 8), np.uint8)),
            r"holds an array of shape \(2, 8, 8, 8",
        ),
        (
            lambda path: np.savez(path, x=COLOUR, y=np.zeros(5, int)),
            r"has labels int64 of shape \(5,\); give one integer",
        ),
        (lambda path: np.savez(path, x=COLOUR, y=np.zeros(6)), r"has labels float64 of shape \(6,\)"),
        (lambda path: np.savez(path, a=COLOUR, b=COLOUR), r"holds arrays called a, b; call the images 'x' or 'images'"),
        (lambda path: np.savez(path), r"holds arrays called nothing"),
        (lambda path: np.savez(path, x=np.array([{}], object)), r"cannot be read \(Object arrays cannot be loaded"),
        (lambda path: path.write_bytes(b"PK"), r"x\.npz cannot be read \(File is not a zip file\); save it with numpy"),
        (bomb, r"x\.npz: \d+ compressed bytes declare 201000000, a decompression bomb perhaps"),
    ],
)
def test_unusable_arrays_are_refused_in_one_line(write, message, tmp_path):
    write(tmp_path / "x.npz")
    with pytest.raises(UserError, match=message) as refused:
        open_images(str(tmp_path / "x.npz"), **SIZE)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (COLOUR[0] / 255, "the array holds float64; save pixels as uint8"),
        (COLOUR, r"the array has shape \(6, 8, 8, 3\); an image is"),
        (np.zeros((8, 9, 7), np.uint8), r"no axis of the array of shape \(8, 9, 7\) is that of 3 channels"),
        (np.zeros((8, 9, 2), np.uint8), "the image has 2 channels, not 3; train with --image-channels 2"),
        (np.zeros((1, 100_001), np.uint8), "a side of more than 100000 is not read"),
    ],
)
def test_arrays_that_are_no_image_are_refused(array, message):
    with pytest.raises(BadImageError, match=message):
        decode(saved(array), channels=3)


@given(data=st.data())
def test_damaged_arrays_give_pixels_or_a_one_line_error(data):
    encoded = bytearray(saved(COLOUR[0]))
    for position in data.draw(st.lists(st.integers(6, 140), max_size=5)):
        encoded[position] = data.draw(st.integers(0, 255))
    try:
        outcome = read_npy(bytes(encoded[: data.draw(st.integers(7, len(encoded)))]), 3)
    except BadImageError as error:
        outcome = str(error)
    assert "\n" not in outcome if isinstance(outcome, str) else outcome.ndim == 3
