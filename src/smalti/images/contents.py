"""The contents of an image set besides its pixels: labels, source ids, the held-out split, a fingerprint.

Tables are opened in `sources.py`. Pixels are decoded in `image_set.py`.
"""

import hashlib
import os
import pickle
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import torch
from fsspec.core import url_to_fs
from jaxtyping import Bool, Int64
from torch import Tensor

from smalti.core.errors import UserError
from smalti.core.randomness import Stream, derive
from smalti.images.formats.archives import member_of, read_member, shown_path
from smalti.images.formats.opening import UnreadableImageError
from smalti.images.sources import Table, open_table, stamp
from smalti.images.splits import HELD_OUT_PERCENT, also_held_out, held_out

_SKIN_TONES_AND_STYLE = {"1F3FB", "1F3FC", "1F3FD", "1F3FE", "1F3FF", "FE0F"}
_KEY_RECIPE = "smalti 1"  # part of every source id: change it whenever the keys change, so that no cached id is reused
_ROWS_AT_ONCE = 64  # encoded rows in memory
_SHOWN_CLASSES = 10  # the largest ones


@dataclass(frozen=True)
class Contents:
    """The contents of an image set.

    Attributes:
        images: a table with one column of encoded images, `column`.
        column: its name.
        labels: one for each image, -1 if it has none.
        label_names: names of the labels 0, 1, ...
        source_ids: one for each image, equal for images of one original.
        held_out: marks the images that training never uses.
        fingerprint: SHA-256 over source ids, labels and encoded images in order.
        notes: what was left out and why, a sentence each.
        captions: reads the captions: one for each image, "" for none; None if no image has one.
    """

    images: datasets.Dataset
    column: str
    labels: Int64[Tensor, " n"]
    label_names: tuple[str, ...]
    source_ids: Int64[Tensor, " n"]
    held_out: Bool[Tensor, " n"]
    fingerprint: str
    notes: tuple[str, ...]
    captions: Callable[[], list[str] | None]


def read_contents(table: Table, held_out_images: str | None, channels: int, columns: Mapping[str, Any]) -> Contents:
    """Reads the contents of a table, and of a second one if other images are held out.

    Args:
        table: the images.
        held_out_images: `none`, a fraction such as `0.05`, or another source, whose images are added and are the
            held-out split; None for the fraction 0.1.
        channels: of the images.
        columns: the columns that a user chose, as `open_table` takes them; those of the other source have the same
            names, unless it has none of these.

    Raises:
        UserError: if the fraction is not between 0 and 1, or the other source cannot be opened.
    """
    percent = held_out_percent(held_out_images)
    tables = [table]
    if percent is None:
        assert held_out_images is not None
        tables.append(_open_held_out(held_out_images, channels, columns))
    labels, label_names = _joined_labels([read_labels(each) for each in tables])
    ids = torch.cat([read_source_ids(each) for each in tables])
    contents = torch.cat([_hash_of_images(each) for each in tables])
    parts = (part.numpy().astype("<i8").tobytes() for part in (ids, labels, contents))
    notes = tuple(note for each in tables for note in each.notes)
    images = [each.rows.select_columns(each.image_column) for each in tables]
    if percent is not None:
        out, joined = held_out(ids, percent), images[0]
    else:
        ids, out, overlaps = _split_by_source(tables, ids, contents, held_out_images)
        notes += overlaps
        column = table.image_column
        if tables[1].image_column != column:
            images[1] = images[1].rename_column(tables[1].image_column, column)
        joined = datasets.concatenate_datasets(
            [each.cast_column(column, datasets.Image(decode=False)) for each in images]
        )
    fingerprint = hashlib.sha256(b"".join(parts)).hexdigest()
    captions = partial(_read_captions, tables)
    return Contents(joined, table.image_column, labels, label_names, ids, out, fingerprint, notes, captions)


def _split_by_source(
    tables: Sequence[Table], ids: Int64[Tensor, " n"], contents: Int64[Tensor, " n"], held_out_images: str | None
) -> tuple[Int64[Tensor, " n"], Bool[Tensor, " n"], tuple[str, ...]]:
    """Holds out the second table, and what of the first has its images or sources; returns ids, the split, and notes.

    Ids of two tables are compared if both are hashes of contents, or of texts in columns of one name. Numbers are not:
    two files that each count their sources from 0 would share ids without sharing images, and lose training data.
    Ids of the held-out images that are equal without being comparable are replaced.
    """
    own, key = len(tables[0].rows), tables[0].key_column
    same_key = key == tables[1].key_column
    comparable = same_key and (key is None or all(_is_text(each, key) for each in tables))
    unreadable = contents == _hash_keys([None], "image", _KEY_RECIPE)["value"][0]
    distinct = torch.where(unreadable, -1 - torch.arange(len(contents)), contents)  # unknown contents are not equal
    marked = also_held_out(ids[:own], distinct[:own], ids[own:], distinct[own:], comparable=comparable)
    equal = torch.isin(contents[:own], contents[own:]) & marked
    confused = torch.isin(ids[:own], ids[own:]) & ~marked
    notes = []
    if both := int(equal.sum()):
        notes.append(f"{both} of {own} images are also in {held_out_images}: they are held out, and not trained on")
    if siblings := int((marked & ~equal).sum()):
        shared = f"{siblings} of {own} images share a source ({key}) with held-out images"
        notes.append(f"{shared}: they are held out too, and not trained on")
    if same_key and (number := int(confused.sum())):
        shared = f"{number} of {own} images have a {key} that is also in {held_out_images}, but other contents"
        notes.append(f"{shared}: they are trained on, as numbers may count from 0 in each; write equal sources as text")
    if not comparable:
        clash = torch.isin(ids[own:], ids[:own])
        renamed = derive(ids[own:], Stream.HELD_OUT_SPLIT) & torch.iinfo(torch.int64).max
        ids = torch.cat([ids[:own], torch.where(clash, renamed, ids[own:])])
    return ids, torch.cat([marked, torch.ones(len(ids) - own, dtype=torch.bool)]), tuple(notes)


