"""Codes as a small file: a line of JSON that says what they are, then every code in as few whole bits as it needs.

For sending images at a fixed rate; latent sets, which training reads, are in `latentsets/`.
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
    """What a file of packed codes holds.

    Attributes:
        codes: of all images.
        layout: of one image's codes.
        header: what else was written down of them, as JSON.
        size_bytes: of the whole file.
    """

    codes: Codes
    layout: Layout
    header: dict[str, Any]
    size_bytes: int


def bits_of(level: Level) -> int:
    """Bits that each code of a level takes: the fewest that tell all codes apart.

    Raises:
        UserError: of a continuous level.
    """
    if not level.radices:
        raise UserError("this tokenizer's codes are real numbers, which have no fixed rate; take another tokenizer")
    return math.ceil(math.log2(level.codebook_size))


def bits_per_image(layout: Layout) -> int:
    """The rate: bits of one image's codes. Raises as `bits_of` does."""
    return sum(level.positions * bits_of(level) for level in layout.levels)


def write_codes(path: Path, codes: Codes, layout: Layout, header: dict[str, Any]) -> int:
    """Writes codes, whole or not at all; returns the size of the file in bytes.

    Raises:
        UserError: as `bits_of` does.
    """
    streams = [_bits(grid, bits_of(level)) for grid, level in zip(codes, layout.levels, strict=True)]
    payload = np.packbits(np.concatenate(streams)).tobytes()
    described = {**header, "images": len(codes[0]), "layout": layout.to_json(), "sha256": sha256(payload).hexdigest()}
    with whole_file(path) as partial:
        partial.write_bytes(MAGIC + json.dumps(described).encode() + b"\n" + payload)
    return path.stat().st_size


def read_codes(path: Path, expected: Callable[[dict[str, Any]], None]) -> Packed:
    """Reads what `write_codes` wrote.

    Args:
        path: the file.
        expected: is given the header before the codes are read, to refuse what it will not do with.

    Raises:
        UserError: if there is no such file, it is none of ours, or it was cut short or changed.
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
    expected(header)
    size = -(-images * bits_per_image(layout) // 8)
    if len(payload) != size or sha256(payload).hexdigest() != digest:
        raise UserError(f"{path} is damaged: {size} bytes of codes should follow its header; fetch or write it again")
    bits, codes = np.unpackbits(np.frombuffer(payload, np.uint8)), []
    for level in layout.levels:
        width = bits_of(level)
        here, bits = np.split(bits, [images * level.positions * width])
        weights = 1 << np.arange(width - 1, -1, -1)
        codes.append(torch.from_numpy(here.reshape(images, *level.shape, width) @ weights))
    layout.check(tuple(codes))
    return Packed(tuple(codes), layout, header, len(content))


def _bits(grid: Tensor, width: int) -> np.ndarray:
    """All codes' bits in a row, each code's most significant first."""
    codes = grid.cpu().numpy().reshape(-1, 1)
    return (codes >> np.arange(width - 1, -1, -1) & 1).astype(np.uint8).ravel()
