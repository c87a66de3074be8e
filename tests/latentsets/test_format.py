"""The HDF5 layout of latent sets: the documented digest, plain h5py access, large attributes, small files."""

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.latents import GRID, PROVENANCE, extended_set, make_codes, make_columns, opened, small_set, write
from hypothesis import given
from hypothesis import strategies as st

from smalti.core.codes import Layout, Level
from smalti.core.errors import UserError
from smalti.images.splits import held_out
from smalti.latentsets.hdf5.format import number_sources
from smalti.latentsets.reader import LatentSet
from smalti.latentsets.table import from_parquet, to_parquet
from smalti.latentsets.writer import LatentSetWriter


def test_digests_follow_the_documented_recipe(tmp_path):
    codes = small_set(tmp_path / "latents.h5")
    latent_set = LatentSet(tmp_path / "latents.h5")
    with opened(tmp_path / "latents.h5", "r") as file:
        stored = {name: np.bytes_(file.attrs[name]) for name in file.attrs}
    meaning = (
        "layout tokenizer_kind tokenizer_config tokenizer_digest image_fingerprint preprocessing label_names skipped"
    )
    parts = [f"{name} {len(stored[name])}\n".encode() + stored[name] + b"\n" for name in meaning.split()]
    assert latent_set.content_digest == hashlib.sha256(b"".join([*parts, *arrays(codes)])).hexdigest()


@pytest.mark.parametrize("extended", [False, True])
def test_documented_program_computes_the_digests(extended, tmp_path, capsys):
    text = (Path(__file__).parents[2] / "docs" / "latent-format.md").read_text()
    (extended_set if extended else small_set)(tmp_path / "latents.h5")
    exec(text.split("```python\n")[1].split("```")[0].replace("runs/latents/hrvq.h5", str(tmp_path / "latents.h5")), {})
    assert capsys.readouterr().out == "True\nTrue\n"


def test_builds_at_other_times_have_one_content_digest(tmp_path):
    digests = set()
    for created in ("2024-01-01T00:00:00+00:00", "2025-01-01T00:00:00+00:00"):
        made = replace(PROVENANCE, created=created, command="another", tokenizer_source="elsewhere")
        write(tmp_path / "latents.h5", GRID, make_codes(GRID, 4), [0], made)
        digests.add(LatentSet(tmp_path / "latents.h5").content_digest)
    assert len(digests) == 1
    write(tmp_path / "latents.h5", GRID, make_codes(GRID, 4), [0], replace(PROVENANCE, label_names=tuple("dcba")))
    assert LatentSet(tmp_path / "latents.h5").content_digest not in digests


def test_version_2_is_read_and_becomes_version_4_by_conversion(tmp_path):
    codes = small_set(tmp_path / "latents.h5")
    digest = LatentSet(tmp_path / "latents.h5").content_digest
    make_version_2(tmp_path / "latents.h5", hashlib.sha256(b"".join(arrays(codes))).hexdigest())
    old = LatentSet(tmp_path / "latents.h5")
    old.verify()
    assert old.batch(range(60))[0].equal(codes[0])
    to_parquet(old, tmp_path / "latents.parquet")
    again = from_parquet(str(tmp_path / "latents.parquet"), tmp_path / "again.h5")
    assert (old.version, again.version) == (2, 4)
    assert again.content_digest == digest
    with opened(tmp_path / "latents.h5", "r+") as file:
        file["labels"][7] = 2
    with pytest.raises(UserError, match="is damaged: its content has digest"):
        LatentSet(tmp_path / "latents.h5").verify()


