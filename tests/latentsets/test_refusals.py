"""Latent sets that are refused: damaged, truncated, incomplete, or in another format."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.latents import opened, small_set, write
from hypothesis import given, settings
from hypothesis import strategies as st

from smalti.core.codes import Layout, Level
from smalti.core.errors import UserError
from smalti.latentsets.hdf5.digests import attributes_digest
from smalti.latentsets.reader import LatentSet


@settings(max_examples=20)
@given(position=st.floats(0, 1, exclude_max=True), flip=st.integers(1, 255))
def test_verify_detects_any_changed_byte_of_the_codes(tmp_path_factory, position, flip):
    path = tmp_path_factory.mktemp("set") / "latents.h5"
    small_set(path)
    with opened(path, "r") as file:
        offset, size = file["codes/0"].id.get_offset(), file["codes/0"].id.get_storage_size()
    damaged = bytearray(path.read_bytes())
    damaged[offset + int(position * size)] ^= flip
    path.write_bytes(damaged)
    with pytest.raises(UserError, match="is damaged: its content has digest"):
        LatentSet(path).verify()


def test_verify_detects_changed_columns_and_codes_outside_the_codebook(tmp_path):
    path = tmp_path / "latents.h5"
    for name in ("labels", "flipped"):
        small_set(path)
        with opened(path, "r+") as file:
            file[name][7] ^= 1
        with pytest.raises(UserError, match="is damaged: its content has digest"):
            LatentSet(path).verify()
    small_set(path)
    layout = Layout((Level(3, 4, (257,)),))
    write(path, layout, (torch.zeros(60, 3, 4, dtype=torch.int64),), [0])
    latent_set = LatentSet(path)
    with opened(path, "r+") as file:
        file["codes/0"][3] = 257
    digest = latent_set.digest()  # a program that writes codes that are too large also writes a digest over them
    with opened(path, "r+") as file:
        file.attrs.modify("content_digest", np.bytes_(digest))
        texts = {name: str(np.asarray(file.attrs[name]).astype(str)) for name in file.attrs}
        file.attrs.modify("attributes_digest", np.bytes_(attributes_digest(texts)))
    with pytest.raises(UserError, match="codes not below 257 at level 0"):
        LatentSet(path).verify()


def test_verify_detects_any_changed_attribute(tmp_path):
    path = tmp_path / "latents.h5"
    small_set(path)
    LatentSet(path).verify()
    content = path.read_bytes()
    with opened(path, "r") as file:
        names = set(file.attrs) - {"format", "format_version"}  # files with another one of these are not opened
    for name in names:
        with opened(path, "r+") as file:
            text = file.attrs[name].decode()
            changed = {
                "layout": text.replace("[8, 8, 8]", "[512]"),
                "skipped": '[{"row": 3}]',
                "label_names": '["a", "b", "c", "d"]',
            }
            new = changed.get(name, text.replace("}", ', "more": "x"}') if text.startswith("{") else f"x{text[1:]}")
            assert new != text
            del file.attrs[name]
            file.attrs[name] = np.bytes_(new)
        with pytest.raises(UserError, match=r"an attribute was changed after|its content has digest"):
            LatentSet(path).verify()
        path.write_bytes(content)


def refused(path: Path, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        LatentSet(path)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


@given(kept=st.floats(0, 1, exclude_max=True))
@settings(max_examples=20)
def test_truncated_file_is_refused_on_opening(tmp_path_factory, kept):
    path = tmp_path_factory.mktemp("set") / "latents.h5"
    small_set(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(kept * len(whole))])
    refused(path, "truncated or damaged|not an HDF5 file")


def test_files_in_other_formats_are_refused(tmp_path):
    path = tmp_path / "latents.h5"
    refused(path, "there is no latent set at")
    refused(tmp_path, r"there is no latent set \*.h5 at .*; build one")
    path.write_text("a text")
    refused(path, "is not an HDF5 file")
    with opened(path, "w") as file:
        file["images"] = np.zeros(3)
    refused(path, "is HDF5 but not a latent set")


def no_labels(file: Any) -> None:
    del file["labels"]


def short_labels(file: Any) -> None:
    del file["labels"]
    file["labels"] = np.zeros(59, np.int64)


def wide_codes(file: Any) -> None:
    codes = file["codes/0"][:]
    del file["codes/0"]
    file["codes/0"] = codes.astype(np.int64)


def chunked_codes(file: Any) -> None:
    codes = file["codes/0"][:]
    del file["codes/0"]
    file.create_dataset("codes/0", data=codes, compression="gzip")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda file: file.attrs.modify("format_version", 5),
            "has format version 5, this smalti reads 2 to 4; upgrade",
        ),
        (
            lambda file: file.attrs.modify("format_version", 1),
            "has format version 1, this .* build it again",
        ),
        (lambda file: file.attrs.create("format_version", "2"), "format_version is not a whole number.* build the"),
        (lambda file: file.attrs.modify("preprocessing", "[1]"), r"latents\.h5: preprocessing is \[1\]"),
        (lambda file: file.attrs.pop("tokenizer_digest"), "lacks the attributes tokenizer_digest"),
        (lambda file: file.attrs.pop("content_digest"), "lacks the attributes content_digest"),
        (lambda file: file.attrs.create("image_source", 3), "the attributes image_source are not strings"),
        (lambda file: file.attrs.modify("label_names", "[cat"), "its attributes are damaged"),
        (lambda file: file.attrs.modify("layout", '[{"height": 3}]'), "its layout is damaged"),
        (no_labels, "lacks labels"),
        (short_labels, r"codes/0 is \(60, 3, 4\) uint16, not \(59, 3, 4\) uint16"),
        (wide_codes, r"codes/0 is \(60, 3, 4\) int64, not \(60, 3, 4\) uint16"),
        (chunked_codes, "chunked or compressed"),
    ],
)
def test_incomplete_sets_are_refused(tmp_path, change, message):
    small_set(tmp_path / "latents.h5")
    with opened(tmp_path / "latents.h5", "r+") as file:
        change(file)
    refused(tmp_path / "latents.h5", message)
