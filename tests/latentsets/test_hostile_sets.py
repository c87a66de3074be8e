"""Latent sets that mean harm: links to other files, sizes that the file does not hold, values of wrong types."""

import json
import time
import tracemalloc
from contextlib import suppress
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from helpers.latents import opened, small_set
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from smalti.core.errors import UserError
from smalti.latentsets.hdf5.format import COLUMNS
from smalti.latentsets.reader import LatentSet
from smalti.latentsets.summary import describe


def refusal(path: Path) -> str:
    """Opens and verifies a set that must be refused, in one line, quickly and in little memory; returns the line."""
    tracemalloc.start()
    start = time.process_time()
    with pytest.raises(UserError) as caught:
        LatentSet(path).verify()
    assert time.process_time() - start < 10  # a declared size that is believed takes minutes
    assert tracemalloc.get_traced_memory()[1] < 100 << 20
    tracemalloc.stop()
    assert "\n" not in str(caught.value)
    assert "\x1b" not in str(caught.value)
    return str(caught.value)


def replaced(name: str, **options: Any) -> Any:
    """Returns a change that replaces a dataset by one with other storage."""

    def change(file: Any, folder: Path) -> None:
        shape, dtype = file[name].shape, file[name].dtype
        del file[name]
        resolved = {key: value(folder) if callable(value) else value for key, value in options.items()}
        file.create_dataset(name, **{"shape": shape, "dtype": dtype, **resolved})

    return change


def linked(name: str, link: Any) -> Any:
    """Returns a change that replaces an object by a link."""

    def change(file: Any, _folder: Path) -> None:
        del file[name]
        file[name] = link

    return change


def virtual(file: Any, _folder: Path) -> None:
    shape, dtype = file["codes/0"].shape, file["codes/0"].dtype
    del file["codes/0"]
    layout = h5py.VirtualLayout(shape, dtype)
    layout[:] = h5py.VirtualSource("other.h5", "codes/0", shape)
    file.create_virtual_dataset("codes/0", layout)


def many_rows(rows: int) -> Any:
    """Returns a change that declares many rows of which none is stored."""

    def change(file: Any, _folder: Path) -> None:
        for name in (*COLUMNS, "codes/0"):
            shape, dtype = file[name].shape[1:], file[name].dtype
            del file[name]
            chunks = (1 << 24,) if name in COLUMNS else (1, *shape)
            file.create_dataset(name, (rows, *shape), dtype, chunks=chunks, compression="gzip")

    return change


def set_attribute(name: str, value: Any) -> Any:
    def change(file: Any, _folder: Path) -> None:
        del file.attrs[name]
        encoded = value.encode() if isinstance(value, str) else value
        dtype = h5py.string_dtype("utf-8", len(encoded)) if isinstance(value, str) else None
        file.attrs.create(name, encoded, dtype=dtype)

    return change


def with_values(name: str, value: int) -> Any:
    def change(file: Any, _folder: Path) -> None:
        file[name][:] = np.full(file[name].shape, value, file[name].dtype)

    return change


def secret(folder: Path) -> list[tuple[str, int, int]]:
    (folder / "secret").write_bytes(b"secret" * 10000)
    return [(str(folder / "secret"), 0, h5py.h5f.UNLIMITED)]


