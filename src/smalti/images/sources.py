"""Sources of images: the embedded emoji, folders, Parquet files and the hub, each opened as a `datasets` table.

A table also gives its rows' labels and source ids. Decoding is in `decoding.py`; splits and batches
are in `splits.py` and `image_set.py`.
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
_KEY_RECIPE = "smalti 1"  # part of every source id: change it whenever the keys change, so that no cached id is reused
_UNDECODED_FORMATS = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"}  # Pillow recognises but does not decode these
_ROWS_AT_ONCE = 64  # encoded rows in memory; the `datasets` default fails if the first row group is empty
_HUB_ID = re.compile(r"(?P<id>[\w.-]+(/[\w.-]+)?)(@(?P<config>[\w.-]+))?(:(?P<split>[\w.\-\[\]%:]+))?", re.ASCII)


@dataclass(frozen=True)
class Table:
    """A table of encoded images.

    Attributes:
        rows: the `datasets` table.
        image_column: the column of images: bytes, or a dict of `bytes` and `path`, one of which may be None.
        label_column: the column of labels; None if there are none.
        key_column: the column that identifies the sources; None if the images' bytes do.
    """

    rows: datasets.Dataset
    image_column: str
    label_column: str | None
    key_column: str | None


def open_table(source: str, *, image_column: str | None = None, label_column: str | None = None) -> Table:
    """Opens `source` as a table and finds its columns; see `smalti.images.image_set.open_images`.

    Raises:
        UserError: if there is nothing at `source`, it cannot be read or is empty, or a column is
            missing or ambiguous.
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
    """Returns the bytes of a table's image, read from its path if the table holds only that.

    Raises:
        BadImageError: if the row holds no image, or its file cannot be read.
    """
    if isinstance(image, bytes):
        return image
    if image is None or (image["bytes"] is None and image.get("path") is None):
        raise BadImageError("there is no image in this row; remove the row")
    if image["bytes"] is not None:
        return image["bytes"]
    try:
        if "://" in image["path"]:  # inside an archive that `datasets` downloaded
            filesystem, inner = url_to_fs(image["path"])
            return filesystem.cat_file(inner)
        return Path(image["path"]).read_bytes()
    except OSError as error:
        raise BadImageError(f"the file cannot be read ({error.strerror or error}); repair or remove it") from error


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


def read_source_ids(table: Table) -> Int64[Tensor, " n"]:
    """Returns a source id in [0, 2**63) for each row, the same for all rows of one source; `datasets` caches them.

    It is a hash of the key column if there is one; emoji that differ only in skin tone or style are
    one source. Otherwise it is a hash of the encoded image, so it does not depend on names or order,
    and exact duplicates stay together.
    """
    kind = "image" if table.key_column is None else "emoji" if table.key_column == "codepoints" else "value"
    return _hashes(table, table.key_column or table.image_column, kind)


def read_contents(table: Table) -> Int64[Tensor, " n"]:
    """Returns a hash of each row's encoded image, even if a key column identifies the sources; cached as well."""
    return _hashes(table, table.image_column, "image")


def _hashes(table: Table, column: str, kind: str) -> Int64[Tensor, " n"]:
    # a copy maps the file again, and the pages it read are freed with it
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
        return b""  # decoding it will raise the error with its name


def _list_files(source: str) -> tuple[Path, list[Path]]:
    """Returns the root and the images or Parquet files at a path or glob, sorted by name; no files for a hub id."""
    path = Path(source).expanduser()
    if path.is_dir():
        root, paths = path, list(_walk(path))
    elif path.exists():
        root, paths = path.parent, [path]
    elif has_magic(source) and not _HUB_ID.fullmatch(source):
        root = Path(*takewhile(lambda part: not has_magic(part), path.parts))
        paths = [match for match in map(Path, glob(str(path), recursive=True)) if match.is_file()]
    elif _HUB_ID.fullmatch(source) and not _is_data_file(path):
        return path, []
    else:
        raise UserError(f"there is nothing at {source}; give a folder of images, Parquet files, a hub id, or {EMOJI!r}")
    data_files = sorted(filter(_is_data_file, paths), key=Path.as_posix)
    parquet = [file for file in data_files if file.suffix.lower() == ".parquet"]
    if not data_files:
        raise UserError(f"{source} holds no images and no Parquet files; give a folder, file or glob that does")
    if parquet and len(parquet) < len(data_files):
        raise UserError(f"{source} holds images and Parquet files; give a glob of either, such as '{source}/*.parquet'")
    return root, data_files


def _walk(folder: Path) -> Iterator[Path]:
    """Yields all files below a folder except hidden ones. Follows links to folders, unless they form a circle."""

    def refuse(error: OSError) -> None:
        raise UserError(f"{error.filename} cannot be listed ({error.strerror}); make it readable") from error

    for parent, folders, names in os.walk(folder, followlinks=True, onerror=refuse):
        root = Path(parent)
        visible = (name for name in folders if not name.startswith("."))
        folders[:] = [name for name in visible if not root.resolve().is_relative_to((root / name).resolve())]
        yield from (root / name for name in names if not name.startswith("."))


