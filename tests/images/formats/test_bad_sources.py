"""Archives, lists and metadata that cannot be used: one line that names what is wrong, and never a wrong image."""

import io
import struct
import tarfile
import zipfile

import pytest
from helpers.container_toys import labelled_images, write_files, write_tar, write_zip
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from smalti.core.errors import UserError
from smalti.images.formats import archives
from smalti.images.formats.annotations import read_list
from smalti.images.image_set import open_images

FILES = labelled_images(4)
IMAGE = FILES["cat/000.png"]
SIZE = {"height": 8, "width": 8}


def tar(**files):
    return lambda root: write_tar(root / "x.tar", {name.replace("_", "."): content for name, content in files.items()})


def two_of_one_name(root):
    with tarfile.open(root / "x.tar", "w") as archive:
        for _ in range(2):
            member = tarfile.TarInfo("a.png")
            member.size = len(IMAGE)
            archive.addfile(member, io.BytesIO(IMAGE))


def truncated(root):
    path = write_tar(root / "x.tar", FILES)
    path.write_bytes(path.read_bytes()[:1000])


def linked(root):
    with tarfile.open(root / "x.tar", "w") as archive:
        member = tarfile.TarInfo("a.png")
        member.type, member.linkname = tarfile.SYMTYPE, "b.png"
        archive.addfile(member)


def files(**texts):
    """Returns a function that writes images and text files, whose names have `_` for `.`."""

    def write(root):
        write_files(root, {"a.png": IMAGE, "b.png": FILES["dog/003.png"]})
        write_files(root, {name.replace("_", "."): text.encode() for name, text in texts.items()})

    return write


@pytest.mark.parametrize(
    ("make", "source", "message"),
    [
        (lambda root: (root / "x.tar").write_bytes(b""), "x.tar", r"x\.tar cannot be opened \(empty file\)"),
        (lambda root: (root / "x.tar").write_bytes(bytes(10240)), "x.tar", "holds no images; give archives that do"),
        (tar(a_txt=b"no image", b_md=b""), "x.tar", r"holds no images \(passed over, .*\.md \(1 file\)"),
        (truncated, "x.tar", r"x\.tar cannot be opened \(unexpected end of data\); give a whole"),
        (two_of_one_name, "x.tar", "holds two files called a.png; give each a name of its own"),
        (linked, "x.tar", "holds a.png as a symbolic link; write the archive with --dereference"),
        (lambda root: (root / "x.zip").write_bytes(b"PK no"), "x.zip", r"x\.zip cannot be opened \(File is not a zip"),
        (tar(a_png=IMAGE, a_json=b"{", a_cls=b"1"), "x.tar", None),
        (tar(a_png=IMAGE, a_json=b"{"), "x.tar", r"the \.json beside a\.png cannot be read"),
        (tar(a_png=IMAGE, a_cls=b"\xff"), "x.tar", r"x\.tar/a\.cls is not text in UTF-8"),
        (None, "none.csv", r"there is nothing at .*none\.csv; give a folder of images"),
        (None, "x-{0..1}.tar", r"there is no .*x-0\.tar; check the name"),
        (None, "x-{5..1}.tar", r"names -3 files; give one of 1 to"),
        (None, "x-{0..1}.png", r"names \.png files; ranges and URLs are those of \.tar or \.zip"),
        (files(x_csv="path,label\na.png,1\n"), "x.csv", None),
        (
            files(x_csv="name,label\na.png,1\n"),
            "x.csv",
            r"no column of paths; its columns are 'name', 'label': call one",
        ),
        (files(x_csv="path,file\na.png,b.png\n"), "x.csv", r"several columns of paths"),
        (files(x_csv="path,label\n"), "x.csv", "lists no images"),
        (files(x_csv=""), "x.csv", r"cannot be read as a table \(Empty CSV file\)"),
        (files(x_csv="path,y,y\na.png,1,2\n"), "x.csv", "several columns called 'y'"),
        (
            files(x_csv="path,y\na.png,1,2\n"),
            "x.csv",
            "cannot be read as a table .*; give a header and one line for each",
        ),
        (files(x_csv="path,y\n,2\n"), "x.csv", "row 1: None is not a path"),
        (files(x_txt="a.png\nb.png\na.png\n"), "x.txt", r"names .*a\.png twice; remove one of the rows"),
        (files(x_txt="../a.png\n"), "x.txt", r"row 1: \.\./a\.png is outside the folder of the list; move the list"),
        (files(x_txt="/etc/passwd\n"), "x.txt", r"row 1: /etc/passwd is outside the folder of the list"),
        (files(x_jsonl='{"path": "a.png"\n'), "x.jsonl", "cannot be read as a table"),
        (files(metadata_csv="name,label\na.png,1\n"), ".", r"metadata\.csv has no column 'file_name'"),
        (
            files(metadata_csv="file_name,label\nc.png,1\n"),
            ".",
            r"names .*c\.png, which is not there; add the image or",
        ),
        (files(metadata_csv="file_name,label\na.png,1\na.png,2\n"), ".", r"names .*a\.png twice"),
        (files(metadata_csv="file_name,label\n../a.png,1\n"), ".", "is outside the folder of the list"),
        (files(metadata_csv="file_name\na.png\n", metadata_jsonl='{"file_name": "a.png"}'), ".", r"a\.png twice"),
    ],
)
def test_unusable_sources_are_refused_in_one_line(make, source, message, tmp_path):
    if make is not None:
        make(tmp_path)
    if message is None:  # a near miss that is read
        assert len(open_images(str(tmp_path / source), **SIZE))
        return
    with pytest.raises(UserError, match=message) as refused:
        open_images(str(tmp_path / source), **SIZE)
    assert "\n" not in str(refused.value)


