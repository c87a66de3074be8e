"""Image sets: what opens and what is refused, source ids and splits that never change, rows as training reads them."""

import io
import json
import os
import pickle
import re
import zipfile
from collections import defaultdict
from importlib.resources import files
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch.utils.data import DataLoader

from smalti import sources
from smalti.errors import UserError
from smalti.images import ImageRows, ImageSet, open_images
from smalti.preprocess import BadImageError
from smalti.splits import held_out

COLOURS = ["red", "lime", "blue", "black", "white", "yellow", "cyan", "magenta", "grey", "navy", "olive", "teal"]


def png(colour: str, size: tuple[int, int] = (32, 32), kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, colour).save(file, kind)
    return file.getvalue()


def colour_of(image_set: ImageSet, index: int) -> str:
    rgb = tuple(image_set.pixels([index])[0, :, 16, 16].tolist())
    return next(colour for colour in COLOURS if Image.new("RGB", (1, 1), colour).getpixel((0, 0)) == rgb)


def write_folder(root: Path, names: list[str]) -> Path:
    """One image of its own colour for each name."""
    for name, colour in zip(names, COLOURS, strict=False):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(png(colour))
    return root


def write_parquet(path: Path, **columns) -> Path:
    """A Parquet file as anything but `datasets` writes it: without marks of what is an image."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path)
    return path


def marked(colours: list[str], **columns) -> datasets.Dataset:
    """A table whose column `image` says that it holds images."""
    images = [{"bytes": png(colour), "path": None} for colour in colours]
    return datasets.Dataset.from_dict({"image": images, **columns}).cast_column("image", datasets.Image())


@pytest.fixture(scope="module")
def emoji() -> ImageSet:
    return open_images()


# Sources of images.


def test_a_folder_is_read_in_sorted_order_with_its_subfolders_as_labels(tmp_path):
    names = ["b/2.png", "a/10.PNG", "b/1.png", "a/deep/x.jpeg", "top.png", ".hidden.png", ".cache/no.png", "a/b.txt"]
    image_set = open_images(str(write_folder(tmp_path, names)))
    assert image_set.label_names == ("a", "b", "deep")
    assert image_set.labels.tolist() == [0, 2, 1, 1, -1]
    assert [colour_of(image_set, index) for index in range(5)] == ["lime", "black", "blue", "red", "white"]


def test_a_flat_folder_has_no_labels_and_one_file_is_a_set(tmp_path):
    image_set = open_images(str(write_folder(tmp_path, ["b.png", "a.png"])))
    assert image_set.label_names == ()
    assert image_set.labels.tolist() == [-1, -1]
    assert len(open_images(str(tmp_path / "b.png"))) == 1
    assert len(open_images(str(tmp_path / "[ab].*"))) == 2


def test_linked_folders_are_read_and_circles_are_not(tmp_path):
    write_folder(tmp_path / "elsewhere", ["x.png"])
    write_folder(tmp_path / "images", ["y.png"])
    (tmp_path / "images" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "images" / "circle").symlink_to(tmp_path / "images")
    assert open_images(str(tmp_path / "images")).label_names == ("linked",)


def test_the_order_of_the_folder_listing_does_not_matter(tmp_path, monkeypatch):
    names = [f"{folder}/{number}.png" for folder in "ba" for number in range(5)]
    expected = open_images(str(write_folder(tmp_path / "one", names)))
    walk = os.walk

    def reversed_walk(*args, **options):
        for parent, folders, found in walk(*args, **options):
            folders.sort(reverse=True)
            yield parent, folders, sorted(found, reverse=True)

    monkeypatch.setattr(os, "walk", reversed_walk)
    for name in names:  # another place, made in another order
        (tmp_path / "two" / name).parent.mkdir(parents=True, exist_ok=True)
    for name in reversed(names):
        (tmp_path / "two" / name).write_bytes((tmp_path / "one" / name).read_bytes())
    found = open_images(str(tmp_path / "two"))
    assert found.source_ids.equal(expected.source_ids)
    assert found.fingerprint == expected.fingerprint


def test_renaming_keeps_source_ids_and_new_content_changes_them(tmp_path):
    write_folder(tmp_path, ["a.png", "b.png"])
    first = open_images(str(tmp_path)).source_ids.tolist()
    (tmp_path / "a.png").rename(tmp_path / "c.png")
    assert open_images(str(tmp_path)).source_ids.tolist() == first[::-1]
    (tmp_path / "c.png").write_bytes(png("teal"))
    (tmp_path / "d.png").write_bytes(png("lime"))
    again = open_images(str(tmp_path)).source_ids.tolist()
    assert again[0] == again[2] == first[1]  # exact duplicates are one source
    assert again[1] not in first


def test_source_ids_are_computed_once(tmp_path, monkeypatch):
    write_folder(tmp_path / "folder", ["a.png", "b.png"])
    parquet = write_parquet(tmp_path / "x.parquet", image=[png("red"), png("lime")])
    opened = [str(tmp_path / "folder"), str(parquet)]
    expected = [open_images(source).source_ids.tolist() for source in opened]

    def refuse(image):
        raise AssertionError("hashed again")

    monkeypatch.setattr(sources, "encoded", refuse)
    assert [open_images(source).source_ids.tolist() for source in opened] == expected


@pytest.mark.parametrize("form", ["marked", "struct", "bytes", "large bytes"])
def test_parquet_in_every_form_images_are_stored_in(form, tmp_path):
    path = tmp_path / "images.parquet"
    encoded = [png("red"), png("lime")]
    if form == "marked":
        marked(["red", "lime"]).to_parquet(path)
    elif form == "struct":
        write_parquet(path, img=[{"bytes": image, "path": "x.png"} for image in encoded], width=[32, 32])
    else:
        write_parquet(path, img=pa.array(encoded, pa.binary() if form == "bytes" else pa.large_binary()))
    image_set = open_images(str(path))
    assert [colour_of(image_set, index) for index in range(2)] == ["red", "lime"]
    assert image_set.label_names == ()


def test_parquet_folders_and_globs_are_read_in_sorted_order(tmp_path):
    for number, colour in [(2, "blue"), (0, "red"), (1, "lime")]:
        write_parquet(tmp_path / "da[t]a" / f"part-{number}.parquet", image=[png(colour)])  # brackets are no pattern
    write_parquet(tmp_path / "da[t]a" / "part-.parquet", image=pa.array([], pa.binary()))
    for source in (tmp_path / "da[t]a", tmp_path / "da*" / "part-*.parquet"):
        image_set = open_images(str(source))
        assert [colour_of(image_set, index) for index in range(3)] == ["red", "lime", "blue"]


def test_images_within_archives_are_read(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        archive.writestr("inner/teal.png", png("teal"))
    image = {"bytes": None, "path": f"zip://inner/teal.png::{tmp_path / 'x.zip'}"}
    path = write_parquet(
        tmp_path / "x.parquet",
        image=pa.array([image], pa.struct({"bytes": pa.binary(), "path": pa.string()})),
    )
    assert colour_of(open_images(str(path)), 0) == "teal"


@pytest.mark.parametrize(
    ("labels", "names", "expected"),
    [
        (["dog", "cat", None, "dog"], ("cat", "dog"), [1, 0, -1, 1]),
        ([700, 5, -1, 5], ("5", "700"), [1, 0, -1, 0]),
        ([True, False, True, True], ("False", "True"), [1, 0, 1, 1]),
        ([0.5, 1.5, 2.5, 3.5], (), [-1, -1, -1, -1]),
    ],
)
def test_labels_of_every_type(labels, names, expected, tmp_path):
    path = write_parquet(tmp_path / "x.parquet", image=[png(colour) for colour in COLOURS[:4]], label=labels)
    image_set = open_images(str(path))
    assert image_set.label_names == names
    assert image_set.labels.tolist() == expected


def test_declared_classes_keep_their_names_and_the_label_column_can_be_chosen(tmp_path):
    table = marked(["red", "lime", "blue"], kind=[2, None, 0], shade=[1, 1, 0])
    table = table.cast_column("kind", datasets.ClassLabel(names=["x", "y", "z"]))
    table.to_parquet(tmp_path / "one.parquet")
    image_set = open_images(str(tmp_path / "one.parquet"))
    assert image_set.label_names == ("x", "y", "z")
    assert image_set.labels.tolist() == [2, -1, 0]
    table.cast_column("shade", datasets.ClassLabel(names=["dark", "light"])).to_parquet(tmp_path / "two.parquet")
    with pytest.raises(UserError, match=r"2 columns of classes .'kind', 'shade'.; choose one with --label-column"):
        open_images(str(tmp_path / "two.parquet"))
    assert open_images(str(tmp_path / "two.parquet"), label_column="shade").label_names == ("dark", "light")


def test_two_columns_of_images_need_a_choice(tmp_path):
    table = marked(["red"]).add_column("other", [{"bytes": png("blue"), "path": None}])
    table.cast_column("other", datasets.Image()).to_parquet(tmp_path / "x.parquet")
    with pytest.raises(UserError, match=r"2 columns of images .'image', 'other'.; choose one with --image-column"):
        open_images(str(tmp_path / "x.parquet"))
    assert colour_of(open_images(str(tmp_path / "x.parquet"), image_column="other"), 0) == "blue"


def test_a_source_id_column_names_the_sources(tmp_path):
    images = [png(colour) for colour in COLOURS[:4]]
    path = write_parquet(tmp_path / "x.parquet", image=images, source_id=["cow", "hen", "cow", "pig"])
    ids = open_images(str(path)).source_ids
    assert ids[0] == ids[2]
    assert ids.unique().numel() == 3
    assert (ids >= 0).all()


def a_table(*images: str, **columns):
    """What makes a Parquet file, and images beside it."""

    def make(root: Path) -> None:
        write_folder(root, list(images))
        write_parquet(root / "x.parquet", **columns)

    return make


@pytest.mark.parametrize(
    ("make", "source", "options", "message"),
    [
        (None, "no/such/folder", {}, "there is nothing at .*no/such/folder; give a folder"),
        (None, "none.parquet", {}, "there is nothing at .*none.parquet"),
        (None, "*.png", {}, "holds no images and no Parquet files"),
        (lambda root: (root / "empty").mkdir(), "empty", {}, "empty holds no images"),
        (lambda root: write_folder(root / "a", ["x.txt"]), "a", {}, "a holds no images"),
        (a_table(a=[1], b=["c"]), "x.parquet", {}, "no column of images; its columns are 'a', 'b'"),
        (a_table(a=[b"c"]), "x.parquet", {"image_column": "b"}, "no column 'b'; its columns are 'a'"),
        (a_table(a=[1.5]), "x.parquet", {"image_column": "a"}, "'a' of .* not images"),
        (a_table(a=[b"c"]), "x.parquet", {"label_column": "b"}, "no column 'b'"),
        (a_table(a=[b"c"]), "x.parquet", {"label_column": "a"}, "labels are classes, integers"),
        (a_table(a=pa.array([], pa.binary())), "x.parquet", {}, "cannot be opened .*no data"),
        (a_table("mixed/x.png", a=[b"c"]), ".", {}, "images and Parquet files; give a glob"),
        (lambda root: (root / "x.parquet").write_bytes(b"not Parquet"), "x.parquet", {}, "x.parquet cannot be opened"),
        (None, ".", {"channels": 2}, "cannot have 2 channels"),
        (None, ".", {"height": 0}, "0x32 pixels are empty"),
    ],
)
def test_what_cannot_be_opened_is_refused_in_one_line(make, source, options, message, tmp_path):
    if make is not None:
        make(tmp_path)
    with pytest.raises(UserError, match=message) as refused:
        open_images(str(tmp_path / source), **options)
    assert "\n" not in str(refused.value)


def test_unreadable_folders_are_named(tmp_path, monkeypatch):
    def scandir(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(UserError, match=re.escape(f"{tmp_path} cannot be listed (Permission denied)")):
        open_images(str(tmp_path))


def test_a_label_without_a_name_is_refused(tmp_path):
    table = pa.table({"image": [png("red")], "label": [7]})
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
    table = table.replace_schema_metadata(features.arrow_schema.metadata)
    pq.write_table(table, tmp_path / "x.parquet")
    with pytest.raises(UserError, match="'label' has label 7 but 2 names"):
        open_images(str(tmp_path / "x.parquet"))


def test_the_hub_offline_is_one_line():
    with pytest.raises(UserError, match="no folder nobody/nothing, and as a hub data set it cannot") as refused:
        open_images("nobody/nothing")
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("source", "asked"),
    [
        ("someone/things", ("someone/things", None, "train")),
        ("things:test", ("things", None, "test")),
        ("someone/things@small:train[:50%]", ("someone/things", "small", "train[:50%]")),
    ],
)
def test_a_hub_id_says_config_and_split(source, asked, monkeypatch):
    calls = []

    def load_dataset(path, name, *, split):
        calls.append((path, name, split))
        return marked(["red", "blue"])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert colour_of(open_images(source), 1) == "blue"
    assert calls == [asked]


def test_a_hub_split_without_rows_is_refused(monkeypatch):
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **options: marked(["red"]).select([]))
    with pytest.raises(UserError, match=r"things:train\[:0\] has no rows"):
        open_images("things:train[:0]")


# Odd and bad images, as a folder has them.


def test_a_folder_of_odd_images_becomes_pixels_of_one_size(tmp_path):
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
def test_a_bad_image_is_named_with_its_row(bad, reason, tmp_path):
    write_folder(tmp_path, ["a.png", "b.png", "c.png"])
    (tmp_path / "b.png").write_bytes(bad)
    image_set = open_images(str(tmp_path))
    assert colour_of(image_set, 2) == "blue"
    with pytest.raises(BadImageError, match=rf"b\.png, row 1: .*{reason}"):
        image_set.pixels([0, 1])
    with pytest.raises(BadImageError, match=rf"b\.png, row 1: .*{reason}"):
        ImageRows(image_set, split="all", flips=False)


def test_missing_images_are_named_with_their_row(tmp_path):
    (tmp_path / "gone.png").symlink_to(tmp_path / "nowhere.png")
    with pytest.raises(BadImageError, match=r"gone\.png, row 0: the file cannot be read \(No such file"):
        open_images(str(tmp_path)).pixels([0])
    write_parquet(tmp_path / "y.parquet", image=[png("red"), None])
    with pytest.raises(BadImageError, match=r"y\.parquet, row 1: there is no image"):
        open_images(str(tmp_path / "y.parquet")).pixels([1])


# The emoji, source ids and splits.


def test_the_emoji_never_change(emoji):
    assert len(emoji) == 3786
    assert emoji.label_names[:2] == ("Activities", "Animals & Nature")
    assert torch.bincount(emoji.labels).tolist() == [85, 159, 5, 270, 131, 264, 2261, 169, 224, 218]
    assert emoji.fingerprint == "8a0acdff3ee477841b7ed54eec0a5c074fd5cb0e3289cb6f0d05bf8552342e66"
    assert emoji.source_ids[:3].tolist() == [8463703222255128354, 7900430901984015610, 5286950980543214298]
    assert json.loads(json.dumps(emoji.preprocessing)) == emoji.preprocessing
    assert {"height": 32, "width": 32, "channels": 3}.items() <= emoji.preprocessing.items()


def test_emoji_pixels_are_those_of_the_file(emoji):
    stored = pq.read_table(str(files("smalti") / "data" / "emoji32.parquet"), columns=["image"])["image"].to_pylist()
    for index in (0, 1234, 3785):
        expected = np.asarray(Image.open(io.BytesIO(stored[index]["bytes"])))
        assert (emoji.pixels([index])[0].permute(1, 2, 0).numpy() == expected).all()


def test_skin_tones_stay_together(emoji):
    codepoints = pq.read_table(str(files("smalti") / "data" / "emoji32.parquet"))["codepoints"].to_pylist()
    families = defaultdict(list)
    for index, points in enumerate(codepoints):
        families[re.sub(r"(^|-)(1F3F[B-F]|FE0F)(?=-|$)", "", points).strip("-")].append(index)
    assert max(map(len, families.values())) >= 25  # couples: five tones each
    ids = [emoji.source_ids[members].unique() for members in families.values()]
    assert all(len(of_family) == 1 for of_family in ids)
    assert torch.cat(ids).unique().numel() == len(families)
    out = held_out(emoji.source_ids)
    assert all(out[members].unique().numel() == 1 for members in families.values())


def test_the_split_never_changes(emoji):
    assert held_out(torch.arange(100)).nonzero().ravel().tolist() == [13, 33, 50, 51, 61, 63, 71, 85, 91]
    assert int(held_out(emoji.source_ids).sum()) == 435


@given(ids=st.lists(st.integers(0, 2**63 - 1), min_size=1, max_size=50), seed=st.integers(0, 99))
def test_the_split_is_a_function_of_the_id_alone_and_grows_with_the_percentage(ids, seed):
    ids = torch.tensor(ids)
    order = torch.randperm(len(ids), generator=torch.Generator().manual_seed(seed))
    assert held_out(ids)[order].equal(held_out(ids[order]))
    assert held_out(ids[:1], 50).equal(held_out(ids, 50)[:1])
    assert (held_out(ids, 10) <= held_out(ids, 30)).all()
    assert not held_out(ids, 0).any()
    assert held_out(ids, 100).all()


def test_the_split_takes_its_share_of_any_ids():
    numbers = torch.arange(20_000)
    for ids in (numbers, numbers * 1000 + 7, numbers << 40):
        assert held_out(ids, 10).float().mean().item() == pytest.approx(0.1, abs=0.01)


@pytest.mark.parametrize("percent", [-1, 101])
def test_impossible_percentages_are_refused(percent):
    with pytest.raises(UserError, match="cannot be held out; give a percentage from 0 to 100"):
        held_out(torch.arange(3), percent)


# Rows, as training reads them.


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


def test_the_splits_share_no_source_and_together_are_all(emoji):
    train, out, both = (ImageRows(emoji, split=split, flips=True) for split in ("train", "held_out", "all"))
    sources_of = [set(rows.__getitems__(range(len(rows)))["source_ids"].tolist()) for rows in (train, out, both)]
    assert sources_of[0].isdisjoint(sources_of[1])
    assert sources_of[0] | sources_of[1] == sources_of[2] == set(emoji.source_ids.tolist())
    assert len(train) + len(out) == len(both) == 2 * len(emoji)


def test_nothing_to_train_on_is_said(tmp_path):
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


def test_the_cache_is_filled_once_by_rows_and_only_where_it_fits(tmp_path, monkeypatch):
    write_folder(tmp_path, ["a.png", "b.png"])
    decoded = []
    decode = ImageSet._decode
    monkeypatch.setattr(ImageSet, "_decode", lambda *args: decoded.append(args[1]) or decode(*args))
    fits = open_images(str(tmp_path), cache_bytes=2 * 3 * 32 * 32)
    for split in ("all", "all"):
        ImageRows(fits, split=split, flips=True).__getitems__([0, 1, 2, 3])
    assert sorted(decoded) == [0, 1]
    decoded.clear()
    larger = ImageRows(open_images(str(tmp_path), cache_bytes=2 * 3 * 32 * 32 - 1), split="all", flips=False)
    assert decoded == []
    larger.__getitems__([1])
    larger.__getitems__([1])
    assert decoded == [1, 1]
