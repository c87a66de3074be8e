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
import platform
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from smalti.codes import Layout, Level
from smalti.errors import UserError

FORMAT = "smalti-latents"
FORMAT_VERSION = 1
PAGE_BYTES = 4096
COLUMN_CHUNK_ROWS = 16384
DIGEST_PIECE_BYTES = 1 << 24
COLUMNS = {"labels": np.dtype("<i8"), "source_ids": np.dtype("<i8"), "flipped": np.dtype("u1")}
"""Datasets of one number a row, beside `codes/0..`: class (-1 for none), source image, whether it is mirrored."""


def _software() -> dict[str, str]:
    packages = ("smalti", "torch", "numpy", "h5py")
    return {"python": platform.python_version(), **{package: version(package) for package in packages}}


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
    command: str = field(default_factory=lambda: shlex.join(sys.argv))
    created: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))
    software: dict[str, str] = field(default_factory=_software)

    def __post_init__(self) -> None:
        # As JSON has them (lists for tuples), so that what is read equals what was written.
        for name in ("tokenizer_config", "preprocessing", "software"):
            object.__setattr__(self, name, json.loads(json.dumps(getattr(self, name))))


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


def lay_down(path: Path, layout: Layout, rows: int, provenance: Provenance) -> tuple[int, ...]:
    """Creates a file with its attributes and room for the codes, and returns the offset in bytes of each level's codes.

    Strings are of variable length, which HDF5 keeps outside the header: its 64 KiB limit on attributes is not theirs.
    """
    early = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    early.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)  # else there is no offset before the first write
    with h5py.File(path, "w", alignment_threshold=PAGE_BYTES, alignment_interval=PAGE_BYTES) as file:
        file.attrs["format"] = FORMAT
        file.attrs["format_version"] = FORMAT_VERSION
        file.attrs["layout"] = json.dumps(layout.to_json())
        for name, value in vars(provenance).items():
            file.attrs[name] = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        offsets = []
        for index, level in enumerate(layout.levels):
            shape = (rows, *level.shape)
            grid = file.create_dataset(f"codes/{index}", shape, stored_dtype(level), dcpl=early, fill_time="never")
            offsets.append(grid.id.get_offset())
    return tuple(offsets)


def complete(path: Path, columns: dict[str, np.ndarray], content_digest: str) -> None:
    """Adds what is known last. Only a file that has its digest is a latent set.

    No shuffle filter: it would part the bytes of source ids, which are hashes and repeat in mirror images.
    """
    with h5py.File(path, "r+") as file:
        for name, column in columns.items():
            chunk = (min(len(column), COLUMN_CHUNK_ROWS),)
            file.create_dataset(name, data=column, chunks=chunk, compression="gzip", compression_opts=4)
        file.attrs["content_digest"] = content_digest


def content_digest(path: Path, layout: Layout, offsets: tuple[int, ...], columns: dict[str, np.ndarray]) -> str:
    """SHA-256 of the codes in a file and of the columns in memory, in hexadecimal.

    For `codes/0..`, then `labels`, `source_ids`, `flipped`: a line `name dtype shape` (`codes/0 <u2 100 16 16`), then
    the values in row-major order. So it depends on the numbers and their types, not on how HDF5 keeps them or in which
    blocks they were written. The codes are read and not mapped: memory stays flat.
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
        if file.attrs.get("format") != FORMAT:
            raise UserError(f"{path} is HDF5 but not a latent set; give one made by build_latents.py")
        if (number := file.attrs.get("format_version")) != FORMAT_VERSION:
            raise UserError(f"{path} has format version {number}, this smalti reads {FORMAT_VERSION}; upgrade smalti")
        layout, provenance, content_digest = _read_attributes(path, file)
        grids, columns = _read_datasets(path, file, layout)
        offsets = tuple(grid.id.get_offset() for grid in grids)
        if None in offsets:
            raise UserError(f"{path}: its codes are chunked or compressed, not contiguous; undo the repacking")
        rows = len(columns["labels"])
        return Contents(layout, provenance, content_digest, rows, offsets, columns)


def _read_attributes(path: Path, file: h5py.File) -> tuple[Layout, Provenance, str]:
    types: dict[str, Any] = {"layout": list, "content_digest": str}
    types |= {described.name: described.type for described in dataclasses.fields(Provenance)}
    if missing := [name for name in types if name not in file.attrs]:
        raise UserError(f"{path} lacks the attributes {', '.join(missing)}; build the latent set again")
    texts: dict[str, Any] = {name: file.attrs[name] for name in types}
    if wrong := [name for name, text in texts.items() if not isinstance(text, str)]:
        raise UserError(f"{path}: the attributes {', '.join(wrong)} are not strings; build the latent set again")
    try:
        values = {name: text if types[name] is str else json.loads(text) for name, text in texts.items()}
        layout, digest = Layout.from_json(values.pop("layout")), values.pop("content_digest")
        return layout, Provenance(**{**values, "label_names": tuple(values["label_names"])}), digest
    except (TypeError, KeyError, ValueError) as error:
        raise UserError(f"{path}: its attributes are damaged ({error}); build the latent set again") from error


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
