"""Listing of files: splits that are no classes, class folders, and notes of everything that is left out."""

import contextlib
import os
import unicodedata
from contextlib import suppress
from pathlib import Path

import listing_by_pathlib
import pytest
from helpers.image_toys import COLOURS, png, write_folder, write_parquet
from hypothesis import example, given, settings
from hypothesis import strategies as st

from smalti.core.errors import UserError
from smalti.core.files import require_no_input
from smalti.images.image_set import open_images
from smalti.images.listing import list_files
from smalti.images.reading import print_summary
from smalti.images.sources import local_paths, open_table


def listed(root: Path) -> tuple[list[str], list[str | None], tuple[str, ...]]:
    listing = list_files(str(root))
    assert listing is not None
    return [os.path.relpath(path, root) for path in listing.paths], list(listing.labels), listing.notes


@pytest.mark.parametrize(
    ("names", "kept", "left_out"),
    [
        (["train/1.png", "test/2.png", "val/3.png"], ["train/1.png"], "test (1 image), val (1 image)"),
        (["Training/a/1.png", "Valid/a/2.png", "Valid/b/3.png"], ["Training/a/1.png"], "Valid (2 images)"),
        (["images/train/1.png", "images/test/2.png"], ["images/train/1.png"], "test (1 image)"),
        (["a/train/1.png", "a/test/2.png", "0.png"], ["a/train/1.png"], "beside them (1 image), test (1 image)"),
        (["train-0.parquet", "test-0.parquet"], ["train-0.parquet"], "test (1 file)"),
        (["data/train.parquet", "data/validation.parquet"], ["data/train.parquet"], "validation (1 file)"),
    ],
)
def test_only_the_training_split_is_read(names, kept, left_out, tmp_path):
    paths, labels, notes = listed(write_folder(tmp_path, names))
    assert paths == kept
    assert labels == [{"Training/a/1.png": "a", "a/train/1.png": "a", "data/train.parquet": "data"}.get(kept[0])]
    split = "Training" if "Training" in kept[0] else "train"
    assert notes == (f"{tmp_path} is divided: only {split} is read; left out: {left_out}",)


def test_a_folder_of_evaluation_splits_is_read_whole_without_making_them_classes(tmp_path):
    paths, labels, notes = listed(write_folder(tmp_path, ["test/1.png", "val/2.png"]))
    assert (len(paths), labels) == (2, [None, None])
    assert notes == (
        f"{tmp_path} is divided into test (1 image), val (1 image), but not into train: all of it is read",
    )


def test_train_among_other_classes_is_a_class(tmp_path):
    assert listed(write_folder(tmp_path, ["car/1.png", "train/2.png"]))[1:] == (["car", "train"], ())


def test_a_folder_train_alone_is_no_class(tmp_path):
    assert listed(write_folder(tmp_path, ["train/1.png", "train/cat/2.png"]))[1:] == ([None, "cat"], ())


def test_folders_with_generic_names_keep_the_class_above_them(tmp_path):
    names = ["cat/images/1.png", "dog/IMG/2.png", "dog/puppy/jpg/3.png"]
    assert listed(write_folder(tmp_path, names))[1] == ["cat", "dog", "puppy"]


def test_a_class_of_several_folders_is_named(tmp_path):
    names = ["cat/young/1.png", "dog/young/2.png", "dog/old/3.png", "dog/old/images/4.png"]
    _, labels, notes = listed(write_folder(tmp_path, names))
    assert sorted(map(str, labels)) == ["old", "old", "young", "young"]
    assert notes == (
        "without a column of labels the innermost folder is the class: 'young' is that of cat/young, dog/young",
    )


def test_files_that_are_passed_over_are_counted_by_suffix(tmp_path):
    write_folder(tmp_path, ["a.png", "1.HEIC", "2.heic", "noext", "notes.txt", ".hidden", "old.tar.gz"])
    (passed_over,) = listed(tmp_path)[2]
    assert "passed over" in passed_over
    for counted in (".heic (2 files)", "no suffix (1 file)", ".txt (1 file)", "save photographs as JPEG or PNG"):
        assert counted in passed_over
    assert passed_over.endswith("; unpack compressed archives: .tar and .zip are read")