def test_missing_labels_are_counted_and_an_unknown_column_names_those_there_are(tmp_path):
    files(metadata_csv="file_name,label,kind\na.png,1,x\n")(tmp_path)
    images = open_images(str(tmp_path), **SIZE)
    assert images.labels.tolist() == [0, -1]
    assert images.notes == (
        f"metadata.csv has no row for 1 of 2 images, which get no label; the first: {tmp_path}/b.png",
    )
    assert open_images(str(tmp_path), label_column="kind", **SIZE).label_names == ("x",)
    with pytest.raises(UserError, match=r"has no column 'breed'; its columns are 'label', 'kind'"):
        open_images(str(tmp_path), label_column="breed", **SIZE)
    (tmp_path / "list.csv").write_text("path,kind\na.png,x\n")
    with pytest.raises(UserError, match=r"list\.csv has no column 'breed'; its columns are 'kind'"):
        open_images(str(tmp_path / "list.csv"), label_column="breed", **SIZE)
    tar(a_png=IMAGE, b_png=IMAGE, a_cls=b"1")(tmp_path)
    (note,) = open_images(str(tmp_path / "x.tar"), **SIZE).notes
    assert note == "1 of 2 images have no .cls beside them, and get no label; the first: b.png"


@pytest.mark.parametrize(
    ("labels", "message"),
    [("1.5\n2.5", "labels are classes, integers or strings"), ("x\n2024-05-06", None), ("1\nx", None)],
)
def test_labels_of_every_type_in_a_list(labels, message, tmp_path):
    rows = "\n".join(f"{name}.png,{label}" for name, label in zip("ab", labels.split("\n"), strict=True))
    files(x_csv=f"path,kind\n{rows}\n")(tmp_path)
    if message is None:
        assert open_images(str(tmp_path / "x.csv"), label_column="kind", **SIZE).labels.tolist() in ([0, 1], [1, 0])
    else:
        with pytest.raises(UserError, match=message):
            open_images(str(tmp_path / "x.csv"), label_column="kind", **SIZE)


def test_a_broken_image_in_an_archive_is_named(tmp_path):
    path = write_zip(tmp_path / "x.zip", {**FILES, "dog/009.png": IMAGE[:40]}, zipfile.ZIP_STORED)
    errors = open_images(str(path), **SIZE).check().errors
    assert list(errors) == [4]
    assert errors[4].startswith(f"{path}/dog/009.png, row 4: ")
    content = bytearray(path.read_bytes())
    content[content.index(IMAGE) + 60] ^= 1
    path.write_bytes(content)
    assert "is damaged in its archive" in open_images(str(path), **SIZE).check().errors[0]


def test_encrypted_members_and_other_compressions_are_named(tmp_path):
    path = write_zip(tmp_path / "x.zip", {"a.png": IMAGE}, zipfile.ZIP_LZMA)
    assert "its compression (method 14) is not read" in open_images(str(path), **SIZE).check().errors[0]
    path = write_zip(tmp_path / "y.zip", {"a.png": IMAGE}, zipfile.ZIP_STORED)
    content = bytearray(path.read_bytes())
    struct.pack_into("<H", content, 6, 1)  # the flag of encryption in the member's own header
    path.write_bytes(content)
    assert "it is encrypted" in open_images(str(path), **SIZE).check().errors[0]


def test_a_zip_bomb_is_refused_before_it_expands(tmp_path, monkeypatch):
    path = write_zip(tmp_path / "x.zip", {"a.png": bytes(201 * 10**6)})
    monkeypatch.setattr(archives, "_inflated", None)
    (error,) = open_images(str(path), **SIZE).check().errors.values()
    assert "compressed bytes declare 201000000, a decompression bomb perhaps" in error


def test_a_zip_that_declares_too_little_is_damaged(tmp_path):
    """A bomb may lie about its size: no more is decompressed than it declares."""
    path = write_zip(tmp_path / "x.zip", {"a.png": IMAGE + bytes(10**6)})
    (member,) = archives.index_of(str(path)).members
    with pytest.raises(UserError, match="is damaged in its archive"):
        archives.read_member(member._replace(size=len(IMAGE)))


WHOLE = {
    "x.tar": write_tar,
    "x.zip": write_zip,
}


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=60)
@given(data=st.data(), name=st.sampled_from(sorted(WHOLE)))
def test_damaged_archives_give_members_or_a_one_line_error(data, name, tmp_path):
    path = WHOLE[name](tmp_path / name, {**FILES, "a.cls": b"1", "metadata.csv": b"file_name\ncat/000.png\n"})
    content = bytearray(path.read_bytes())
    for position in data.draw(st.lists(st.integers(0, len(content) - 1), max_size=6)):
        content[position] = data.draw(st.integers(0, 255))
    path.write_bytes(content[: data.draw(st.integers(1, len(content)))])
    message = ""
    try:
        for member in archives._build(str(path)).members:
            archives.read_member(member)
    except UserError as error:
        message = str(error)
    assert "\n" not in message


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=150)
@given(
    text=st.text(st.sampled_from('ab,"\n\t./\\{}:é1'), max_size=40),
    suffix=st.sampled_from(["csv", "tsv", "jsonl", "txt"]),
)
def test_any_text_is_a_list_or_a_one_line_error(text, suffix, tmp_path):
    path = tmp_path / f"x.{suffix}"
    path.write_text(f"path\n{text}" if suffix != "jsonl" else text, encoding="utf-8", newline="")
    try:
        paths, columns = read_list(path, None)
    except UserError as error:
        message = str(error)
        paths, columns = [], {}
    else:
        message = ""
    assert "\n" not in message
    assert all(each.startswith(f"{tmp_path}/") for each in paths)
    assert all(len(values) == len(paths) for values in columns.values())
