"""The images and labels in a set of archives: folders packed as they are, or samples in the layout of WebDataset.

Archives are read in the order of their names, and the images of each in the order of theirs, so that an
archive of a folder gives the same set as the folder. In a WebDataset shard the files of one sample share the
name up to the first dot: `0001.jpg` has its label in `0001.cls` or in a field of `0001.json`.
"""

from collections import Counter
from collections.abc import Sequence
from itertools import chain
from pathlib import PurePosixPath
from typing import NamedTuple

from smalti.core.errors import UserError
from smalti.images.formats.annotations import (
    Columns,
    Labels,
    MetadataFile,
    choose_captions,
    choose_labels,
    join_metadata,
    read_sidecars,
    stem_of,
)
from smalti.images.formats.archives import Member, index_of
from smalti.images.listing import describe_passed_over
from smalti.images.names import METADATA, arrange, images_among


class Members(NamedTuple):
    """The images in archives, their labels and captions (None if there are none), and notes of what was left out."""

    images: list[Member]
    labels: Labels
    captions: list[str | None] | None
    notes: list[str]


class _Archive(NamedTuple):
    """The images of one archive, their paths in it without a folder of the archive's own name, and columns."""

    images: list[Member]
    names: list[str]
    columns: Columns
    notes: list[str]
    others: list[PurePosixPath]


def list_members(
    source: str,
    archives: Sequence[str],
    extension: str | None,
    label_column: str | None,
    caption_column: str | None,
    split: str | None,
) -> Members:
    """Lists the images in archives, in order.

    Args:
        source: its name, for messages.
        archives: paths or URLs.
        extension: of the images, such as `jpg` or `input.png`, if samples have several.
        label_column: the column of labels; see `annotations.choose_labels`.
        caption_column: the column of captions; see `annotations.choose_captions`.
        split: the split that is read, if folders in the archives are those of splits.

    Raises:
        UserError: if an archive cannot be read, there are no images, a sample has several, or a column is missing.
    """
    read = [_read(archive, extension, label_column, caption_column) for archive in sorted(archives)]
    images = [member for each in read for member in each.images]
    notes = describe_passed_over([other for each in read for other in each.others])
    if not images:
        found = f" ({notes[0]})" if notes else ""
        wanted = "images" if extension is None else f"files ending in .{extension.lstrip('.')}"
        raise UserError(f"{source} holds no {wanted}{found}; give archives that do")
    chosen = arrange(source, [name for each in read for name in each.names], split)
    columns = Columns()
    for name in dict.fromkeys(name for each in read for name in each.columns):
        values = list(chain.from_iterable(each.columns.get(name, [None] * len(each.images)) for each in read))
        columns[name] = [values[index] for index in chosen.indices]
    labels = choose_labels(columns, chosen.labels, source, label_column)
    captions = choose_captions(columns, source, caption_column, label_column)
    notes = [*chosen.notes, *(note for each in read for note in each.notes), *notes]
    return Members([images[index] for index in chosen.indices], labels, captions, notes)


def _read(archive: str, extension: str | None, label_column: str | None, caption_column: str | None) -> _Archive:
    index = index_of(archive)
    images = _images(index.members, extension)
    keys = [member.name for member in images]
    texts = {text.name: text.text for text in index.texts}
    files = [
        MetadataFile(f"{archive}/{name}", str("/" / PurePosixPath(name).parent), text)
        for name, text in index.texts
        if PurePosixPath(name).name.lower() in METADATA
    ]
    rooted = [f"/{key}" for key in keys]
    columns, notes = join_metadata(files, rooted, {*rooted}.__contains__)
    sidecars, sidecar_notes = read_sidecars(texts, keys, label_column, caption_column)
    if sidecars:
        _require_one_image(archive, keys)
    used = {member.name for member in images}
    used |= {*texts} if sidecars else {name for name in texts if PurePosixPath(name).name.lower() in METADATA}
    others = [PurePosixPath(member.name) for member in index.members if member.name not in used]
    return _Archive(
        images, _without_own_folder(archive, keys), {**sidecars, **columns}, [*notes, *sidecar_notes], others
    )


def _images(members: Sequence[Member], extension: str | None) -> list[Member]:
    if extension is not None:
        ending = "." + extension.lower().lstrip(".")
        return [member for member in members if member.name.lower().endswith(ending)]
    names = {*images_among(PurePosixPath(member.name) for member in members)}
    return [member for member in members if PurePosixPath(member.name) in names]


def _require_one_image(archive: str, keys: Sequence[str]) -> None:
    """Refuses samples of several images, of which a label could be that of any."""
    stem, count = Counter(map(stem_of, keys)).most_common(1)[0]
    if count > 1:
        several = [key[len(stem) + 1 :] for key in keys if stem_of(key) == stem]
        raise UserError(
            f"{archive} holds {count} images of the sample {stem} ({', '.join(several)}); choose with --image-column, "
            f"such as --image-column {several[0]}"
        )


def _without_own_folder(archive: str, keys: Sequence[str]) -> list[str]:
    """Returns the paths below the folder that the archive was made of, if all are in one of the archive's name."""
    paths = [PurePosixPath(key) for key in keys]
    stem = PurePosixPath(archive).stem
    own = all(len(path.parts) > 1 and path.parts[0] == stem for path in paths)
    return [str(path.relative_to(stem) if own else path) for path in paths]
