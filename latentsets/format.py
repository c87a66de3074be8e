"""The HDF5 layout of a latent set: its datasets, columns and attributes, and its digests.

This file holds what the writer (`writer.py`) and the reader (`reader.py`) must agree on. Codes and conditions are
contiguous datasets, which a reader can memory-map. The columns beside them are compressed, and so are captions
(`captions.py`). All numbers are little-endian.
"""

import dataclasses
import hashlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import h5py
import numpy as np
from jaxtyping import Int64

from smalti.core.codes import Layout, Level
from smalti.core.config import config_from_json, parse_json
from smalti.core.errors import UserError
from smalti.core.files import open_regular
from smalti.latentsets.captions import CAPTION_ENDS, CAPTIONS, caption_bytes, check_captions
from smalti.latentsets.provenance import ADDED_IN_4, Provenance
from smalti.latentsets.untrusted_hdf5 import attribute, column, contiguous_offset, dataset, opened, require_extent

FORMAT = "smalti-latents"
FORMAT_VERSION = 4
VERSIONS = (2, 3, 4)
"""The format versions that are read. The content digest of version 2 covers codes and columns only; version 3 has
neither conditions nor captions."""
CONDITIONS = "conditions"
"""The dataset of the vector of each row that priors can be conditioned on; a set may have none."""
CONDITION_DTYPE = np.dtype("<f2")
ALIGNMENT_BYTES = 512
"""Alignment of each level's codes in the file. Rows of 512 bytes, or of a power of two below that, then never cross
a page or cache line unnecessarily."""
COLUMN_CHUNK_ROWS = 65536
LIBRARY = ("v110", "v110")
"""HDF5 file format bounds. HDF5 1.10 (2016) can read it; older structures take several KiB more."""
DIGEST_PIECE_BYTES = 1 << 24
MOST_DIGITS = 31
"""Most radices of a level: each is at least 2, and all codes fit 31 bits."""
MOST_UNNAMED_CLASSES = 1 << 16
"""Largest number of classes of a set without label names, or its number of rows if that is larger. A prior allocates a
vector for each class up to the largest label."""
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
COLUMNS = {
    "labels": np.dtype("<i8"),
    "source_ids": np.dtype("<i8"),
    "held_out": np.dtype("u1"),
    "flipped": np.dtype("u1"),
}
"""Datasets beside `codes/0..` with one number per row: the class (-1 for none), the source image (0, 1, ... in order of
first appearance), whether the row is held out from training, and whether it is a mirror image."""


@dataclass(frozen=True)
class Contents:
    """Everything in a latent set's file except the values of `arrays`, which are at `offsets` (in bytes).

    `attributes` holds the texts of all attributes as stored, with both digests. `columns` has the ends of captions, if
    the set has captions.
    """

    layout: Layout
    provenance: Provenance
    attributes: dict[str, str]
    rows: int
    arrays: "Arrays"
    offsets: tuple[int, ...]
    columns: dict[str, np.ndarray]


Arrays: TypeAlias = dict[str, tuple[np.dtype, tuple[int, ...]]]
"""The contiguous datasets of a set by name: the type and the shape of each."""


def arrays_of(layout: Layout, rows: int, condition_width: int) -> Arrays:
    """Returns the contiguous datasets of a set: the codes of each level, and the conditions if there are any."""
    arrays: Arrays = {
        f"codes/{index}": (stored_dtype(level), (rows, *level.shape)) for index, level in enumerate(layout.levels)
    }
    return arrays | ({CONDITIONS: (CONDITION_DTYPE, (rows, condition_width))} if condition_width else {})


def stored_dtype(level: Level) -> np.dtype:
    """Returns `level.dtype` in little-endian byte order, on every machine."""
    return level.dtype.newbyteorder("<")


def level_bytes(level: Level, rows: int) -> int:
    """Returns the bytes that the codes of one level take."""
    return rows * math.prod(level.shape) * level.dtype.itemsize


