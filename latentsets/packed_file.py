"""The file format of compressed images: one line of JSON, then every code in the fewest whole bits (a fixed rate).

Or, in version 3, the codes as an entropy coder wrote them (`priors/methods/entropy_coding.py`). The commands `compress`
and `decompress` write and read it. Latent sets, which training reads, have another format (`format.py`).
"""

import json
import math
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path, PurePosixPath
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from smalti.core.codes import Codes, Layout, Level
from smalti.core.config import parse_json
from smalti.core.errors import UserError
from smalti.core.files import open_regular, whole_file
from smalti.latentsets.hdf5.format import layout_from_json

MAGIC = b"smalti codes 2 "
OLD_MAGIC = b"smalti codes 1 "
"""Version 1, whose `sha256` in the header covers the codes only. It is still read."""
ENTROPY_MAGIC = b"smalti codes 3 "
"""Version 3, whose codes are entropy-coded. Its header also has `payload_bytes`, and `codes_sha256` over the codes."""
MOST_CODES_PER_BYTE = 1 << 10
"""An entropy-coded payload is padded with zeros up to this ratio, so that a small file cannot declare endless codes."""
LARGEST_HEADER_BYTES = 1 << 24

Decode: TypeAlias = Callable[[dict[str, Any], bytes, int, Layout], Codes | None]
"""Decodes a payload, given the header and, from it, the number of images and the layout; None for bits of no codes."""


@dataclass(frozen=True)
class Packed:
    """The contents of a file of packed codes.

    Attributes:
        codes: The codes of all images.
        layout: The layout of one image's codes.
        header: The JSON object in the file's first line.
        size_bytes: The size of the whole file.
    """

    codes: Codes
    layout: Layout
    header: dict[str, Any]
    size_bytes: int


def bits_per_code(level: Level) -> int:
    """Returns the bits that each code of a level takes: the logarithm of the codebook's size, rounded up.

    Raises:
        UserError: if the level is continuous.
    """
    if not level.radices:
        raise UserError("this tokenizer has real-valued latents, which have no fixed rate; choose another tokenizer")
    return math.ceil(math.log2(level.codebook_size))


def bits_per_image(layout: Layout) -> int:
    """Returns the rate: the bits of one image's codes.

    Raises:
        UserError: if a level is continuous.
    """
    return sum(level.positions * bits_per_code(level) for level in layout.levels)


def read_header(path: Path) -> dict[str, Any]:
    """Returns the header of a file of packed codes; empty for any other file. The codes are not checked."""
    try:
        with open_regular(path) as file:
            return _parse_header(path, file.readline(LARGEST_HEADER_BYTES))
    except (OSError, UserError):
        return {}


def write_codes(
    path: Path, codes: Codes, layout: Layout, header: dict[str, Any], entropy_coded: bytes | None = None
) -> int:
    """Writes a file of packed codes, whole or not at all; returns its size in bytes.

    Args:
        path: The file.
        codes: The codes of all images.
        layout: The layout of one image's codes.
        header: More of the header, which `Packed.header` holds.
        entropy_coded: The codes as an entropy coder wrote them, to which zeros may be added; None for a fixed rate.

    Raises:
        UserError: if a level is continuous.
    """
    header = {**header, "images": len(codes[0]), "layout": layout.to_json()}
    if entropy_coded is None:
        streams = [_bits(grid, bits_per_code(level)) for grid, level in zip(codes, layout.levels, strict=True)]
        magic, payload = MAGIC, np.packbits(np.concatenate(streams)).tobytes()
    else:
        magic, payload = ENTROPY_MAGIC, entropy_coded.ljust(_least_payload_bytes(len(codes[0]), layout), b"\0")
        header |= {"payload_bytes": len(payload), "codes_sha256": _codes_digest(codes)}
    header["sha256"] = _digest(header, payload)
    line = magic + json.dumps(header).encode() + b"\n"
    try:
        if len(line) > LARGEST_HEADER_BYTES:
            raise ValueError
        parse_json(line[len(magic) :])
    except ValueError as error:  # `read_codes` would refuse it
        raise UserError(
            f"{len(codes[0])} images are too many for one file of packed codes; compress fewer at a time"
        ) from error
    with whole_file(path) as partial:
        partial.write_bytes(line + payload)
    return path.stat().st_size


