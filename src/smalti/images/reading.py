"""Reading a set of images, as every command begins: opens it, prints what it holds, and checks every file.

The settings of this are in `Reading`, which the configs of all these commands contain. Opening alone is
`image_set.open_images`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from smalti.core.errors import UserError
from smalti.core.progress import print_note
from smalti.images.checks import Checks
from smalti.images.decoding import BadImageError, bad_images_error
from smalti.images.fitting import Fit, recorded_fit
from smalti.images.image_set import ImageSet, open_images

OnBadImage: TypeAlias = Literal["raise", "skip"]


@dataclass(frozen=True)
class Reading:
    """Settings of how a set of images is read."""

    image_column: str | None = None
    """Column of the images, if a table has several [default: as trained, if the images are those of the training]."""
    label_column: str | None = None
    """Column of the labels [default: as trained, if the images are those of the training; else `label`, or the only
    column of classes]."""
    fit: Fit | None = None
    """The way in which images of other proportions get the model's: `crop` keeps the centre, `pad` keeps the whole
    image between white borders, `squash` ignores the proportions. A model keeps the choice of its training [default:
    as trained, else crop]."""
    on_bad_image: OnBadImage = "raise"
    """Handling of images that cannot be decoded: all files are decoded at the start, then `raise` names those that
    cannot be, and `skip` leaves them out."""


def read_images(
    source: str, reading: Reading, *, height: int, width: int, channels: int, shown: bool = True
) -> ImageSet:
    """Opens a set of images and checks all files; prints what it holds and how images of other proportions fit.

    Args:
        source: see `open_images`.
        reading: how to read it.
        height: in pixels.
        width: in pixels.
        channels: 1 for grey, 3 for RGB.
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
    shown: bool = True,
) -> ImageSet:
    """Reads images for a trained model: those of `source`, or else those it was trained on, fitted as in its training.

    A model records the path of its images as it was typed, which may name other images in another
    folder. Their fingerprint, which it records too, is therefore compared.

    Args:
        provenance: of the model.
        name: of the model, for messages.
        source: see `open_images`; None for the images of the training.
        reading: how to read them. Columns and fit default to those of the training.
        height: in pixels.
        width: in pixels.
        channels: 1 for grey, 3 for RGB.
        shown: whether this process prints.

    Raises:
        UserError: as `read_images` does, or if there is no `source` and the model does not record the images it was
            trained on, or those have another fingerprint.
    """
    recorded = provenance.get("preprocessing") or {}
    trained = provenance if source is None else {}
    source = source or trained.get("image_source")
    if source is None:
        raise UserError(f"{name} does not record which images it was trained on; give --images")

    def column(requested: str | None, key: str) -> str | None:
        return requested or trained.get(key) or (recorded.get(key) if trained else None)

    completed = Reading(
        column(reading.image_column, "image_column"),
        column(reading.label_column, "label_column"),
        reading.fit or recorded_fit(recorded),
        reading.on_bad_image,
    )
    images = _open(source, completed, height=height, width=width, channels=channels)
    expected = trained.get("image_fingerprint", images.fingerprint)
    if images.fingerprint != expected:
        raise UserError(
            f"{source} does not hold the images that {name} was trained on (fingerprint {images.fingerprint[:12]}, "
            f"not {expected[:12]}): run the command in the folder of the training, or give --images PATH; "
            f"--images {source} uses the images that are there now"
        )
    _check(images, completed, trained=reading.fit is None and "fit" in recorded, shown=shown)
    return images


def _open(source: str, reading: Reading, *, height: int, width: int, channels: int) -> ImageSet:
    return open_images(
        source,
        height=height,
        width=width,
        channels=channels,
        fit=reading.fit or "crop",
        image_column=reading.image_column,
        label_column=reading.label_column,
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
    note = _describe_fit(checks, images.preprocessing, trained)
    if shown and note:
        print_note(f"images: {note}")


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
