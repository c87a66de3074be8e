"""The file: names, attributes and datasets of a latent set, how they are laid down, checked and digested.

Writing rows is `writer.py`'s, reading them `reader.py`'s; here is only what both must agree on. Codes are contiguous
datasets, so that a reader can map them; the columns beside them are compressed, so that they weigh next to nothing. All
numbers are little-endian.
"""

import dataclasses
import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from jaxtyping import Int64

from smalti.core.codes import Layout, Level
from smalti.core.errors import UserError
from smalti.core.provenance import command, versions

FORMAT = "smalti-latents"
FORMAT_VERSION = 2
ALIGNMENT_BYTES = 512  # of each level's codes: rows of 512 bytes and their parts keep within pages and cache lines
COLUMN_CHUNK_ROWS = 65536
LIBRARY = ("v110", "v110")  # HDF5 of 2016 reads it; older structures take several KiB more
DIGEST_PIECE_BYTES = 1 << 24
COLUMNS = {
    "labels": np.dtype("<i8"),
    "source_ids": np.dtype("<i8"),
    "held_out": np.dtype("u1"),
    "flipped": np.dtype("u1"),
}
"""Datasets of one number a row, beside `codes/0..`: class (-1 for none), source image (0, 1, ... in order of first
appearance), whether training must not see it, whether it is mirrored."""


@dataclass(frozen=True)
class Provenance:
    """Where codes come from: all one needs to trust and to decode them. Every field is a root attribute of its name.

    Attributes:
        tokenizer_kind: as registered.
        tokenizer_config: its config's fields, JSON values.
        tokenizer_digest: SHA-256 over kind, config and weights (`Checkpointed.digest`).
        tokenizer_source: the folder or hub id it was loaded from.
        image_source: what was given as images.
        image_fingerprint: changes when the images do.
        preprocessing: what was done to the images before encoding, JSON values.
        label_names: the name of each label from 0 on; empty where images have no labels.
        skipped: images left out because they could not be decoded: `row` in the image source and `reason`, in order.
        command: the command line that made the set.
        created: when, UTC, ISO 8601.
        software: versions that made it.
    """

    tokenizer_kind: str
    tokenizer_config: dict[str, Any]
    tokenizer_digest: str
    tokenizer_source: str
    image_source: str
    image_fingerprint: str
    preprocessing: dict[str, Any]
    label_names: tuple[str, ...] = ()
    skipped: tuple[dict[str, Any], ...] = ()
    command: str = field(default_factory=command)
    created: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))
    software: dict[str, str] = field(default_factory=versions)

    def __post_init__(self) -> None:
        # As JSON has them (lists for tuples), so that what is read equals what was written.
        for name in ("tokenizer_config", "preprocessing", "software"):
            object.__setattr__(self, name, json.loads(json.dumps(getattr(self, name))))

    def to_attributes(self) -> dict[str, str]:
        """Text by name: what is no text itself, as JSON."""
        return {
            name: value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
            for name, value in vars(self).items()
        }

    @classmethod
    def from_attributes(cls, texts: Mapping[str, str]) -> "Provenance":
        """The inverse of `to_attributes`.

        Raises:
            ValueError: if a text is not the JSON it should be.
            KeyError: if one is missing.
        """
        types: dict[str, Any] = {described.name: described.type for described in dataclasses.fields(cls)}
        values = {name: texts[name] if kind is str else json.loads(texts[name]) for name, kind in types.items()}
        return cls(**{**values, **{name: tuple(values[name]) for name in ("label_names", "skipped")}})


@dataclass(frozen=True)
class Contents:
    """What a whole latent set says of itself, its codes excepted: those lie at `offsets` (bytes), one a level."""

    layout: Layout
    provenance: Provenance
    content_digest: str
    rows: int
    offsets: tuple[int, ...]
    columns: dict[str, np.ndarray]


def stored_dtype(level: Level) -> np.dtype:
    """`level.dtype`, little-endian whatever the machine."""
    return level.dtype.newbyteorder("<")


def level_bytes(level: Level, rows: int) -> int:
    """How many bytes the codes of one level take."""
    return rows * math.prod(level.shape) * level.dtype.itemsize


def number_sources(ids: Int64[np.ndarray, " n"]) -> Int64[np.ndarray, " n"]:
    """Any ids as `source_ids`: 0, 1, ... in order of first appearance, which compress to next to nothing."""
    _, first, inverse = np.unique(ids, return_index=True, return_inverse=True)
    return np.argsort(np.argsort(first))[inverse]


