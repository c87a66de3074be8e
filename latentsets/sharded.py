"""Latent sets of several files, which are read as one: their order, their index, and rows of all of them.

Each file is a latent set by itself. `build_latents --shard-rows` writes a folder of such files, its shards, with an
index that describes the whole set. SetFiles without an index are read as one set too, if the same tokenizer made them.
"""

import dataclasses
import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from glob import glob, has_magic
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int64
from numpy.lib.stride_tricks import as_strided
from torch import Tensor

from smalti.core.codes import Layout, Level
from smalti.core.config import config_from_json, read_json
from smalti.core.errors import UserError
from smalti.core.files import write_json
from smalti.latentsets.digests import attributes_digest, content_digest
from smalti.latentsets.format import (
    COLUMNS,
    FORMAT,
    SOURCE_NUMBERS,
    Extent,
    Header,
    attribute_texts,
    described,
    level_bytes,
    read_columns,
    read_header,
    require_version,
    stored_dtype,
)
from smalti.latentsets.provenance import Provenance

INDEX_NAME = "index.json"
ALIKE = ("tokenizer_digest", "preprocessing", "label_names")
"""The attributes, beside the layout, that files without an index must share to be read as one set."""


@dataclass(frozen=True)
class Shard:
    """A file of a set of several files, as the index lists it.

    Attributes:
        name: Its name in the folder.
        rows: The number of its rows.
        offsets: The offset of each level's codes in bytes.
        file_bytes: The size of the file.
        content_digest: Its own content digest.
    """

    name: str
    rows: int
    offsets: tuple[int, ...]
    file_bytes: int
    content_digest: str


@dataclass(frozen=True)
class SetFiles:
    """An opened set: the description of the whole set, and where its files have their codes.

    Attributes:
        layout: The layout of the codes.
        provenance: The provenance of the whole set.
        attributes: The texts of its attributes. Several files without an index have no digests.
        extents: The files in the order of their rows.
        digests: The content digest of each file.
        indexed: True for the shards of one set, whose sources have one numbering.
    """

    layout: Layout
    provenance: Provenance
    attributes: dict[str, str]
    extents: tuple[Extent, ...]
    digests: tuple[str, ...]
    indexed: bool

    @property
    def identity(self) -> str:
        """The content digest, or one over those of the files if that of the whole set is not recorded."""
        return self.attributes.get("content_digest") or hashlib.sha256(" ".join(self.digests).encode()).hexdigest()

    def headers(self) -> Iterator[Header]:
        """Reads the header of each file again, in order.

        Raises:
            UserError: if a file was replaced by another latent set.
        """
        for extent, digest in zip(self.extents, self.digests, strict=True):
            header = read_header(extent.path)
            if header.extent != extent or header.attributes["content_digest"] != digest:
                raise UserError(f"{extent.path} was replaced by another latent set since it was opened; start again")
            yield header

    def columns(self, names: Sequence[str] = tuple(COLUMNS)) -> Iterator[dict[str, np.ndarray]]:
        """Reads columns of each file in order, with the source ids of the whole set.

        Without an index, sources of different files are different sources.

        Raises:
            UserError: as `headers` does, and for wrong columns.
        """
        before = 0
        for header in self.headers():
            columns = read_columns(header, names)
            numbers, ids = columns.pop(SOURCE_NUMBERS, None), columns.get("source_ids")
            if ids is not None and self.indexed:
                if numbers is None:
                    raise UserError(f"{header.extent.path} lacks {SOURCE_NUMBERS}; build the latent set again")
                columns["source_ids"] = numbers[ids]
            elif ids is not None:
                columns["source_ids"] = ids + before
                before += int(ids.max()) + 1
            yield columns


def open_files(path: Path) -> SetFiles:
    """Opens a file, a folder of files, or the files that a pattern such as `folder/*.h5` matches, in order of name.

    Raises:
        UserError: if there is none, one cannot be read, they do not fit together, or one in the index is missing.
    """
    if path.is_dir():
        return _read_index(path) if (path / INDEX_NAME).exists() else _combined(path, sorted(path.glob("*.h5")))
    if path.exists() or not has_magic(str(path)):
        header = read_header(path)
        attributes = header.attributes
        return SetFiles(
            header.layout, header.provenance, attributes, (header.extent,), (attributes["content_digest"],), False
        )
    found = sorted(map(Path, glob(str(path))))
    folders = {file.parent for file in found}
    if len(folders) == 1 and (index := found[0].parent / INDEX_NAME).exists():
        whole = _read_index(index.parent)
        if [extent.path for extent in whole.extents] == found:
            return whole
    return _combined(path, found)


