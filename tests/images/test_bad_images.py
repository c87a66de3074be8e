"""Unusual and bad images in one folder, through `build_latents`: converted, reported with file and row, or skipped."""

import io
import json
import os
import shutil
import struct

import h5py
import numpy as np
import pytest
import torch
from helpers.build_toys import FLAGS, one_thread, run, save_tokenizer
from PIL import Image

from smalti.core.errors import UserError
from smalti.core.files import input_digest
from smalti.core.hub.public_names import public_values
from smalti.encoding import build
from smalti.images.decoding import decode, load_image, load_transparency, to_float
from smalti.images.formats.opening import BadImageError, bad_images_error
from smalti.images.image_set import ImageSet, open_images
from smalti.latentsets.reader import LatentSet
from smalti.tokenizers.vq.hrvq import HRVQ

NOISE = Image.effect_noise((40, 30), 60)


def encoded(image, kind="PNG", **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def rotated():
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded(NOISE, "JPEG", exif=exif)


GOOD = {
    "alpha.png": encoded(NOISE.convert("LA")),
    "animated.gif": encoded(NOISE, "GIF", save_all=True, append_images=[NOISE.transpose(Image.Transpose.ROTATE_180)]),
    "cmyk.jpg": encoded(NOISE.convert("CMYK"), "JPEG"),
    "deep.png": encoded(Image.fromarray(np.asarray(NOISE).astype(np.uint16) * 257)),
    "dot.png": encoded(Image.new("RGB", (1, 1), "red")),
    "grey.png": encoded(NOISE),
    "long.bmp": encoded(Image.new("RGB", (3, 5000), "red"), "BMP"),
    "palette.gif": encoded(NOISE.convert("P"), "GIF", transparency=3),
    "rgb.png": encoded(NOISE.convert("RGB")),
    "rotated.jpg": rotated(),
}
BAD = {
    "empty.png": (b"", "the image is empty (0 bytes)"),
    "gone.png": (None, "the file cannot be read (No such file"),
    "text.jpg": (b"not an image", "these 12 bytes are not an image"),
    "truncated.jpg": (encoded(NOISE.resize((400, 300)), "JPEG")[:-2000], "the image cannot be decoded (image file is"),
}


def write(folder, name, content):
    if content is None:
        (folder / name).symlink_to(folder / "nowhere.png")
    else:
        (folder / name).write_bytes(content)


@pytest.fixture
def workspace(tmp_path, monkeypatch):
    """A working folder with a tokenizer and the good images."""
    (tmp_path / "img").mkdir()
    for name, content in GOOD.items():
        write(tmp_path / "img", name, content)
    save_tokenizer(tmp_path / "tokenizer")
    monkeypatch.chdir(tmp_path)
    with one_thread():
        yield tmp_path


def expected_codes(workspace, names):
    """Encodes each image alone, followed by its mirror image."""
    tokenizer, codes = HRVQ.load(workspace / "tokenizer"), []
    for name in names:
        pixels = to_float(load_image(workspace / "img" / name, channels=3, height=8, width=8))
        codes += [tokenizer.encode(image[None])[0] for image in (pixels, pixels.flip(-1))]
    return torch.cat(codes)


def test_unusual_images_are_converted(workspace, capfd):
    assert run(capfd, *FLAGS, "--out", "latents.h5")[0] == 0
    latents = LatentSet("latents.h5")
    assert latents.batch(range(len(latents)))[0].equal(expected_codes(workspace, sorted(GOOD)))
    assert latents.provenance.skipped == ()


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("workers", ["0", "1"])
def test_a_bad_image_is_named_with_file_and_row(workspace, capfd, name, workers):
    content, reason = BAD[name]
    write(workspace / "img", name, content)
    row = sorted([*GOOD, name]).index(name)
    status, out, err = run(capfd, *FLAGS, "--workers", workers, "--out", "latents.h5")
    assert (status, out) == (2, "")
    (line,) = [line for line in err.splitlines() if line.startswith("error")]
    assert f"img/{name}, row {row}: {reason}" in line
    assert line.endswith("or leave out such images with --on-bad-image skip")
    assert not (workspace / "latents.h5").exists()


def test_the_digest_does_not_depend_on_the_folder_of_images_that_are_left_out(workspace, capfd):
    (name, (content, _)), digests = next(iter(BAD.items())), set()
    for folder in ("here", "there/deeper"):
        shutil.copytree(workspace / "img", workspace / folder / "photos")
        write(workspace / folder / "photos", name, content)
        flags = [*FLAGS, "--images", f"{folder}/photos", "--on-bad-image", "skip", "--out", f"{folder}.h5"]
        assert run(capfd, *flags)[0] == 0
        latents = LatentSet(f"{folder}.h5")
        digests.add(latents.content_digest)
        (image,) = latents.provenance.skipped
        assert image["reason"].startswith(f"{name}, row ")
    assert len(digests) == 1
    assert public_values({"skipped": latents.provenance.skipped}) == {
        "skipped": latents.provenance.skipped
    }  # so it can be pushed


def test_skipped_images_are_recorded_and_counted(workspace, capfd):
    for name, (content, _) in BAD.items():
        write(workspace / "img", name, content)
    flags = [*FLAGS, "--workers", "1", "--batch-size", "4", "--out", "latents.h5", "--on-bad-image"]
    assert run(capfd, *flags, "raise")[0] == 2
    status, out, _ = run(capfd, *flags, "skip")  # resumes after the blocks before the first bad image
    assert status == 0
    assert "4 images that could not be decoded: " in out
    latents = LatentSet("latents.h5")
    names = sorted([*GOOD, *BAD])
    skipped = {image["row"]: image["reason"] for image in latents.provenance.skipped}
    assert list(skipped) == [row for row, name in enumerate(names) if name in BAD]
    assert all(f"{names[row]}, row {row}: {BAD[names[row]][1]}" in reason for row, reason in skipped.items())
    assert latents.batch(range(len(latents)))[0].equal(expected_codes(workspace, sorted(GOOD)))
    assert latents.source_ids.tolist() == [row // 2 for row in range(20)]
    latents.verify()
    with h5py.File("latents.h5") as file:
        assert json.loads(file.attrs["skipped"]) == list(latents.provenance.skipped)
    before = latents.path.read_bytes()
    assert run(capfd, *flags, "skip")[0] == 0
    assert run(capfd, *flags, "raise")[0] == 2  # the bad images are still in the folder
    assert latents.path.read_bytes() == before


def test_all_bad_images_are_named_before_any_is_encoded(workspace, capfd, monkeypatch):
    """The check is paid once: the next command with the same images decodes none of them for it."""
    for name in ("empty.png", "text.jpg", "truncated.jpg"):
        write(workspace / "img", name, BAD[name][0])
    decoded, decode = [], ImageSet._decode
    monkeypatch.setattr(ImageSet, "_decode", lambda *args: decoded.append(args[1]) or decode(*args))
    encoded = []
    monkeypatch.setattr(build, "encode_block", lambda *args, **_: encoded.append(args))
    for decodes in (len(GOOD) + 3, 0):
        decoded.clear()
        status, _, err = run(capfd, *FLAGS, "--out", "latents.h5")
        assert status == 2
        assert "error: 3 images cannot be decoded: " in err
        assert all(f"img/{name}, row " in err for name in ("empty.png", "text.jpg", "truncated.jpg"))
        assert (len(decoded), encoded) == (decodes, [])
    write(workspace / "img", "empty.png", GOOD["rgb.png"])
    assert "error: 2 images cannot be decoded: " in run(capfd, *FLAGS, "--out", "latents.h5")[2]


def test_an_error_names_ten_bad_images_and_counts_the_others(tmp_path):
    error = str(bad_images_error({row: f"{row}.png, row {row}: broken" for row in range(13)}))
    assert error.startswith("13 images cannot be decoded: 0.png, row 0: broken; 1.png, row 1: broken; ")
    assert error.endswith("; 9.png, row 9: broken; and 3 more")


def test_a_later_build_reports_the_images_that_an_earlier_one_skipped(workspace, capfd, monkeypatch):
    write(workspace / "img", "empty.png", b"")
    flags = [*FLAGS, "--out", "latents.h5", "--on-bad-image"]

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:  # interrupts after all blocks are finished
        patch.setattr("smalti.latentsets.building.blocks.BlockStore.merge", interrupted)
        assert run(capfd, *flags, "skip")[0] == 130
    status, _, err = run(capfd, *flags, "raise")
    assert status == 2
    assert "empty.png, row 5: the image is empty" in err
    assert run(capfd, *flags, "skip")[0] == 0
    assert [image["row"] for image in LatentSet("latents.h5").provenance.skipped] == [5]


def test_a_folder_of_bad_images_only_is_refused(workspace, capfd):
    shutil.rmtree(workspace / "img")
    (workspace / "img").mkdir()
    for name, (content, _) in BAD.items():
        write(workspace / "img", name, content)
    status, _, err = run(capfd, *FLAGS, "--on-bad-image", "skip", "--out", "latents.h5")
    assert status == 2
    assert "error: none of the 4 images of img can be decoded; the first: " in err


def test_named_pipes_are_refused_instead_of_waited_for(tmp_path):
    (tmp_path / "img").mkdir()
    for name in ("img/0.png", "img/1.parquet"):
        os.mkfifo(tmp_path / name)
    for read in (lambda path: load_image(path, channels=3), load_transparency, input_digest):
        with pytest.raises(UserError, match=r"0\.png is not a regular file"):
            read(tmp_path / "img" / "0.png")
    with pytest.raises(UserError, match=r"1\.parquet is not a regular file"):
        open_images(str(tmp_path / "img"))
    (tmp_path / "img" / "1.parquet").unlink()
    assert "it is not a regular file" in open_images(str(tmp_path / "img")).check().errors[0]
    os.mkfifo(tmp_path / "img" / "metadata.csv")
    with pytest.raises(UserError, match=r"metadata\.csv is not a regular file"):
        open_images(str(tmp_path / "img"))


def test_images_with_a_very_long_side_are_refused(tmp_path):
    for width in (99_999, 150_000):
        Image.new("L", (width, 1)).save(tmp_path / f"{width}.png")
    assert load_image(tmp_path / "99999.png", channels=1, height=8, width=8).shape == (1, 8, 8)
    with pytest.raises(BadImageError, match="150000x1 pixels, and a side of more than 100000 is not read"):
        load_image(tmp_path / "150000.png", channels=1, height=8, width=8)


def test_an_offset_of_a_wrong_type_is_damage():
    """Found by fuzzing: Pillow seeks to a TIFF's offset whatever its type."""
    tiff = encoded(Image.new("RGB", (8, 8)), "TIFF")
    long_offset, float_offset = (struct.pack("<HHI", 273, kind, 1) for kind in (4, 11))  # StripOffsets
    assert tiff.count(long_offset) == 1
    with pytest.raises(BadImageError, match="cannot be decoded"):
        decode(tiff.replace(long_offset, float_offset), channels=3)