def fault(columns: Mapping[str, np.ndarray], label_names: Sequence[str]) -> str | None:
    """What is wrong with the columns of a whole set, in words; None if nothing is."""
    labels, ids, held_out = (columns[name] for name in ("labels", "source_ids", "held_out"))
    largest_label = (len(label_names) or 2**63) - 1
    if len(wrong := labels[(labels < -1) | (labels > largest_label)]):
        return f"{wrong[0]} is no label: they are -1 for none, or from 0 to {largest_label}"
    if max(held_out.max(), columns["flipped"].max()) > 1:
        return "held_out and flipped are not all 0 or 1"
    if not np.array_equal(number_sources(ids), ids):
        return "source ids are not 0, 1, ... in order of first appearance"
    if not np.array_equal(held_out[np.unique(ids, return_index=True)[1]][ids], held_out):
        return "rows of one source image are on both sides of the held-out split"
    return None


def lay_down(path: Path, layout: Layout, rows: int) -> tuple[int, ...]:
    """Creates a file with room for the codes and nothing else; returns the offset in bytes of each level's codes.

    It is frugal: with HDF5's defaults what surrounds the codes would be some per cent of a small set.
    """
    access, creation = h5py.h5p.create(h5py.h5p.FILE_ACCESS), h5py.h5p.create(h5py.h5p.FILE_CREATE)
    access.set_libver_bounds(h5py.h5f.LIBVER_V110, h5py.h5f.LIBVER_V110)
    access.set_alignment(ALIGNMENT_BYTES, ALIGNMENT_BYTES)
    creation.set_attr_phase_change(64, 0)  # attributes in the root's header
    early = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    early.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)  # else there is no offset before the first write
    offsets = []
    with h5py.File(h5py.h5f.create(os.fsencode(path), h5py.h5f.ACC_TRUNC, creation, access)) as file:
        for index, level in enumerate(layout.levels):
            shape = (rows, *level.shape)
            grid = file.create_dataset(f"codes/{index}", shape, stored_dtype(level), dcpl=early, fill_time="never")
            offsets.append(grid.id.get_offset())
    return tuple(offsets)


def add_columns(path: Path, layout: Layout, provenance: Provenance, columns: Mapping[str, np.ndarray]) -> None:
    """Adds all else but the digest."""
    texts = {"format": FORMAT, "layout": json.dumps(layout.to_json()), **provenance.to_attributes()}
    with h5py.File(path, "r+", libver=LIBRARY) as file:
        for name, column in columns.items():
            chunk = (min(len(column), COLUMN_CHUNK_ROWS),)
            file.create_dataset(name, data=column, chunks=chunk, shuffle=True, compression="gzip")
        file.attrs["format_version"] = FORMAT_VERSION
        for name, text in texts.items():
            _write_text(file, name, text)


def complete(path: Path, content_digest: str) -> None:
    """Adds what is known last. Only a file that has its digest is a latent set."""
    with h5py.File(path, "r+", libver=LIBRARY) as file:
        _write_text(file, "content_digest", content_digest)


def _write_text(file: h5py.File, name: str, text: str) -> None:
    """An attribute of fixed length: those of variable length go to a heap of 4 KiB at least."""
    encoded = text.encode()
    file.attrs.create(name, encoded, dtype=h5py.string_dtype("utf-8", max(1, len(encoded))))


def content_digest(path: Path, layout: Layout, offsets: tuple[int, ...], columns: Mapping[str, np.ndarray]) -> str:
    """SHA-256 of the codes in a file and of the columns in memory, in hexadecimal.

    For `codes/0..`, then `labels`, `source_ids`, `held_out`, `flipped`: a line `name dtype shape` (`codes/0 <u2 100 16
    16`), then the values in row-major order. So it depends on the numbers and their types, not on how HDF5 keeps them
    or in which blocks they were written. The codes are read and not mapped: memory stays flat.
    """
    sha, rows = hashlib.sha256(), len(columns["labels"])

    def announce(name: str, dtype: np.dtype, shape: tuple[int, ...]) -> None:
        sha.update(f"{name} {dtype.str} {' '.join(map(str, shape))}\n".encode())

    with path.open("rb") as file:
        for index, (level, offset) in enumerate(zip(layout.levels, offsets, strict=True)):
            announce(f"codes/{index}", stored_dtype(level), (rows, *level.shape))
            file.seek(offset)
            left = level_bytes(level, rows)
            while left:
                piece = file.read(min(left, DIGEST_PIECE_BYTES))
                assert piece, "a file was cut short while it was read"
                sha.update(piece)
                left -= len(piece)
    for name, dtype in COLUMNS.items():
        announce(name, dtype, (rows,))
        sha.update(np.ascontiguousarray(columns[name], dtype).data)
    return sha.hexdigest()


