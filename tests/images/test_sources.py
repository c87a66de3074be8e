"""Sources of images: formats, errors, labels and source ids."""

import logging
import os
import re
import tracemalloc
import zipfile
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers.image_toys import COLOURS, colour_of, marked, png, write_folder, write_parquet

from smalti.core.errors import UserError
from smalti.images import contents, sources
from smalti.images.image_set import open_images


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


def test_a_mistyped_folder_gives_one_line_without_the_hubs_warnings(monkeypatch, caplog):
    def load(*_, **__):
        logging.getLogger("huggingface_hub.utils._http").warning("Retrying in 1s [Retry 1/5].")
        raise ConnectionError("no network")

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(UserError, match=r"there is no folder nosuch, and as a hub data set .* \(no network\)"):
        open_images("nosuch", height=8, width=8)
    assert caplog.text == ""


def test_linked_folders_are_read_unless_circular(tmp_path):
    write_folder(tmp_path / "other", ["x.png"])
    write_folder(tmp_path / "images", ["y.png"])
    (tmp_path / "images" / "linked").symlink_to(tmp_path / "other")
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
    for name in names:  # another folder, written in another order
        (tmp_path / "two" / name).parent.mkdir(parents=True, exist_ok=True)
    for name in reversed(names):
        (tmp_path / "two" / name).write_bytes((tmp_path / "one" / name).read_bytes())
    reordered = open_images(str(tmp_path / "two"))
    assert reordered.source_ids.equal(expected.source_ids)
    assert reordered.fingerprint == expected.fingerprint


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

    monkeypatch.setattr(contents, "encoded", refuse)
    assert [open_images(source).source_ids.tolist() for source in opened] == expected


@pytest.mark.parametrize("form", ["marked", "struct", "bytes", "large bytes"])
def test_parquet_columns_of_every_form_are_read(form, tmp_path):
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
        write_parquet(
            tmp_path / "da[t]a" / f"part-{number}.parquet", image=[png(colour)]
        )  # these brackets are not a glob
    write_parquet(tmp_path / "da[t]a" / "part-.parquet", image=pa.array([], pa.binary()))
    for source in (tmp_path / "da[t]a", tmp_path / "da*" / "part-*.parquet"):
        image_set = open_images(str(source))
        assert [colour_of(image_set, index) for index in range(3)] == ["red", "lime", "blue"]


def test_images_in_archives_are_read(tmp_path):
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
    with pytest.raises(UserError, match=r"2 columns of classes .'kind', 'shade'.; choose one with --label-column NAME"):
        open_images(str(tmp_path / "two.parquet"))
    assert open_images(str(tmp_path / "two.parquet"), label_column="shade").label_names == ("dark", "light")


def test_several_columns_of_images_are_refused(tmp_path):
    table = marked(["red"]).add_column("other", [{"bytes": png("blue"), "path": None}])
    table.cast_column("other", datasets.Image()).to_parquet(tmp_path / "x.parquet")
    with pytest.raises(UserError, match=r"2 columns of images .'image', 'other'.; choose one with --image-column NAME"):
        open_images(str(tmp_path / "x.parquet"))
    assert colour_of(open_images(str(tmp_path / "x.parquet"), image_column="other"), 0) == "blue"


def test_a_source_id_column_names_the_sources(tmp_path):
    images = [png(colour) for colour in COLOURS[:4]]
    path = write_parquet(tmp_path / "x.parquet", image=images, source_id=["cow", "hen", "cow", "pig"])
    ids = open_images(str(path)).source_ids
    assert ids[0] == ids[2]
    assert ids.unique().numel() == 3
    assert (ids >= 0).all()


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="only Linux lists the mapped files")
def test_hashing_frees_the_memory_of_the_images(tmp_path):
    size = 4 << 20
    pq.write_table(pa.table({"image": [os.urandom(size) for _ in range(3)]}), tmp_path / "large.parquet")
    table = sources.open_table(str(tmp_path / "large.parquet"))
    contents.read_source_ids(table)
    (cached,) = (file["filename"] for file in table.rows.cache_files)
    mapped = re.findall(rf"{re.escape(cached)}\n(?:\w+: .*\n)*?Rss:\s*(\d+) kB", Path("/proc/self/smaps").read_text())
    assert mapped
    assert sum(map(int, mapped)) * 1024 < size


