"""Image sets: unusual and bad files, stable source ids and splits, and the rows of a split."""

import io
import json
import pickle
import re
from collections import defaultdict
from importlib.resources import files
from pathlib import Path

import jaxtyping
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from helpers.image_toys import colour_of, png, write_folder, write_parquet
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch.utils.data import DataLoader

from smalti.core.errors import UserError
from smalti.images.formats.opening import BadImageError
from smalti.images.image_set import ImageRows, ImageSet, open_images
from smalti.images.splits import held_out


@pytest.fixture(scope="module")
def emoji() -> ImageSet:
    return open_images("emoji")


# Unusual and bad images in a folder.


def test_a_folder_of_unusual_images_becomes_pixels_of_one_size(tmp_path):
    noise = Image.effect_noise((40, 30), 60)
    noise.save(tmp_path / "grey.png")
    Image.fromarray(np.asarray(noise).astype(np.uint16) * 257).save(tmp_path / "grey16.png")
    noise.convert("LA").save(tmp_path / "alpha.png")
    noise.convert("P").save(tmp_path / "palette.gif", transparency=3)
    noise.convert("CMYK").save(tmp_path / "cmyk.jpg")
    noise.convert("1").save(tmp_path / "bit.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    noise.save(tmp_path / "rotated.jpg", exif=exif)
    noise.save(tmp_path / "animated.gif", save_all=True, append_images=[noise.transpose(Image.Transpose.ROTATE_180)])
    Image.new("RGB", (1, 1), "red").save(tmp_path / "dot.png")
    Image.new("RGB", (5000, 3), "red").save(tmp_path / "wide.bmp")
    for channels in (1, 3):
        image_set = open_images(str(tmp_path), height=16, width=24, channels=channels)
        assert image_set.pixels(range(10)).shape == (10, channels, 16, 24)
    names = sorted(path.name for path in tmp_path.iterdir())
    pixels = dict(zip(names, image_set.pixels(range(10)), strict=True))
    assert pixels["grey.png"].equal(pixels["grey16.png"])
    assert pixels["grey.png"].equal(pixels["alpha.png"])
    assert pixels["dot.png"].equal(pixels["wide.bmp"])


@pytest.mark.parametrize(
    ("bad", "reason"), [(b"", "0 bytes"), (b"hello", "not an image"), (png("red", (99, 99), "JPEG")[:-99], "truncated")]
)
def test_a_bad_image_is_reported_with_its_row(bad, reason, tmp_path):
    write_folder(tmp_path, ["a.png", "b.png", "c.png"])
    (tmp_path / "b.png").write_bytes(bad)
    image_set = open_images(str(tmp_path))
    assert colour_of(image_set, 2) == "blue"
    with pytest.raises(BadImageError, match=rf"b\.png, row 1: .*{reason}"):
        image_set.pixels([0, 1])
    with pytest.raises(BadImageError, match=rf"b\.png, row 1: .*{reason}"):
        ImageRows(image_set, split="all", flips=False)


def test_missing_images_are_reported_with_their_row(tmp_path):
    (tmp_path / "gone.png").symlink_to(tmp_path / "nowhere.png")
    with pytest.raises(BadImageError, match=r"gone\.png, row 0: the file cannot be read \(No such file"):
        open_images(str(tmp_path)).pixels([0])
    write_parquet(tmp_path / "y.parquet", image=[png("red"), None])
    with pytest.raises(BadImageError, match=r"y\.parquet, row 1: there is no image"):
        open_images(str(tmp_path / "y.parquet")).pixels([1])


# The embedded images, source ids and splits.


def test_the_portraits_never_change():
    portraits = open_images()
    assert len(portraits) == 9000
    assert portraits.source == "portraits"
    assert portraits.label_names == ("open-peeps", "pixel-art", "toon-head")
    assert torch.bincount(portraits.labels).tolist() == [3000, 3000, 3000]
    assert portraits.fingerprint == "ff78e96268e432c7b9560c983c4107028c7da1f5e2792a9a746356965f7d1f1e"
    assert int(held_out(portraits.source_ids).sum()) == 879


def test_the_emoji_never_change(emoji):
    assert len(emoji) == 3786
    assert emoji.label_names[:2] == ("Activities", "Animals & Nature")
    assert torch.bincount(emoji.labels).tolist() == [85, 159, 5, 270, 131, 264, 2261, 169, 224, 218]
    assert emoji.fingerprint == "a673e25b01ead881fe4d1e11d7e12359af1f6a47dfec6403ac5a83b14422a512"
    assert emoji.source_ids[:3].tolist() == [8463703222255128354, 7900430901984015610, 5286950980543214298]
    assert json.loads(json.dumps(emoji.preprocessing)) == emoji.preprocessing
    assert {"height": 32, "width": 32, "channels": 3}.items() <= emoji.preprocessing.items()


def test_emoji_pixels_equal_the_files(emoji):
    stored = pq.read_table(str(files("smalti.images") / "data" / "emoji32.parquet"), columns=["image"])[
        "image"
    ].to_pylist()
    for index in (0, 1234, 3785):
        expected = np.asarray(Image.open(io.BytesIO(stored[index]["bytes"])))
        assert (emoji.pixels([index])[0].permute(1, 2, 0).numpy() == expected).all()


def test_skin_tones_share_a_source_and_a_split(emoji):
    codepoints = pq.read_table(str(files("smalti.images") / "data" / "emoji32.parquet"))["codepoints"].to_pylist()
    families = defaultdict(list)
    for index, points in enumerate(codepoints):
        families[re.sub(r"(^|-)(1F3F[B-F]|FE0F)(?=-|$)", "", points).strip("-")].append(index)
    assert max(map(len, families.values())) >= 25  # couples: five tones each
    ids = [emoji.source_ids[members].unique() for members in families.values()]
    assert all(len(family_ids) == 1 for family_ids in ids)
    assert torch.cat(ids).unique().numel() == len(families)
    out = held_out(emoji.source_ids)
    assert all(out[members].unique().numel() == 1 for members in families.values())


def test_the_split_never_changes(emoji):
    assert held_out(torch.arange(100)).nonzero().ravel().tolist() == [13, 33, 50, 51, 61, 63, 71, 85, 91]
    assert int(held_out(emoji.source_ids).sum()) == 435


@given(ids=st.lists(st.integers(0, 2**63 - 1), min_size=1, max_size=50), seed=st.integers(0, 99))
def test_the_split_depends_on_the_id_alone_and_grows_with_the_percentage(ids, seed):
    ids = torch.tensor(ids)
    order = torch.randperm(len(ids), generator=torch.Generator().manual_seed(seed))
    assert held_out(ids)[order].equal(held_out(ids[order]))
    assert held_out(ids[:1], 50).equal(held_out(ids, 50)[:1])
    assert (held_out(ids, 10) <= held_out(ids, 30)).all()
    assert not held_out(ids, 0).any()
    assert held_out(ids, 100).all()


def test_the_split_has_its_share_of_any_ids():
    numbers = torch.arange(20_000)
    for ids in (numbers, numbers * 1000 + 7, numbers << 40):
        assert held_out(ids, 10).float().mean().item() == pytest.approx(0.1, abs=0.01)


@pytest.mark.parametrize("percent", [-1, 101])
def test_impossible_percentages_are_refused(percent):
    with pytest.raises(UserError, match="cannot be held out; give a percentage from 0 to 100"):
        held_out(torch.arange(3), percent)


# The rows of a split.


def identity(batch):
    return batch


def test_flips_are_rows_of_one_source(emoji):
    plain, both = (ImageRows(emoji, split="train", flips=flips) for flips in (False, True))
    assert len(both) == 2 * len(plain)
    batch, mirrored = both.__getitems__([10, 0, 2]), both.__getitems__([11, 1, 3])
    assert mirrored["images"].equal(batch["images"].flip(3))
    assert mirrored["source_ids"].equal(batch["source_ids"])
    assert mirrored["labels"].equal(batch["labels"])
    assert (batch["flipped"].tolist(), mirrored["flipped"].tolist()) == ([False] * 3, [True] * 3)
    assert mirrored["rows"].tolist() == [11, 1, 3]
    unflipped = plain.__getitems__([5, 0, 1])
    assert unflipped["images"].equal(batch["images"])
    assert unflipped["rows"].tolist() == [5, 0, 1]
    assert not unflipped["flipped"].any()


def test_the_splits_share_no_source_and_cover_all(emoji):
    train, out, both = (ImageRows(emoji, split=split, flips=True) for split in ("train", "held_out", "all"))
    sources_of = [set(rows.__getitems__(range(len(rows)))["source_ids"].tolist()) for rows in (train, out, both)]
    assert sources_of[0].isdisjoint(sources_of[1])
    assert sources_of[0] | sources_of[1] == sources_of[2] == set(emoji.source_ids.tolist())
    assert len(train) + len(out) == len(both) == 2 * len(emoji)


def test_an_empty_train_split_is_refused(tmp_path):
    names = list(range(100))  # not the images themselves, whose bytes depend on the machine's zlib
    some = open_images(str(write_parquet(tmp_path / "some.parquet", image=[png("red")] * 100, source_id=names)))
    name = int(held_out(some.source_ids).nonzero()[0])
    image_set = open_images(str(write_parquet(tmp_path / "one.parquet", image=[png("red")], source_id=[name])))
    assert len(ImageRows(image_set, split="held_out", flips=False)) == 1
    with pytest.raises(UserError, match=r"all 1 image.* fall into the held-out split; give more images"):
        ImageRows(image_set, split="train", flips=False)


@pytest.mark.parametrize("cache_bytes", [0, 2**20])
def test_workers_and_pickles_read_the_same_rows(cache_bytes, tmp_path):
    write_folder(tmp_path, [f"{number}.png" for number in range(12)])
    rows = ImageRows(open_images(str(tmp_path), cache_bytes=cache_bytes), split="all", flips=True)
    direct = rows.__getitems__(range(24))
    again = pickle.loads(pickle.dumps(rows)).__getitems__(range(24))
    loader = DataLoader(rows, batch_size=5, num_workers=2, collate_fn=identity, multiprocessing_context="fork")
    batches = list(loader)
    for name, expected in direct.items():
        assert again[name].equal(expected)
        assert torch.cat([batch[name] for batch in batches]).equal(expected)


def test_the_cache_is_filled_once_and_only_if_it_fits(tmp_path, monkeypatch):
    write_folder(tmp_path, ["a.png", "b.png"])
    decoded = []
    decode = ImageSet._decode
    monkeypatch.setattr(ImageSet, "_decode", lambda *args: decoded.append(Path(args[1]["path"]).stem) or decode(*args))
    fits = open_images(str(tmp_path), cache_bytes=2 * 3 * 32 * 32)
    for split in ("all", "all"):
        ImageRows(fits, split=split, flips=True).__getitems__([0, 1, 2, 3])
    assert sorted(decoded) == ["a", "b"]
    decoded.clear()
    larger = ImageRows(open_images(str(tmp_path), cache_bytes=2 * 3 * 32 * 32 - 1), split="all", flips=False)
    assert decoded == []
    larger.__getitems__([1])
    larger.__getitems__([1])
    assert decoded == ["b", "b"]


def test_splits_and_rows_that_do_not_exist_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # which checks types in tests alone
    images = open_images("emoji", limit=20, height=8, width=8)
    with pytest.raises(UserError, match="split must be one of train, held_out, all, not 'test'"):
        ImageRows(images, split="test", flips=False)
    rows = ImageRows(images, split="all", flips=False)
    for read in (images.pixels, rows.__getitems__, lambda wrong: images.crops(wrong, 1)):
        with pytest.raises(UserError, match=r"the rows are a boolean mask; give .* mask.nonzero\(\)"):
            read(torch.arange(20) > 3)
        with pytest.raises(UserError, match="row numbers must be integers, not float64"):
            read([0.9])
    assert len(images.pixels([])) == 0


def test_one_row_is_that_of_a_batch():
    rows = ImageRows(open_images("emoji", limit=5, height=8, width=8), split="all", flips=True)
    batch, row = rows.__getitems__([3]), rows[3]
    assert list(row) == list(batch)
    assert all(value.equal(batch[name][0]) for name, value in row.items())
    assert row["images"].shape == (3, 8, 8)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ({"height": 2.5}, "^height must be a whole number, not 2.5$"),
        ({"width": "32"}, "^width must be a whole number, not '32'$"),
        ({"channels": 3.0}, "^channels must be a whole number, not 3.0$"),
        ({"limit": 2.5}, "^--limit must be a whole number, not 2.5$"),
        ({"limit": 0}, "^--limit must be at least 1, not 0$"),
    ],
)
def test_shapes_that_are_not_whole_are_refused(shape, message, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # which checks types in tests alone
    with pytest.raises(UserError, match=message):
        open_images("emoji", **shape)


def test_paths_and_numbers_are_sources_and_fractions(tmp_path, monkeypatch):
    write_folder(tmp_path / "emoji", [f"{number}.png" for number in range(4)])
    monkeypatch.chdir(tmp_path)
    images = open_images(Path("emoji"), held_out=0.25)
    assert (len(images), images.source) == (4, "./emoji")
    assert images.fingerprint == open_images("./emoji").fingerprint
    assert torch.equal(images.held_out, open_images("./emoji", held_out="0.25").held_out)
    assert images.preprocessing == open_images("./emoji", held_out="0.25").preprocessing
    with pytest.raises(UserError, match="the source is empty; give a value"):
        open_images("")
    with pytest.raises(UserError, match="cannot be read: File name too long"):
        open_images("x" * 5000)


def test_large_images_leave_pillows_own_limit_as_it_was(tmp_path, monkeypatch):
    for number in range(24):
        Image.new("RGB", (40, 30), (number, 0, 0)).save(tmp_path / f"{number:02}.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    for _ in range(3):  # decoded on several threads
        images = open_images(str(tmp_path), height=2, width=2, most_pixels=1200)
        rows = ImageRows(images, split="all", flips=False)
        assert rows.__getitems__(range(24))["images"][:, 0, 0, 0].tolist() == list(range(24))
        assert Image.MAX_IMAGE_PIXELS == 100