def test_version_3_is_read_with_its_digests(tmp_path):
    """The digest is the one that the last version to write version 3 gave this set."""
    codes = small_set(tmp_path / "latents.h5")
    with opened(tmp_path / "latents.h5", "r+") as file:
        file.attrs.modify("format_version", 3)
        del file.attrs["condition_source"]
        texts = {**file.attrs, "format_version": b"3"}
        del texts["attributes_digest"]
        parts = (f"{name} {len(texts[name])}\n".encode() + texts[name] + b"\n" for name in sorted(texts))
        file.attrs.modify("attributes_digest", np.bytes_(hashlib.sha256(b"".join(parts)).hexdigest()))
    old = LatentSet(tmp_path / "latents.h5")
    old.verify()
    assert (old.version, old.condition_width, old.captions([0])) == (3, 0, [""])
    assert old.content_digest == "8bc6fb759d7eb9e663599bcf79df1c823b83c41ec1f36bbf4b77021810c3d5cd"
    assert old.batch(range(60))[0].equal(codes[0])


def arrays(codes):
    """Returns what the content digest takes of the arrays of a small set; in version 2 there was nothing else."""
    columns = {name: column.numpy() for name, column in make_columns(60).items()}
    return [
        b"codes/0 <u2 60 3 4\n" + codes[0].numpy().astype("<u2").tobytes(),
        b"labels <i8 60\n" + columns["labels"].tobytes(),
        b"source_ids <i8 60\n" + columns["source_ids"].tobytes(),
        b"held_out |u1 60\n" + columns["held_out"].tobytes(),
        b"flipped |u1 60\n" + columns["flipped"].tobytes(),
    ]


def make_version_2(path, digest):
    """Changes a set to the form that version 2 had."""
    with opened(path, "r+") as file:
        file.attrs.modify("format_version", 2)
        del file.attrs["attributes_digest"]
        file.attrs.modify("content_digest", np.bytes_(digest))


def test_plain_h5py_reads_codes_columns_and_attributes(tmp_path):
    codes = small_set(tmp_path / "latents.h5")
    with opened(tmp_path / "latents.h5", "r") as file:
        stored = file["codes/0"]
        assert (stored.dtype, stored.chunks, stored.compression) == (np.uint16, None, None)
        assert np.array_equal(stored[:], codes[0].numpy())
        for name, column in make_columns(60).items():
            assert np.array_equal(file[name][:], column.numpy())
        assert file.attrs["tokenizer_digest"].decode() == PROVENANCE.tokenizer_digest
        assert json.loads(file.attrs["layout"])[0]["radices"] == [8, 8, 8]


def test_attributes_beyond_64_kib_are_kept(tmp_path):
    names = tuple(f"class {number:06d} ö" for number in range(22_000))
    provenance = replace(PROVENANCE, label_names=names, preprocessing={"x": "y" * 100_000})
    write(tmp_path / "latents.h5", GRID, make_codes(GRID, 4), [0], provenance)
    assert LatentSet(tmp_path / "latents.h5").provenance == provenance


@pytest.mark.parametrize("rows_per_image", [1, 2])
@pytest.mark.parametrize(("level", "rows"), [(Level(16, 16, (1024,)), 2_000), (Level(8, 8, (512,)), 8_000)])
def test_file_is_at_most_one_percent_larger_than_its_codes(tmp_path, level, rows, rows_per_image):
    """The set has labels, a random split, and a provenance of about 4 KiB, as real sets have."""
    ids = torch.arange(rows) // rows_per_image
    provenance = replace(PROVENANCE, preprocessing={"some": "x" * 2000})
    columns = {"labels": ids * 100 // rows, "source_ids": ids, "held_out": held_out(ids)}
    path, layout = tmp_path / "latents.h5", Layout((level,))
    flipped = torch.arange(rows) % rows_per_image == 1
    with LatentSetWriter(path, layout, **columns, flipped=flipped, provenance=provenance) as writer:
        writer.write(0, make_codes(layout, rows))
    codes_bytes = rows * level.positions * level.dtype.itemsize
    assert codes_bytes < path.stat().st_size < 1.01 * codes_bytes


@given(ids=st.lists(st.integers(-5, 5), max_size=30))
def test_sources_are_numbered_in_order_of_first_appearance(ids):
    first = list(dict.fromkeys(ids))
    assert number_sources(np.array(ids, np.int64)).tolist() == [first.index(source) for source in ids]