def number_sources(ids: Int64[np.ndarray, " n"]) -> Int64[np.ndarray, " n"]:
    """Renumbers ids as `source_ids`: 0, 1, ... in order of first appearance. Such numbers compress very well."""
    _, first, inverse = np.unique(ids, return_index=True, return_inverse=True)
    return np.argsort(np.argsort(first))[inverse]


def find_column_error(columns: Mapping[str, np.ndarray], label_names: Sequence[str]) -> str | None:
    """Describes the first error in the columns of a whole set; returns None if there is none."""
    labels, ids, held_out = (columns[name] for name in ("labels", "source_ids", "held_out"))
    largest_label = (len(label_names) or max(MOST_UNNAMED_CLASSES, len(labels))) - 1
    if len(wrong := labels[(labels < -1) | (labels > largest_label)]):
        return f"{wrong[0]} is not a label: labels are -1 for none, or from 0 to {largest_label}"
    if max(held_out.max(), columns["flipped"].max()) > 1:
        return "held_out and flipped are not all 0 or 1"
    if not np.array_equal(number_sources(ids), ids):
        return "source ids are not 0, 1, ... in order of first appearance"
    if not np.array_equal(held_out[np.unique(ids, return_index=True)[1]][ids], held_out):
        return "rows of one source image are on both sides of the held-out split"
    return None


def create_file(path: Path, arrays: Arrays) -> tuple[int, ...]:
    """Creates an HDF5 file with space for the arrays and nothing else; returns the offset of each in bytes.

    The settings keep the metadata small. With HDF5's defaults it would be a few per cent of a small set.
    """
    access, creation = h5py.h5p.create(h5py.h5p.FILE_ACCESS), h5py.h5p.create(h5py.h5p.FILE_CREATE)
    access.set_libver_bounds(h5py.h5f.LIBVER_V110, h5py.h5f.LIBVER_V110)
    access.set_file_locking(False, True)  # as for reading; smalti's own locks are in core/locks.py
    access.set_alignment(ALIGNMENT_BYTES, ALIGNMENT_BYTES)
    creation.set_attr_phase_change(64, 0)  # keeps attributes in the root's header
    early = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    early.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)  # otherwise there is no offset before the first write
    offsets = []
    with h5py.File(h5py.h5f.create(os.fsencode(path), h5py.h5f.ACC_TRUNC, creation, access)) as file:
        for name, (dtype, shape) in arrays.items():
            array = file.create_dataset(name, shape, dtype, dcpl=early, fill_time="never")
            offsets.append(array.id.get_offset())
    return tuple(offsets)


def attribute_texts(layout: Layout, provenance: Provenance) -> dict[str, str]:
    """Returns the texts of all attributes of a new set, without digests."""
    texts = {"format": FORMAT, "format_version": str(FORMAT_VERSION), "layout": json.dumps(layout.to_json())}
    return {**texts, **provenance.to_attributes()}


def add_columns(path: Path, layout: Layout, provenance: Provenance, columns: Mapping[str, np.ndarray]) -> None:
    """Adds the columns, captions among them, and all attributes except the digests."""
    with h5py.File(path, "r+", libver=LIBRARY, locking=False) as file:
        for name, column in columns.items():
            chunk = (min(len(column), COLUMN_CHUNK_ROWS),)
            file.create_dataset(name, data=column, chunks=chunk, shuffle=True, compression="gzip")
        for name, text in attribute_texts(layout, provenance).items():
            if name == "format_version":
                file.attrs[name] = FORMAT_VERSION
            else:
                _write_text(file, name, text)


def add_digests(path: Path, layout: Layout, provenance: Provenance, content_digest: str) -> None:
    """Adds both digests. The content digest completes the file: without it the file is not a latent set."""
    texts = {**attribute_texts(layout, provenance), "content_digest": content_digest}
    with h5py.File(path, "r+", libver=LIBRARY, locking=False) as file:
        _write_text(file, "attributes_digest", attributes_digest(texts))
        _write_text(file, "content_digest", content_digest)


