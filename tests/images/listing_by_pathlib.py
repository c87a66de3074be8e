"""The listing of files through `pathlib`, as it was at first: slow, and the reference for the one on strings."""

import re
from collections import Counter
from glob import has_magic
from itertools import takewhile
from pathlib import Path

from smalti.core.errors import UserError
from smalti.images.listing import (
    _COMPRESSED,
    _MOST_SUFFIXES,
    Listing,
    _folders,
    _is_unicode,
    _matches,
    _without_circles,
)
from smalti.images.names import CONTAINERS, METADATA, SPLITS, _label, _select_split, _suffixes, counted


def list_files(source, split=None):
    """Returns what `smalti.images.listing.list_files` does, of the same arguments."""
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
    unnamed = [file for file in paths if not _is_unicode(str(file))]  # which tables cannot hold
    paths = [file for file in paths if _is_unicode(str(file))]
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
    kinds = sorted({CONTAINERS.get(file.suffix.lower(), "images") for file in data_files}, key=str.lower)
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
    indices, labels, notes = arrange(
        source, names, None if inside else split, divisible=whole_folder or split is not None
    )
    return Listing(
        root,
        kinds[0],
        tuple(str(data_files[index]) for index in indices),
        labels,
        (*notes, *passed_over),
        tuple(metadata),
        single=path.is_file(),
        divided=divided,
    )


def arrange(source, names, split, *, divisible=True):
    """Divides names into splits and classes by their folders; returns indices, labels and notes of one split."""
    splits = divide(names) if divisible else None
    if splits is None and split is not None:
        raise UserError(
            f"{source} is not divided into splits such as train/ and test/, so it has no {split!r}; leave --split out"
        )
    indices, notes = list(range(len(names))), []
    if splits is not None:
        unit = "file" if names[0].suffix.lower() in CONTAINERS else "image"
        indices, notes = _select_split(source, splits, split, unit)
    folders = [names[index].parent.parts for index in indices]
    labels = tuple(_label(parts, splits is not None) for parts in folders)
    return indices, labels, [*notes, *_describe_merged(folders, labels, splits is not None)]


def _describe_merged(folders, labels, divided):
    """Returns a note if a class has the images of several folders, such as cats/young and dogs/young."""
    outer = {}
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


def is_image_file(path):
    """Returns whether a file's suffix is that of NumPy's format or of one that this Pillow decodes."""
    return path.suffix.lower() in _suffixes() or path.suffix.lower() == ".npy"


def images_among(files):
    """Returns the images among files: those that Pillow decodes, or arrays if there are none.

    Arrays beside images are something else, such as features of them.
    """
    files = [file for file in files if is_image_file(file)]
    return [file for file in files if file.suffix.lower() in _suffixes()] or files


def _walk(folder):
    """Yields all files below a folder except hidden ones. Follows links to folders, unless they lead back."""

    def refuse(error):
        raise UserError(f"{error.filename} cannot be listed ({error.strerror}); make it readable") from error

    for parent, names in _folders(folder, refuse):
        yield from (parent / name for name in names if not name.startswith("."))


def divide(names):
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


def describe_passed_over(files):
    """Returns a note of the files that are neither images nor containers; empty if there are none."""
    counts = Counter(file.suffix.lower() or "no suffix" for file in files)
    if not counts:
        return []
    shown = dict(counts.most_common(_MOST_SUFFIXES))
    rest = len(counts) - len(shown)
    kinds = counted(shown, "file") + (f" and {rest} other kinds" if rest else "")
    advice = "; save photographs as JPEG or PNG" if counts.keys() & {".heic", ".heif", "no suffix"} else ""
    if counts.keys() & _COMPRESSED:
        advice += "; unpack compressed archives: .tar and .zip are read"
    return [f"passed over, because the suffix is not of a format that Pillow reads here: {kinds}{advice}"]
