"""Names of files and folders: kinds of files by suffix, splits and classes by folders. No file is read.

Labels come from folder names. Folders and files named for a split (`train`, `test`, ...) are not classes:
only one split is read, by default that of training. Listing the files of a folder is in `listing.py`.
"""

import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path, PurePath, PurePosixPath
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

P = TypeVar("P", str, PurePath, PurePosixPath, Path)
Kind: TypeAlias = Literal["images", "Parquet files", "archives", "arrays"]
"""The kinds of files that a source consists of; one source has files of one kind."""
CONTAINERS: dict[str, Kind] = {
    ".parquet": "Parquet files",
    ".tar": "archives",
    ".zip": "archives",
    ".npz": "arrays",
}
"""The kinds of files that hold many images, by suffix."""


def suffix_of(path: str | PurePath) -> str:
    """Returns the suffix of a file's name, as `PurePath.suffix` but in lower case, and without parsing the path."""
    name = os.path.basename(path)
    dot = name.rfind(".")
    return name[dot:].lower() if 0 < dot < len(name) - 1 else ""


def is_data_file(path: str | PurePath) -> bool:
    """Returns whether a file's suffix is that of a container or of a format of images that is decoded."""
    return suffix_of(path) in CONTAINERS or is_image_file(path)


def is_image_file(path: str | PurePath) -> bool:
    """Returns whether a file's suffix is that of NumPy's format or of one that this Pillow decodes."""
    suffix = suffix_of(path)
    return suffix in _suffixes() or suffix == ".npy"


def images_among(files: Iterable[P]) -> list[P]:
    """Returns the images among files: those that Pillow decodes, or arrays if there are none.

    Arrays beside images are something else, such as features of them.
    """
    suffixes = [(file, suffix_of(file)) for file in files]
    decoded = [file for file, suffix in suffixes if suffix in _suffixes()]
    return decoded or [file for file, suffix in suffixes if suffix == ".npy"]


@cache
def _suffixes() -> frozenset[str]:
    decoded = (
        suffix
        for suffix, kind in Image.registered_extensions().items()
        if kind in Image.OPEN and kind not in _UNDECODED_FORMATS
    )
    return frozenset(decoded)


class Arrangement(NamedTuple):
    """The part of a source that is read, with labels.

    Attributes:
        indices: of the names that are read, in order.
        labels: one for each index, the name of its class or None.
        notes: what was left out, a sentence each.
        divided: whether the names are divided into splits.
    """

    indices: list[int]
    labels: tuple[str | None, ...]
    notes: list[str]
    divided: bool


def arrange(
    source: str, names: Sequence[str], split: str | None, *, divisible: bool = True, inside: bool = False
) -> Arrangement:
    """Divides names into splits and classes by their folders, and selects one split.

    Args:
        source: its name, for messages.
        names: paths of images or containers below the source's root, with slashes.
        split: the split to read; None for that of training, or for all if there is none.
        divisible: whether folders may be splits.
        inside: whether the files may be divided, each in itself, if their names are not.

    Raises:
        UserError: if there is no such split.
    """
    splits = divide(names) if divisible else None
    if splits is None and split is not None and not inside:
        raise UserError(
            f"{source} is not divided into splits such as train/ and test/, so it has no {split!r}; leave --split out"
        )
    indices, notes, divided = list(range(len(names))), list[str](), splits is not None
    if splits is not None:
        unit = "file" if suffix_of(names[0]) in CONTAINERS else "image"
        indices, notes = _select_split(source, splits, split, unit)
    folders = [_folder(names[index]) for index in indices]
    label_of = {folder: _label(PurePosixPath(folder).parts, divided) for folder in dict.fromkeys(folders)}
    labels = tuple(label_of[folder] for folder in folders)
    return Arrangement(indices, labels, [*notes, *_describe_merged(label_of, divided)], divided)


def _folder(name: str) -> str:
    """Returns the folder of a name, with its last slash. Paths are parsed once for each folder, not for each file."""
    return name[: name.rfind("/") + 1]


def _describe_merged(labels: Mapping[str, str | None], divided: bool) -> list[str]:
    """Returns a note if several folders have one label, such as cats/young and dogs/young."""
    outer: dict[str, set[str]] = {}
    for folder, label in labels.items():
        if label is not None:
            kept = [part for part in PurePosixPath(folder).parts if not (divided and part.lower() in SPLITS)]
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


def divide(names: Sequence[str]) -> list[str | None] | None:
    """Returns the name of each file's split; None if the files are not divided into splits.

    They are if every file below the root's own level is in a folder named for a split, or every container is named
    for one. So a set with the classes `train`, `car` and `ship` has no splits.
    """
    folders = [_folder(name) for name in names]
    split_of = {
        folder: next((part for part in PurePosixPath(folder).parts if part.lower() in SPLITS), None)
        for folder in dict.fromkeys(folders)
    }
    if any(split_of.values()) and all(split or not folder for folder, split in split_of.items()):
        return [split_of[folder] for folder in folders]
    stems: list[str | None] = []
    for name in names:
        stem = re.split(r"[-_.]", os.path.basename(name))[0] if suffix_of(name) in CONTAINERS else ""
        if stem.lower() not in SPLITS:
            return None
        stems.append(stem)
    return stems


def _select_split(
    source: str, splits: Sequence[str | None], requested: str | None, unit: str
) -> tuple[list[int], list[str]]:
    """Returns the indices of the requested split, or of training's, all if there is none, and notes of the others."""
    counts, wanted = Counter(splits), TRAINING if requested is None else {requested.lower()}
    chosen = sorted(name for name in counts if name and name.lower() in wanted)
    others = {name or "beside them": count for name, count in counts.items() if name not in chosen}
    listed = counted(others, unit)
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


def counted(counts: dict[str, int], unit: str) -> str:
    """Returns a list of names with their counts, such as `test (3 images)`."""
    return ", ".join(f"{name} ({count} {unit}{'s' * (count != 1)})" for name, count in counts.items())
