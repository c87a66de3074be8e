"""Lists the image or Parquet files of a folder, file or glob, and describes what it leaves out and why.

Labels come from folder names. Folders and Parquet files named for a split (`train`, `test`, ...) are
not classes: only the training split is read. Opening the files is in `sources.py`.
"""

import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from glob import glob, has_magic
from itertools import takewhile
from pathlib import Path

from PIL import Image

from smalti.core.errors import UserError

TRAINING = frozenset({"train", "training"})
SPLITS = TRAINING | {"val", "valid", "validation", "dev", "test", "testing", "eval"}
"""Names of folders, and of Parquet files before a `-`, `_` or `.`, that divide a set; in any case."""
GENERIC_FOLDERS = frozenset({"image", "images", "img", "imgs", "jpeg", "jpg", "png"})
"""Names of folders that hold the images of the class above them."""
METADATA = frozenset({"metadata.csv", "metadata.jsonl"})
_UNDECODED_FORMATS = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"}  # Pillow recognises but does not decode these
_MOST_SUFFIXES = 8


@dataclass(frozen=True)
class Listing:
    """The files of a source.

    Attributes:
        root: the folder that the source names, or the one of its file or glob.
        paths: the image files or the Parquet files, sorted by name.
        labels: one for each path, the name of its class or None.
        notes: what was left out and why, a sentence each.
    """

    root: Path
    paths: tuple[Path, ...]
    labels: tuple[str | None, ...]
    notes: tuple[str, ...]


def list_files(source: str) -> Listing | None:
    """Returns the images or Parquet files at a path or glob; None if there is nothing there.

    Raises:
        UserError: if there are no images and no Parquet files, or both, or a folder cannot be listed.
    """
    path = Path(source).expanduser()
    whole_folder = path.is_dir()
    if whole_folder:
        root, paths = path, list(_walk(path))
    elif path.exists():
        root, paths = path.parent, [path]
    elif has_magic(source):
        root = Path(*takewhile(lambda part: not has_magic(part), path.parts))
        paths = [match for match in map(Path, glob(str(path), recursive=True)) if match.is_file()]
    else:
        return None
    unnamed = [file for file in paths if not _is_unicode(file)]  # which tables cannot hold
    paths = [file for file in paths if _is_unicode(file)]
    data_files = sorted(filter(is_data_file, paths), key=Path.as_posix)
    passed_over = _describe_passed_over([file for file in paths if not is_data_file(file)])
    if unnamed:
        passed_over.append(f"passed over, because the name is not UTF-8: {len(unnamed)} file(s); rename them")
    parquet = [file for file in data_files if file.suffix.lower() == ".parquet"]
    if not data_files:
        found = f" ({passed_over[0]})" if passed_over else ""
        raise UserError(f"{source} holds no images and no Parquet files{found}; give a folder, file or glob that does")
    if pipes := [file for file in parquet if not file.is_file()]:
        raise UserError(f"{pipes[0]} is not a regular file; remove it")
    if parquet and len(parquet) < len(data_files):
        raise UserError(f"{source} holds images and Parquet files; give a glob of either, such as '{source}/*.parquet'")
    splits = _splits(root, data_files) if whole_folder else None
    selected, split_notes = (data_files, []) if splits is None else _training_files(source, data_files, splits)
    labels = tuple(_label(file.relative_to(root).parent.parts, splits is not None) for file in selected)
    return Listing(root, tuple(selected), labels, (*split_notes, *passed_over))


def is_data_file(path: Path) -> bool:
    """Returns whether a file's suffix is that of Parquet or of a format that this Pillow decodes."""
    return path.suffix.lower() in _suffixes()