def _write_text(file: h5py.File, name: str, text: str) -> None:
    """Writes a text attribute of fixed length. Those of variable length would need a heap of at least 4 KiB."""
    encoded = text.encode()
    file.attrs.create(name, encoded, dtype=h5py.string_dtype("utf-8", max(1, len(encoded))))


def attributes_digest(texts: Mapping[str, str]) -> str:
    """Returns SHA-256, in hexadecimal, of all attributes but itself, sorted by name; each as `_hashed` writes it."""
    names = sorted(texts.keys() - {"attributes_digest"})
    return hashlib.sha256(b"".join(_hashed(name, texts[name]) for name in names)).hexdigest()


def _hashed(name: str, text: str) -> bytes:
    """Returns what digests take of an attribute: a line `name bytes`, the text, and a newline."""
    encoded = text.encode()
    return f"{name} {len(encoded)}\n".encode() + encoded + b"\n"


def content_digest(
    path: Path,
    arrays: Arrays,
    offsets: tuple[int, ...],
    columns: Mapping[str, np.ndarray],
    attributes: Mapping[str, str],
) -> str:
    """Returns the content digest: SHA-256, in hexadecimal, of everything that decides what the set means.

    The hash runs over the attributes in `MEANING` (from version 3 on), `codes/0..`, `conditions` if there are any, then
    `labels`, `source_ids`, `held_out`, `flipped`, and `caption_ends` and `captions` if there are any. So a set without
    conditions and captions has the same digest in versions 3 and 4. For each array it takes a line `name dtype shape`
    (`codes/0 <u2 100 16 16`), then the values in row-major order. The digest therefore depends on the numbers and their
    types, but not on how HDF5 stores them or in which blocks they were written. Attributes about one build, such as its
    time, are left out, so that two builds of the same codes have one digest. Codes are read piece by piece, not
    memory-mapped, so that memory use stays constant.
    """
    sha = hashlib.sha256()
    if attributes["format_version"] != "2":
        for name in MEANING:
            sha.update(_hashed(name, attributes[name]))

    def hash_header(name: str, dtype: np.dtype, shape: tuple[int, ...]) -> None:
        sha.update(f"{name} {dtype.str} {' '.join(map(str, shape))}\n".encode())

    with open_regular(path) as file:
        for (name, (dtype, shape)), offset in zip(arrays.items(), offsets, strict=True):
            hash_header(name, dtype, shape)
            file.seek(offset)
            remaining = math.prod(shape) * dtype.itemsize
            while remaining:
                piece = file.read(min(remaining, DIGEST_PIECE_BYTES))
                assert piece, "the file was truncated while it was read"
                sha.update(piece)
                remaining -= len(piece)
    for name, values in columns.items():
        hash_header(name, values.dtype, values.shape)
        sha.update(np.ascontiguousarray(values).data)
    if CAPTION_ENDS in columns:
        hash_header(CAPTIONS, np.dtype("u1"), (int(columns[CAPTION_ENDS][-1]),))
        for piece in caption_bytes(path):
            sha.update(piece.data)
    return sha.hexdigest()


