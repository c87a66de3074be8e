"""One set of images in every container: the same images, labels, source ids and fingerprint; splits, limits, labels."""

import json
import shutil
import zipfile

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers.container_toys import CLASSES, CONTAINERS, labelled_images, write_files, write_tar, write_zip
from hypothesis import given
from hypothesis import strategies as st

from smalti.core.errors import UserError
from smalti.images.formats import archives
from smalti.images.image_set import ImageRows, open_images
from smalti.images.reading import Reading, read_images, read_images_for
from smalti.images.sources import expand_braces, local_paths

FILES = labelled_images()
SIZE = {"height": 8, "width": 8}


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    return open_images(CONTAINERS["folder"](tmp_path_factory.mktemp("folder"), FILES), **SIZE)


@pytest.mark.parametrize("container", CONTAINERS)
def test_every_container_gives_the_set_of_the_folder(container, expected, tmp_path):
    images = open_images(CONTAINERS[container](tmp_path / "x", FILES), **SIZE)
    assert images.fingerprint == expected.fingerprint
    assert images.label_names == CLASSES
    assert images.labels.equal(expected.labels)
    assert images.source_ids.equal(expected.source_ids)
    assert images.pixels(range(len(FILES))).equal(expected.pixels(range(len(FILES))))
    assert not images.check().errors
    assert [note for note in images.notes if "other" not in note] == []


@pytest.mark.parametrize("scheme", ["memory", "file"])
def test_archives_at_a_url_are_read(scheme, expected, tmp_path):
    folder = "/shards-test" if scheme == "memory" else str(tmp_path)
    local = CONTAINERS["shards"](tmp_path / "local", FILES)
    filesystem = fsspec.filesystem(scheme)
    for number in range(3):
        name = f"shards-{number:04}.tar"
        filesystem.pipe_file(f"{folder}/{name}", (tmp_path / "local" / name).read_bytes())
    assert open_images(local, **SIZE).fingerprint == expected.fingerprint
    for pattern in ("shards-{0000..0002}.tar", "shards-*.tar"):
        assert open_images(f"{scheme}://{folder}/{pattern}", **SIZE).fingerprint == expected.fingerprint
    assert len(open_images(f"{scheme}://{folder}/shards-0001.tar", **SIZE)) == 4
    assert local_paths(f"{scheme}://{folder}/shards-*.tar") == []


@pytest.mark.parametrize(
    ("source", "names"),
    [
        ("a-{08..11}.tar", ["a-08.tar", "a-09.tar", "a-10.tar", "a-11.tar"]),
        ("{x,y}-{1..2}.tar", ["x-1.tar", "x-2.tar", "y-1.tar", "y-2.tar"]),
        ("plain.tar", []),
        ("{single}.tar", []),
    ],
)
def test_braces_expand_as_in_a_shell(source, names):
    assert expand_braces(source) == names


@given(first=st.integers(0, 120), count=st.integers(1, 30), width=st.integers(1, 5))
def test_ranges_of_numbers_are_complete_and_padded(first, count, width):
    names = expand_braces(f"s-{{{first:0{width}}..{first + count - 1}}}.tar")
    assert [int(name[2:-4]) for name in names] == list(range(first, first + count))
    assert all(len(name[2:-4]) >= min(width, 5) for name in names)


def test_an_index_is_built_once_and_again_after_a_change(tmp_path, monkeypatch):
    source = write_tar(tmp_path / "x.tar", FILES)
    first, built = open_images(str(source), **SIZE), []
    build = archives._build
    monkeypatch.setattr(archives, "_build", lambda archive: built.append(archive) or build(archive))
    assert open_images(str(source), **SIZE).fingerprint == first.fingerprint
    assert built == []
    write_tar(source, labelled_images(seed=1))
    assert open_images(str(source), **SIZE).fingerprint != first.fingerprint
    assert built == [str(source)]


def test_members_are_read_without_reading_the_archive_again(tmp_path):
    """Random access by position: every other byte of the archive may be gone."""
    source = write_tar(tmp_path / "x.tar", FILES)
    images = open_images(str(source), **SIZE)
    (member,) = (each for each in archives.index_of(str(source)).members if each.name == "dog/007.png")
    content = source.read_bytes()
    blank = bytes(member.start) + content[member.start : member.start + member.size]
    source.write_bytes(blank + bytes(len(content) - len(blank)))
    assert images.pixels([7]).shape == (1, 3, 8, 8)
    with pytest.raises(UserError, match=r"x\.tar/dog/006\.png, row 6: .* not an image of a known format"):
        images.pixels([6])