def test_a_folder_without_images_names_what_it_holds(tmp_path):
    write_folder(tmp_path, ["1.HEIC", "2.HEIC"])
    with pytest.raises(UserError, match=r"holds no images and no Parquet files \(passed over, .*: \.heic \(2 files\)"):
        list_files(str(tmp_path))


@pytest.mark.parametrize("name", ["labels", "cls", "class", "category"])
def test_a_column_that_looks_like_labels_is_named(name, tmp_path):
    path = write_parquet(tmp_path / "x.parquet", image=[png("red")], **{name: [1]})
    (note,) = open_images(str(path)).notes
    assert note.startswith(f"found a column '{name}', which is not read; labels are read from 'label': rename it")
    assert open_images(str(path), label_column=name).notes == ()


def test_a_column_of_float_labels_is_named(tmp_path):
    path = write_parquet(tmp_path / "x.parquet", image=[png("red")] * 2, label=[1.0, None])
    (note,) = open_images(str(path)).notes
    assert note == "column 'label' is not read: it holds float64; labels are integers or strings: convert it"


def test_the_summary_counts_images_and_classes(tmp_path, capsys):
    write_folder(tmp_path, ["b/1.png", "b/2.png", "a/3.png", "4.png", "x.txt"])
    print_summary(open_images(str(tmp_path)))
    first, second = [line for line in capsys.readouterr().err.splitlines() if line.startswith("images: ")]
    assert first == f"images: 4 images from {tmp_path}, in 2 classes: b 2, a 1, without a class 1"
    assert "passed over" in second
    assert (
        open_images(str(write_folder(tmp_path / "flat", ["1.png"])))
        .summary()[0]
        .endswith(f"1 image from {tmp_path / 'flat'}, without classes")
    )


def test_the_summary_of_many_classes_is_short_and_escapes_control_characters(tmp_path, capsys):
    write_folder(tmp_path, [f"\x1b[31m{index}/x.png" for index in range(len(COLOURS))])
    print_summary(open_images(str(tmp_path)))
    (line,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("images: "))
    assert "in 12 classes: " in line
    assert line.endswith("and 2 more")
    assert not any(unicodedata.category(each) == "Cc" for each in line)


def test_outputs_inside_the_folder_of_images_are_refused(tmp_path, monkeypatch):
    write_folder(tmp_path / "photos", ["1.png"])
    (tmp_path / "link").symlink_to(tmp_path / "photos")
    monkeypatch.chdir(tmp_path)
    globbed = ("photos/run", "photos/*.png")
    for out, source in (globbed, ("photos/run", "photos"), ("link/run", "photos"), ("photos", "link"), ("runs/x", ".")):
        with pytest.raises(UserError, match=r"lies inside the input folder|would overwrite an input"):
            require_no_input([Path(out)], local_paths(source))
    for out, source in (
        ("run", "photos"),
        ("photos-2", "photos"),
        ("photos/codes.h5", "photos/*.parquet"),
        ("emoji/x", "emoji"),
        ("me/photos/run", "me/photos"),
    ):
        require_no_input([Path(out)], local_paths(source))


def test_links_that_lead_back_list_no_file_again(tmp_path):
    """Through one folder, through two, and to a folder above; a link that leads elsewhere is followed."""
    write_folder(tmp_path, ["set/a/1.png", "set/a/2.png", "set/b/3.png", "set/c/d/4.png", "other/5.png"])
    links = {"a/see": "../b", "b/see": "../a", "c/self": ".", "c/d/up": "../../..", "c/other": "../../other"}
    for link, target in links.items():
        (tmp_path / "set" / link).symlink_to(target)
    names = ["a/1.png", "a/2.png", "a/see/3.png", "b/3.png", "b/see/1.png", "b/see/2.png", "c/d/4.png", "c/other/5.png"]
    assert listed(tmp_path / "set")[0] == names
    for pattern, expected in (
        ("**/*.png", names),
        ("*/see/*.png", [name for name in names if "see" in name]),
        ("c/../*/*.png", ["c/../a/1.png", "c/../a/2.png", "c/../b/3.png"]),
    ):
        listing = list_files(str(tmp_path / "set" / pattern))
        assert [path.removeprefix(f"{tmp_path / 'set'}/") for path in listing.paths] == expected