def read_codes(path: Path, check_header: Callable[[dict[str, Any]], None], decode: Decode | None = None) -> Packed:
    """Reads a file that `write_codes` wrote.

    Args:
        path: The file.
        check_header: A function that is called with the checked header before the codes are unpacked, and may raise a
            UserError.
        decode: Decodes the codes of an entropy-coded file; a file at a fixed rate needs none.

    Raises:
        UserError: if there is no such file, it has another format, it was truncated or changed, or `decode` is missing
            or decodes other codes than those that were written.
    """
    try:
        with open_regular(path) as file:
            size_bytes = os.fstat(file.fileno()).st_size
            line = file.readline(LARGEST_HEADER_BYTES)
            version, header = line[: len(MAGIC)], _parse_header(path, line)
            layout, images = layout_from_json(header["layout"], str(path)), header["images"]
            if any(level.channels for level in layout.levels):
                raise UserError(f"{path} declares real-valued latents, not codes; fetch or write it again")
            fixed_rate = version != ENTROPY_MAGIC
            payload_bytes = -(-images * bits_per_image(layout) // 8) if fixed_rate else header["payload_bytes"]
            if not fixed_rate and payload_bytes < _least_payload_bytes(images, layout):
                raise UserError(f"{path} declares more codes than its bytes hold; fetch or write it again")
            if size_bytes != len(line) + payload_bytes:
                raise UserError(
                    f"{path} is damaged: {payload_bytes} bytes of codes should follow its header, not "
                    f"{size_bytes - len(line)}; fetch or write it again"
                )
            payload = file.read(payload_bytes)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); give a file that compress.py wrote") from error
    unsigned = {name: value for name, value in header.items() if name != "sha256"}
    digest = sha256(payload).hexdigest() if version == OLD_MAGIC else _digest(unsigned, payload)
    if len(payload) != payload_bytes or digest != header["sha256"]:
        raise UserError(f"{path} is damaged: its header or codes were changed; fetch or write it again")
    check_header(header)
    if not fixed_rate and decode is None:
        raise UserError(f"{path} was coded with a prior; pass the prior that encoded it as --prior")
    codes = decode(header, payload, images, layout) if decode and not fixed_rate else _unpack(payload, images, layout)
    if not fixed_rate and (codes is None or _codes_digest(codes) != header["codes_sha256"]):
        raise UserError(
            f"{path} cannot be decoded here: this machine computes other probabilities than the one that encoded it; "
            "decode it there, or write it again without --prior"
        )
    try:
        layout.check(codes or ())
    except UserError as error:
        raise UserError(f"{path}: {error}; fetch or write it again") from error
    return Packed(codes or (), layout, header, size_bytes)


def _unpack(payload: bytes, images: int, layout: Layout) -> Codes:
    """Returns the codes of a payload at a fixed rate."""
    bits, codes = np.unpackbits(np.frombuffer(payload, np.uint8)), []
    for level in layout.levels:
        width = bits_per_code(level)
        level_bits, bits = np.split(bits, [images * level.positions * width])
        weights = 1 << np.arange(width - 1, -1, -1)
        codes.append(torch.from_numpy(level_bits.reshape(images, *level.shape, width) @ weights))
    return tuple(codes)


def _least_payload_bytes(images: int, layout: Layout) -> int:
    return images * sum(level.positions for level in layout.levels) // MOST_CODES_PER_BYTE


def _codes_digest(codes: Codes) -> str:
    """Returns a SHA-256 over all codes."""
    return sha256(b"".join(grid.cpu().numpy().astype("<i8").tobytes() for grid in codes)).hexdigest()


def _parse_header(path: Path, line: bytes) -> dict[str, Any]:
    """Parses the first line of a file.

    Raises:
        UserError: if it is not the header of packed codes.
    """
    try:
        if not line.startswith((MAGIC, OLD_MAGIC, ENTROPY_MAGIC)) or not line.endswith(b"\n"):
            raise ValueError("its first line is not a header")
        header = parse_json(line[len(MAGIC) :])
        types = {"images": int, "layout": list, "sha256": str}
        if line.startswith(ENTROPY_MAGIC):
            types |= {"payload_bytes": int, "codes_sha256": str}
        if not isinstance(header, dict):
            raise ValueError("its header is not an object")
        if wrong := [name for name, kind in types.items() if type(header.get(name)) is not kind]:
            raise ValueError(f"{wrong[0]} in its header is missing or has the wrong type")
        if header["images"] < 1:
            raise ValueError(f"it declares {header['images']} images")
        if type(header.get("layer")) not in (int, type(None)):
            raise ValueError("layer in its header has the wrong type")
        if "names" in header and (name_error := find_name_error(header["names"], header["images"])):
            raise ValueError(name_error)
    except ValueError as error:
        raise UserError(
            f"{path} is not a whole file of packed codes ({error}); give one that compress.py wrote"
        ) from error
    return header


def find_name_error(names: Any, images: int) -> str | None:
    """Describes the first error in the names of decoded images: files below a folder, without suffix; None if all fit.

    Args:
        names: Of the images, in order.
        images: Their number.
    """
    if not isinstance(names, list) or len(names) != images or not all(isinstance(name, str) for name in names):
        return "names in its header are not one text for each image"
    for name in names:
        parts = name.split("/")
        if not all(parts) or {".", ".."} & {*parts} or not name.isprintable() or re.search(r'[\\:*?"<>|]', name):
            return f"{name[:60]!r} in its header is not the name of a file"
    if len({name.casefold() for name in names}) < images:
        return "names in its header repeat"
    folders = {str(folder).casefold() for name in names for folder in PurePosixPath(name).parents}
    if any(f"{name}.png".casefold() in folders for name in names):
        return "names in its header are those of pictures and of folders at once"
    return None


def _digest(header: dict[str, Any], payload: bytes) -> str:
    """Returns a SHA-256 over the header, in a canonical form, and the codes."""
    return sha256(json.dumps(header, sort_keys=True).encode() + b"\n" + payload).hexdigest()


def _bits(grid: Tensor, width: int) -> np.ndarray:
    """Returns the bits of all codes in one row, each code's most significant bit first."""
    codes = grid.cpu().numpy().reshape(-1, 1)
    return (codes >> np.arange(width - 1, -1, -1) & 1).astype(np.uint8).ravel()