def _is_text(table: Table, column: str) -> bool:
    kind = table.rows.data.column(column).type
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)


def _open_held_out(source: str, channels: int, columns: Mapping[str, Any]) -> Table:
    """Opens the source of the held-out images with the chosen columns; without them, and a note, if it has none."""
    try:
        return open_table(source, channels=channels, **columns)
    except UserError as error:
        if not any(columns.values()):
            raise
        try:
            table = open_table(source, channels=channels)
        except UserError:
            raise error from None
        note = f"{source} is read without the columns that were chosen for the other images: {error}"
        return replace(table, notes=(*table.notes, note))


def _read_captions(tables: Sequence[Table]) -> list[str] | None:
    captions: list[str] = []
    for each in tables:
        values = [None] * len(each.rows) if each.caption_column is None else each.rows[each.caption_column][:]
        captions += [value or "" for value in values]
    return captions if any(captions) else None


def held_out_percent(requested: str | None) -> float | None:
    """Returns the percentage to hold out; None if `requested` names other images."""
    if requested is None:
        return float(HELD_OUT_PERCENT)
    if requested.lower() == "none":
        return 0.0
    try:
        fraction = float(requested)
    except ValueError:
        return None
    if not 0 < fraction < 1:
        raise UserError(f"--held-out {requested} is no fraction; give one between 0 and 1, a folder, or none")
    return 100 * fraction


def _joined_labels(
    several: Sequence[tuple[Int64[Tensor, " _n"], tuple[str, ...]]],
) -> tuple[Int64[Tensor, " n"], tuple[str, ...]]:
    """Numbers the labels of several tables alike: the names of the first, then those that only others have."""
    names = list(dict.fromkeys(name for _, own in several for name in own))
    number = {name: index for index, name in enumerate(names)}
    renumbered = [torch.tensor([*(number[name] for name in own), -1])[labels] for labels, own in several]
    return torch.cat(renumbered), tuple(names)


def encoded(image: bytes | dict[str, Any] | None) -> bytes:
    """Returns the bytes of a table's image, read from its path if the table holds only that.

    Raises:
        UnreadableImageError: if the row holds no image, or its file cannot be read.
    """
    if isinstance(image, bytes):
        return image
    if image is None or (image["bytes"] is None and image.get("path") is None):
        raise UnreadableImageError("there is no image in this row; remove the row")
    if image["bytes"] is not None:
        return image["bytes"]
    if (member := member_of(image["path"])) is not None:
        return read_member(member)
    try:
        if "://" in image["path"]:  # inside an archive that `datasets` downloaded
            filesystem, inner = url_to_fs(image["path"])
            return filesystem.cat_file(inner)
        path = Path(image["path"])
        if path.exists() and not path.is_file():  # opening a named pipe may never return
            raise UnreadableImageError("it is not a regular file; remove it")
        return path.read_bytes()
    except OSError as error:
        raise UnreadableImageError(
            f"the file cannot be read ({error.strerror or error}); repair or remove it"
        ) from error


def file_names(rows: datasets.Dataset, column: str) -> list[str] | None:
    """Returns the paths of the images' files below the folder that all are in; None if an image is in no file."""
    if (paths := _file_paths(rows, column)) is None:
        return None
    folder = _folder_of(paths)
    return [Path(os.path.relpath(path, folder)).as_posix() for path in paths]


def common_folder(rows: datasets.Dataset, column: str) -> str | None:
    """Returns the absolute path of the folder that all the images' files are in; None if an image is in no file."""
    paths = _file_paths(rows, column)
    return None if paths is None else _folder_of(paths)


def _folder_of(paths: Sequence[str]) -> str:
    return os.path.commonpath([os.path.dirname(os.path.abspath(path)) for path in paths])


def _file_paths(rows: datasets.Dataset, column: str) -> list[str] | None:
    images = rows.data.column(column)
    if not pa.types.is_struct(images.type):
        return None
    paths = [path and shown_path(path) for chunk in images.chunks for path in chunk.field("path").to_pylist()]
    return None if any(path is None or "://" in path for path in paths) else paths


