"""The digests of a latent set: SHA-256 of what decides the meaning of its codes, and of all its attributes.

They do not depend on how the set is stored: in one file or in several, in which blocks it was written, or when.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import h5py
import numpy as np

from smalti.core.codes import Layout
from smalti.core.files import open_regular
from smalti.latentsets.format import (
    COLUMNS,
    LIBRARY,
    Extent,
    attribute_texts,
    level_bytes,
    stored_dtype,
    write_text,
)
from smalti.latentsets.provenance import Provenance

DIGEST_PIECE_BYTES = 1 << 24
MEANING = (
    "layout",
    "tokenizer_kind",
    "tokenizer_config",
    "tokenizer_digest",
    "image_fingerprint",
    "preprocessing",
    "label_names",
    "skipped",
)
"""The attributes that decide what codes and labels mean; the content digest covers them."""


def add_digests(path: Path, layout: Layout, provenance: Provenance, content_digest: str) -> None:
    """Adds both digests. The content digest completes the file: without it the file is not a latent set."""
    texts = {**attribute_texts(layout, provenance), "content_digest": content_digest}
    with h5py.File(path, "r+", libver=LIBRARY, locking=False) as file:
        write_text(file, "attributes_digest", attributes_digest(texts))
        write_text(file, "content_digest", content_digest)


def attributes_digest(texts: Mapping[str, str]) -> str:
    """Returns SHA-256, in hexadecimal, of all attributes but itself, sorted by name; each as `_hashed` writes it."""
    names = sorted(texts.keys() - {"attributes_digest"})
    return hashlib.sha256(b"".join(_hashed(name, texts[name]) for name in names)).hexdigest()


def _hashed(name: str, text: str) -> bytes:
    """Returns what digests take of an attribute: a line `name bytes`, the text, and a newline."""
    encoded = text.encode()
    return f"{name} {len(encoded)}\n".encode() + encoded + b"\n"


def content_digest(
    layout: Layout,
    attributes: Mapping[str, str],
    extents: Sequence[Extent],
    column: Callable[[str], Iterable[np.ndarray]],
) -> str:
    """Returns the content digest: SHA-256, in hexadecimal, of everything that decides what the set means.

    The hash runs over the attributes in `MEANING` (in version 3), `codes/0..`, then `labels`, `source_ids`,
    `held_out`, `flipped`. For each array it takes a line `name dtype shape` (`codes/0 <u2 100 16 16`), then the values
    in row-major order. The digest therefore depends on the numbers and their types, but not on how HDF5 stores them or
    in which blocks they were written. Attributes about one build, such as its time, are left out, so that two builds
    of the same codes have one digest. Nor does it depend on the number of files. The codes are read piece by piece, not
    memory-mapped, so that memory use stays constant.

    Args:
        layout: The layout of the codes.
        attributes: The texts of the attributes.
        extents: The codes of each file, in order.
        column: Returns the values of a column in each file, in order.
    """
    sha, rows = hashlib.sha256(), sum(extent.rows for extent in extents)
    if attributes["format_version"] != "2":
        for name in MEANING:
            sha.update(_hashed(name, attributes[name]))

    def hash_header(name: str, dtype: np.dtype, shape: tuple[int, ...]) -> None:
        sha.update(f"{name} {dtype.str} {' '.join(map(str, shape))}\n".encode())

    for index, level in enumerate(layout.levels):
        hash_header(f"codes/{index}", stored_dtype(level), (rows, *level.shape))
        for extent in extents:
            for piece in _pieces(extent.path, extent.offsets[index], level_bytes(level, extent.rows)):
                sha.update(piece)
    for name, dtype in COLUMNS.items():
        hash_header(name, dtype, (rows,))
        for values in column(name):
            sha.update(np.ascontiguousarray(values, dtype).data)
    return sha.hexdigest()


def _pieces(path: Path, offset: int, remaining: int) -> Iterator[bytes]:
    with open_regular(path) as file:
        file.seek(offset)
        while remaining:
            piece = file.read(min(remaining, DIGEST_PIECE_BYTES))
            assert piece, "the file was truncated while it was read"
            yield piece
            remaining -= len(piece)