SPLIT = {f"{split}/{name}": content for split in ("train", "val") for name, content in FILES.items()}


@pytest.mark.parametrize("container", ["folder", "tar", "zip", "text list"])
def test_splits_are_recognised_in_every_container(container, expected, tmp_path):
    other = labelled_images(seed=1)
    files = {f"train/{name}": content for name, content in FILES.items()}
    files |= {f"val/{name}": content for name, content in other.items()}
    source = CONTAINERS[container](tmp_path / "x", files)
    images = open_images(source, **SIZE)
    assert images.fingerprint == expected.fingerprint
    assert any("only train is read; left out: val (12 images)" in note for note in images.notes)
    held_out = open_images(source, split="val", **SIZE)
    assert held_out.fingerprint == open_images(str(write_files(tmp_path / "val", other)), **SIZE).fingerprint
    assert held_out.preprocessing["split"] == "val"
    with pytest.raises(UserError, match=r"has no split 'test'; it is divided into train .*, val .*: give --split one"):
        open_images(source, split="test", **SIZE)


def test_archives_named_for_splits_are_divided(expected, tmp_path):
    write_tar(tmp_path / "train-0.tar", FILES)
    write_tar(tmp_path / "test-0.tar", labelled_images(seed=1))
    assert open_images(str(tmp_path), **SIZE).fingerprint == expected.fingerprint
    assert open_images(str(tmp_path), split="test", **SIZE).fingerprint != expected.fingerprint


def test_a_source_without_splits_has_none(tmp_path):
    source = CONTAINERS["folder"](tmp_path / "x", FILES)
    for name, message in ((source, "is not divided into splits"), ("portraits", "is not divided into splits")):
        with pytest.raises(UserError, match=message):
            open_images(name, split="train", **SIZE)


@pytest.mark.parametrize("container", ["folder", "shards", "parquet", "csv list"])
def test_a_limit_reads_the_first_images(container, expected, tmp_path):
    images = open_images(CONTAINERS[container](tmp_path / "x", FILES), limit=5, **SIZE)
    assert images.source_ids.equal(expected.source_ids[:5])
    assert images.preprocessing["limit"] == 5
    assert images.file_names() is None or len(images.file_names()) == 5
    with pytest.raises(UserError, match="--limit must be at least 1, not 0"):
        open_images("portraits", limit=0)


def test_labels_come_from_a_chosen_column_and_integers_keep_their_order(tmp_path):
    samples = {}
    for number, content in enumerate(FILES.values()):
        samples[f"{number}.png"] = content
        samples[f"{number}.json"] = json.dumps({"size": number + 5, "tag": f"t{number % 2}", "who": [1]}).encode()
        samples[f"{number}.cls"] = str(number).encode()
        samples[f"{number}.txt"] = b"a caption"
    source = str(write_tar(tmp_path / "x.tar", samples))
    images = open_images(source, **SIZE)
    assert images.label_names == tuple(map(str, range(12)))
    assert open_images(source, label_column="tag", **SIZE).label_names == ("t0", "t1")
    assert open_images(source, label_column="size", **SIZE).label_names == tuple(map(str, range(5, 17)))
    assert open_images(source, label_column="txt", **SIZE).label_names == ("a caption",)
    with pytest.raises(UserError, match=r"has no column 'who'; its columns are .*'size'.*'cls'"):
        open_images(source, label_column="who", **SIZE)


def test_a_sample_of_several_images_needs_a_choice(tmp_path):
    (first, second, *_) = FILES.values()
    samples = {"1.input.png": first, "1.target.png": second, "1.cls": b"3"}
    source = str(write_tar(tmp_path / "x.tar", samples))
    with pytest.raises(
        UserError, match=r"holds 2 images of the sample 1 \(input.png, target.png\); choose with --image"
    ):
        open_images(source, **SIZE)
    images = open_images(source, image_column="target.png", **SIZE)
    assert images.pixels([0]).equal(
        open_images(str(write_files(tmp_path / "y", {"a.png": second})), **SIZE).pixels([0])
    )
    assert images.label_names == ("3",)
    with pytest.raises(UserError, match=r"holds no files ending in \.webp"):
        open_images(source, image_column="webp", **SIZE)


