"""The digests of a latent set: SHA-256 of what decides the meaning of its codes, and of all its attributes.

They do not depend on how the set is stored: in one file or in several, in which blocks it was written, or when.
"""

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import h5py
import numpy as np

from smalti.core.codes import Layout
from smalti.core.files import open_regular
from smalti.latentsets.hdf5.captions import CAPTION_ENDS, CAPTIONS, caption_bytes
from smalti.latentsets.hdf5.format import COLUMNS, LIBRARY, ROW_COLUMNS, Extent, arrays_of, attribute_texts, write_text
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
    *,
    condition_width: int = 0,
    captioned: Sequence[bool] = (),
) -> str:
    """Returns the content digest: SHA-256, in hexadecimal, of everything that decides what the set means.

    The hash runs over the attributes in `MEANING` (from version 3 on), `codes/0..`, `conditions` if there are any, then
    `labels`, `source_ids`, `held_out`, `flipped`, and `caption_ends` and `captions` if there are any. So a set without
    conditions and captions has the same digest in versions 3 and 4. For each array it takes a line `name dtype shape`
    (`codes/0 <u2 100 16 16`), then the values in row-major order. The digest therefore depends on the numbers and their
    types, but not on how HDF5 stores them or in which blocks they were written. Attributes about one build, such as its
    time, are left out, so that two builds of the same codes have one digest. Nor does it depend on the number of files.
    Codes are read piece by piece, not memory-mapped, so that memory use stays constant.

    Args:
        layout: The layout of the codes.
        attributes: The texts of the attributes.
        extents: The codes of each file, in order.
        column: Returns the values of a column in each file, in order.
        condition_width: Numbers in the vector of each row; 0 for none.
        captioned: Whether each file has captions; empty for a set without any.
    """
    sha, rows = hashlib.sha256(), sum(extent.rows for extent in extents)
    if attributes["format_version"] != "2":
        for name in MEANING:
            sha.update(_hashed(name, attributes[name]))

    def hash_header(name: str, dtype: np.dtype, shape: tuple[int, ...]) -> None:
        sha.update(f"{name} {dtype.str} {' '.join(map(str, shape))}\n".encode())

    for index, (name, (dtype, shape)) in enumerate(arrays_of(layout, rows, condition_width).items()):
        hash_header(name, dtype, shape)
        for extent in extents:
            size = extent.rows * math.prod(shape[1:]) * dtype.itemsize
            for piece in _pieces(extent.path, extent.offsets[index], size):
                sha.update(piece)
    for name, dtype in COLUMNS.items():
        hash_header(name, dtype, (rows,))
        for values in column(name):
            sha.update(np.ascontiguousarray(values, dtype).data)
    if any(captioned):
        hash_header(CAPTION_ENDS, ROW_COLUMNS[CAPTION_ENDS], (rows,))
        before = 0
        for ends in column(CAPTION_ENDS):
            sha.update(np.ascontiguousarray(ends + before, ROW_COLUMNS[CAPTION_ENDS]).data)
            before += int(ends[-1])
        hash_header(CAPTIONS, np.dtype("u1"), (before,))
        for extent, has_captions in zip(extents, captioned, strict=True):
            for piece in caption_bytes(extent.path) if has_captions else ():
                sha.update(piece.data)
    return sha.hexdigest()


def _pieces(path: Path, offset: int, remaining: int) -> Iterator[bytes]:
    with open_regular(path) as file:
        file.seek(offset)
        while remaining:
            piece = file.read(min(remaining, DIGEST_PIECE_BYTES))
            assert piece, "the file was truncated while it was read"
            yield piece
            remaining -= len(piece)
