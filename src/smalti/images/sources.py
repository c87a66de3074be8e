"""Sources of images: embedded ones, files, archives, arrays, lists, Parquet and the hub, each as a `datasets` table.

Files are listed in `listing.py`, and columns are found in `columns.py`; the formats of files are in
`formats/`. Labels and source ids of a table are in `contents.py`.
"""

import hashlib
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from glob import escape, glob, has_magic
from importlib.resources import as_file, files
from itertools import takewhile
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import pyarrow as pa
from datasets.exceptions import DatasetsError
from fsspec.core import url_to_fs
from pyarrow.dataset import ParquetFragmentScanOptions

from smalti.core.errors import UserError, one_line
from smalti.core.hub.download import quiet_hub
from smalti.core.malloc import give_back_freed_memory
from smalti.images.columns import describe_unread_labels, find_image_column, find_label_column, require_captions
from smalti.images.formats import archives, arrays
from smalti.images.formats.annotations import (
    LIST_SUFFIXES,
    Labels,
    MetadataFile,
    choose_captions,
    choose_labels,
    join_metadata,
    read_list,
    read_text,
)
from smalti.images.formats.shards import list_members
from smalti.images.listing import Listing, expand_braces, list_files
from smalti.images.names import CONTAINERS, arrange, is_data_file, suffix_of