def test_held_out_images_may_be_a_fraction_none_or_another_source(expected, tmp_path):
    folder = CONTAINERS["folder"](tmp_path / "x", FILES)
    assert not open_images(folder, held_out="none", **SIZE).held_out.any()
    halves = open_images(folder, held_out="0.5", **SIZE).held_out
    assert expected.held_out.logical_and(~halves).sum() == 0  # a larger fraction only adds images
    other = labelled_images(4, seed=1)
    other["mouse/9.png"], other["dog/copy.png"] = other.pop("dog/003.png"), FILES["cat/002.png"]
    archive = str(write_zip(tmp_path / "val.zip", other))
    images = open_images(folder, held_out=archive, **SIZE)
    assert images.held_out.nonzero().squeeze(1).tolist() == [2, 12, 13, 14, 15, 16]  # row 2 is also in the archive
    assert images.label_names == (*CLASSES, "mouse")
    assert images.labels[12:].tolist() == [0, 0, 1, 1, 2]
    assert any("1 of 12 images are also in" in note for note in images.notes)
    assert len(ImageRows(images, split="train", flips=False)) == 11
    assert ImageRows(images, split="held_out", flips=False).__getitems__([4])["images"].shape == (1, 3, 8, 8)
    for wrong in ("1.5", "20", "-0.1"):
        with pytest.raises(UserError, match="is no fraction; give one between 0 and 1, a folder, or none"):
            open_images(folder, held_out=wrong, **SIZE)


@pytest.mark.parametrize(
    "path",
    [
        "member:",
        "member:{}",
        "member:[1]",
        "member:[1, 2, 3, 4, 5, 6, 7]",
        'member:["no/such.tar", "a", 0, 1, 1, null, null]',
    ],
)
def test_paths_of_foreign_tables_cannot_break_reading(path, tmp_path):
    """A Parquet file may name anything as the path of an image."""
    image = pa.array([{"bytes": None, "path": path}], pa.struct({"bytes": pa.binary(), "path": pa.string()}))
    pq.write_table(pa.table({"image": image}), tmp_path / "x.parquet")
    assert "cannot be read" in open_images(str(tmp_path / "x.parquet"), **SIZE).check().errors[0]


def test_the_query_of_a_url_is_no_suffix():
    assert archives.suffix_of("https://host/a.TAR?key=1.zip") == ".tar"
    assert archives.suffix_of("odd?name.zip") == ".zip"


@pytest.mark.parametrize("kind", ["0.5", "none", "val.tar"])
def test_a_model_keeps_what_its_training_held_out(kind, tmp_path):
    source = CONTAINERS["folder"](tmp_path / "x", FILES)
    write_tar(tmp_path / "val.tar", labelled_images(4, seed=1))
    requested = str(tmp_path / kind) if kind == "val.tar" else kind
    trained = read_images(source, Reading(held_out=requested), **SIZE, channels=3)
    provenance = {"image_source": source, "image_fingerprint": trained.fingerprint}
    provenance["preprocessing"] = trained.preprocessing
    again = read_images_for(provenance, "it", None, Reading(), **SIZE, channels=3)
    assert again.held_out.equal(trained.held_out)
    assert again.preprocessing == trained.preprocessing
    other = read_images_for(provenance, "it", source, Reading(), **SIZE, channels=3)
    expected = open_images(source, held_out=None if kind == "val.tar" else kind, **SIZE).held_out
    assert other.held_out.equal(expected)  # images of another source are not added to it
    assert Reading(held_out=requested).held_out_paths == ([tmp_path / kind] if kind == "val.tar" else [])


@pytest.mark.parametrize("write", [write_files, lambda path, files: write_tar(path.with_suffix(".tar"), files)])
def test_arrays_and_archives_beside_images_are_passed_over(write, expected, tmp_path):
    """Shards of WebDataset often hold features of each image."""
    extra = {"cat/000.npy": b"features", "backup.zip": b"", "x.npz": b""}
    images = open_images(str(write(tmp_path / "x", {**FILES, **extra})), **SIZE)
    assert images.fingerprint == expected.fingerprint
    (note,) = images.notes
    for counted in (".npy (1 file)", ".zip (1 file)", ".npz (1 file)"):
        assert counted in note


def test_hard_links_in_a_tar_are_images(tmp_path):
    folder = write_files(tmp_path / "pets", {"a.png": FILES["cat/000.png"]})
    (folder / "b.png").hardlink_to(folder / "a.png")
    shutil.make_archive(str(tmp_path / "pets"), "tar", folder)
    images = open_images(str(tmp_path / "pets.tar"), **SIZE)
    assert images.source_ids.unique().numel() == 1
    assert len(images) == 2


def test_stored_and_compressed_zips_are_read_like_zipfile_reads_them(tmp_path):
    for method in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        path = write_zip(tmp_path / f"{method}.zip", FILES, method)
        with zipfile.ZipFile(path) as oracle:
            for member in archives.index_of(str(path)).members:
                assert archives.read_member(member) == oracle.read(member.name)