def test_links_to_files_are_listed_each(tmp_path):
    write_folder(tmp_path, ["a/1.png"])
    (tmp_path / "a" / "2.png").symlink_to("1.png")
    for source in (tmp_path, tmp_path / "*" / "*.png"):
        assert [Path(path).name for path in list_files(str(source)).paths] == ["1.png", "2.png"]


def test_names_that_are_not_utf8_are_passed_over_and_said(tmp_path):
    write_folder(tmp_path, ["a/one.png", "a/two.png"])
    (tmp_path / "a/one.png").rename(tmp_path / os.fsdecode(b"a/\xff.png"))
    images = open_images(str(tmp_path))
    assert len(images) == 1
    assert "passed over, because the name is not UTF-8: 1 file(s); rename them" in images.summary()


FOLDERS = st.sampled_from(["train", "Test", "val", "cat", "Images", "ünï", "a.b", ".hidden", "dog.PNG", "x[1]"])
STEMS = st.sampled_from(["1", "10", "É", "a.b", "..x", "z.", ".h", "метки", "train-0", "test.1", "metadata"])
SUFFIXES = st.sampled_from([".png", ".PNG", ".Jpg", ".npy", ".parquet", ".tar", ".ZIP", ".csv", ".txt", ".gz", "", "."])
NAMES = st.builds(
    lambda folders, *name: "/".join([*folders, "".join(name)]), st.lists(FOLDERS, max_size=3), STEMS, SUFFIXES
)


@settings(max_examples=150, deadline=None)
@given(
    names=st.sets(NAMES, min_size=1, max_size=8),
    links=st.dictionaries(NAMES, st.sampled_from([".", "..", "train", "cat", "missing", "1.png"]), max_size=2),
    pattern=st.sampled_from(["", "", "", "*", "*/*", "**/*.png", "**", "*/*.[pP]*"]),
    split=st.sampled_from([None, None, "train", "TEST"]),
    relative=st.booleans(),
)
@example(names={"train/a/1.png", "test/2.png", "0.png"}, links={}, pattern="", split=None, relative=True)
@example(names={"train-0.tar", "test-0.tar", "a/x.tar"}, links={}, pattern="", split="train", relative=False)
def test_files_are_listed_as_through_pathlib(tmp_path_factory, names, links, pattern, split, relative):
    """The rows of a set are in the order of its listing, and its fingerprint depends on them."""
    root = tmp_path_factory.mktemp("set")
    for name in sorted(names):
        with suppress(OSError):  # another name is that of a folder
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).touch()
    for name, target in links.items():
        with suppress(OSError):
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).symlink_to(target)
    sources = [pattern or "."] if relative else [str(root / pattern), *(str(root / name) for name in sorted(names)[:2])]
    with contextlib.chdir(root):
        for source in sources:
            results = []
            for implementation in (listing_by_pathlib.list_files, list_files):
                try:
                    results.append(implementation(source, split))
                except UserError as error:
                    results.append(str(error))
            assert results[0] == results[1]


def test_a_change_of_files_or_labels_is_another_table(tmp_path):
    """`datasets` keeps what it computed for a table by the table's fingerprint."""

    def fingerprint():
        return open_table(str(tmp_path), caption_column="text").rows._fingerprint

    write_folder(tmp_path, ["a/1.png", "b/2.png"])
    metadata = tmp_path / "metadata.csv"
    metadata.write_text("file_name,text\na/1.png,one\nb/2.png,two\n")
    fingerprints = [fingerprint()]
    assert fingerprint() == fingerprints[0]
    os.utime(tmp_path / "a/1.png", ns=(1, 1))
    fingerprints.append(fingerprint())
    metadata.write_text("file_name,text\na/1.png,one\nb/2.png,three\n")
    fingerprints.append(fingerprint())
    metadata.write_text("file_name,text,label\na/1.png,one,a\nb/2.png,three,c\n")
    fingerprints.append(fingerprint())
    (tmp_path / "b").rename(tmp_path / "d")
    metadata.write_text("file_name,text,label\na/1.png,one,a\nd/2.png,three,c\n")
    fingerprints.append(fingerprint())
    assert len({*fingerprints}) == len(fingerprints)