LEVEL = {"height": 3, "width": 4, "radices": [8, 8, 8], "channels": 0}
CHANGES = {
    "external codes": (replaced("codes/0", external=secret), "codes/0 reads from another file"),
    "external labels": (replaced("labels", external=secret), "labels reads from another file"),
    "virtual codes": (virtual, "codes/0 reads from another file"),
    "external link": (linked("codes/0", h5py.ExternalLink("other.h5", "/codes/0")), "codes/0 is a link"),
    "external group": (linked("codes", h5py.ExternalLink("other.h5", "/codes")), "codes is a link"),
    "linked labels": (linked("labels", h5py.ExternalLink("/etc/hostname", "/labels")), "labels is a link"),
    "soft link": (linked("codes/0", h5py.SoftLink("/elsewhere")), "codes/0 is a link"),
    "loop": (linked("codes/0", h5py.SoftLink("/codes/0")), "codes/0 is a link"),
    "unwritten codes": (replaced("codes/0"), "not contiguous"),
    "2e9 rows": (many_rows(2 * 10**9), "not contiguous"),
    "1e12 rows": (many_rows(10**12), "not contiguous"),
    "large chunks": (replaced("labels", chunks=(1 << 25,), maxshape=(None,)), "chunks of 33554432 rows"),
    "scalar labels": (replaced("labels", shape=()), "has no rows"),
    "null labels": (replaced("labels", shape=None), "has no rows"),
    "labels of two axes": (replaced("labels", shape=(60, 1)), "labels is"),
    "negative labels": (with_values("labels", -5), "-5 is not a label"),
    "large labels": (with_values("labels", 10**9), "1000000000 is not a label"),
    "held out 7": (with_values("held_out", 7), "not all 0 or 1"),
    "version text": (set_attribute("format_version", "3"), "format_version is not a whole number"),
    "version array": (set_attribute("format_version", np.array([2, 2])), "format_version is not a whole number"),
    "version NaN": (set_attribute("format_version", float("nan")), "format_version is not a whole number"),
    "format array": (set_attribute("format", np.array([1, 2])), "not a latent set"),
    "deep JSON": (set_attribute("layout", "[" * 30000 + "]" * 30000), "nested deeper"),
    "long integer": (set_attribute("layout", "9" * 5000), "does not fit 64 bits"),
    "NaN": (set_attribute("preprocessing", '{"a": NaN}'), "not a finite number"),
    "lone surrogate": (set_attribute("label_names", '["\\ud800"]'), "attributes are damaged"),
    "list as config": (set_attribute("tokenizer_config", "[1]"), "tokenizer_config is"),
    "numbers as names": (set_attribute("label_names", "[1, 2]"), "label_names is"),
    "text as names": (set_attribute("label_names", '"abc"'), "label_names is"),
    "numbers as skipped": (set_attribute("skipped", "[1]"), "skipped is"),
    "empty layout": (set_attribute("layout", "[]"), "layout is damaged"),
    "layout of numbers": (set_attribute("layout", "[1]"), "layout is damaged"),
    "float radices": (set_attribute("layout", json.dumps([{**LEVEL, "radices": [8.0]}])), "layout is damaged"),
    "true height": (set_attribute("layout", json.dumps([{**LEVEL, "height": True}])), "layout is damaged"),
    "many radices": (set_attribute("layout", json.dumps([{**LEVEL, "radices": [2] * 200000}])), "200000 radices"),
    "negative channels": (set_attribute("layout", json.dumps([{**LEVEL, "radices": [], "channels": -3}])), "negative"),
    "huge grid": (set_attribute("layout", json.dumps([{**LEVEL, "height": 10**18}])), "codes/0 is"),
}


@pytest.mark.parametrize(("change", "message"), CHANGES.values(), ids=CHANGES.keys())
def test_hostile_set_is_refused_in_one_line(tmp_path, change, message):
    small_set(tmp_path / "other.h5")
    small_set(tmp_path / "latents.h5")
    with opened(tmp_path / "latents.h5", "r+") as file:
        change(file, tmp_path)
    assert message in refusal(tmp_path / "latents.h5")


def test_offsets_outside_the_file_are_refused(tmp_path):
    path = tmp_path / "latents.h5"
    small_set(path)
    content = path.read_bytes()
    with opened(path, "r") as file:
        offset = file["codes/0"].id.get_offset()
    position = content.find(offset.to_bytes(8, "little"))
    for wrong in (0, offset + 1, len(content) * 4, 2**62):
        path.write_bytes(content[:position] + wrong.to_bytes(8, "little") + content[position + 8 :])
        assert str(path) in refusal(path)


def test_control_characters_are_escaped_in_summaries_and_errors(tmp_path):
    path = tmp_path / "latents.h5"
    small_set(path)
    with opened(path, "r+") as file:
        set_attribute("image_source", "\x1b[2J\nerror: forged")(file, tmp_path)
        set_attribute("label_names", json.dumps([f"\x1b[31m{number}" for number in range(4)]))(file, tmp_path)
    text = describe(LatentSet(path))
    assert "\x1b" not in text
    assert r"\x1b[2J\nerror: forged" in text
    assert str(UserError("\x1b]0;owned\x07")) == r"\x1b]0;owned\x07"


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
    lambda children: st.lists(children, max_size=3) | st.dictionaries(st.sampled_from([*LEVEL, "a"]), children),
    max_leaves=8,
)


@settings(max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(name=st.sampled_from(["layout", "tokenizer_config", "preprocessing", "label_names", "skipped"]), value=JSON)
def test_attributes_of_any_structure_give_a_set_or_one_line(tmp_path, name, value):
    path = tmp_path / "latents.h5"
    small_set(path)
    with opened(path, "r+") as file:
        set_attribute(name, json.dumps(value))(file, tmp_path)
    with suppress(UserError):
        describe(LatentSet(path))


@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(position=st.floats(0, 1, exclude_max=True), flip=st.integers(1, 255))
def test_changed_byte_anywhere_gives_a_set_or_one_line(tmp_path, position, flip):
    path = tmp_path / "latents.h5"
    small_set(path)
    content = bytearray(path.read_bytes())
    content[int(position * len(content))] ^= flip
    path.write_bytes(content)
    with suppress(UserError):
        latent_set = LatentSet(path)
        describe(latent_set)
        latent_set.verify()
