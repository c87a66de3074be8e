"""Lists the files of a folder, file or glob, divides names into splits and classes, and describes what is left out.

Labels come from folder names. Folders and files named for a split (`train`, `test`, ...) are not classes:
only one split is read, by default that of training. Opening the files is in `sources.py`.
"""

import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from glob import escape, glob, has_magic
from itertools import takewhile
from pathlib import Path, PurePath
from typing import Literal, NamedTuple, TypeAlias, TypeVar

from PIL import Image

from smalti.core.errors import UserError

TRAINING = frozenset({"train", "training"})
SPLITS = TRAINING | {"val", "valid", "validation", "dev", "test", "testing", "eval"}
"""Names of folders, and of containers before a `-`, `_` or `.`, that divide a set; in any case."""
GENERIC_FOLDERS = frozenset({"image", "images", "img", "imgs", "jpeg", "jpg", "png"})
"""Names of folders that hold the images of the class above them."""
METADATA = frozenset({"metadata.csv", "metadata.jsonl"})
_UNDECODED_FORMATS = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"}  # Pillow recognises but does not decode these
_COMPRESSED = {".gz", ".tgz", ".bz2", ".xz", ".zst", ".7z", ".rar"}
_MOST_SUFFIXES = 8
_BRACES = re.compile(r"\{(?:(?P<first>\d+)\.\.(?P<last>\d+)|(?P<choice>[^{}]*,[^{}]*))\}", re.ASCII)
_MOST_NAMES = 1_000_000

P = TypeVar("P", bound=PurePath)
Kind: TypeAlias = Literal["images", "Parquet files", "archives", "arrays"]
"""The kinds of files that a source consists of; one source has files of one kind."""
CONTAINERS: dict[str, Kind] = {
    ".parquet": "Parquet files",
    ".tar": "archives",
    ".zip": "archives",
    ".npz": "arrays",
}
"""The kinds of files that hold many images, by suffix."""


@dataclass(frozen=True)
class Listing:
    """The files of a source.

    Attributes:
        root: the folder that the source names, or the one of its file or glob.
        kind: of all files.
        paths: the files, sorted by name.
        labels: one for each path, the name of its class or None.
        notes: what was left out and why, a sentence each.
        metadata: the files `metadata.csv` and `metadata.jsonl` among the images.
        single: whether the source names one file.
        divided: whether the files are those of a split.
    """

    root: Path
    kind: Kind
    paths: tuple[Path, ...]
    labels: tuple[str | None, ...]
    notes: tuple[str, ...]
    metadata: tuple[Path, ...] = ()
    single: bool = False
    divided: bool = False


def expand_braces(source: str) -> list[str]:
    """Returns the names that a range such as `{0000..0127}`, or a choice such as `{a,b}`, stands for; empty if none.

    Raises:
        UserError: if a range is empty or has more than a million names.
    """
    braces = _BRACES.search(source)
    if braces is None:
        return []
    if braces["choice"] is not None:
        parts = braces["choice"].split(",")
    else:
        first, last, width = int(braces["first"]), int(braces["last"]), len(braces["first"])
        if not 0 <= last - first < _MOST_NAMES:
            raise UserError(f"the range in {source} names {last - first + 1} files; give one of 1 to {_MOST_NAMES}")
        parts = [str(number).zfill(width) for number in range(first, last + 1)]
    names = [f"{source[: braces.start()]}{part}{source[braces.end() :]}" for part in parts]
    return [name for each in names for name in expand_braces(each) or [each]]


def list_files(source: str, split: str | None = None) -> Listing | None:
    """Returns the images or containers of images at a path or glob; None if there is nothing there.

    Raises:
        UserError: if there are none, or of several kinds, if there is no such split, or if a folder cannot be listed.
    """
    path = Path(source).expanduser()
    whole_folder = path.is_dir()
    if whole_folder:
        root, paths = path, list(_walk(path))
    elif path.exists():
        root, paths = path.parent, [path]
    elif has_magic(source):
        root = Path(*takewhile(lambda part: not has_magic(part), path.parts))
        paths = _without_circles(root, [match for match in _matches(path) if match.is_file()])
    else:
        return None
    unnamed = [file for file in paths if not _is_unicode(file)]  # which tables cannot hold
    paths = [file for file in paths if _is_unicode(file)]
    images = images_among(paths)
    containers = [file for file in paths if file.suffix.lower() in CONTAINERS]
    if images:  # a backup among photographs is passed over, but Parquet files are the images of a data set
        containers = [file for file in containers if CONTAINERS[file.suffix.lower()] == "Parquet files"]
    data_files = sorted([*images, *containers], key=Path.as_posix)
    read = {*data_files}
    others = [file for file in paths if file not in read]
    metadata = sorted(file for file in others if file.name.lower() in METADATA)
    passed_over = describe_passed_over([file for file in others if file not in metadata])
    if unnamed:
        passed_over.append(f"passed over, because the name is not UTF-8: {len(unnamed)} file(s); rename them")
    kinds: list[Kind] = sorted({CONTAINERS.get(file.suffix.lower(), "images") for file in data_files}, key=str.lower)
    if not data_files:
        found = f" ({passed_over[0]})" if passed_over else ""
        raise UserError(f"{source} holds no images and no Parquet files{found}; give a folder, file or glob that does")
    if pipes := [file for file in data_files if file.suffix.lower() in CONTAINERS and not file.is_file()]:
        raise UserError(f"{pipes[0]} is not a regular file; remove it")
    if len(kinds) > 1:
        raise UserError(
            f"{source} holds {' and '.join(kinds)}; give a glob of one kind, such as '{source}/*{data_files[0].suffix}'"
        )
    names = [file.relative_to(root) for file in data_files]
    divided = (whole_folder or split is not None) and divide(names) is not None
    inside = kinds == ["archives"] and not divided  # the archives may be divided, each in itself
    chosen = arrange(source, names, None if inside else split, divisible=whole_folder or split is not None)
    return Listing(
        root,
        kinds[0],
        tuple(data_files[index] for index in chosen.indices),
        chosen.labels,
        (*chosen.notes, *passed_over),
        tuple(metadata),
        single=path.is_file(),
        divided=divided,
    )