def _combined(path: Path, found: Sequence[Path]) -> SetFiles:
    """Describes files without an index as one set."""
    if not found:
        raise UserError(f"there is no latent set *.h5 at {path}; build one with build_latents.py --shard-rows")
    headers = [read_header(file) for file in found]
    first = headers[0]
    for header in headers[1:]:
        same = {"layout": header.layout == first.layout}
        same |= {name: getattr(header.provenance, name) == getattr(first.provenance, name) for name in ALIKE}
        if different := [name for name, equal in same.items() if not equal]:
            raise UserError(
                f"{first.extent.path} and {header.extent.path} are not one set: they have another {different[0]}; "
                "give files that one tokenizer made in one way"
            )
    provenances = [header.provenance for header in headers]
    prints = dict.fromkeys(each.image_fingerprint for each in provenances)
    provenance = dataclasses.replace(
        first.provenance,
        image_source=", ".join(dict.fromkeys(each.image_source for each in provenances)),
        image_fingerprint=prints.popitem()[0] if len(prints) == 1 else _digest_of(list(prints)),
        skipped=tuple(image for each in provenances for image in each.skipped),
    )
    return SetFiles(
        first.layout,
        provenance,
        attribute_texts(first.layout, provenance),
        tuple(header.extent for header in headers),
        tuple(header.attributes["content_digest"] for header in headers),
        indexed=False,
    )


def _digest_of(texts: list[str]) -> str:
    return hashlib.sha256(" ".join(texts).encode()).hexdigest()


def _read_index(folder: Path) -> SetFiles:
    """Opens the set that an index describes, without opening its files."""
    path = folder / INDEX_NAME
    try:
        index = read_json(path)
        if index.keys() != {"attributes", "shards"} or index["attributes"].get("format") != FORMAT:
            raise UserError(f"{path} is not the index of a latent set; remove it, or build the set again")
        attributes, shards = index["attributes"], [config_from_json(Shard, each, str(path)) for each in index["shards"]]
        names = [*require_version(path, attributes.get("format_version")), "format_version"]
        if missing := [name for name in names if name not in attributes]:
            raise UserError(f"{path} lacks the attributes {', '.join(missing)}; build the latent set again")
        layout, provenance, texts = described(path, {name: attributes[name] for name in names})
    except (ValueError, TypeError, AttributeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path} is damaged ({error}); copy it again, or build the latent set again") from error
    if not shards:
        raise UserError(f"{path} lists no files; build the latent set again")
    _require_listed(folder, layout, shards)
    extents = tuple(Extent(folder / shard.name, shard.rows, shard.offsets) for shard in shards)
    return SetFiles(layout, provenance, texts, extents, tuple(shard.content_digest for shard in shards), indexed=True)


def _require_listed(folder: Path, layout: Layout, shards: Sequence[Shard]) -> None:
    """Checks that the folder holds exactly the files that its index lists, each of the listed size."""
    sizes = {file.name: file.stat().st_size for file in folder.glob("*.h5")}
    for number, shard in enumerate(shards):
        if shard.name not in sizes:
            raise UserError(f"{folder} lacks {shard.name}, one of its {len(shards)} files; copy the folder again")
        ends = [
            offset + level_bytes(level, shard.rows) for level, offset in zip(layout.levels, shard.offsets, strict=False)
        ]
        if sizes[shard.name] != shard.file_bytes or len(shard.offsets) != len(layout.levels):
            raise UserError(f"{folder / shard.name} is not the file that {INDEX_NAME} lists; copy the folder again")
        if shard.rows < 1 or min(shard.offsets) < 1 or max(ends) > shard.file_bytes:
            raise UserError(f"{folder / INDEX_NAME} is damaged at file {number}; copy the folder again")
    if others := sorted(sizes.keys() - {shard.name for shard in shards}):
        raise UserError(
            f"{folder / others[0]} is not a file of the set in that folder; move it away, or give '{folder}/*.h5' to "
            "read all files"
        )


