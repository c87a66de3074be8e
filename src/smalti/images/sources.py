"""Sources of images: embedded ones, folders, Parquet files and the hub, each opened as a `datasets` table.

A table also gives its rows' labels and source ids. Files are listed in `listing.py`, and columns are
found in `columns.py`. Decoding is in `decoding.py`; splits and batches are in `splits.py` and
`image_set.py`.
"""

import hashlib
import os
import pickle
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
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
from torch import Tensor

from smalti.core.errors import UserError
from smalti.core.malloc import give_back_freed_memory
from smalti.images.columns import describe_unread_labels, find_image_column, find_label_column
from smalti.images.decoding import UnreadableImageError
from smalti.images.listing import Listing, is_data_file, list_files

EMBEDDED = {"portraits": "portraits32.parquet", "emoji": "emoji32.parquet"}
"""The files of the image sources that the package contains. The first is the default."""
DEFAULT = "portraits"
EXAMPLE_IMAGE = Path(str(files("smalti.images") / "data" / "example.png"))
"""A held-out portrait with a transparent part, which `inpaint` fills without flags."""
_SKIN_TONES_AND_STYLE = {"1F3FB", "1F3FC", "1F3FD", "1F3FE", "1F3FF", "FE0F"}
_KEY_RECIPE = "smalti 1"  # part of every source id: change it whenever the keys change, so that no cached id is reused
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
        notes: what was left out and why, a sentence each.
    """

    rows: datasets.Dataset
    image_column: str
    label_column: str | None
    key_column: str | None
    notes: tuple[str, ...] = ()


def local_paths(source: str | None) -> list[Path]:
    """Returns the files and folders of this disk that a source of images names; none for embedded images or a hub id.

    Commands pass them to `core.files` as inputs. A glob of images stands for the folder that it searches, where a
    picture that a command writes could match it.
    """
    if source is None or source in EMBEDDED:
        return []
    path = Path(source).expanduser()
    if os.path.exists(path):
        return [path]
    if not has_magic(source):
        return []
    if path.suffix.lower() == ".parquet":
        return [*map(Path, glob(str(path), recursive=True))]
    return [Path(*takewhile(lambda part: not has_magic(part), path.parts))]


def open_table(source: str, *, image_column: str | None = None, label_column: str | None = None) -> Table:
    """Opens `source` as a table and finds its columns; see `smalti.images.image_set.open_images`.

    Raises:
        UserError: if there is nothing at `source`, it cannot be read or is empty, or a column is
            missing or ambiguous.
    """
    if source in EMBEDDED:
        with as_file(files("smalti.images") / "data" / EMBEDDED[source]) as path:
            rows = _read_parquet([path], source).cast_column("image", datasets.Image(decode=False))
        key_column = "codepoints" if source == "emoji" else None
        return Table(rows, image_column="image", label_column="label", key_column=key_column)
    listing = _list_files(source)
    if listing is None:
        rows = _read_hub(source)
    elif listing.paths[0].suffix.lower() == ".parquet":
        rows = _read_parquet(listing.paths, source)
    else:
        rows = _read_files(listing)
    if not len(rows):
        raise UserError(f"{source} has no rows; give a data set with images")
    image_column = find_image_column(rows.features, source, image_column)
    if isinstance(rows.features[image_column], datasets.Image):
        rows = rows.cast_column(image_column, datasets.Image(decode=False))
    label_column = find_label_column(rows.features, source, label_column)
    key_column = "source_id" if "source_id" in rows.features else None
    notes = listing.notes if listing is not None else ()
    if label_column is None:
        notes += describe_unread_labels(rows.features)
    return Table(rows, image_column, label_column, key_column, notes)


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
    images = rows.data.column(column)
    if not pa.types.is_struct(images.type):
        return None
    paths = [path for chunk in images.chunks for path in chunk.field("path").to_pylist()]
    if any(path is None or "://" in path for path in paths):
        return None
    folder = os.path.commonpath([os.path.dirname(os.path.abspath(path)) for path in paths])
    return [Path(os.path.relpath(path, folder)).as_posix() for path in paths]


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
    options = {"kind": kind, "recipe": _KEY_RECIPE}
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


def _hash_keys(keys: list[Any], kind: str, recipe: str) -> dict[str, list[int]]:
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


def _list_files(source: str) -> Listing | None:
    """Returns the files of a source, or None for a hub id.

    A name that is both a glob and a hub id, such as `id:train[:50%]`, is a hub id.
    """
    path = Path(source).expanduser()
    hub_id = _HUB_ID.fullmatch(source) and not is_data_file(path)
    listing = list_files(source) if path.exists() or not _HUB_ID.fullmatch(source) else None
    if listing is None and not hub_id:
        raise UserError(
            f"there is nothing at {source}; give a folder of images, Parquet files, a hub id, or "
            f"{' or '.join(map(repr, EMBEDDED))}"
        )
    return listing


def _read_files(listing: Listing) -> datasets.Dataset:
    """Opens image files as a table, one row each."""
    described = {
        "paths": [str(path.absolute()) for path in listing.paths],
        "labels": list(listing.labels),
        "stamps": [_stamp(path) for path in listing.paths],
    }
    features = datasets.Features(
        {"image": datasets.Image(decode=False), "label": datasets.Value("string"), "stamp": datasets.Value("string")}
    )
    # A generator instead of a table in memory: source ids are cached only for tables that are backed by a file.

    def open_rows() -> Any:
        return datasets.Dataset.from_generator(_describe_files, features, gen_kwargs={"described": described})

    return _opened(
        open_rows, f"the listing of {listing.root}", "see that HF_DATASETS_CACHE can be written"
    ).select_columns(["image", "label"])


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


def _read_parquet(paths: Sequence[Path], source: str) -> datasets.Dataset:
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
