"""Vectors and captions of latent sets: kept exactly, added to a finished set, refused if they do not fit."""

from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.latents import CONDITION_WIDTH, GRID, PROVENANCE, extended_set, make_codes, make_columns, opened, small_set
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from smalti.core.errors import UserError
from smalti.core.hub.ids import parse_target
from smalti.latentsets.conditions import ConditionSource, add_conditions, read_vectors
from smalti.latentsets.dataset import LatentRows
from smalti.latentsets.reader import LatentSet
from smalti.latentsets.sharing import files_to_share
from smalti.latentsets.summary import describe
from smalti.latentsets.table import from_parquet, to_parquet
from smalti.latentsets.writer import LatentSetWriter

FINITE = st.floats(-60_000, 60_000, width=16)


@pytest.fixture
def extended(tmp_path):
    codes, vectors, captions = extended_set(tmp_path / "latents.h5")
    return LatentSet(tmp_path / "latents.h5"), codes, vectors, captions


@settings(max_examples=12)
@given(
    captions=st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=8), min_size=4, max_size=4),
    vectors=arrays(np.float16, st.tuples(st.just(4), st.integers(1, 3)), elements=FINITE),
)
def test_any_vectors_and_texts_are_read_as_they_were_written(captions, vectors, tmp_path_factory):
    path = tmp_path_factory.mktemp("set") / "latents.h5"
    added = {"provenance": PROVENANCE, "condition_width": vectors.shape[1], "captions": captions}
    with LatentSetWriter(path, GRID, **make_columns(4), **added) as writer:
        writer.write(0, make_codes(GRID, 4), torch.from_numpy(vectors))
    latent_set = LatentSet(path)
    latent_set.verify()
    assert np.array_equal(latent_set.vectors([3, 0, 3]).numpy(), vectors[[3, 0, 3]])
    assert latent_set.captions([2, 0, -1]) == [captions[2], captions[0], captions[3]]
    assert latent_set.captioned_rows().tolist() == [row for row, text in enumerate(captions) if text]


def test_conversion_and_upload_keep_vectors_and_captions(extended, tmp_path):
    latents, codes, vectors, captions = extended
    to_parquet(latents, tmp_path / "latents.parquet")
    again = from_parquet(str(tmp_path / "latents.parquet"), tmp_path / "again.h5")
    (tmp_path / "scratch").mkdir()
    files = files_to_share(latents, parse_target("a/b", None), tmp_path / "scratch", tokenizer="a/tokenizer")
    assert "5 numbers for each row, from `an encoder`" in files["README.md"].decode()
    for copy in (again, LatentSet(files["latents.h5"])):
        assert copy.content_digest == latents.content_digest
        assert copy.vectors(range(60)).equal(vectors.float())
        assert copy.captions(range(60)) == captions
        assert copy.provenance.condition_source == "an encoder"
        assert copy.batch(range(60))[0].equal(codes[0])


def test_summary_shows_the_width_and_some_captions(extended):
    text = describe(extended[0])
    assert "a vector of 5 numbers for each row, from an encoder" in text
    assert "59 of 60 rows have one, such as 'caption é 1'; 'caption é 21'; 'caption é 41'" in text


def test_rows_have_their_vectors_mapped_and_resident(extended):
    latents, _, vectors, _ = extended
    rows = LatentRows(latents, split="held_out", conditions=True)
    expected = vectors[latents.held_out].float()
    mapped = rows.__getitems__([4, 0])
    assert mapped["conditions"].equal(expected[[4, 0]])
    before = LatentRows(latents, split="held_out").resident_bytes
    assert rows.resident_bytes - before == 2 * CONDITION_WIDTH * len(rows)
    resident = rows.to("cpu").__getitems__([4, 0])
    assert resident["conditions"].equal(mapped["conditions"])
    assert resident["codes"].equal(mapped["codes"])
    assert "conditions" not in LatentRows(latents, split="train").__getitems__([0])