def write_index(folder: Path, known_digest: str | None = None) -> None:
    """Writes the index of the shards in a folder, which completes the set. All codes are read for its content digest.

    Args:
        folder: The folder of the shards, in order of name.
        known_digest: The content digest, if it is known.
    """
    found = sorted(folder.glob("*.h5"))
    files = dataclasses.replace(_combined(folder, found), indexed=True)
    shards = [
        Shard(extent.path.name, extent.rows, extent.offsets, extent.path.stat().st_size, digest)
        for extent, digest in zip(files.extents, files.digests, strict=True)
    ]
    texts = dict(files.attributes)
    texts["content_digest"] = known_digest or digest_of_files(files, texts)
    texts["attributes_digest"] = attributes_digest(texts)
    attributes: dict[str, Any] = {**texts, "format_version": int(texts["format_version"])}
    write_json(folder / INDEX_NAME, {"attributes": attributes, "shards": [dataclasses.asdict(each) for each in shards]})


def digest_of_files(files: SetFiles, texts: Mapping[str, str]) -> str:
    """Computes the content digest of a set from its current bytes, in the memory that a column of one file takes."""

    def column(name: str) -> Iterator[np.ndarray]:
        return (columns[name] for columns in files.columns([name]))

    return content_digest(files.layout, texts, files.extents, column)


class MappedCodes:
    """One level's codes in all files of a set, memory-mapped.

    Args:
        extents: The files, in order.
        index: The number of the level.
        level: The level.
    """

    def __init__(self, extents: Sequence[Extent], index: int, level: Level) -> None:
        self.level = level
        # Plain arrays over the memory maps: indexing an np.memmap builds an instance of the subclass each time.
        self._maps = [
            np.asarray(
                np.memmap(extent.path, stored_dtype(level), "r", extent.offsets[index], (extent.rows, *level.shape))
            )
            for extent in extents
        ]
        self._ends = np.cumsum([extent.rows for extent in extents])
        self._map_addresses()

    def take(self, rows: Sequence[int] | Int64[Tensor, " b"] | Int64[np.ndarray, " b"]) -> np.ndarray:
        """Returns the codes of rows in any order, `(b, *level.shape)` in the stored dtype.

        Raises:
            IndexError: if a row is outside [-len, len).
        """
        if len(self._maps) == 1:
            return np.take(self._maps[0], rows, axis=0)
        total, numbers = int(self._ends[-1]), np.asarray(rows, np.int64)
        lowest, highest = (numbers.min(), numbers.max()) if numbers.size else (0, 0)
        if not -total <= lowest <= highest < total:
            raise IndexError(f"rows {lowest} to {highest} are not all in [-{total}, {total})")
        if lowest < 0:
            numbers = np.where(numbers < 0, numbers + total, numbers)
        units = self._shifts[np.searchsorted(self._ends, numbers, "right")] + numbers * len(self._within)
        if len(self._within) > 1:
            units = units[:, None] + self._within
        codes = np.take(self._memory, units, axis=0).view(self._maps[0].dtype)
        return codes.reshape(-1, *self.level.shape)

    def blocks(self, rows: int) -> Iterator[np.ndarray]:
        """Yields the codes of all rows in order, at most so many rows at once."""
        for codes in self._maps:
            for start in range(0, len(codes), rows):
                yield codes[start : start + rows]

    def _map_addresses(self) -> None:
        """Prepares `take` to gather rows of all files in one call: one for each file would take several times as long.

        All maps are in this process's memory, so the memory from the first to the last is one array of units, with a
        unit that divides the size of a row and all distances between maps. What lies between the maps is never read.
        """
        row_bytes = math.prod(self.level.shape) * self.level.dtype.itemsize
        starts = np.array([codes.ctypes.data for codes in self._maps], np.int64)
        distances = starts - starts.min()
        unit = math.gcd(row_bytes, *distances.tolist())
        self._within = np.arange(row_bytes // unit)
        first = self._maps[int(starts.argmin())].reshape(-1)[: row_bytes // self.level.dtype.itemsize]
        size = (int(distances.max()) + max(codes.nbytes for codes in self._maps)) // unit
        self._memory = as_strided(first.view(np.uint8)[:unit].reshape(1, unit), (size, unit), (unit, 1))
        rows_before = self._ends - [len(codes) for codes in self._maps]
        self._shifts = distances // unit - rows_before * len(self._within)