def _is_unicode(path: Path) -> bool:
    """Returns whether a path can be written as UTF-8; other bytes are surrogates in Python's names of files."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        return False
    return True


@cache
def _suffixes() -> frozenset[str]:
    decoded = (
        suffix
        for suffix, kind in Image.registered_extensions().items()
        if kind in Image.OPEN and kind not in _UNDECODED_FORMATS
    )
    return frozenset((".parquet", *decoded))


def _walk(folder: Path) -> Iterator[Path]:
    """Yields all files below a folder except hidden ones. Follows links to folders, unless they form a circle."""

    def refuse(error: OSError) -> None:
        raise UserError(f"{error.filename} cannot be listed ({error.strerror}); make it readable") from error

    for parent, folders, names in os.walk(folder, followlinks=True, onerror=refuse):
        root = Path(parent)
        visible = (name for name in folders if not name.startswith("."))
        folders[:] = [name for name in visible if not root.resolve().is_relative_to((root / name).resolve())]
        yield from (root / name for name in names if not name.startswith("."))


def _splits(root: Path, files: Sequence[Path]) -> list[str | None] | None:
    """Returns the name of each file's split; None if the files are not divided into splits.

    They are if every file below the root's own level is in a folder named for a split, or every Parquet file is named
    for one. So a set with the classes `train`, `car` and `ship` has no splits.
    """
    folders = [file.relative_to(root).parent.parts for file in files]
    names = [next((part for part in parts if part.lower() in SPLITS), None) for parts in folders]
    if any(names) and all(name or not parts for name, parts in zip(names, folders, strict=True)):
        return names
    stems = [re.split(r"[-_.]", file.name)[0] if file.suffix.lower() == ".parquet" else "" for file in files]
    return [*stems] if all(stem.lower() in SPLITS for stem in stems) else None


def _training_files(source: str, files: Sequence[Path], splits: Sequence[str | None]) -> tuple[list[Path], list[str]]:
    """Returns the files of the training split, all files if there is none, and notes of what is left out."""
    counts, unit = Counter(splits), "image" if files[0].suffix.lower() != ".parquet" else "file"
    others = {name: count for name, count in counts.items() if (name or "").lower() not in TRAINING}
    training = sorted(name for name in counts if name and name.lower() in TRAINING)
    listed = _counted({name or "beside them": count for name, count in others.items()}, unit)
    if not training:
        return list(files), [f"{source} is divided into {listed}, but not into train: all of it is read"]
    notes = [f"{source} is divided: only {', '.join(training)} is read; left out: {listed}"] if others else []
    return [file for file, split in zip(files, splits, strict=True) if split in training], notes


def _label(folders: Sequence[str], divided: bool) -> str | None:
    """Returns the innermost folder's name that names a class, neither a split nor a generic name such as `images`."""
    named = [name for name in folders if not (divided and name.lower() in SPLITS)]
    classes = [name for name in named if name.lower() not in GENERIC_FOLDERS]
    if classes:
        return classes[-1]
    return named[-1] if named and not divided else None


def _describe_passed_over(files: Sequence[Path]) -> list[str]:
    """Returns notes of the files that are neither images nor Parquet files."""
    metadata = sorted({file.name for file in files if file.name.lower() in METADATA})
    counts = Counter(file.suffix.lower() or "no suffix" for file in files if file.name.lower() not in METADATA)
    notes = []
    if counts:
        shown = dict(counts.most_common(_MOST_SUFFIXES))
        rest = len(counts) - len(shown)
        kinds = _counted(shown, "file") + (f" and {rest} other kinds" if rest else "")
        advice = "; save photographs as JPEG or PNG" if counts.keys() & {".heic", ".heif", "no suffix"} else ""
        notes.append(f"passed over, because the suffix is not of a format that Pillow reads here: {kinds}{advice}")
    notes += [
        f"{name} is not read: labels are the names of folders; put the images of each class into a folder of its own"
        for name in metadata
    ]
    return notes


def _counted(counts: dict[str, int], unit: str) -> str:
    return ", ".join(f"{name} ({count} {unit}{'s' * (count != 1)})" for name, count in counts.items())