def read_contents(path: Path) -> Contents:
    """Reads and checks everything but the codes' values, and closes the file.

    Raises:
        UserError: if there is no file, it is not HDF5, truncated or damaged, not a latent set, of another format
            version, or lacks something.
    """
    with _opened(path) as file:
        if _text(file.attrs.get("format")) != FORMAT:
            raise UserError(f"{path} is HDF5 but not a latent set; give one made by build_latents.py")
        if (number := file.attrs.get("format_version")) != FORMAT_VERSION:
            remedy = "build it again" if number in range(FORMAT_VERSION) else "upgrade smalti"
            raise UserError(f"{path} has format version {number}, this smalti reads {FORMAT_VERSION}; {remedy}")
        layout, provenance, content_digest = _read_attributes(path, file)
        grids, columns = _read_datasets(path, file, layout)
        offsets = tuple(grid.id.get_offset() for grid in grids)
        if None in offsets:
            raise UserError(f"{path}: its codes are chunked or compressed, not contiguous; undo the repacking")
        rows = len(columns["labels"])
        return Contents(layout, provenance, content_digest, rows, offsets, columns)


def _read_attributes(path: Path, file: h5py.File) -> tuple[Layout, Provenance, str]:
    names = ["layout", "content_digest", *(described.name for described in dataclasses.fields(Provenance))]
    if missing := [name for name in names if name not in file.attrs]:
        raise UserError(f"{path} lacks the attributes {', '.join(missing)}; build the latent set again")
    texts: dict[str, Any] = {name: _text(file.attrs[name]) for name in names}
    if wrong := [name for name, text in texts.items() if not isinstance(text, str)]:
        raise UserError(f"{path}: the attributes {', '.join(wrong)} are not strings; build the latent set again")
    try:
        layout = Layout.from_json(json.loads(texts["layout"]))
        return layout, Provenance.from_attributes(texts), texts["content_digest"]
    except (TypeError, KeyError, ValueError) as error:
        raise UserError(f"{path}: its attributes are damaged ({error}); build the latent set again") from error


def _text(value: Any) -> Any:
    """An attribute's value; h5py leaves strings of fixed length as bytes."""
    return value.decode(errors="replace") if isinstance(value, bytes) else value


def _read_datasets(path: Path, file: h5py.File, layout: Layout) -> tuple[list[h5py.Dataset], dict[str, np.ndarray]]:
    """The codes' datasets, coarsest level first, and the columns' values."""
    expected = {f"codes/{i}": (stored_dtype(level), level.shape) for i, level in enumerate(layout.levels)}
    expected |= {name: (dtype, ()) for name, dtype in COLUMNS.items()}
    found: dict[str, h5py.Dataset] = {}
    for name in expected:
        dataset = file.get(name)
        if not isinstance(dataset, h5py.Dataset):
            raise UserError(f"{path} lacks {name}; build the latent set again")
        found[name] = dataset
    rows = found["labels"].size
    for name, (dtype, shape) in expected.items():
        if (found[name].dtype, found[name].shape) != (dtype, (rows, *shape)):
            has, needs = f"{found[name].shape} {found[name].dtype}", f"{(rows, *shape)} {dtype}"
            raise UserError(f"{path}: {name} is {has}, not {needs}; build the latent set again")
    return [found[f"codes/{i}"] for i in range(len(layout.levels))], {name: found[name][:] for name in COLUMNS}


@contextmanager
def _opened(path: Path) -> Iterator[h5py.File]:
    """The file, open for reading without a lock: many read at once, and some shared file systems have no locks."""
    try:
        with h5py.File(path, "r", locking=False) as file:
            yield file
    except FileNotFoundError as error:
        raise UserError(f"there is no latent set at {path}; build one with build_latents.py") from error
    except (OSError, RuntimeError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise UserError(f"{path} cannot be read: {os.strerror(error.errno)}") from error
        if not h5py.is_hdf5(path):
            raise UserError(f"{path} is not an HDF5 file; give a latent set made by build_latents.py") from error
        raise UserError(f"{path} is truncated or damaged; copy it again, or build it again") from error
