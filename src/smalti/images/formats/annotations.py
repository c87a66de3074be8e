"""Texts that say what images are: lists of paths, `metadata.csv` and `metadata.jsonl`, and labels beside images.

Each gives columns: one value for each image, None where there is none. The column of labels is chosen as in
a table.
"""

import io
import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple, TypeAlias

import datasets
import pyarrow as pa
import pyarrow.csv
import pyarrow.json
from datasets.features.features import generate_from_arrow_type

from smalti.core.config import parse_json
from smalti.core.errors import UserError, one_line
from smalti.core.files import open_regular
from smalti.images.columns import describe_unread_labels, find_label_column

LIST_SUFFIXES = frozenset({".csv", ".tsv", ".txt", ".jsonl"})
"""Suffixes of lists of images."""
PATH_COLUMN = "file_name"
"""The column of paths in metadata files, as `datasets` names it, and in lists."""
_PATH_COLUMNS = (PATH_COLUMN, "path", "file", "filename", "image", "image_path")
_CLASS, _CAPTION = "cls", "txt"  # the suffixes of a label and of a caption in a WebDataset shard

Columns: TypeAlias = dict[str, list[Any]]


class MetadataFile(NamedTuple):
    """A file of metadata: its name for the user, the folder that its paths start from, and its text."""

    name: str
    folder: str
    text: str


class Labels(NamedTuple):
    """The labels of images, integers or texts, None where there is none, and notes of columns that are not read."""

    values: list[int | None] | list[str | None]
    notes: list[str]

    @property
    def kind(self) -> str:
        """Returns the type of the labels, "int64" or "string"."""
        return "int64" if any(isinstance(value, int) for value in self.values) else "string"


def read_list(path: Path, column: str | None) -> tuple[list[str], Columns]:
    """Reads a list of images: the path of each, absolute, and its other columns.

    Args:
        path: of the list. Its paths start from its folder.
        column: the column of paths; None for the only one with a usual name.

    Raises:
        UserError: if the list cannot be read, has no column of paths, names an image twice, or one outside its folder.
    """
    columns = _parse(read_text(path), path.suffix.lower(), str(path))
    if path.suffix.lower() == ".txt":  # spaces around a path are left out, unless the file's name has them
        columns = {
            name: [line if (path.parent / line).exists() else line.strip() for line in lines]
            for name, lines in columns.items()
        }
    usual = [name for name in columns if name.lower() in _PATH_COLUMNS]
    if column is None and len(usual) != 1:
        found = "several columns" if usual else "no column"
        raise UserError(
            f"{path} has {found} of paths; its columns are {', '.join(map(repr, columns))}: "
            f"call one {PATH_COLUMN!r}, or choose it with --image-column"
        )
    paths = _paths(columns, column or usual[0], str(path), str(path.parent.absolute()))
    if not paths:
        raise UserError(f"{path} lists no images; give one with a path for each image")
    _require_distinct(paths, str(path))
    return paths, columns


def read_text(path: Path) -> str:
    """Reads a file of text.

    Raises:
        UserError: if it cannot be read, is not a regular file, or is not UTF-8.
    """
    try:
        with open_regular(path) as file:
            return file.read().decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read ({error}); write it in UTF-8, and make it readable") from error


def join_metadata(
    files: Sequence[MetadataFile], keys: Sequence[str], exists: Callable[[str], bool]
) -> tuple[Columns, list[str]]:
    """Returns the columns of metadata files for each image, and notes.

    Args:
        files: the files of metadata.
        keys: the full path of each image.
        exists: returns whether there is an image at a full path, also if it is in another split.

    Raises:
        UserError: if a file cannot be read, has no column `file_name`, or names an image twice, one outside its
            folder, or one that is not there.
    """
    rows, joined, positions = 0, Columns(), {key: position for position, key in enumerate(keys)}
    seen: set[str] = set()
    for file in files:
        columns = _parse(file.text, PurePosixPath(file.name).suffix.lower(), file.name)
        paths = _paths(columns, PATH_COLUMN, file.name, file.folder)
        _require_distinct([*seen.intersection(paths), *paths], file.name)
        seen.update(paths)
        for name in columns:
            joined.setdefault(name, [None] * len(keys))
        for number, path in enumerate(paths):
            position = positions.get(path)
            if position is None and not exists(path):
                raise UserError(f"{file.name} names {path}, which is not there; add the image or remove the row")
            if position is not None:
                rows += 1
                for name, values in columns.items():
                    joined[name][position] = values[number]
    missing = len(keys) - rows
    notes = []
    if missing and files:
        first = next(key for key in keys if key not in seen)
        names = ", ".join(sorted({PurePosixPath(file.name).name for file in files}))
        notes.append(f"{names} has no row for {missing} of {len(keys)} images, which get no label; the first: {first}")
    return joined, notes


