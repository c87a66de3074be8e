"""The file format of compressed images: one line of JSON, then every code in the fewest whole bits (a fixed rate).

The commands `compress` and `decompress` write and read it. Latent sets, which training reads, have another format
(`format.py`).
"""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from smalti.core.codes import Codes, Layout, Level
from smalti.core.errors import UserError
from smalti.core.files import whole_file

MAGIC = b"smalti codes 1 "


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


def write_codes(path: Path, codes: Codes, layout: Layout, header: dict[str, Any]) -> int:
    """Writes a file of packed codes, whole or not at all; returns its size in bytes.

    Raises:
        UserError: if a level is continuous.
    """
    streams = [_bits(grid, bits_per_code(level)) for grid, level in zip(codes, layout.levels, strict=True)]
    payload = np.packbits(np.concatenate(streams)).tobytes()
    header = {**header, "images": len(codes[0]), "layout": layout.to_json(), "sha256": sha256(payload).hexdigest()}
    with whole_file(path) as partial:
        partial.write_bytes(MAGIC + json.dumps(header).encode() + b"\n" + payload)
    return path.stat().st_size


def read_codes(path: Path, check_header: Callable[[dict[str, Any]], None]) -> Packed:
    """Reads a file that `write_codes` wrote.

    Args:
        path: The file.
        check_header: A function that is called with the header before the codes are read, and may raise a UserError.

    Raises:
        UserError: if there is no such file, it has another format, or it was truncated or changed.
    """
    try:
        content = path.read_bytes()
    except (FileNotFoundError, IsADirectoryError) as error:
        raise UserError(f"{path} is not a file; give one that compress.py wrote") from error
    line, _, payload = content.partition(b"\n")
    try:
        if not line.startswith(MAGIC):
            raise ValueError
        header = json.loads(line[len(MAGIC) :])
        layout, images, digest = Layout.from_json(header["layout"]), header["images"], header["sha256"]
    except (ValueError, KeyError, TypeError, UserError) as error:
        raise UserError(f"{path} is not a whole file of packed codes; give one that compress.py wrote") from error
    check_header(header)
    size = -(-images * bits_per_image(layout) // 8)
    if len(payload) != size or sha256(payload).hexdigest() != digest:
        raise UserError(f"{path} is damaged: {size} bytes of codes should follow its header; fetch or write it again")
    bits, codes = np.unpackbits(np.frombuffer(payload, np.uint8)), []
    for level in layout.levels:
        width = bits_per_code(level)
        level_bits, bits = np.split(bits, [images * level.positions * width])
        weights = 1 << np.arange(width - 1, -1, -1)
        codes.append(torch.from_numpy(level_bits.reshape(images, *level.shape, width) @ weights))
    layout.check(tuple(codes))
    return Packed(tuple(codes), layout, header, len(content))


def _bits(grid: Tensor, width: int) -> np.ndarray:
    """Returns the bits of all codes in one row, each code's most significant bit first."""
    codes = grid.cpu().numpy().reshape(-1, 1)
    return (codes >> np.arange(width - 1, -1, -1) & 1).astype(np.uint8).ravel()