def read_labels(table: Table) -> tuple[Int64[Tensor, " n"], tuple[str, ...]]:
    """Returns the labels, -1 for none, and their names.

    If the table declares no names, they are the distinct values, sorted.

    Raises:
        UserError: if a label is beyond the names that the table declares.
    """
    if table.label_column is None:
        return torch.full((len(table.rows),), -1), ()
    feature = table.rows.features[table.label_column]
    values = table.rows[table.label_column][:]
    if isinstance(feature, datasets.ClassLabel):
        names = tuple(feature.names)
        labels = [-1 if value is None else value for value in values]
        if max(labels) >= len(names):
            raise UserError(f"column {table.label_column!r} has label {max(labels)} but {len(names)} names; fix it")
        return torch.tensor(labels).clamp(min=-1), names
    missing = {value for value in values if value is None or (isinstance(value, int) and value < 0)}
    distinct = sorted(set(values) - missing)
    number = {value: index for index, value in enumerate(distinct)} | dict.fromkeys(missing, -1)
    return torch.tensor([number[value] for value in values]), tuple(map(str, distinct))


def describe_classes(labels: Int64[Tensor, " n"], names: Sequence[str]) -> str:
    """Returns the classes with their numbers of images, the largest first."""
    if not names:
        return "without classes"
    counts = torch.bincount(labels + 1, minlength=len(names) + 1).tolist()
    largest = sorted(zip(counts[1:], names, strict=True), key=lambda each: -each[0])[:_SHOWN_CLASSES]
    shown = [f"{name} {count}" for count, name in largest]
    if len(names) > len(shown):
        shown.append(f"and {len(names) - len(shown)} more")
    if counts[0]:
        shown.append(f"without a class {counts[0]}")
    return f"in {len(names)} class{'es' * (len(names) != 1)}: {', '.join(shown)}"


def read_source_ids(table: Table) -> Int64[Tensor, " n"]:
    """Returns a source id in [0, 2**63) for each row, the same for all rows of one source; `datasets` caches them.

    It is a hash of the key column if there is one; emoji that differ only in skin tone or style are
    one source. Otherwise it is a hash of the encoded image, so it does not depend on names or order,
    and exact duplicates stay together.
    """
    kind = "image" if table.key_column is None else "emoji" if table.key_column == "codepoints" else "value"
    return _hashes(table, table.key_column or table.image_column, kind)


def _hash_of_images(table: Table) -> Int64[Tensor, " n"]:
    """Returns a hash of each row's encoded image, even if a key column identifies the sources; cached as well."""
    return _hashes(table, table.image_column, "image")


def _hashes(table: Table, column: str, kind: str) -> Int64[Tensor, " n"]:
    options = {"kind": kind, "recipe": _KEY_RECIPE}
    if kind == "image" and (stamps := _stamps_of_paths(table)):
        options["stamps"] = stamps
    return torch.tensor(_computed(table.rows, column, _hash_keys, options, datasets.Value("int64"), "hashing"))


def _computed(
    rows: datasets.Dataset, column: str, function: Callable[..., Any], options: dict[str, str], kind: Any, what: str
) -> list[Any]:
    """Returns a value for each row, computed from one column, or read from the cache of `datasets`."""
    # a copy maps the file again, and the pages it read are freed with it
    copied = pickle.loads(pickle.dumps(rows.select_columns(column)))
    values = copied.map(
        function,
        batched=True,
        batch_size=_ROWS_AT_ONCE,
        input_columns=column,
        remove_columns=column,
        fn_kwargs=options,
        features=datasets.Features({"value": kind}),
        desc=what,
    )
    return values["value"][:]


def _stamps_of_paths(table: Table) -> str:
    """Returns a digest that changes with the files that a table names without stamps; "" for a table of none."""
    images = table.rows.data.column(table.image_column)
    if table.stamped or not pa.types.is_struct(images.type):
        return ""
    stamps = hashlib.sha256()
    for chunk in images.chunks:
        for path in chunk.field("path").filter(chunk.field("bytes").is_null()).to_pylist():
            if path is not None and "://" not in path:
                stamps.update(f"{path}\0{stamp(Path(path))}\n".encode())
    return stamps.hexdigest()


def _hash_keys(keys: list[Any], kind: str, recipe: str, stamps: str = "") -> dict[str, list[int]]:
    """Returns the hashes of keys. `stamps` is a part of the cache's key only."""
    hashes = [hashlib.blake2b(_key_bytes(key, kind), digest_size=8, person=recipe.encode()).digest() for key in keys]
    return {"value": [int.from_bytes(digest, "big") >> 1 for digest in hashes]}  # 63 bits: torch has no unsigned int64


def _key_bytes(key: Any, kind: str) -> bytes:
    if kind == "emoji":
        return "-".join(point for point in key.split("-") if point not in _SKIN_TONES_AND_STYLE).encode()
    if kind == "value":
        return str(key).encode()
    try:
        return encoded(key)
    except UnreadableImageError:
        return b"unreadable"  # decoding it will raise the error with its name
