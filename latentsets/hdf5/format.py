"""The HDF5 layout of a latent set's file: its datasets, columns and attributes.

This file holds what the writer (`writer.py`) and the reader (`reader.py`) must agree on. Codes and conditions are
contiguous datasets, which a reader can memory-map. The columns beside them are compressed, and so are captions
(`captions.py`). All numbers are little-endian. The digests are in `digests.py`, sets of several files in `sharded.py`.
"""

import dataclasses
import json
import math
import os
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import h5py
import numpy as np
from jaxtyping import Int64

from smalti.core.codes import Layout, Level
from smalti.core.config import config_from_json, parse_json
from smalti.core.errors import UserError
from smalti.latentsets.hdf5.captions import CAPTION_ENDS, check_captions
from smalti.latentsets.hdf5.untrusted_hdf5 import attribute, column, contiguous_offset, dataset, opened, require_extent
from smalti.latentsets.provenance import OPTIONAL, Provenance

ADDED_IN_4 = ("condition_source",)
"""Attributes that format versions 2 and 3 lack."""
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
MOST_DIGITS = 31
"""Most radices of a level: each is at least 2, and all codes fit 31 bits."""
MOST_UNNAMED_CLASSES = 1 << 16
"""Largest number of classes of a set without label names, or its number of rows if that is larger. A prior allocates a
vector for each class up to the largest label."""
COLUMNS = {
    "labels": np.dtype("<i8"),
    "source_ids": np.dtype("<i8"),
    "held_out": np.dtype("u1"),
    "flipped": np.dtype("u1"),
}
"""Datasets beside `codes/0..` with one number per row: the class (-1 for none), the source image (0, 1, ... in order of
first appearance), whether the row is held out from training, and whether it is a mirror image."""
ROW_COLUMNS = {**COLUMNS, CAPTION_ENDS: np.dtype("<i8")}
"""The columns, and the ends of captions, which only sets with captions have."""
SOURCE_NUMBERS = "source_numbers"
"""The dataset of a shard, a file of a set of several files, with the number of each of its sources in the whole set.
The shard's own `source_ids` count its sources alone, so that it is a latent set by itself."""


@dataclass(frozen=True)
class Extent:
    """The contiguous datasets in one file (`arrays_of`): their number of rows, and the offset of each in bytes."""

    path: Path
    rows: int
    offsets: tuple[int, ...]


@dataclass(frozen=True)
class Header:
    """Everything in a latent set's file except the values of codes, conditions, columns and captions.

    `attributes` holds the texts of all attributes as stored, with both digests. `condition_width` is 0 for a file
    without conditions, and `captioned` says whether it has captions.
    """

    extent: Extent
    layout: Layout
    provenance: Provenance
    attributes: dict[str, str]
    condition_width: int
    captioned: bool


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
    first = first_rows(ids)
    if ids.min() < 0 or not np.array_equal(ids[first], np.arange(len(first))):
        return "source ids are not 0, 1, ... in order of first appearance"
    if not np.array_equal(held_out[first][ids], held_out):
        return "rows of one source image are on both sides of the held-out split"
    return None


def first_rows(ids: Int64[np.ndarray, " n"], before: int = -1) -> Int64[np.ndarray, " sources"]:
    """Returns the row at which each source appears first, in order, if ids are numbered by first appearance.

    Each is then larger by one than all before it. Rows whose ids are at most `before` count as seen.
    """
    highest = np.maximum.accumulate(np.concatenate([[before], ids]))
    return np.flatnonzero(highest[1:] != highest[:-1])


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
                write_text(file, name, text)


def write_text(file: h5py.File, name: str, text: str) -> None:
    """Writes a text attribute of fixed length. Those of variable length would need a heap of at least 4 KiB."""
    encoded = text.encode()
    file.attrs.create(name, encoded, dtype=h5py.string_dtype("utf-8", max(1, len(encoded))))


def read_header(path: Path) -> Header:
    """Reads and checks everything except the values of codes, conditions, columns and captions, then closes the file.

    Raises:
        UserError: if the file does not exist, is not HDF5, is truncated or damaged, is not a latent set, has another
            format version, lacks a dataset or an attribute, or refers to other files.
    """
    with opened(path) as file:
        layout, provenance, attributes = _read_attributes(path, file)
        read = (CONDITIONS, CAPTION_ENDS) if int(attributes["format_version"]) > 3 else ()
        optional = [name for name in read if name in file]
        dtypes = {name: dtype for name, dtype in ROW_COLUMNS.items() if name in COLUMNS or name in optional}
        stored = {name: dataset(path, file, name) for name in (*dtypes, *optional)}
        rows = (stored["labels"].shape or (0,))[0]
        if not rows:
            raise UserError(f"{path} has no rows; build the latent set again")
        width = (stored[CONDITIONS].shape or (0,))[-1] if CONDITIONS in optional else 0
        arrays = arrays_of(layout, rows, width)
        stored |= {name: dataset(path, file, name) for name in arrays}
        for name, (dtype, shape) in {**arrays, **{name: (dtype, (rows,)) for name, dtype in dtypes.items()}}.items():
            require_extent(path, stored[name], name, dtype, shape)
        offsets = tuple(contiguous_offset(path, stored[name], name) for name in arrays)
    return Header(Extent(path, rows, offsets), layout, provenance, attributes, width, CAPTION_ENDS in optional)


