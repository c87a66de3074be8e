"""Tests of packed codes: they round-trip, and every damaged or hostile file is refused in one line."""

import json
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.latents import GRID, make_codes
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from smalti.core.errors import UserError
from smalti.latentsets.packed_file import MAGIC, OLD_MAGIC, Packed, read_codes, write_codes

HEADER = {"tokenizer_kind": "hrvq", "tokenizer_digest": "ab", "layer": None}


def read(path: Path) -> Packed:
    return read_codes(path, lambda header: None)


def refusal(path: Path) -> str:
    with pytest.raises(UserError) as caught:
        read(path)
    assert str(caught.value).isprintable()
    return str(caught.value)


def parts(path: Path) -> tuple[dict[str, Any], bytes]:
    line, _, payload = path.read_bytes().partition(b"\n")
    return json.loads(line[len(MAGIC) :]), payload


def test_codes_round_trip_and_version_one_is_still_read(tmp_path):
    path, codes = tmp_path / "c.smalti", make_codes(GRID, 5)
    assert write_codes(path, codes, GRID, HEADER) == path.stat().st_size
    header, payload = parts(path)
    for content in (
        path.read_bytes(),
        OLD_MAGIC + json.dumps({**header, "sha256": sha256(payload).hexdigest()}).encode() + b"\n" + payload,
    ):
        path.write_bytes(content)
        packed = read(path)
        assert torch.equal(packed.codes[0], codes[0])
        assert packed.layout == GRID
        assert packed.size_bytes == len(content)


@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(position=st.floats(0, 1, exclude_max=True), flip=st.integers(1, 255))
def test_any_changed_byte_of_header_or_codes_is_refused(tmp_path, position, flip):
    path = tmp_path / "c.smalti"
    write_codes(path, make_codes(GRID, 5), GRID, HEADER)
    content = bytearray(path.read_bytes())
    index = int(position * len(content))
    content[index] ^= flip
    path.write_bytes(content)
    if (changed := parts_or_none(path)) is None or changed != parts_of(content, index, flip):
        refusal(path)


def parts_or_none(path: Path) -> Any:
    try:
        return parts(path)
    except ValueError:
        return None


def parts_of(content: bytearray, index: int, flip: int) -> Any:
    """Returns the parts before the change: white space in JSON may change without any effect."""
    before = bytearray(content)
    before[index] ^= flip
    line, _, payload = bytes(before).partition(b"\n")
    return json.loads(line[len(MAGIC) :]), payload


LEVEL = {"height": 3, "width": 4, "radices": [8, 8, 8], "channels": 0}


@pytest.mark.parametrize(
    "change",
    [
        *({"images": value} for value in (-1, 0, 10**18, "5", 5.0, None, True, [1])),
        *({"layout": value} for value in (None, [], [LEVEL] * 2, [1], "x", [{**LEVEL, "height": 10**9}])),
        *({"layout": [{**LEVEL, **level}]} for level in ({"radices": [8.0]}, {"height": "3"}, {"width": True})),
        {"layout": [{"height": 3, "width": 4, "radices": [], "channels": 4}]},
        {"layout": [{**LEVEL, "height": 4, "width": 3}]},
        {"layout": [{**LEVEL, "radices": [512]}]},
        {"layer": "../../x"},
        {"tokenizer_kind": "\x1b[31m\nforged"},
        {"tokenizer_digest": None},
        {"sha256": None},
    ],
)
def test_changed_header_is_refused_in_one_line(tmp_path, change):
    path = tmp_path / "c.smalti"
    write_codes(path, make_codes(GRID, 5), GRID, HEADER)
    header, payload = parts(path)
    path.write_bytes(MAGIC + json.dumps({**header, **change}).encode() + b"\n" + payload)
    refusal(path)


def test_other_files_are_refused_in_one_line(tmp_path):
    path = tmp_path / "c.smalti"
    assert "No such file" in refusal(path)
    assert "is a folder" in refusal(tmp_path)
    for content in (b"", MAGIC, b"[" * 10**5, b'{"layout":' + b"9" * 5000 + b"}", b'{"a":"\xff"}', b"[1]", b'"x"'):
        path.write_bytes(MAGIC + content + b"\n" if content else content)
        assert "not a whole file of packed codes" in refusal(path)
    codes = make_codes(GRID, 5)
    write_codes(path, codes, GRID, HEADER)
    whole = path.read_bytes()
    for content in (whole[:-1], whole + b"x"):
        path.write_bytes(content)
        assert "bytes of codes should follow" in refusal(path)


def test_codes_outside_the_codebook_are_refused(tmp_path):
    path, layout = tmp_path / "c.smalti", [{**LEVEL, "radices": [7, 7, 7]}]
    payload = b"\xff" * (5 * 12 * 9 // 8 + 1)
    header = {**HEADER, "images": 5, "layout": layout, "sha256": sha256(payload).hexdigest()}
    path.write_bytes(OLD_MAGIC + json.dumps(header).encode() + b"\n" + payload)
    assert "from 0 to 342" in refusal(path)
