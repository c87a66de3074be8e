"""Captions of a latent set: a text for each row, stored as UTF-8 one after the other, with the end of each in a column.

Texts are compressed and read from the file when they are asked for, since training does not need them.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from jaxtyping import Int64, UInt8

from smalti.core.errors import UserError
from smalti.latentsets.hdf5.untrusted_hdf5 import dataset, opened, require_extent, require_readable

CAPTIONS, CAPTION_ENDS = "captions", "caption_ends"
"""The dataset of the texts' bytes, and the column of the byte that follows each row's text."""
LARGEST_CAPTION_BYTES = 1 << 20
"""Longest text of a row, in UTF-8."""
_BYTES = np.dtype("u1")
_MOST_COMPRESSED = 1100
"""Gzip compresses to a thousandth at best; a file that declares more has no such texts."""
_PIECE_BYTES = 1 << 24


def encode_captions(captions: Sequence[str]) -> tuple[Int64[np.ndarray, " rows"], UInt8[np.ndarray, " bytes"]]:
    """Returns the ends of the captions and their bytes.

    Raises:
        UserError: if a caption is longer than `LARGEST_CAPTION_BYTES`.
    """
    encoded = [caption.encode(errors="replace") for caption in captions]
    sizes = np.fromiter(map(len, encoded), np.int64, len(encoded))
    if sizes.max() > LARGEST_CAPTION_BYTES:
        raise UserError(
            f"the caption of row {sizes.argmax()} takes {sizes.max()} bytes, more than the {LARGEST_CAPTION_BYTES} "
            "that a latent set stores; shorten it"
        )
    return sizes.cumsum(), np.frombuffer(b"".join(encoded), np.uint8)


def digest_of_captions(captions: Sequence[str]) -> str:
    """Returns the SHA-256 of captions, in hexadecimal."""
    return hashlib.sha256(json.dumps(list(captions)).encode()).hexdigest()


def read_captions(path: Path, ends: Int64[np.ndarray, " rows"], rows: Sequence[int]) -> list[str]:
    """Returns the captions of some rows, in their order; "" for a row without one."""
    with opened(path) as file:
        stored: Any = dataset(path, file, CAPTIONS)
        spans = [(int(ends[row - 1]) if row else 0, int(ends[row])) for row in (range(len(ends))[row] for row in rows)]
        return [stored[start:end].tobytes().decode(errors="replace") for start, end in spans]


def caption_bytes(path: Path) -> Iterator[UInt8[np.ndarray, " _bytes"]]:
    """Yields the bytes of all captions piece by piece, for the digest."""
    with opened(path) as file:
        stored: Any = dataset(path, file, CAPTIONS)
        for start in range(0, len(stored), _PIECE_BYTES):
            yield stored[start : start + _PIECE_BYTES]


def check_captions(path: Path, file: h5py.File, ends: Int64[np.ndarray, " rows"]) -> None:
    """Checks the dataset of captions against the ends, without reading it.

    Raises:
        UserError: if the ends do not ascend, or the dataset has another size than the last end.
    """
    sizes = np.diff(ends, prepend=0)
    if sizes.min() < 0 or sizes.max() > LARGEST_CAPTION_BYTES:
        raise UserError(f"{path}: {CAPTION_ENDS} do not ascend by at most {LARGEST_CAPTION_BYTES}; build it again")
    stored = dataset(path, file, CAPTIONS)
    require_extent(path, stored, CAPTIONS, _BYTES, (int(ends[-1]),))
    require_readable(path, stored, CAPTIONS)
    if ends[-1] > _MOST_COMPRESSED * stored.id.get_storage_size():
        raise UserError(f"{path}: {CAPTIONS} holds fewer bytes than it declares; copy it again, or build it again")
