"""Reading a set of images, as every command begins: opens it, prints what it holds, and checks every file.

The settings of this are in `Reading`, which the configs of all these commands contain. Opening alone is
`image_set.open_images`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeAlias

from smalti.core.config import added, require_choices, store_paths
from smalti.core.errors import UserError
from smalti.core.progress import print_note
from smalti.images.checks import Checks
from smalti.images.contents import held_out_percent
from smalti.images.fitting import Fit, recorded_fit
from smalti.images.formats.opening import BadImageError, bad_images_error
from smalti.images.image_set import ImageRows, ImageSet, open_images
from smalti.images.sources import local_paths

OnBadImage: TypeAlias = Literal["raise", "skip"]


@dataclass(frozen=True)
class Reading:
    """Settings of how a set of images is read.

    Raises:
        UserError: if `on_bad_image` is none of its choices.
    """

    image_column: str | None = None
    """Column of the images, if a table has several; column of the paths in a list; extension of the images in
    WebDataset shards [default: the only one; for the images that a model was trained on, as in its training]."""
    label_column: str | None = None
    """Column of the labels, also of `metadata.csv` or in the `.json` beside an image [default: `label`, or the
    only column of classes, or the names of folders; for the images that a model was trained on, as in its training]."""
    split: str | None = added(None)
    """Split to read of images that are divided into folders or files such as train, val and test, or of a data set of
    the hub [default: train; for the images that a model was trained on, as in its training]."""
    limit: int | None = added(None)
    """Number of images to read, the first ones, for a quick try [default: all; for the images that a model was
    trained on, as in its training]."""
    held_out: str | None = added(None)
    """Images that are held out from training: a fraction such as 0.05; another folder or source of images, all of
    which are then held out; or `none` [default: 0.1, or as in the training of the model]."""
    fit: Fit | None = None
    """The way in which images of other proportions get the model's: `crop` keeps the centre, `pad` keeps the whole
    image between white borders, `squash` ignores the proportions [default: crop, or as in the training of
    the model]."""
    image_depth: Literal[8, 16] | None = added(None)
    """Bits of each channel: 16 keeps those of deep grey images and arrays, for scans and measurements; 8 scales them
    down [default: 8, or as in the training of the model]."""
    most_pixels: int | None = added(None)
    """Maximum number of pixels of an image. Larger images are refused. Raise it for large scans that you trust
    [default: 178956970, and less for files that look like decompression bombs]."""
    on_bad_image: OnBadImage = "raise"
    """Handling of images that cannot be decoded: all files are decoded at the start, then `raise` names those that
    cannot be, and `skip` leaves them out."""

    def __post_init__(self) -> None:
        store_paths(self, names=("held_out",))
        require_choices(self)

    @property
    def held_out_paths(self) -> list[Path]:
        """The files and folders of this disk that hold the held-out images."""
        return [] if self.held_out is None or _is_fraction(self.held_out) else local_paths(self.held_out)


def read_images(
    source: str, reading: Reading, *, height: int, width: int, channels: int, shown: bool = True
) -> ImageSet:
    """Opens a set of images and checks all files; prints what it holds and how images of other proportions fit.

    Args:
        source: see `open_images`.
        reading: how to read it.
        height: in pixels.
        width: in pixels.
        channels: see `open_images`.
        shown: whether this process prints.

    Raises:
        BadImageError: naming the images that cannot be decoded, unless they are left out.
        UserError: as `open_images` does, or if no image is left.
    """
    images = _open(source, reading, height=height, width=width, channels=channels)
    _check(images, reading, trained=False, shown=shown)
    return images


def read_images_for(
    provenance: Mapping[str, Any],
    name: str,
    source: str | None,
    reading: Reading,
    *,
    height: int,
    width: int,
    channels: int,
    caption_column: str | None = None,
    shown: bool = True,
) -> ImageSet:
    """Reads images for a trained model: those of `source`, or else those it was trained on, fitted as in its training.

    A model records the path of its images as it was typed, which may name other images in another
    folder. Their fingerprint, which it records too, is therefore compared.

    Args:
        provenance: of the model.
        name: of the model, for messages.
        source: see `open_images`; None for the images of the training.
        reading: how to read them. Its other settings default to those of the training.
        height: in pixels.
        width: in pixels.
        channels: see `open_images`.
        caption_column: see `open_images`.
        shown: whether this process prints.

    Raises:
        UserError: as `read_images` does, or if there is no `source` and the model does not record the images it was
            trained on, or those have another fingerprint.
    """
    recorded = provenance.get("preprocessing") or {}
    trained = provenance if source is None else {}
    asked = reading
    same_images = source is None and (asked.split, asked.limit, asked.held_out) == (None, None, None)
    source = source or trained.get("image_source")
    if source is None:
        raise UserError(f"{name} does not record which images it was trained on; give --images")
    kept = {each: trained.get(each, recorded.get(each)) for each in _OF_THE_IMAGES} if trained else {}
    held_out = provenance.get("held_out", recorded.get("held_out"))  # recorded without its folders, `folds/1` is 1
    if not trained and _is_fraction(held_out):
        kept["held_out"] = held_out  # another source of held-out images goes with the training's images
    kept |= {"fit": recorded_fit(recorded), "image_depth": recorded.get("image_depth", 8)}
    changes = {each: value for each, value in kept.items() if value is not None and getattr(asked, each) is None}
    completed = replace(asked, **changes)
    size = {"height": height, "width": width, "channels": channels}
    images = _open(source, completed, **size, caption_column=caption_column)
    expected = trained.get("image_fingerprint", images.fingerprint)
    if same_images and images.fingerprint != expected:
        raise UserError(
            f"{source} does not hold the images that {name} was trained on (fingerprint {images.fingerprint[:12]}, "
            f"not {expected[:12]}): run the command in the folder of the training, or give --images PATH; "
            f"--images {source} uses the images that are there now"
        )
    _check(images, completed, trained=reading.fit is None and "fit" in recorded, shown=shown)
    return images


_OF_THE_IMAGES = ("image_column", "label_column", "split", "limit", "held_out")
"""Settings that a model keeps for the images of its training, but not for others."""


def held_out_rows(images: ImageSet) -> ImageRows:
    """Returns the held-out images of a set, without mirror images.

    Raises:
        UserError: if there are none.
    """
    rows = ImageRows(images, split="held_out", flips=False)
    if not len(rows):
        raise UserError(f"{images.source} has no held-out images; give more --images")
    return rows


def _is_fraction(held_out: str | None) -> bool:
    """Returns whether a value of `--held-out` names no images."""
    return held_out is not None and held_out_percent(held_out) is not None


def _open(
    source: str, reading: Reading, *, height: int, width: int, channels: int, caption_column: str | None = None
) -> ImageSet:
    return open_images(
        source,
        height=height,
        width=width,
        channels=channels,
        fit=reading.fit or "crop",
        depth=reading.image_depth or 8,
        most_pixels=reading.most_pixels,
        caption_column=caption_column,
        **{each: getattr(reading, each) for each in _OF_THE_IMAGES},
    )


def print_summary(image_set: ImageSet) -> None:
    """Prints the summary of a set on standard error; commands that read images begin with it."""
    for line in image_set.summary():
        print_note(f"images: {line}")


def _check(images: ImageSet, reading: Reading, *, trained: bool, shown: bool) -> None:
    """Prints the summary and checks all files; `trained` is whether the fit is that of a trained model."""
    if shown:
        print_summary(images)
    checks = images.check()
    bad = checks.errors
    if bad and reading.on_bad_image == "raise":
        raise BadImageError(f"{bad_images_error(bad)}, or leave out such images with --on-bad-image skip")
    images.leave_out(bad)
    if shown and bad:
        print_note(f"images: {len(bad)} left out: {bad_images_error(bad)}")
    notes = [_describe_fit(checks, images.preprocessing, trained), describe_pictures(images.preprocessing)]
    for note in filter(None, notes if shown else []):
        print_note(f"images: {note}")


def describe_pictures(preprocessing: Mapping[str, Any]) -> str | None:
    """Returns a sentence about what pictures show of images with alpha, other channels or 16 bits; None for others."""
    channels, deep = preprocessing["channels"], preprocessing.get("image_depth") == 16
    parts = {1: "grey", 2: "the first of 2 channels, as grey", 3: "colours"}
    part = parts.get(channels, f"the first three of {channels} channels, as red, green and blue")
    return f"pictures show {part}{', in 8 of 16 bits' if deep else ''}" if deep or channels not in (1, 3) else None


def _describe_fit(checks: Checks, preprocessing: Mapping[str, Any], trained: bool) -> str | None:
    """Returns a sentence about the images of other proportions than the model's; None if there are none."""
    fit, height, width = recorded_fit(preprocessing), preprocessing["height"], preprocessing["width"]
    count, total = checks.of_other_proportions(height, width), checks.sizes.total()
    if not count:
        return None
    others = "not square" if height == width else f"not of the proportions {width}:{height}"
    results: dict[Fit, str] = {
        "crop": "the centre is kept",
        "pad": "they get white borders",
        "squash": "they are squashed",
    }
    ending = " (--fit pad keeps all, in white borders)" if fit == "crop" else ""
    ending = " (as in the training)" if trained else ending
    return f"{count} of {total} images are {others}: {results[fit]}{ending}"