def read_contents(path: Path) -> Contents:
    """Reads and checks everything except the codes' values, then closes the file.

    Raises:
        UserError: if the file does not exist, is not HDF5, is truncated or damaged, is not a latent set, has another
            format version, lacks a dataset or an attribute, refers to other files, or has wrong labels, sources or
            splits.
    """
    with opened(path) as file:
        layout, provenance, attributes = _read_attributes(path, file)
        read = (CONDITIONS, CAPTION_ENDS) if int(attributes["format_version"]) > 3 else ()
        optional = [name for name in read if name in file]
        dtypes = COLUMNS | ({CAPTION_ENDS: np.dtype("<i8")} if CAPTION_ENDS in optional else {})
        stored = {name: dataset(path, file, name) for name in (*dtypes, *optional)}
        rows = (stored["labels"].shape or (0,))[0]
        if not rows:
            raise UserError(f"{path} has no rows; build the latent set again")
        width = (stored[CONDITIONS].shape or (0,))[-1] if CONDITIONS in optional else 0
        arrays = arrays_of(layout, rows, width)
        stored |= {name: dataset(path, file, name) for name in arrays}
        for name, (dtype, shape) in {**arrays, **{name: (dtype, (rows,)) for name, dtype in dtypes.items()}}.items():
            require_extent(path, stored[name], name, dtype, shape)
        # Codes take at least one byte a row, so columns of as many rows are not much larger than the file.
        offsets = tuple(contiguous_offset(path, stored[name], name) for name in arrays)
        columns = {name: column(path, stored[name], name) for name in dtypes}
        if CAPTION_ENDS in columns:
            check_captions(path, file, columns[CAPTION_ENDS])
    if error := find_column_error(columns, provenance.label_names):
        raise UserError(f"{path}: {error}; build it again")
    return Contents(layout, provenance, attributes, rows, arrays, offsets, columns)


def _read_attributes(path: Path, file: h5py.File) -> tuple[Layout, Provenance, dict[str, str]]:
    try:
        if attribute(file, "format") != FORMAT:
            raise UserError(f"{path} is HDF5 but not a latent set; give one made by build_latents.py")
        number = attribute(file, "format_version")
        if not isinstance(number, int):
            raise ValueError("format_version is not a whole number")
        if number not in VERSIONS:
            remedy = "build it again" if number in range(FORMAT_VERSION) else "upgrade smalti"
            read = f"{VERSIONS[0]} to {VERSIONS[-1]}"
            raise UserError(f"{path} has format version {number}, this smalti reads {read}; {remedy}")
        new = ADDED_IN_4 if number < 4 else ()
        described = [field.name for field in dataclasses.fields(Provenance) if field.name not in new]
        digests = ["content_digest", *(["attributes_digest"] if number != 2 else [])]
        names = ["format", "layout", *described, *digests]
        if missing := [name for name in names if name not in file.attrs]:
            raise UserError(f"{path} lacks the attributes {', '.join(missing)}; build the latent set again")
        values = {name: attribute(file, name) for name in names}
        texts = {name: value for name, value in values.items() if isinstance(value, str)}
        if wrong := sorted(values.keys() - texts.keys()):
            raise UserError(f"{path}: the attributes {', '.join(wrong)} are not strings; build the latent set again")
        layout = layout_from_json(parse_json(texts["layout"]), str(path))
        return layout, Provenance.from_attributes(texts, str(path)), {**texts, "format_version": str(number)}
    except (UserError, OSError):
        raise
    except ValueError as error:
        raise UserError(f"{path}: its attributes are damaged ({error}); build the latent set again") from error


def layout_from_json(levels: Any, source: str) -> Layout:
    """Rebuilds a layout from the JSON in a file that anyone may have written; see `Layout.to_json`.

    Raises:
        UserError: if it is not the JSON of a layout.
    """
    for level in levels if isinstance(levels, list) else ():
        radices = level.get("radices") if isinstance(level, dict) else None
        if isinstance(radices, list) and len(radices) > MOST_DIGITS:
            raise UserError(
                f"{source}: a layout of {len(radices)} radices is damaged; at most {MOST_DIGITS} fit a code"
            )
    try:
        layout = config_from_json(Layout, {"levels": levels}, source)
    except UserError as error:
        raise UserError(f"{source}: its layout is damaged ({str(error).removeprefix(f'{source}: ')})") from error
    if any(level.channels < 0 for level in layout.levels):
        raise UserError(f"{source}: its layout is damaged (a level has a negative number of channels)")
    return layout