def test_vectors_are_added_to_a_finished_set_without_encoding(tmp_path):
    codes = small_set(tmp_path / "latents.h5")
    before = LatentSet(tmp_path / "latents.h5")
    vectors = np.random.default_rng(0).normal(size=(60, 4))
    with pytest.raises(UserError, match=r"latents\.h5 has no vectors; build it with --conditions"):
        LatentRows(before, split="train", conditions=True)
    after = add_conditions(before, vectors, tmp_path / "latents.h5", source="an encoder")
    after.verify()
    assert after.batch(range(60))[0].equal(codes[0])
    assert np.array_equal(after.vectors(range(60)), vectors.astype(np.float16).astype(np.float32))
    assert after.content_digest != before.content_digest
    assert after.provenance.condition_source == "an encoder"
    for wrong, message in (
        (vectors[:-1], "there are 59 vectors, but .*latents.h5 has 60 rows"),
        (vectors * 1e6, "the array of vectors has a number beyond 65504"),
    ):
        with pytest.raises(UserError, match=message):
            add_conditions(before, wrong, tmp_path / "wrong.h5", source="an encoder")
    assert not (tmp_path / "wrong.h5").exists()


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros(3), r"has the shape \(3,\); give \(n, width\), a vector in each row"),
        (np.zeros((3, 0)), r"has the shape \(3, 0\)"),
        (np.zeros((3, 2), np.int64), "holds int64; give float16, float32 or float64"),
        (np.array([[0.0], [1.0], [np.nan]]), "has NaN or infinity in row 2"),
        (np.array([[0.0], [70_000.0]]), "has a number beyond 65504, the largest of float16 in row 1"),
        (np.array([["a"]], object), "cannot be read"),
        (None, "cannot be read"),
    ],
)
def test_files_that_hold_no_vectors_are_refused(array, message, tmp_path):
    if array is not None:
        np.save(tmp_path / "vectors.npy", array)
    with pytest.raises(UserError, match=message):
        read_vectors(tmp_path / "vectors.npy")


def test_functions_that_do_not_fit_are_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    Path("encoders_of_a_test.py").write_text(
        "def good(images): return images.float().mean((2, 3))\n"
        "def flat(images): return images.float().mean((1, 2, 3))\n"
        "def varying(images): return images.float().flatten(1)[:, : images.amax() + 1]\n"
        "value = 3\n"
    )
    blank, pixels = torch.zeros(1, 3, 2, 2, dtype=torch.uint8), torch.full((2, 3, 2, 2), 4, dtype=torch.uint8)
    good = ConditionSource("encoders_of_a_test:good", 2, blank)
    assert good([0, 1], pixels).tolist() == [[4.0] * 3] * 2
    assert good.source.startswith("encoders_of_a_test:good, SHA-256 ")
    with pytest.raises(UserError, match=r"varying returned \(2, 5\), but \(2, 1\) is expected; return as many"):
        ConditionSource("encoders_of_a_test:varying", 2, blank)([0, 1], pixels)
    for requested, message in (
        ("encoders_of_a_test:flat", r"encoders_of_a_test:flat returned has the shape \(1,\)"),
        ("encoders_of_a_test:value", "encoders_of_a_test has no function 'value'; check its name"),
        ("no_such_module:f", "there is no module 'no_such_module'"),
        ("colours", "neither FILE.npy nor module:function"),
    ):
        with pytest.raises(UserError, match=message):
            ConditionSource(requested, 2, blank)
    np.save("two.npy", np.zeros((2, 3)))
    with pytest.raises(UserError, match=r"two\.npy has 2 rows, but there are 5 images; give one row for each"):
        ConditionSource("two.npy", 5, blank)


def change_conditions(file):
    del file["conditions"]
    file["conditions"] = np.zeros((59, 5), np.float16)


def infinite(file):
    file["conditions"][7, 1] = np.inf


def descending(file):
    file["caption_ends"][5] = 10**6


def huge(file):
    ends = file["caption_ends"][:]
    ends[-1] += 1 << 19
    file["caption_ends"][:] = ends
    del file["captions"]
    file.create_dataset("captions", (int(ends[-1]),), "u1", chunks=(1 << 16,), compression="gzip")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (change_conditions, r"conditions is \(59, 5\) float16, not \(60, 5\) float16"),
        (infinite, "is damaged: its content has digest"),
        (descending, "caption_ends do not ascend"),
        (huge, "captions holds fewer bytes than it declares"),
        (lambda file: file.__delitem__("captions"), "lacks captions"),
    ],
)
def test_damaged_vectors_and_captions_are_refused(extended, change, message):
    with opened(extended[0].path, "r+") as file:
        change(file)
    with pytest.raises(UserError, match=message):
        LatentSet(extended[0].path).verify()