class Arrangement(NamedTuple):
    """The part of a source that is read, with labels.

    Attributes:
        indices: of the names that are read, in order.
        labels: one for each index, the name of its class or None.
        notes: what was left out, a sentence each.
    """

    indices: list[int]
    labels: tuple[str | None, ...]
    notes: list[str]


def arrange(source: str, names: Sequence[PurePath], split: str | None, *, divisible: bool = True) -> Arrangement:
    """Divides names into splits and classes by their folders, and selects one split.

    Args:
        source: its name, for messages.
        names: paths of images or containers below the source's root.
        split: the split to read; None for that of training, or for all if there is none.
        divisible: whether folders may be splits.

    Raises:
        UserError: if there is no such split.
    """
    splits = divide(names) if divisible else None
    if splits is None and split is not None:
        raise UserError(
            f"{source} is not divided into splits such as train/ and test/, so it has no {split!r}; leave --split out"
        )
    indices, notes = list(range(len(names))), list[str]()
    if splits is not None:
        unit = "file" if names[0].suffix.lower() in CONTAINERS else "image"
        indices, notes = _select_split(source, splits, split, unit)
    folders = [names[index].parent.parts for index in indices]
    labels = tuple(_label(parts, splits is not None) for parts in folders)
    return Arrangement(indices, labels, [*notes, *_describe_merged(folders, labels, splits is not None)])


def _describe_merged(folders: Sequence[Sequence[str]], labels: Sequence[str | None], divided: bool) -> list[str]:
    """Returns a note if a class has the images of several folders, such as cats/young and dogs/young."""
    outer: dict[str, set[str]] = {}
    for parts, label in {(tuple(parts), label) for parts, label in zip(folders, labels, strict=True)}:
        if label is not None:
            kept = [part for part in parts if not (divided and part.lower() in SPLITS)]
            place = "/".join(kept[: len(kept) - kept[::-1].index(label)])
            outer.setdefault(label, set()).add(place)
    merged = {label: sorted(places) for label, places in outer.items() if len(places) > 1}
    if not merged:
        return []
    label, places = min(merged.items())
    more = f" and {len(places) - 2} more" if len(places) > 2 else ""
    others = f"; so are {len(merged) - 1} more classes" if len(merged) > 1 else ""
    shown = f"{', '.join(places[:2])}{more}{others}"
    return [f"without a column of labels the innermost folder is the class: {label!r} is that of {shown}"]


def is_data_file(path: PurePath) -> bool:
    """Returns whether a file's suffix is that of a container or of a format of images that is decoded."""
    return path.suffix.lower() in CONTAINERS or is_image_file(path)


def is_image_file(path: PurePath) -> bool:
    """Returns whether a file's suffix is that of NumPy's format or of one that this Pillow decodes."""
    return path.suffix.lower() in _suffixes() or path.suffix.lower() == ".npy"


def images_among(files: Iterable[P]) -> list[P]:
    """Returns the images among files: those that Pillow decodes, or arrays if there are none.

    Arrays beside images are something else, such as features of them.
    """
    files = [file for file in files if is_image_file(file)]
    return [file for file in files if file.suffix.lower() in _suffixes()] or files


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
    return frozenset(decoded)


def _walk(folder: Path) -> Iterator[Path]:
    """Yields all files below a folder except hidden ones. Follows links to folders, unless they lead back."""

    def refuse(error: OSError) -> None:
        raise UserError(f"{error.filename} cannot be listed ({error.strerror}); make it readable") from error

    for parent, names in _folders(folder, refuse):
        yield from (parent / name for name in names if not name.startswith("."))