EMBEDDED = {"portraits": "portraits32.parquet", "emoji": "emoji32.parquet"}
"""The files of the image sources that the package contains. The first is the default."""
DEFAULT = "portraits"
EXAMPLE_IMAGE = Path(str(files("smalti.images") / "data" / "example.png"))
"""A held-out portrait with a transparent part, which `inpaint` fills without flags."""
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
        caption_column: the column of captions; None if there are none.
        notes: what was left out and why, a sentence each.
        stamped: whether the cached values of `rows` depend on the stamps of the files that it names.
    """

    rows: datasets.Dataset
    image_column: str
    label_column: str | None
    key_column: str | None
    notes: tuple[str, ...] = ()
    caption_column: str | None = None
    stamped: bool = False


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
    if expanded := expand_braces(source):
        return [Path(name) for name in expanded if "://" not in name]
    if not has_magic(source) or "://" in source:
        return []
    if path.suffix.lower() in CONTAINERS:
        return [*map(Path, glob(str(path), recursive=True))]
    return [Path(*takewhile(lambda part: not has_magic(part), path.parts))]


def open_table(
    source: str,
    *,
    image_column: str | None = None,
    label_column: str | None = None,
    split: str | None = None,
    limit: int | None = None,
    channels: int = 3,
    caption_column: str | None = None,
) -> Table:
    """Opens `source` as a table and finds its columns; see `smalti.images.image_set.open_images`.

    Raises:
        UserError: if there is nothing at `source`, it cannot be read or is empty, or a column or split is
            missing or ambiguous.
    """
    table = _open(source, _Chosen(image_column, label_column, caption_column, split), channels)
    if caption_column is not None and table.caption_column is None:
        require_captions(table.rows.features, source, caption_column)
        table = replace(table, caption_column=caption_column)
    if not len(table.rows):
        raise UserError(f"{source} has no rows; give a data set with images")
    if limit is not None:
        table = replace(table, rows=table.rows.select(range(min(limit, len(table.rows)))))
    return table


class _Chosen(NamedTuple):
    """The columns and the split that a user chose."""

    image_column: str | None
    label_column: str | None
    caption_column: str | None
    split: str | None


def _open(source: str, chosen: _Chosen, channels: int) -> Table:
    image_column, label_column, caption_column, split = chosen
    if source in EMBEDDED:
        if split is not None:
            raise UserError(f"{source} is not divided into splits; leave --split out")
        with as_file(files("smalti.images") / "data" / EMBEDDED[source]) as path:
            rows = _read_parquet([path], source).cast_column("image", datasets.Image(decode=False))
        key_column = "codepoints" if source == "emoji" else None
        return Table(rows, image_column="image", label_column="label", key_column=key_column)
    path = Path(source).expanduser()
    if not os.path.exists(path) and (named := _named_archives(source)):
        return _read_archives(source, named, (), chosen)
    if path.is_file() and path.suffix.lower() in LIST_SUFFIXES:
        return _read_image_list(path, chosen)
    listing = _list_files(source, split)
    if listing is not None and listing.kind == "archives":
        inner = chosen._replace(split=None if listing.divided else split)
        return _read_archives(source, [str(Path(each).absolute()) for each in listing.paths], listing.notes, inner)
    if listing is not None and (listing.kind == "arrays" or _is_array_set(listing, channels)):
        return _refusing_columns(_read_arrays(listing, channels), image_column, label_column)
    if listing is not None and listing.kind == "images":
        return _refusing_columns(_read_image_files(source, listing, label_column, caption_column), image_column, None)
    rows = _read_hub(source, split) if listing is None else _read_parquet(listing.paths, source)
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


def _list_files(source: str, split: str | None) -> Listing | None:
    """Returns the files of a source, or None for a hub id.

    A name that is both a glob and a hub id, such as `id:train[:50%]`, is a hub id.
    """
    path = Path(source).expanduser()
    is_file = is_data_file(path) or path.suffix.lower() in LIST_SUFFIXES
    hub_id = _HUB_ID.fullmatch(source) and not is_file
    listing = list_files(source, split) if path.exists() or not _HUB_ID.fullmatch(source) else None
    if listing is None and not hub_id:
        raise UserError(
            f"there is nothing at {source}; give a folder of images, Parquet files, archives, a list, a hub id "
            f"(owner/name), or {' or '.join(map(repr, EMBEDDED))}"
        )
    return listing


def _named_archives(source: str) -> list[str]:
    """Returns the archives that a URL or a range in braces names; empty for any other source.

    Raises:
        UserError: if a URL is not that of archives, or matches none.
    """
    names = expand_braces(source) or ([source] if "://" in source else [])
    if "://" in source and re.search(r"[*\[]", names[0]):  # a `?` begins a query
        try:
            filesystem, pattern = url_to_fs(names[0])
            names = sorted(filesystem.unstrip_protocol(path) for path in filesystem.glob(pattern))
        except (OSError, ValueError, ImportError) as error:
            raise UserError(f"{source} cannot be listed ({one_line(error)}); check the address") from error
        if not names:
            raise UserError(f"there is nothing at {source}; check the address")
    suffixes = {archives.suffix_of(name) for name in names}
    if names and not all(CONTAINERS.get(suffix) == "archives" for suffix in suffixes):
        raise UserError(
            f"{source} names {', '.join(sorted(suffixes))} files; ranges and URLs are those of .tar or .zip"
        )
    return [name if "://" in name else os.path.abspath(os.path.expanduser(name)) for name in names]


def _read_archives(source: str, names: Sequence[str], notes: Sequence[str], chosen: _Chosen) -> Table:
    """Opens the images in archives as a table; an image column is their extension, if samples have several."""
    members = list_members(source, names, *chosen)
    stamps = {name: archives.stamp(name) for name in names}
    rows = _read_paths(
        source,
        [member.to_path() for member in members.images],
        members.labels,
        [stamps[member.archive] for member in members.images],
        members.captions,
    )
    return _table_of_paths(rows, (*notes, *members.notes, *members.labels.notes))


def _read_image_list(path: Path, chosen_columns: _Chosen) -> Table:
    """Opens the images that a list names, in its order."""
    image_column, label_column, caption_column, split = chosen_columns
    paths, columns = read_list(path, image_column)
    names = [os.path.relpath(each, path.parent.absolute()).replace(os.sep, "/") for each in paths]
    chosen = arrange(str(path), names, split)
    columns = {name: [values[index] for index in chosen.indices] for name, values in columns.items()}
    labels = choose_labels(
        {name: columns[name] for name in columns if name != image_column}, chosen.labels, str(path), label_column
    )
    paths = [paths[index] for index in chosen.indices]
    captions = choose_captions(columns, str(path), caption_column)
    rows = _read_paths(str(path), paths, labels, [*map(stamp, paths)], captions)
    return _table_of_paths(rows, (*chosen.notes, *labels.notes))


def _read_image_files(source: str, listing: Listing, label_column: str | None, caption_column: str | None) -> Table:
    """Opens image files as a table, one row each, with the columns of their metadata."""
    here = str(Path.cwd())
    paths = [os.path.join(here, path) for path in listing.paths]
    texts = [MetadataFile(str(path), path.parent.absolute().as_posix(), read_text(path)) for path in listing.metadata]
    columns, notes = join_metadata(texts, [path.replace(os.sep, "/") for path in paths], os.path.exists)
    labels = choose_labels(columns, listing.labels, source, label_column)
    captions = choose_captions(columns, source, caption_column)
    rows = _read_paths(source, paths, labels, [*map(stamp, paths)], captions)
    return _table_of_paths(rows, (*listing.notes, *notes, *labels.notes))


def _table_of_paths(rows: datasets.Dataset, notes: tuple[str, ...]) -> Table:
    captions = "caption" if "caption" in rows.features else None
    return Table(rows, "image", "label", None, notes, captions, stamped=True)


def _read_paths(
    source: str, paths: list[str], labels: Labels, stamps: list[str], captions: list[str | None] | None
) -> datasets.Dataset:
    """Opens images as a table, by their paths; the stamps change with the files."""
    described = {"image": paths, "label": labels.values, "stamp": stamps}
    text = datasets.Value("string")
    kinds = {"image": datasets.Image(decode=False), "label": datasets.Value(labels.kind), "stamp": text}
    if captions is not None:
        described["caption"], kinds["caption"] = captions, text
    features = datasets.Features(kinds)
    digest = hashlib.sha256(repr((described, kinds)).encode()).hexdigest()[:32]  # `datasets` would pickle each text
    options = {"gen_kwargs": {"described": described}, "fingerprint": digest}
    # A generator instead of a table in memory: source ids are cached only for tables that are backed by a file.
    open_rows = partial(datasets.Dataset.from_generator, _describe_files, features, **options)
    remedy = "see that HF_DATASETS_CACHE can be written"
    return _opened(open_rows, f"the listing of {source}", remedy).remove_columns("stamp")


def _is_array_set(listing: Listing, channels: int) -> bool:
    """Returns whether a source is one `.npy` file of several images; in a folder such a file is one image."""
    (first, *others) = listing.paths
    return not others and listing.single and suffix_of(first) == ".npy" and arrays.is_set(Path(first), channels)


def _read_arrays(listing: Listing, channels: int) -> Table:
    """Opens arrays as a table, one row for each image, which `datasets` keeps in its cache."""
    paths = [Path(path).absolute() for path in listing.paths]
    features = datasets.Features(
        {"image": datasets.Image(decode=False), "label": datasets.Value(arrays.kind_of_labels(paths))}
    )
    described = {"paths": [*map(str, paths)], "stamps": [*map(stamp, paths)], "channels": channels}

    def open_rows() -> Any:
        return datasets.Dataset.from_generator(arrays.describe_arrays, features, gen_kwargs={"described": described})

    rows = _opened(open_rows, str(listing.root), "give whole arrays, and see that HF_DATASETS_CACHE can be written")
    return Table(rows, "image", "label", None, listing.notes)


def _refusing_columns(table: Table, image_column: str | None, label_column: str | None) -> Table:
    """Returns a table of files that have no columns, unless one is requested."""
    for flag, requested, own in (("image", image_column, "image"), ("label", label_column, "label")):
        if requested not in (None, own):
            raise UserError(f"these images have no column {requested!r}; leave --{flag}-column out")
    return table


def stamp(path: str | Path) -> str:
    """Returns a stamp that changes with a file's content or permissions, so that its cached source id is not reused."""
    try:
        stat = os.stat(path)
    except OSError:  # a broken link; decoding reports it
        return ""
    return f"{stat.st_size} {stat.st_mtime_ns} {stat.st_ctime_ns}"


