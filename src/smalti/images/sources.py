"""Where images come from: the embedded emoji, folders, Parquet files and the hub, each opened as a `datasets` table.

Also what such a table says of its rows: labels and source ids. Not here: pixels (`preprocess`), splits and batches
(`images`).
"""

import hashlib
import os
import pickle
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from glob import escape, glob, has_magic
from importlib.resources import as_file, files
from itertools import takewhile
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import torch
from datasets.exceptions import DatasetsError
from fsspec.core import url_to_fs
from jaxtyping import Int64
from PIL import Image
from torch import Tensor

from smalti.core.errors import UserError
from smalti.core.malloc import give_back_freed_memory
from smalti.images.decoding import BadImageError

EMOJI = "emoji"
_SKIN_TONES_AND_STYLE = {"1F3FB", "1F3FC", "1F3FD", "1F3FE", "1F3FF", "FE0F"}
# Part of every source id: whoever changes how keys are made changes this, so that no cached id of the old kind is used.
_KEY_RECIPE = "smalti 1"
# Formats that Pillow recognises but does not decode by itself.
_UNDECODED_FORMATS = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"}
_ROWS_AT_ONCE = 64  # in memory, encoded; `datasets`' own choice, the first file's row group, fails where that is empty
_HUB_ID = re.compile(r"(?P<id>[\w.-]+(/[\w.-]+)?)(@(?P<config>[\w.-]+))?(:(?P<split>[\w.\-\[\]%:]+))?", re.ASCII)


@dataclass(frozen=True)
class Table:
    """Encoded images, not yet decoded.

    Attributes:
        rows: a `datasets` table.
        image_column: holds bytes, or a dict of `bytes` and `path`, of which one may be None.
        label_column: None if unlabelled.
        key_column: whose values name the sources; None if the images' bytes do.
    """

    rows: datasets.Dataset
    image_column: str
    label_column: str | None
    key_column: str | None


def open_table(source: str, *, image_column: str | None = None, label_column: str | None = None) -> Table:
    """Finds the images of `source` and the columns that describe them; see `smalti.images.image_set.open_images`.

    Raises:
        UserError: if there is nothing at `source`, it cannot be read, is empty, or does not say which columns are
            meant.
    """
    if source == EMOJI:
        with as_file(files("smalti.images") / "data" / "emoji32.parquet") as path:
            rows = _read_parquet([path], source).cast_column("image", datasets.Image(decode=False))
            return Table(rows, image_column="image", label_column="label", key_column="codepoints")
    root, paths = _list_files(source)
    if not paths:
        rows = _read_hub(source)
    elif paths[0].suffix.lower() == ".parquet":
        rows = _read_parquet(paths, source)
    else:
        rows = _read_files(paths, root)
    if not len(rows):
        raise UserError(f"{source} has no rows; give a data set with images")
    image_column = _find_image_column(rows.features, source, image_column)
    if isinstance(rows.features[image_column], datasets.Image):
        rows = rows.cast_column(image_column, datasets.Image(decode=False))
    label_column = _find_label_column(rows.features, source, label_column)
    return Table(rows, image_column, label_column, key_column="source_id" if "source_id" in rows.features else None)


def encoded(image: bytes | dict[str, Any] | None) -> bytes:
    """The bytes of a table's image, fetched if the table holds only their path.

    Raises:
        BadImageError: if the table holds no image there, or its file cannot be read.
    """
    if isinstance(image, bytes):
        return image
    if image is None or (image["bytes"] is None and image.get("path") is None):
        raise BadImageError("there is no image in this row; remove the row")
    if image["bytes"] is not None:
        return image["bytes"]
    try:
        if "://" in image["path"]:  # within an archive that `datasets` fetched
            filesystem, inner = url_to_fs(image["path"])
            return filesystem.cat_file(inner)
        return Path(image["path"]).read_bytes()
    except OSError as error:
        raise BadImageError(f"the file cannot be read ({error.strerror or error}); mend or remove it") from error


def read_labels(table: Table) -> tuple[Int64[Tensor, " n"], tuple[str, ...]]:
    """Labels (-1 where there is none) and their names; for values without names, these are the distinct values, sorted.

    Raises:
        UserError: if a label is not one of the names that the table declares.
    """
    if table.label_column is None:
        return torch.full((len(table.rows),), -1), ()
    feature = table.rows.features[table.label_column]
    values = table.rows[table.label_column][:]
    if isinstance(feature, datasets.ClassLabel):
        names = tuple(feature.names)
        labels = [-1 if value is None else value for value in values]
        if max(labels) >= len(names):
            raise UserError(f"column {table.label_column!r} has label {max(labels)} but {len(names)} names; mend it")
        return torch.tensor(labels).clamp(min=-1), names
    missing = {value for value in values if value is None or (isinstance(value, int) and value < 0)}
    distinct = sorted(set(values) - missing)
    number = {value: index for index, value in enumerate(distinct)} | dict.fromkeys(missing, -1)
    return torch.tensor([number[value] for value in values]), tuple(map(str, distinct))


