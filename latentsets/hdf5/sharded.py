"""Latent sets of several files, which are read as one: their order, their index, and rows of all of them.

Each file is a latent set by itself. `build_latents --shard-rows` writes a folder of such files, its shards, with an
index that describes the whole set. Files without an index are read as one set too, if the same tokenizer made them.
"""

import dataclasses
import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from glob import glob, has_magic
from pathlib import Path
from typing import Any

import numpy as np

from smalti.core.codes import Layout
from smalti.core.config import added, config_from_json, read_json
from smalti.core.errors import UserError
from smalti.core.files import write_json
from smalti.latentsets.hdf5.captions import CAPTION_ENDS
from smalti.latentsets.hdf5.digests import attributes_digest, content_digest
from smalti.latentsets.hdf5.format import (
    COLUMNS,
    FORMAT,
    SOURCE_NUMBERS,
    Extent,
    Header,
    arrays_of,
    attribute_texts,
    described,
    read_columns,
    read_header,
)
from smalti.latentsets.provenance import Provenance, shortened

INDEX_NAME = "index.json"
ALIKE = ("tokenizer_digest", "preprocessing", "label_names", "condition_source")
"""The attributes, beside the layout, that files without an index must share to be read as one set."""


@dataclass(frozen=True)
class Shard:
    """A file of a set of several files, as the index lists it.

    Attributes:
        name: Its name in the folder.
        rows: The number of its rows.
        offsets: The offset of each level's codes in bytes, then that of the conditions if there are any.
        file_bytes: The size of the file.
        content_digest: Its own content digest.
        condition_width: Numbers in the vector of each row; 0 for none.
        captioned: Whether it has captions.
    """

    name: str
    rows: int
    offsets: tuple[int, ...]
    file_bytes: int
    content_digest: str
    condition_width: int = added(off=0)
    captioned: bool = added(off=False)


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
        condition_width: Numbers in the vector of each row; 0 for none.
        captioned: Whether each file has captions.
    """

    layout: Layout
    provenance: Provenance
    attributes: dict[str, str]
    extents: tuple[Extent, ...]
    digests: tuple[str, ...]
    indexed: bool
    condition_width: int
    captioned: tuple[bool, ...]

    @property
    def column_names(self) -> tuple[str, ...]:
        """The names of all columns, with the ends of captions if a file has any."""
        return (*COLUMNS, CAPTION_ENDS) if any(self.captioned) else tuple(COLUMNS)

    @property
    def identity(self) -> str:
        """The content digest, or one over those of the files if that of the whole set is not recorded."""
        return self.attributes.get("content_digest") or hashlib.sha256(" ".join(self.digests).encode()).hexdigest()

    def headers(self) -> Iterator[Header]:
        """Reads the header of each file again, in order.

        Raises:
            UserError: as `header` does.
        """
        return map(self.header, range(len(self.extents)))

    def header(self, number: int) -> Header:
        """Reads the header of one file again.

        Raises:
            UserError: if the file was replaced by another latent set.
        """
        extent = self.extents[number]
        header = read_header(extent.path)
        if header.extent != extent or header.attributes["content_digest"] != self.digests[number]:
            raise UserError(f"{extent.path} was replaced by another latent set since it was opened; start again")
        return header

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
            header.layout,
            header.provenance,
            attributes,
            (header.extent,),
            (attributes["content_digest"],),
            indexed=False,
            condition_width=header.condition_width,
            captioned=(header.captioned,),
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
        same = {
            "layout": header.layout == first.layout,
            "width of conditions": header.condition_width == first.condition_width,
        }
        same |= {name: getattr(header.provenance, name) == getattr(first.provenance, name) for name in ALIKE}
        if different := [name for name, equal in same.items() if not equal]:
            raise UserError(
                f"{first.extent.path} and {header.extent.path} cannot be read as one set, because their "
                f"{different[0]} differs; give files built with equal settings"
            )
    provenances = [header.provenance for header in headers]
    prints = dict.fromkeys(each.image_fingerprint for each in provenances)
    provenance = dataclasses.replace(
        first.provenance,
        image_source=", ".join(dict.fromkeys(each.image_source for each in provenances)),
        image_fingerprint=prints.popitem()[0] if len(prints) == 1 else _digest_of(list(prints)),
        skipped=shortened(image for each in provenances for image in each.skipped),
    )
    return SetFiles(
        first.layout,
        provenance,
        attribute_texts(first.layout, provenance),
        tuple(header.extent for header in headers),
        tuple(header.attributes["content_digest"] for header in headers),
        indexed=False,
        condition_width=first.condition_width,
        captioned=tuple(header.captioned for header in headers),
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
        layout, provenance, texts = described(path, attributes, attributes.get)
    except (ValueError, TypeError, AttributeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path} is damaged ({error}); copy it again, or build the latent set again") from error
    if not shards:
        raise UserError(f"{path} lists no files; build the latent set again")
    _require_listed(folder, layout, shards)
    extents = tuple(Extent(folder / shard.name, shard.rows, shard.offsets) for shard in shards)
    return SetFiles(
        layout,
        provenance,
        texts,
        extents,
        tuple(shard.content_digest for shard in shards),
        indexed=True,
        condition_width=shards[0].condition_width,
        captioned=tuple(shard.captioned for shard in shards),
    )


def names_in_index(contents: bytes) -> list[str]:
    """Returns the names of the shards that an index lists; empty if it is not the index of a latent set."""
    try:
        index = json.loads(contents)
        return [str(shard["name"]) for shard in index["shards"]] if index["attributes"]["format"] == FORMAT else []
    except (ValueError, TypeError, KeyError):
        return []


def _require_listed(folder: Path, layout: Layout, shards: Sequence[Shard]) -> None:
    """Checks that the folder holds exactly the files that its index lists, each of the listed size."""
    sizes = {file.name: file.stat().st_size for file in folder.glob("*.h5")}
    for number, shard in enumerate(shards):
        if shard.name not in sizes:
            raise UserError(f"{folder} lacks {shard.name}, one of its {len(shards)} files; copy the folder again")
        arrays = arrays_of(layout, shard.rows, shard.condition_width).values()
        ends = [
            offset + math.prod(shape) * dtype.itemsize
            for (dtype, shape), offset in zip(arrays, shard.offsets, strict=False)
        ]
        if sizes[shard.name] != shard.file_bytes or len(shard.offsets) != len(arrays):
            raise UserError(f"{folder / shard.name} is not the file that {INDEX_NAME} lists; copy the folder again")
        wrong = shard.rows < 1 or shard.condition_width != shards[0].condition_width
        if wrong or min(shard.offsets) < 1 or max(ends) > shard.file_bytes:
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
        Shard(
            extent.path.name,
            extent.rows,
            extent.offsets,
            extent.path.stat().st_size,
            digest,
            files.condition_width,
            captioned,
        )
        for extent, digest, captioned in zip(files.extents, files.digests, files.captioned, strict=True)
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

    kinds = {"condition_width": files.condition_width, "captioned": files.captioned}
    return content_digest(files.layout, texts, files.extents, column, **kinds)