def read_sidecars(
    texts: Mapping[str, str], keys: Sequence[str], label_column: str | None, caption_column: str | None = None
) -> tuple[Columns, list[str]]:
    """Returns the columns that small files beside images hold: their suffixes, and the fields of JSON.

    Args:
        texts: the texts by full path.
        keys: the full path of each image.
        label_column: the column of labels; None for the usual ones.
        caption_column: the column of captions; None for the usual one.

    Raises:
        UserError: if a text is not JSON, but its name ends in .json.
    """
    stems = {stem_of(key): position for position, key in enumerate(keys)}
    found: dict[str, dict[int, str]] = {}
    for path, text in texts.items():
        stem = stem_of(path)
        if (position := stems.get(stem)) is not None:
            found.setdefault(path[len(stem) + 1 :].lower(), {})[position] = text.strip()
    documents = found.pop("json", {})
    columns: Columns = {}
    needed = {label_column or _CLASS, *([caption_column] if caption_column else [])}
    if documents and not needed <= found.keys():
        for position, text in documents.items():
            for name, value in _json_fields(text, keys[position]).items():
                columns.setdefault(name, [None] * len(keys))[position] = value
    for suffix, by_position in found.items():
        values = columns[suffix] = [by_position.get(position) for position in range(len(keys))]
        if all(value is None or _is_integer(value) for value in values):
            columns[suffix] = [None if value is None else int(value) for value in values]
    missing = len(keys) - len(found.get(_CLASS, ()))
    notes = []
    if _CLASS in found and missing:
        first = next(keys[position] for position in range(len(keys)) if position not in found[_CLASS])
        notes.append(f"{missing} of {len(keys)} images have no .cls beside them, and get no label; the first: {first}")
    return columns, notes


def stem_of(path: str) -> str:
    """Returns a path up to the first dot of its name: the key of a sample in WebDataset."""
    folder, slash, name = path.rpartition("/")
    return f"{folder}{slash}{name.split('.', 1)[0]}"


def choose_labels(columns: Columns, folder_labels: Sequence[str | None], source: str, requested: str | None) -> Labels:
    """Returns the labels of images: the requested column, or `label`, or that of `.cls` files, or folders' names.

    Raises:
        UserError: if the requested column is missing or holds no labels.
    """
    columns = {name: values for name, values in columns.items() if name.lower() not in _PATH_COLUMNS}
    if requested is not None and requested not in columns and not (requested == "label" and any(folder_labels)):
        names = ", ".join(map(repr, columns)) or "none"
        raise UserError(f"{source} has no column {requested!r}; its columns are {names}")
    features = datasets.Features({name: _feature(values, name, source) for name, values in columns.items()})
    if "label" not in features and any(folder_labels):
        features["label"] = datasets.Value("string")
    if requested is None and _CLASS in columns and "label" not in columns:
        requested = _CLASS
    name = find_label_column(features, source, requested)
    if name is None or name not in columns:
        unread = datasets.Features({each: features[each] for each in columns})
        return Labels([*folder_labels], [*describe_unread_labels(unread)])
    values = columns[name]
    integers = all(value is None or (isinstance(value, int) and not isinstance(value, bool)) for value in values)
    return Labels(values if integers else [None if value is None else str(value) for value in values], [])


