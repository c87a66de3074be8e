"""Lists the files of a folder, file or glob, and describes what is left out.

Folders may have a million files, so their paths are strings. What names mean is in `names.py`, and opening the files in
`sources.py`.
"""

import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from glob import escape, glob, has_magic
from itertools import takewhile
from pathlib import Path, PurePath

from smalti.core.errors import UserError
from smalti.images.names import CONTAINERS, METADATA, Kind, arrange, counted, images_among, suffix_of

_COMPRESSED = {".gz", ".tgz", ".bz2", ".xz", ".zst", ".7z", ".rar"}
_MOST_SUFFIXES = 8
_BRACES = re.compile(r"\{(?:(?P<first>\d+)\.\.(?P<last>\d+)|(?P<choice>[^{}]*,[^{}]*))\}", re.ASCII)
_MOST_NAMES = 1_000_000


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
    paths: tuple[str, ...]
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
        root, paths = path, [*_walk(path)]
    elif path.exists():
        root, paths = path.parent, [str(path)]
    elif has_magic(source):
        root = Path(*takewhile(lambda part: not has_magic(part), path.parts))
        paths = [*map(str, _without_circles(root, [match for match in _matches(path) if match.is_file()]))]
    else:
        return None
    found = len(paths)
    paths = [file for file in paths if _is_unicode(file)]  # tables cannot hold other names
    images = images_among(paths)
    containers: dict[str, Kind] = {
        file: CONTAINERS[suffix] for file in paths if (suffix := suffix_of(file)) in CONTAINERS
    }
    if images:  # a backup among photographs is passed over, but Parquet files are the images of a data set
        containers = {file: kind for file, kind in containers.items() if kind == "Parquet files"}
    data_files = sorted([*images, *containers], key=_with_slashes)
    read = {*data_files}
    others = [file for file in paths if file not in read]
    metadata = [file for file in others if os.path.basename(file).lower() in METADATA]
    read.update(metadata)
    passed_over = describe_passed_over(file for file in others if file not in read)
    if unnamed := found - len(paths):
        passed_over.append(f"passed over, because the name is not UTF-8: {unnamed} file(s); rename them")
    all_kinds: set[Kind] = {*containers.values()}
    if images:
        all_kinds.add("images")
    kinds = sorted(all_kinds, key=lambda kind: kind.lower())
    if not data_files:
        reason = f" ({passed_over[0]})" if passed_over else ""
        raise UserError(f"{source} holds no images and no Parquet files{reason}; give a folder, file or glob that does")
    if pipes := [file for file in sorted(containers, key=_with_slashes) if not os.path.isfile(file)]:
        raise UserError(f"{pipes[0]} is not a regular file; remove it")
    if len(kinds) > 1:
        glob_of_one = f"{source}/*{Path(data_files[0]).suffix}"
        raise UserError(f"{source} holds {' and '.join(kinds)}; give a glob of one kind, such as '{glob_of_one}'")
    prefix = _prefix(root)
    names = [_with_slashes(file.removeprefix(prefix)) for file in data_files]
    chosen = arrange(source, names, split, divisible=whole_folder or split is not None, inside=kinds == ["archives"])
    return Listing(
        root,
        kinds[0],
        tuple(data_files[index] for index in chosen.indices),
        chosen.labels,
        (*chosen.notes, *passed_over),
        tuple(sorted(map(Path, metadata))),
        single=path.is_file(),
        divided=chosen.divided,
    )


def _with_slashes(path: str) -> str:
    return path.replace(os.sep, "/")


def _prefix(folder: Path) -> str:
    """Returns what the paths of a folder's files start with: nothing for the working directory."""
    return str(folder / "-")[:-1]


def _is_unicode(path: str) -> bool:
    """Returns whether a path can be written as UTF-8; other bytes are surrogates in Python's names of files."""
    try:
        path.encode()
    except UnicodeEncodeError:
        return False
    return True


def _walk(folder: Path) -> Iterator[str]:
    """Yields all files below a folder except hidden ones. Follows links to folders, unless they lead back."""

    def refuse(error: OSError) -> None:
        raise UserError(f"{error.filename} cannot be listed ({error.strerror}); make it readable") from error

    for parent, names in _folders(folder, refuse):
        prefix = _prefix(parent)
        yield from (prefix + name for name in names if not name.startswith("."))


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


def describe_passed_over(files: Iterable[str | PurePath]) -> list[str]:
    """Returns a note of the files that are neither images nor containers; empty if there are none."""
    counts = Counter(suffix_of(file) or "no suffix" for file in files)
    if not counts:
        return []
    shown = dict(counts.most_common(_MOST_SUFFIXES))
    rest = len(counts) - len(shown)
    kinds = counted(shown, "file") + (f" and {rest} other kinds" if rest else "")
    advice = "; save photographs as JPEG or PNG" if counts.keys() & {".heic", ".heif", "no suffix"} else ""
    if counts.keys() & _COMPRESSED:
        advice += "; unpack compressed archives: .tar and .zip are read"
    return [f"passed over, because the suffix is not of a format that Pillow reads here: {kinds}{advice}"]