def _describe_files(described: dict[str, list[Any]]) -> Iterator[dict[str, Any]]:
    for values in zip(*described.values(), strict=True):
        yield dict(zip(described, values, strict=True))


def _read_parquet(paths: Sequence[str | Path], source: str) -> datasets.Dataset:
    names = [escape(str(Path(path).absolute())) for path in paths]  # `datasets` treats every name as a glob
    # pyarrow's default reads a whole file into memory; without it, at most 1 GiB waits for the writer
    unbuffered = ParquetFragmentScanOptions(pre_buffer=False)
    options = {"batch_size": _ROWS_AT_ONCE, "fragment_scan_options": unbuffered}
    open_rows = partial(datasets.load_dataset, "parquet", data_files=names, split="train", **options)
    return _opened(open_rows, source, "give whole Parquet files that have the same columns")


def _read_hub(source: str, split: str | None) -> datasets.Dataset:
    named = _HUB_ID.fullmatch(source)
    assert named is not None
    if split is not None and named["split"] is not None:
        raise UserError(f"{source} names a split already; leave --split out")
    open_rows = partial(datasets.load_dataset, named["id"], named["config"], split=split or named["split"] or "train")
    with quiet_hub():
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
        if isinstance(error.__cause__, UserError):  # raised in a generator of rows
            raise error.__cause__ from error
        raise UserError(f"{what} cannot be opened ({one_line(error.__cause__ or error)}); {remedy}") from error
    # frees the row groups of a Parquet file: Arrow would keep some 50 MiB, and the C library 30
    pa.default_memory_pool().release_unused()
    give_back_freed_memory()
    return rows