@cache
def _suffixes() -> frozenset[str]:
    """Returns the suffixes of data files: Parquet, and every format that this Pillow decodes."""
    decoded = (
        suffix
        for suffix, kind in Image.registered_extensions().items()
        if kind in Image.OPEN and kind not in _UNDECODED_FORMATS
    )
    return frozenset((".parquet", *decoded))


def _is_data_file(path: Path) -> bool:
    return path.suffix.lower() in _suffixes()


def _read_files(paths: list[Path], root: Path) -> datasets.Dataset:
    """Opens image files as a table, one row each; the name of a file's subfolder, if any, is its label."""
    described = {
        "paths": [str(path.absolute()) for path in paths],
        "labels": [path.parent.name if path.parent != root else None for path in paths],
        "stamps": [_stamp(path) for path in paths],
    }
    features = datasets.Features(
        {"image": datasets.Image(decode=False), "label": datasets.Value("string"), "stamp": datasets.Value("string")}
    )
    # A generator instead of a table in memory: source ids are cached only for tables that are backed by a file.

    def open_rows() -> Any:
        return datasets.Dataset.from_generator(_describe_files, features, gen_kwargs={"described": described})

    return _opened(open_rows, f"the listing of {root}", "see that HF_DATASETS_CACHE can be written").select_columns(
        ["image", "label"]
    )


def _stamp(path: Path) -> str:
    """Returns a stamp that changes with a file's content or permissions, so that its cached source id is not reused."""
    try:
        stat = path.stat()
    except OSError:  # a broken link; decoding reports it
        return ""
    return f"{stat.st_size} {stat.st_mtime_ns} {stat.st_ctime_ns}"


def _describe_files(described: dict[str, list[Any]]) -> Iterator[dict[str, Any]]:
    for path, label, stamp in zip(described["paths"], described["labels"], described["stamps"], strict=True):
        yield {"image": path, "label": label, "stamp": stamp}


def _read_parquet(paths: list[Path], source: str) -> datasets.Dataset:
    names = [escape(str(path.absolute())) for path in paths]  # `datasets` treats every name as a glob
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
    """Opens rows with `datasets`, whose errors are about files, the network, or names that do not exist."""
    try:
        rows = open_rows()
    except (OSError, ValueError, RuntimeError, DatasetsError) as error:
        reason = " ".join(str(error.__cause__ or error).split())
        raise UserError(f"{what} cannot be opened ({reason}); {remedy}") from error
    # frees the row groups of a Parquet file: Arrow would keep some 50 MiB, and the C library 30
    pa.default_memory_pool().release_unused()
    give_back_freed_memory()
    return rows


def _find_image_column(features: datasets.Features, source: str, requested: str | None) -> str:
    """Returns the requested column, or the only column of images, or else the only column of bytes."""
    _require_column(features, source, requested)
    byte_columns = [name for name, feature in features.items() if _holds_bytes(feature)]
    image_columns = [name for name, feature in features.items() if isinstance(feature, datasets.Image)]
    if requested is not None and requested not in image_columns + byte_columns:
        kind, names = features[requested], _listed(features)
        raise UserError(f"column {requested!r} of {source} holds {kind}, not images; its columns are {names}")
    candidates = [requested] if requested is not None else image_columns or byte_columns
    if not candidates:
        raise UserError(f"{source} has no column of images; its columns are {_listed(features)}")
    if len(candidates) > 1:
        count, names = len(candidates), _listed(candidates)
        raise UserError(f"{source} has {count} columns of images ({names}); choose one with image_column")
    return candidates[0]


def _find_label_column(features: datasets.Features, source: str, requested: str | None) -> str | None:
    """Returns the requested column, or `label`, or the only column of classes, or None."""
    _require_column(features, source, requested)
    if requested is not None:
        if not _holds_labels(features[requested]):
            kind = features[requested]
            raise UserError(f"column {requested!r} of {source} holds {kind}; labels are classes, integers or strings")
        return requested
    class_columns = [name for name, feature in features.items() if isinstance(feature, datasets.ClassLabel)]
    if "label" in features and _holds_labels(features["label"]):
        return "label"
    if len(class_columns) > 1:
        count, names = len(class_columns), _listed(class_columns)
        raise UserError(f"{source} has {count} columns of classes ({names}); choose one with label_column")
    return class_columns[0] if class_columns else None


def _require_column(features: datasets.Features, source: str, requested: str | None) -> None:
    if requested is not None and requested not in features:
        raise UserError(f"{source} has no column {requested!r}; its columns are {_listed(features)}")


def _holds_bytes(feature: Any) -> bool:
    """Returns whether a Parquet column without `datasets` metadata holds bytes, bare or in a struct."""
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
