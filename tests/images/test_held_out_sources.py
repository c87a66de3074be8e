"""Held-out images of another source: no image and no source is in both splits, and no other image is left out."""

import io

import numpy as np
import pytest
from helpers.image_toys import write_parquet
from PIL import Image

from smalti.images.contents import encoded
from smalti.images.image_set import open_images

SIZE = {"height": 8, "width": 8}


def photographs(count: int, seed: int = 0) -> list[bytes]:
    random, files = np.random.default_rng(seed), []
    for _ in range(count):
        file = io.BytesIO()
        Image.fromarray(random.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(file, "PNG")
        files.append(file.getvalue())
    return files


def held_out_rows(path, other) -> tuple[list[int], tuple[str, ...]]:
    """Returns the held-out rows of the first source, and the notes. Source ids and splits must agree."""
    images = open_images(str(path), held_out=str(other), **SIZE)
    own = len(open_images(str(path), **SIZE))
    assert images.held_out[own:].all()
    assert {*images.source_ids[images.held_out].tolist()}.isdisjoint(images.source_ids[~images.held_out].tolist())
    assert (images.source_ids >= 0).all()
    return images.held_out[:own].nonzero().squeeze(1).tolist(), images.notes


@pytest.fixture
def folder(tmp_path):
    """A folder of the first three of ten photographs."""
    (tmp_path / "val").mkdir()
    for number, photograph in enumerate(photographs(10)[:3]):
        (tmp_path / "val" / f"{number}.png").write_bytes(photograph)
    return tmp_path / "val"


def test_images_that_are_also_in_a_held_out_folder_are_found_whatever_their_source_ids(tmp_path, folder):
    ids = [f"photo-{number}" for number in range(10)]
    rows, notes = held_out_rows(write_parquet(tmp_path / "x.parquet", image=photographs(10), source_id=ids), folder)
    assert rows == [0, 1, 2]
    assert any(note.startswith(f"3 of 10 images are also in {folder}") for note in notes)


def test_images_are_also_found_in_a_held_out_table_with_source_ids(tmp_path, folder):
    table = write_parquet(tmp_path / "x.parquet", image=photographs(10)[2:], source_id=[*range(8)])
    assert held_out_rows(folder, table)[0] == [2]


def test_all_images_of_a_source_are_held_out_with_one_of_them(tmp_path, folder):
    ids = ["a", "b", "b", "b", "c", "a", "d", "d", "d", "e"]
    rows, notes = held_out_rows(write_parquet(tmp_path / "x.parquet", image=photographs(10), source_id=ids), folder)
    assert rows == [0, 1, 2, 3, 5]
    assert any(note.startswith("2 of 10 images share a source (source_id) with held-out images") for note in notes)


def test_equal_images_are_held_out_together_although_their_source_ids_differ(tmp_path, folder):
    files = photographs(10)
    files[6] = files[5]
    ids = ["a", "b", "c", "d", "e", "a", "f", "g", "h", "i"]
    assert held_out_rows(write_parquet(tmp_path / "x.parquet", image=files, source_id=ids), folder)[0] == [
        0,
        1,
        2,
        5,
        6,
    ]


def test_texts_in_columns_of_one_name_are_the_same_sources(tmp_path):
    own = write_parquet(tmp_path / "x.parquet", image=photographs(4), source_id=["a", "b", "b", "c"])
    other = write_parquet(tmp_path / "y.parquet", image=photographs(2, seed=1), source_id=["b", "d"])
    rows, notes = held_out_rows(own, other)
    assert rows == [1, 2]
    assert any(note.startswith("2 of 4 images share a source (source_id) with held-out images") for note in notes)
    assert not any("also in" in note for note in notes)


def test_numbers_that_both_files_count_from_0_hold_no_other_image_out(tmp_path):
    own = write_parquet(tmp_path / "x.parquet", image=photographs(10), source_id=[*range(10)])
    other = [*photographs(3, seed=1), photographs(10)[7]]
    rows, notes = held_out_rows(own, write_parquet(tmp_path / "y.parquet", image=other, source_id=[*range(4)]))
    assert rows == [7]
    assert any(note.startswith("4 of 10 images have a source_id that is also in") for note in notes)


def test_images_that_cannot_be_read_are_not_equal(tmp_path):
    own = write_parquet(tmp_path / "x.parquet", image=[None, *photographs(2)], source_id=["a", "a", "b"])
    other = write_parquet(tmp_path / "y.parquet", image=[None, *photographs(1, seed=1)])
    assert held_out_rows(own, other)[0] == []


def test_emoji_are_found_by_content_with_all_their_skin_tones(tmp_path):
    emoji = open_images("emoji")
    for number in range(50):
        (tmp_path / f"{number}.png").write_bytes(encoded(emoji._encoded[number]["image"]))
    images = open_images("emoji", held_out=str(tmp_path))
    assert images.held_out[:50].all()
    sources = images.source_ids[: len(emoji)]
    siblings = sources[:, None].eq(sources[None, :50]).any(1)
    assert images.held_out[: len(emoji)].equal(siblings)