def read_source_ids(table: Table) -> Int64[Tensor, " n"]:
    """A number in [0, 2**63) for each row, the same for all rows of one source. `datasets` caches them.

    Hashed is the key column where there is one; emoji that differ in skin tone or style only are one source. Otherwise
    the encoded image is: renaming or reordering files changes nothing, and exact duplicates stay together.
    """
    kind = "image" if table.key_column is None else "emoji" if table.key_column == "codepoints" else "value"
    return _hashes(table, table.key_column or table.image_column, kind)


def read_contents(table: Table) -> Int64[Tensor, " n"]:
    """A number for each row that changes when its encoded image does, whatever names the source. Cached as well."""
    return _hashes(table, table.image_column, "image")


def _hashes(table: Table, column: str, kind: str) -> Int64[Tensor, " n"]:
    # a copy maps the file anew, and what was read of it leaves the memory with it
    rows = pickle.loads(pickle.dumps(table.rows.select_columns(column)))
    ids = rows.map(
        _hash_keys,
        batched=True,
        batch_size=_ROWS_AT_ONCE,
        input_columns=column,
        remove_columns=column,
        fn_kwargs={"kind": kind, "recipe": _KEY_RECIPE},
        features=datasets.Features({"id": datasets.Value("int64")}),
        desc="hashing",
    )
    return torch.tensor(ids["id"][:])


def _hash_keys(keys: list[Any], kind: str, recipe: str) -> dict[str, list[int]]:
    hashes = [hashlib.blake2b(_key_bytes(key, kind), digest_size=8, person=recipe.encode()).digest() for key in keys]
    return {"id": [int.from_bytes(digest, "big") >> 1 for digest in hashes]}  # 63 bits: torch has no unsigned int64


def _key_bytes(key: Any, kind: str) -> bytes:
    if kind == "emoji":
        return "-".join(point for point in key.split("-") if point not in _SKIN_TONES_AND_STYLE).encode()
    if kind == "value":
        return str(key).encode()
    try:
        return encoded(key)
    except BadImageError:
        return b""  # whoever decodes it says so, with its name


def _list_files(source: str) -> tuple[Path, list[Path]]:
    """The root and the images or Parquet files at a path or glob, sorted by name; none if it can only be a hub id."""
    path = Path(source).expanduser()
    if path.is_dir():
        root, found = path, list(_walk(path))
    elif path.exists():
        root, found = path.parent, [path]
    elif has_magic(source) and not _HUB_ID.fullmatch(source):
        root = Path(*takewhile(lambda part: not has_magic(part), path.parts))
        found = [match for match in map(Path, glob(str(path), recursive=True)) if match.is_file()]
    elif _HUB_ID.fullmatch(source) and not _is_data_file(path):
        return path, []
    else:
        raise UserError(f"there is nothing at {source}; give a folder of images, Parquet files, a hub id, or {EMOJI!r}")
    found = sorted(filter(_is_data_file, found), key=Path.as_posix)
    parquet = [file for file in found if file.suffix.lower() == ".parquet"]
    if not found:
        raise UserError(f"{source} holds no images and no Parquet files; give a folder, file or glob that does")
    if parquet and len(parquet) < len(found):
        raise UserError(f"{source} holds images and Parquet files; give a glob of those meant, as '{source}/*.parquet'")
    return root, found


def _walk(folder: Path) -> Iterator[Path]:
    """All files below a folder but the hidden ones. Links to folders are followed, unless they lead in a circle."""

    def refuse(error: OSError) -> None:
        raise UserError(f"{error.filename} cannot be listed ({error.strerror}); make it readable") from error

    for parent, folders, names in os.walk(folder, followlinks=True, onerror=refuse):
        here = Path(parent)
        shown = (name for name in folders if not name.startswith("."))
        folders[:] = [name for name in shown if not here.resolve().is_relative_to((here / name).resolve())]
        yield from (here / name for name in names if not name.startswith("."))


@cache
def _suffixes() -> frozenset[str]:
    """Of all files that count as data: Parquet, and every format that this Pillow decodes."""
    decoded = (
        suffix
        for suffix, kind in Image.registered_extensions().items()
        if kind in Image.OPEN and kind not in _UNDECODED_FORMATS
    )
    return frozenset((".parquet", *decoded))


def _is_data_file(path: Path) -> bool:
    return path.suffix.lower() in _suffixes()


def _read_files(paths: list[Path], root: Path) -> datasets.Dataset:
    """One row for each image file; the name of the subfolder that holds it, if any, is its label."""
    described = {
        "paths": [str(path.absolute()) for path in paths],
        "labels": [path.parent.name if path.parent != root else None for path in paths],
        "stamps": [_stamp(path) for path in paths],
    }
    features = datasets.Features(
        {"image": datasets.Image(decode=False), "label": datasets.Value("string"), "stamp": datasets.Value("string")}
    )
    # A generator rather than a table in memory: source ids are cached only for tables that are backed by a file.

    def open_rows() -> Any:
        return datasets.Dataset.from_generator(_describe_files, features, gen_kwargs={"described": described})

    return _opened(open_rows, f"the listing of {root}", "see that HF_DATASETS_CACHE can be written").select_columns(
        ["image", "label"]
    )