def read_columns(header: Header, names: Sequence[str] = tuple(COLUMNS)) -> dict[str, np.ndarray]:
    """Reads columns of a file; with `source_ids` also a shard's `source_numbers`. All of them together are checked.

    `caption_ends` of a file without captions are zeros.

    Raises:
        UserError: if the file changed since its header was read, or has wrong labels, sources or splits.
    """
    path, rows, columns = header.extent.path, header.extent.rows, {}
    with opened(path) as file:
        for name in names:
            if name == CAPTION_ENDS and not header.captioned:
                columns[name] = np.zeros(rows, np.int64)
                continue
            stored = dataset(path, file, name)
            # Codes take at least one byte a row, so columns of as many rows are not much larger than the file.
            require_extent(path, stored, name, ROW_COLUMNS[name], (rows,))
            columns[name] = column(path, stored, name)
        if header.captioned and CAPTION_ENDS in names:
            check_captions(path, file, columns[CAPTION_ENDS])
        if COLUMNS.keys() <= {*names} and (error := find_column_error(columns, header.provenance.label_names)):
            raise UserError(f"{path}: {error}; build it again")
        if "source_ids" in names and SOURCE_NUMBERS in file:
            stored = dataset(path, file, SOURCE_NUMBERS)
            sources = (int(columns["source_ids"].max()) + 1,)
            require_extent(path, stored, SOURCE_NUMBERS, COLUMNS["source_ids"], sources)
            columns[SOURCE_NUMBERS] = column(path, stored, SOURCE_NUMBERS)
    return columns


def _read_attributes(path: Path, file: h5py.File) -> tuple[Layout, Provenance, dict[str, str]]:
    try:
        if attribute(file, "format") != FORMAT:
            raise UserError(f"{path} is HDF5 but not a latent set; give one made by build_latents.py")
        return described(path, file.attrs, partial(attribute, file))
    except (UserError, OSError):
        raise
    except ValueError as error:
        raise UserError(f"{path}: its attributes are damaged ({error}); build the latent set again") from error


def _names_of_texts(path: Path, number: Any) -> list[str]:
    """Returns the names of the text attributes that every file of a format version has.

    Raises:
        UserError: if the version is not read.
        ValueError: if it is no number.
    """
    if not isinstance(number, int):
        raise ValueError("format_version is not a whole number")
    if number not in VERSIONS:
        remedy = "build it again" if number in range(FORMAT_VERSION) else "upgrade smalti"
        read = f"{VERSIONS[0]} to {VERSIONS[-1]}"
        raise UserError(f"{path} has format version {number}, this smalti reads {read}; {remedy}")
    digests = ["content_digest", *(["attributes_digest"] if number != 2 else [])]
    new = (*OPTIONAL, *(ADDED_IN_4 if number < 4 else ()))
    return [
        "format",
        "layout",
        *(each.name for each in dataclasses.fields(Provenance) if each.name not in new),
        *digests,
    ]


def described(
    path: Path, stored: Container[str], read: Callable[[str], Any]
) -> tuple[Layout, Provenance, dict[str, str]]:
    """Returns the layout, the provenance and the texts that the attributes of a set hold.

    Args:
        path: the file of the attributes, for messages.
        stored: the names of the attributes, of which only those of the set's format version are read.
        read: returns the attribute of a name, None if it is missing.

    Raises:
        UserError: if their format version is not read, one is missing or is not a text, or they describe no layout.
        ValueError: if the version is no number, or a text is damaged.
    """
    number = read("format_version")
    names = _names_of_texts(path, number)
    if missing := [name for name in names if name not in stored]:
        raise UserError(f"{path} lacks the attributes {', '.join(missing)}; build the latent set again")
    values = {name: read(name) for name in (*names, *(each for each in OPTIONAL if each in stored))}
    texts = {name: value for name, value in values.items() if isinstance(value, str)}
    if wrong := sorted(values.keys() - texts.keys()):
        raise UserError(f"{path}: the attributes {', '.join(wrong)} are not strings; build the latent set again")
    layout = layout_from_json(parse_json(texts["layout"]), str(path))
    return layout, Provenance.from_attributes(texts, str(path)), {**texts, "format_version": str(number)}


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