def choose_captions(
    columns: Columns, source: str, requested: str | None, label_column: str | None = None
) -> list[str | None] | None:
    """Returns the captions of images: the requested column, or the `.txt` files beside images in shards; None if none.

    Raises:
        UserError: if the requested column is missing.
    """
    if requested is not None and requested not in columns:
        names = ", ".join(map(repr, columns)) or "none"
        raise UserError(f"{source} has no column {requested!r} for captions; its columns are {names}")
    if requested is None and (label_column == _CAPTION or _CAPTION not in columns):
        return None
    return [None if value is None else str(value) for value in columns[requested or _CAPTION]]


def _feature(values: list[Any], name: str, source: str) -> Any:
    try:
        kind = pa.array(values).type
    except (pa.ArrowException, OverflowError) as error:  # integers and texts in one column
        if all(isinstance(value, str | int | None) for value in values):
            return datasets.Value("string")
        raise UserError(f"column {name!r} of {source} holds values of several types; make them one") from error
    return datasets.Value("string") if pa.types.is_null(kind) else generate_from_arrow_type(kind)


def _parse(text: str, suffix: str, name: str) -> Columns:
    """Returns the columns of a table in text."""
    if suffix == ".txt":
        # `splitlines` would split at U+2028 and other characters, which names of files may have
        lines = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
        return {PATH_COLUMN: [line for line in lines if line.strip()]}
    try:
        if suffix == ".jsonl":
            table = pyarrow.json.read_json(io.BytesIO(text.encode()))
        else:
            delimiter = "\t" if suffix == ".tsv" else ","
            header = text.split("\n", 1)[0].split(delimiter)
            types = {each.strip().strip('"'): pa.string() for each in header if each.strip().lower() in _PATH_COLUMNS}
            table = pyarrow.csv.read_csv(
                io.BytesIO(text.encode()),
                parse_options=pyarrow.csv.ParseOptions(delimiter=delimiter, newlines_in_values=True),
                convert_options=pyarrow.csv.ConvertOptions(
                    column_types=types, strings_can_be_null=True, quoted_strings_can_be_null=False, null_values=[""]
                ),
            )
    except (ValueError, OSError, pa.ArrowException) as error:
        advice = "give a header and one line for each image"
        raise UserError(f"{name} cannot be read as a table ({one_line(error)}); {advice}") from error
    if repeated := [each for each, count in Counter(table.column_names).items() if count > 1]:
        raise UserError(f"{name} has several columns called {repeated[0]!r}; give each a name of its own")
    return {each: table[each].to_pylist() for each in table.column_names}


def _paths(columns: Columns, column: str, name: str, folder: str) -> list[str]:
    """Returns the full paths in a column.

    Raises:
        UserError: if there is no such column, or a path is empty or outside the folder.
    """
    if column not in columns:
        raise UserError(
            f"{name} has no column {column!r}; its columns are {', '.join(map(repr, columns)) or 'none'}: "
            "name that of the paths so"
        )
    paths = []
    for row, value in enumerate(columns[column], 1):
        if not isinstance(value, str) or not value or "\0" in value:
            raise UserError(f"{name}, row {row}: {value!r} is not a path; give each row the path of an image")
        path = os.path.normpath(os.path.join(folder, value)).replace(os.sep, "/")
        if not path.startswith(folder.replace(os.sep, "/").rstrip("/") + "/"):
            raise UserError(
                f"{name}, row {row}: {value} is outside the folder of the list; move the list to a folder above its "
                "images"
            )
        paths.append(path)
    return paths


def _require_distinct(paths: Iterable[str], name: str) -> None:
    repeated = next((path for path, count in Counter(paths).items() if count > 1), None)
    if repeated is not None:
        raise UserError(f"{name} names {repeated} twice; remove one of the rows")


def _json_fields(text: str, name: str) -> dict[str, Any]:
    try:
        document = parse_json(text)
    except ValueError as error:
        raise UserError(f"the .json beside {name} cannot be read ({error}); repair or remove it") from error
    fields = document if isinstance(document, dict) else {}
    return {key: value for key, value in fields.items() if isinstance(value, str | int | float)}


def _is_integer(text: str) -> bool:
    return text.removeprefix("-").isdecimal() and text.isascii() and len(text) < 19