def test_parquet_files_are_not_read_into_memory_before_their_first_row(tmp_path):
    size = 16 << 20
    with pq.ParquetWriter(tmp_path / "large.parquet", pa.schema({"image": pa.binary()})) as writer:
        for _ in range(16):  # row groups
            writer.write_table(pa.table({"image": [os.urandom(size // 64) for _ in range(4)]}))
    tracemalloc.start()
    try:
        assert len(sources.open_table(str(tmp_path / "large.parquet")).rows) == 64
        assert tracemalloc.get_traced_memory()[1] < size
    finally:
        tracemalloc.stop()


def a_table(*images: str, **columns):
    """Returns a function that writes a Parquet file, and images beside it."""

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
        (None, ".", {"channels": 0}, "cannot have 0 channels"),
        (None, ".", {"height": 0}, "0x32 pixels are empty"),
    ],
)
def test_unusable_sources_are_refused_in_one_line(make, source, options, message, tmp_path):
    if make is not None:
        make(tmp_path)
    with pytest.raises(UserError, match=message) as refused:
        open_images(str(tmp_path / source), **options)
    assert "\n" not in str(refused.value)


def test_unreadable_folders_are_reported(tmp_path, monkeypatch):
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


def test_an_offline_hub_gives_one_line():
    with pytest.raises(UserError, match="no folder nobody/nothing, and as a hub data set it cannot") as refused:
        open_images("nobody/nothing")
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("source", "call"),
    [
        ("someone/things", ("someone/things", None, "train")),
        ("things:test", ("things", None, "test")),
        ("someone/things@small:train[:50%]", ("someone/things", "small", "train[:50%]")),
    ],
)
def test_a_hub_id_may_name_config_and_split(source, call, monkeypatch):
    calls = []

    def load_dataset(path, name, *, split):
        calls.append((path, name, split))
        return marked(["red", "blue"])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert colour_of(open_images(source), 1) == "blue"
    assert calls == [call]


def test_a_hub_split_without_rows_is_refused(monkeypatch):
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **options: marked(["red"]).select([]))
    with pytest.raises(UserError, match=r"things:train\[:0\] has no rows"):
        open_images("things:train[:0]")


def test_files_that_a_table_names_by_path_are_read_anew_when_they_change(tmp_path):
    files = write_folder(tmp_path / "files", ["0.png", "1.png"])
    paths = [str(path) for path in sorted(files.iterdir())]
    schema = datasets.Features({"image": datasets.Image()}).arrow_schema
    images = {"image": [{"bytes": None, "path": path} for path in paths]}
    pq.write_table(pa.table(images, schema=schema), tmp_path / "paths.parquet")
    before = open_images(str(tmp_path / "paths.parquet"))
    assert before.fingerprint == open_images(str(tmp_path / "paths.parquet")).fingerprint
    Path(paths[0]).write_bytes(png("white"))
    after = open_images(str(tmp_path / "paths.parquet"))
    assert after.fingerprint != before.fingerprint
    assert after.source_ids[0] != before.source_ids[0]
    assert after.source_ids[1] == before.source_ids[1]


def test_lists_of_text_name_files_with_any_characters(tmp_path):
    """Characters at which Python splits lines, and spaces at both ends; other spaces around a path are left out."""
    names = ["a b.png", "x\u2028y.png", "\x0bz\x85.png", " lead.png", "lead.png"]
    for name, colour in zip(names, COLOURS, strict=False):
        (tmp_path / name).write_bytes(png(colour))
    (tmp_path / "c.png").write_bytes(png("grey"))
    for end in ("\n", "\r\n", "\r"):
        (tmp_path / "list.txt").write_bytes(end.join([*names, "", "   ", "\tc.png "]).encode())
        images = open_images(str(tmp_path / "list.txt"))
        assert [colour_of(images, index) for index in range(len(images))] == [*COLOURS[: len(names)], "grey"]


def test_held_out_images_of_another_source_have_the_chosen_columns(tmp_path):
    labels = {"style": ["ink", "oil"], "label": ["paris", "rome"], "text": ["a", "b"]}
    for name, colours in (("train", ["red", "blue"]), ("test", ["green", "white"])):
        images = {column: [png(colour) for colour in colours] for column in ("left", "right")}
        write_parquet(tmp_path / f"{name}.parquet", **images, **labels)
    chosen = {"image_column": "left", "label_column": "style", "caption_column": "text"}
    images = open_images(str(tmp_path / "train.parquet"), held_out=str(tmp_path / "test.parquet"), **chosen)
    assert images.label_names == ("ink", "oil")
    assert images.labels.tolist() == [0, 1, 0, 1]
    assert images.captions() == ["a", "b", "a", "b"]
    write_folder(tmp_path / "folder", ["ink/0.png", "oil/1.png"])
    images = open_images(str(tmp_path / "train.parquet"), held_out=str(tmp_path / "folder"), **chosen)
    assert images.labels.tolist() == [0, 1, 0, 1]
    assert any("read without the columns that were chosen" in note for note in images.notes)
    with pytest.raises(UserError, match="nothing at"):
        open_images(str(tmp_path / "train.parquet"), held_out=str(tmp_path / "gone"), **chosen)
