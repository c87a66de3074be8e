"""Tests of packed codes: they round-trip, and every damaged or hostile file is refused in one line."""

import json
import zlib
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.latents import GRID, make_codes
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from smalti.core.errors import UserError
from smalti.latentsets.packed_file import ENTROPY_MAGIC, MAGIC, OLD_MAGIC, Packed, read_codes, write_codes

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


def coded(codes) -> bytes:
    """Codes codes with zlib, which stands in for a prior."""
    return zlib.compress(codes[0].numpy().tobytes())


def decode(_header, payload, images, layout):
    """Inverts `coded`; returns None for other bytes, as a prior does."""
    try:
        content = zlib.decompressobj().decompress(payload)
        grid = torch.frombuffer(bytearray(content), dtype=torch.int64)
        return (grid.view(images, *layout.levels[0].shape),)
    except (zlib.error, ValueError, RuntimeError):
        return None


def write_coded(path: Path, **changes: Any) -> None:
    """Writes an entropy-coded file, and signs it again if the header is to be changed."""
    codes = make_codes(GRID, 5)
    assert write_codes(path, codes, GRID, HEADER, coded(codes)) == path.stat().st_size
    line, _, payload = path.read_bytes().partition(b"\n")
    header = {**json.loads(line[len(ENTROPY_MAGIC) :]), **changes}
    unsigned = {name: value for name, value in header.items() if name != "sha256"}
    header["sha256"] = sha256(json.dumps(unsigned, sort_keys=True).encode() + b"\n" + payload).hexdigest()
    path.write_bytes(ENTROPY_MAGIC + json.dumps(header).encode() + b"\n" + payload)


def coded_refusal(path: Path) -> str:
    with pytest.raises(UserError) as caught:
        read_codes(path, lambda header: None, decode)
    return str(caught.value)


def test_entropy_coded_codes_round_trip(tmp_path):
    path = tmp_path / "c.smalti"
    write_coded(path)
    packed = read_codes(path, lambda header: None, decode)
    assert torch.equal(packed.codes[0], make_codes(GRID, 5)[0])
    assert "pass the prior that encoded it as --prior" in refusal(path)


def test_entropy_coded_file_that_was_changed_or_decodes_to_other_codes_is_refused(tmp_path):
    path = tmp_path / "c.smalti"
    write_coded(path)
    whole = path.read_bytes()
    for index in range(len(whole) - 40, len(whole), 7):
        path.write_bytes(whole[:index] + bytes([whole[index] ^ 1]) + whole[index + 1 :])
        assert "is damaged" in coded_refusal(path)
    path.write_bytes(whole[:-1])
    assert "is damaged" in coded_refusal(path)
    write_coded(path, codes_sha256="00" * 32)
    assert "cannot be decoded here" in coded_refusal(path)
    write_coded(path, images=7)
    assert "cannot be decoded here" in coded_refusal(path)


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"payload_bytes": -1}, "more codes than its bytes hold"),
        ({"payload_bytes": "9"}, "payload_bytes in its header"),
        ({"payload_bytes": 10**18}, "is damaged"),
        ({"images": 10**18}, "more codes than its bytes hold"),
        ({"codes_sha256": None}, "codes_sha256 in its header"),
    ],
)
def test_entropy_coded_file_with_a_forged_header_is_refused(tmp_path, change, error):
    path = tmp_path / "c.smalti"
    write_coded(path, **change)
    assert error in coded_refusal(path)


def test_few_entropy_coded_bytes_are_padded(tmp_path):
    """A file of many codes is read, however few bits a prior makes of them."""
    path, codes = tmp_path / "c.smalti", (torch.zeros(2000, 3, 4, dtype=torch.int64),)
    write_codes(path, codes, GRID, HEADER, b"x")
    packed = read_codes(path, lambda header: None, lambda _header, payload, *_: codes if payload[:1] == b"x" else None)
    assert packed.header["payload_bytes"] == 2000 * 12 // 1024