def _stamp(path: Path) -> str:
    """What changes when a file's content or permissions do, so that its cached source id is no longer used."""
    try:
        stat = path.stat()
    except OSError:  # a broken link; decoding names it
        return ""
    return f"{stat.st_size} {stat.st_mtime_ns} {stat.st_ctime_ns}"


def _describe_files(described: dict[str, list[Any]]) -> Iterator[dict[str, Any]]:
    for path, label, stamp in zip(described["paths"], described["labels"], described["stamps"], strict=True):
        yield {"image": path, "label": label, "stamp": stamp}


def _read_parquet(paths: list[Path], source: str) -> datasets.Dataset:
    names = [escape(str(path.absolute())) for path in paths]  # `datasets` takes every name for a glob
    open_rows = partial(datasets.load_dataset, "parquet", data_files=names, split="train", batch_size=_ROWS_AT_ONCE)
    return _opened(open_rows, source, "give whole Parquet files that have the same columns")


def _read_hub(source: str) -> datasets.Dataset:
    named = _HUB_ID.fullmatch(source)
    assert named is not None
    open_rows = partial(datasets.load_dataset, named["id"], named["config"], split=named["split"] or "train")
    return _opened(
        open_rows,
        f"there is no folder {source}, and as a hub data set it",
        "check its name (id@config:split) and the network",
    )


def _opened(open_rows: Callable[[], Any], what: str, remedy: str) -> datasets.Dataset:
    """Calls into `datasets`, whose errors here are about files, the network, or names that do not exist."""
    try:
        rows = open_rows()
    except (OSError, ValueError, RuntimeError, DatasetsError) as error:
        reason = " ".join(str(error.__cause__ or error).split())
        raise UserError(f"{what} cannot be opened ({reason}); {remedy}") from error
    # what a Parquet file's row groups took; some 50 MiB would stay with Arrow, and 30 with the C library
    pa.default_memory_pool().release_unused()
    give_back_freed_memory()
    return rows


def _find_image_column(features: datasets.Features, source: str, asked: str | None) -> str:
    """The column asked for, or the only one of images; failing that, the only one of bytes."""
    if asked is not None and asked not in features:
        raise UserError(f"{source} has no column {asked!r}; its columns are {_listed(features)}")
    of_bytes = [name for name, feature in features.items() if _holds_bytes(feature)]
    of_images = [name for name, feature in features.items() if isinstance(feature, datasets.Image)]
    if asked is not None and asked not in of_images + of_bytes:
        raise UserError(
            f"column {asked!r} of {source} holds {features[asked]}, not images; its columns are {_listed(features)}"
        )
    found = [asked] if asked is not None else of_images or of_bytes
    if not found:
        raise UserError(f"{source} has no column of images; its columns are {_listed(features)}")
    if len(found) > 1:
        raise UserError(
            f"{source} has {len(found)} columns of images ({_listed(found)}); choose one with --image-column"
        )
    return found[0]


def _find_label_column(features: datasets.Features, source: str, asked: str | None) -> str | None:
    """The column asked for, or `label`, or the only one of classes, if any."""
    if asked is not None and asked not in features:
        raise UserError(f"{source} has no column {asked!r}; its columns are {_listed(features)}")
    if asked is not None and not _holds_labels(features[asked]):
        raise UserError(
            f"column {asked!r} of {source} holds {features[asked]}; labels are classes, integers or strings"
        )
    of_classes = [name for name, feature in features.items() if isinstance(feature, datasets.ClassLabel)]
    if asked is not None:
        return asked
    if "label" in features and _holds_labels(features["label"]):
        return "label"
    if len(of_classes) > 1:
        raise UserError(
            f"{source} has {len(of_classes)} columns of classes ({_listed(of_classes)}); choose one with --label-column"
        )
    return of_classes[0] if of_classes else None


def _holds_bytes(feature: Any) -> bool:
    """True of a Parquet column written without the marks of `datasets`: bare bytes, or a struct that has them."""
    if isinstance(feature, dict):
        return "bytes" in feature and _holds_bytes(feature["bytes"])
    return isinstance(feature, datasets.Value) and feature.dtype in ("binary", "large_binary")


def _holds_labels(feature: Any) -> bool:
    if isinstance(feature, datasets.ClassLabel):
        return True
    return isinstance(feature, datasets.Value) and feature.dtype.startswith(
        ("int", "uint", "string", "large_string", "bool")
    )


def _listed(names: Iterable[str]) -> str:
    return ", ".join(map(repr, names))