def _folders(folder: Path, onerror: Callable[[OSError], None] | None = None) -> Iterator[tuple[Path, list[str]]]:
    """Yields a folder and all below it except hidden ones, each with the names of its files; see `_walk`."""
    passed = {folder: (folder.resolve(),)}
    for parent, folders, names in os.walk(folder, followlinks=True, onerror=onerror):
        root = Path(parent)
        above = passed.pop(root)
        entered = {name: _entered(above, root / name) for name in folders if not name.startswith(".")}
        folders[:] = [name for name, chain in entered.items() if chain]
        passed |= {root / name: chain for name, chain in entered.items() if chain}
        yield root, names


def _matches(pattern: Path) -> set[Path]:
    """Returns the paths that match a glob. Python's own `**` follows links that lead back, many times."""
    if "**" not in pattern.parts:
        return {*map(Path, glob(str(pattern)))}
    place = pattern.parts.index("**")
    rest = pattern.parts[place + 1 :] or ("*",)
    tops = _matches(Path(*pattern.parts[:place])) if place else {Path()}
    folders = {folder for top in tops if top.is_dir() for folder, _ in _folders(top)}
    return {match for folder in folders for match in _matches(Path(escape(str(folder)), *rest))}


def _entered(above: tuple[Path, ...], folder: Path) -> tuple[Path, ...] | None:
    """Adds a folder's real path to those that lead to it; returns None if a link leads back to or above one of them."""
    real = folder.resolve()
    return None if any(each.is_relative_to(real) for each in above) else (*above, real)


def _without_circles(root: Path, files: Iterable[Path]) -> list[Path]:
    """Returns the files, of those below `root`, whose paths lead through no folder twice; see `_entered`."""
    passed: dict[Path, tuple[Path, ...] | None] = {}

    def passed_to(folder: Path) -> tuple[Path, ...] | None:
        if folder not in passed:
            below = root in folder.parents
            above = passed_to(folder.parent) if below else ()
            passed[folder] = above if above is None or (below and folder.name == "..") else _entered(above, folder)
        return passed[folder]

    return [file for file in files if passed_to(file.parent)]


def divide(names: Sequence[PurePath]) -> list[str | None] | None:
    """Returns the name of each file's split; None if the files are not divided into splits.

    They are if every file below the root's own level is in a folder named for a split, or every container is named
    for one. So a set with the classes `train`, `car` and `ship` has no splits.
    """
    folders = [name.parent.parts for name in names]
    splits = [next((part for part in parts if part.lower() in SPLITS), None) for parts in folders]
    if any(splits) and all(split or not parts for split, parts in zip(splits, folders, strict=True)):
        return splits
    stems = [re.split(r"[-_.]", name.name)[0] if name.suffix.lower() in CONTAINERS else "" for name in names]
    return [*stems] if all(stem.lower() in SPLITS for stem in stems) else None


def _select_split(
    source: str, splits: Sequence[str | None], requested: str | None, unit: str
) -> tuple[list[int], list[str]]:
    """Returns the indices of the requested split, or of training's, all if there is none, and notes of the others."""
    counts, wanted = Counter(splits), TRAINING if requested is None else {requested.lower()}
    chosen = sorted(name for name in counts if name and name.lower() in wanted)
    others = {name or "beside them": count for name, count in counts.items() if name not in chosen}
    listed = _counted(others, unit)
    if not chosen and requested is not None:
        raise UserError(f"{source} has no split {requested!r}; it is divided into {listed}: give --split one of them")
    if not chosen:
        return [*range(len(splits))], [f"{source} is divided into {listed}, but not into train: all of it is read"]
    notes = [f"{source} is divided: only {', '.join(chosen)} is read; left out: {listed}"] if others else []
    return [index for index, split in enumerate(splits) if split in chosen], notes


def _label(folders: Sequence[str], divided: bool) -> str | None:
    """Returns the innermost folder's name that names a class, neither a split nor a generic name such as `images`."""
    named = [name for name in folders if not (divided and name.lower() in SPLITS)]
    classes = [name for name in named if name.lower() not in GENERIC_FOLDERS]
    if classes:
        return classes[-1]
    return named[-1] if named and not divided else None


def describe_passed_over(files: Sequence[PurePath]) -> list[str]:
    """Returns a note of the files that are neither images nor containers; empty if there are none."""
    counts = Counter(file.suffix.lower() or "no suffix" for file in files)
    if not counts:
        return []
    shown = dict(counts.most_common(_MOST_SUFFIXES))
    rest = len(counts) - len(shown)
    kinds = _counted(shown, "file") + (f" and {rest} other kinds" if rest else "")
    advice = "; save photographs as JPEG or PNG" if counts.keys() & {".heic", ".heif", "no suffix"} else ""
    if counts.keys() & _COMPRESSED:
        advice += "; unpack compressed archives: .tar and .zip are read"
    return [f"passed over, because the suffix is not of a format that Pillow reads here: {kinds}{advice}"]


def _counted(counts: dict[str, int], unit: str) -> str:
    return ", ".join(f"{name} ({count} {unit}{'s' * (count != 1)})" for name, count in counts.items())
