"""Image sets: pixels, labels and source ids, and the rows of a split for training.

Decoding is in `decoding.py`, the sources of images in `sources.py`, the rule of the split in
`splits.py`.

Legend: n images in a set, b rows of a batch, c channels, h w pixels.
"""

import hashlib
import os
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any, Literal

import torch
from jaxtyping import Bool, Int64, UInt8
from torch import Tensor
from torch.utils.data import Dataset

from smalti.core.errors import UserError
from smalti.core.progress import SLOW_SECONDS, bar
from smalti.images import sources
from smalti.images.checks import Checks, load_checks, save_checks
from smalti.images.decoding import (
    BadImageError,
    Decoded,
    UnreadableImageError,
    bad_images_error,
    decode_crops,
    decode_with_size,
)
from smalti.images.fitting import Fit, describe, random_crops
from smalti.images.splits import held_out

CACHE_BYTES = 2**30
_SHOWN_CLASSES = 10  # the largest ones, in a summary
_DECODED_AT_ONCE = 64  # images; limits the encoded bytes in memory while the cache fills
_DECODING_THREADS = min(8, os.cpu_count() or 1)  # Pillow releases the GIL, but small images gain little


class ImageSet:
    """Images of one size, in a fixed order, decoded on access.

    Attributes:
        source: the argument of `open_images`.
        label_names: names of the labels 0, 1, ...; empty if the images have none.
        labels: one for each image, -1 if it has none.
        source_ids: one for each image, in [0, 2**63). Images of one original, such as an emoji in
            several skin tones, share one.
        fingerprint: SHA-256 over source ids, labels and encoded images in order; the same on every machine.
        preprocessing: the description of the preprocessing, as JSON; see `fitting.describe`. It also names the
            columns that were requested.
        notes: what of the source was left out and why, a sentence each.
        left_out: marks the images that `leave_out` excluded from all splits.
    """

    def __init__(
        self,
        source: str,
        table: sources.Table,
        *,
        height: int,
        width: int,
        channels: int,
        fit: Fit,
        columns: dict[str, str],
        cache_bytes: int,
    ) -> None:
        self.source = source
        self.notes = table.notes
        described = describe(height=height, width=width, channels=channels, fit=fit)
        self.preprocessing: dict[str, Any] = {**described, **columns}
        self.labels, self.label_names = sources.read_labels(table)
        self.source_ids: Int64[Tensor, " n"] = sources.read_source_ids(table)
        self.fingerprint = hashlib.sha256(
            b"".join(
                part.numpy().astype("<i8").tobytes()
                for part in (self.source_ids, self.labels, sources.read_contents(table))
            )
        ).hexdigest()
        self.left_out: Bool[Tensor, " n"] = torch.zeros(len(self.source_ids), dtype=torch.bool)
        self._encoded = table.rows.select_columns(table.image_column)
        self._column = table.image_column
        self._shape = (channels, height, width)
        self._fit_kind: Fit = fit
        self._errors: dict[int, str] = {}
        self._cache_bytes = cache_bytes
        self._cache: UInt8[Tensor, "n c h w"] | None = None

    def __len__(self) -> int:
        return len(self.source_ids)

    def summary(self) -> list[str]:
        """Returns lines for a person: how many images of which classes were found, and what was left out and why."""
        counts = torch.bincount(self.labels + 1, minlength=len(self.label_names) + 1).tolist()
        classes = sorted(zip(counts[1:], self.label_names, strict=True), key=lambda each: -each[0])
        shown = [f"{name} {count}" for count, name in classes[:_SHOWN_CLASSES]]
        if len(classes) > len(shown):
            shown.append(f"and {len(classes) - len(shown)} more")
        if classes and counts[0]:
            shown.append(f"without a class {counts[0]}")
        plural = "es" * (len(classes) != 1)
        kinds = f"in {len(classes)} class{plural}: {', '.join(shown)}" if classes else "without classes"
        return [f"{len(self)} image{'s' * (len(self) != 1)} from {self.source}, {kinds}", *self.notes]

    def pixels(
        self, indices: Sequence[int] | Int64[Tensor, " b"], *, bad: dict[int, str] | None = None
    ) -> UInt8[Tensor, "b c h w"]:
        """Returns the images at `indices`, from the cache if it is filled, else decoded now.

        Args:
            indices: in [0, len), in any order, repeated or not.
            bad: receives the error of each image that cannot be decoded, by its index; that image is
                black. Without it, such images are an error.

        Raises:
            BadImageError: with file and row, for images that cannot be decoded.
        """
        indices = list(map(int, indices))
        if self._cache is not None:
            errors = {index: self._errors[index] for index in indices if index in self._errors}
            pixels = self._cache[torch.tensor(indices, dtype=torch.int64)]
        else:
            errors = {}
            pixels = torch.zeros((len(indices), *self._shape), dtype=torch.uint8)
            for position, (index, image) in enumerate(zip(indices, self._encoded[indices][self._column], strict=True)):
                try:
                    pixels[position] = self._decode(image).pixels
                except BadImageError as error:
                    errors[index] = str(error)
        named = self._named(errors)
        if named and bad is None:
            raise bad_images_error(named)
        if bad is not None:
            bad.update(named)
        return pixels

    def crops(self, indices: Sequence[int], count: int) -> UInt8[Tensor, "b n c h w"]:
        """Returns `count` random crops of each image, the same ones every time; see `fitting.random_crops`.

        They are taken from the original images, of any size. Those of an image that cannot be decoded are black.
        """
        size = dict(zip(("channels", "height", "width"), self._shape, strict=True))
        pixels = torch.zeros((len(indices), count, *self._shape), dtype=torch.uint8)
        drawn = random_crops(torch.tensor(indices, dtype=torch.int64), count)
        images = self._encoded[list(indices)][self._column]
        for position, (image, crops) in enumerate(zip(images, drawn, strict=True)):
            with suppress(BadImageError):
                pixels[position] = decode_crops(sources.encoded(image), crops, **size, fit=self._fit_kind)
        return pixels

    def check(self) -> Checks:
        """Decodes every image once, on threads, unless an earlier command has; returns errors and original sizes.

        A set that fits into `cache_bytes` stays in memory. The errors name the file and row.
        """
        channels = self._shape[0]
        checks = load_checks(self.fingerprint, channels)
        if checks is None or any(index >= len(self) for index in checks.errors):
            checks = self._decode_all(keep=self._fits())
            save_checks(checks, self.fingerprint, channels)
        return Checks(self._named(checks.errors), checks.sizes)

    def file_names(self) -> list[str] | None:
        """Returns the name of each image's file, with its subfolders; None if an image is in no file of its own."""
        return sources.file_names(self._encoded, self._column)

    def leave_out(self, bad: dict[int, str]) -> None:
        """Excludes images from all splits of `ImageRows`; the fingerprint stays that of the whole set.

        Raises:
            UserError: if no image is left.
        """
        self.left_out[list(bad)] = True
        if self.left_out.all():
            raise UserError(
                f"none of the {len(self)} images of {self.source} can be decoded; the first: {bad[min(bad)]}"
            )

    def fill_cache(self) -> None:
        """Decodes all images into memory, on threads, unless they are there or exceed `cache_bytes`.

        `ImageRows` calls it in the process that starts the workers, so that they share one copy.

        Raises:
            BadImageError: naming all images that cannot be decoded and are not left out.
        """
        if self._cache is None and self._fits():
            self._decode_all(keep=True)
            if unexpected := {index: error for index, error in self._errors.items() if not self.left_out[index]}:
                self._cache = None
                raise bad_images_error(self._named(unexpected))

    def _fits(self) -> bool:
        return torch.Size((len(self), *self._shape)).numel() <= self._cache_bytes

    def _decode_all(self, *, keep: bool) -> Checks:
        """Decodes every image; with `keep`, fills the cache, with black for images that cannot be decoded."""
        errors: dict[int, str] = {}
        unreadable: list[int] = []
        sizes: list[tuple[int, int] | None] = [None] * len(self)
        cache = torch.empty((len(self) if keep else 0, *self._shape), dtype=torch.uint8)

        def fill(index: int, image: Any) -> None:
            try:
                pixels, height, width = self._decode(image)
                sizes[index] = (height, width)
            except BadImageError as error:
                pixels, errors[index] = 0, str(error)
                if isinstance(error, UnreadableImageError):
                    unreadable.append(index)
            if keep:
                cache[index] = pixels

        what = "decoding" if keep else "checking images"
        progress = bar(what=what, total=len(self), unit="image", delay_seconds=SLOW_SECONDS)
        with progress, ThreadPoolExecutor(_DECODING_THREADS) as pool:
            for start in range(0, len(self), _DECODED_AT_ONCE):
                images = self._encoded[start : start + _DECODED_AT_ONCE][self._column]
                list(pool.map(fill, range(start, len(self)), images))
                progress.update(len(images))
        errors = dict(sorted(errors.items()))
        if keep:
            self._cache, self._errors = cache, errors
        return Checks(errors, Counter(size for size in sizes if size is not None), bool(unreadable))

    def _decode(self, image: Any) -> Decoded:
        channels, height, width = self._shape
        return decode_with_size(
            sources.encoded(image), channels=channels, height=height, width=width, fit=self._fit_kind
        )

    def _named(self, errors: dict[int, str]) -> dict[int, str]:
        """Adds the file's name, or the table's, and the row to errors."""
        if not errors:
            return {}
        images = self._encoded[list(errors)][self._column]
        names = [image.get("path") if isinstance(image, dict) else None for image in images]
        return {
            index: f"{name or self.source}, row {index}: {error}"
            for name, (index, error) in zip(names, errors.items(), strict=True)
        }


def open_images(
    source: str = sources.DEFAULT,
    *,
    height: int = 32,
    width: int = 32,
    channels: int = 3,
    fit: Fit = "crop",
    image_column: str | None = None,
    label_column: str | None = None,
    cache_bytes: int = CACHE_BYTES,
) -> ImageSet:
    """Opens a set of images, without decoding them yet.

    Args:
        source: `portraits` or `emoji` (9 000 drawn portraits and 3 786 Noto emoji of 32x32 pixels,
            both in the package); a folder, read recursively in the order of sorted names, with the
            subfolders' names as labels; one image; a Parquet file, or a folder or glob of them; or
            a hub id, optionally as `id@config:split` (the default split is `train`).
        height: in pixels.
        width: in pixels.
        channels: 1 for grey, 3 for RGB.
        fit: what happens to images of other proportions; see `decoding.decode`.
        image_column: the column of images, if a table has several.
        label_column: the column of labels; by default `label` or the only column of classes.
        cache_bytes: limit of the decoded size (uint8) up to which `ImageRows` keeps a set in memory.

    Raises:
        UserError: if there is nothing at `source`, it cannot be read or holds no images; if a column
            is missing or ambiguous; or if the size or the number of channels is invalid.
    """
    if height < 1 or width < 1:
        raise UserError(f"images of {height}x{width} pixels are empty; give a height and width of at least 1")
    if channels not in (1, 3):
        raise UserError(f"images cannot have {channels} channels; give 1 for grey or 3 for RGB")
    table = sources.open_table(source, image_column=image_column, label_column=label_column)
    requested = {"image_column": image_column, "label_column": label_column}
    columns = {name: column for name, column in requested.items() if column is not None}
    return ImageSet(
        source,
        table,
        height=height,
        width=width,
        channels=channels,
        fit=fit,
        columns=columns,
        cache_bytes=cache_bytes,
    )


class ImageRows(Dataset):
    """The rows of one split. `__getitems__` returns whole batches, for a `DataLoader` with an identity `collate_fn`.

    With `flips` every image is two rows: 2i is the image, 2i + 1 its mirror image. Both share one
    source id, and `held_out` splits by source id, so both are in the same split.

    The constructor decodes the set into memory if it fits (see `open_images`), so that workers need
    not do so.

    Raises:
        UserError: if the train split is empty. The held-out split of a small set may be empty.
    """

    def __init__(self, image_set: ImageSet, *, split: Literal["train", "held_out", "all"], flips: bool) -> None:
        out = held_out(image_set.source_ids)
        selected = {"train": ~out, "held_out": out, "all": torch.ones_like(out)}[split]
        selected = selected & ~image_set.left_out
        if split == "train" and not selected.any():
            raise UserError(
                f"all {len(image_set)} image(s) of {image_set.source} fall into the held-out split; give more images"
            )
        image_set.fill_cache()
        self._image_set = image_set
        self._images: Int64[Tensor, " n"] = selected.nonzero().squeeze(1)
        self._rows_per_image = 2 if flips else 1

    def __len__(self) -> int:
        return len(self._images) * self._rows_per_image

    def spread(self, count: int) -> UInt8[Tensor, "b c h w"]:
        """Returns the images of `count` evenly spaced rows; with fewer rows than that, some repeat."""
        return self.__getitems__([i * len(self) // count for i in range(count)])["images"]

    def __getitems__(self, rows: Sequence[int]) -> dict[str, Tensor]:
        """Returns a batch.

        Args:
            rows: numbers in [0, len), in any order, repeated or not.

        Returns:
            `images` uint8 `(b, c, h, w)` and, for each row, `labels` int64 (-1 if none), `source_ids`
            int64, `flipped` bool and `rows` int64.
        """
        numbers = torch.as_tensor(rows, dtype=torch.int64)
        indices = self._images[numbers // self._rows_per_image]
        flipped = numbers % self._rows_per_image == 1
        images = self._image_set.pixels(indices)
        images = torch.where(flipped.view(-1, 1, 1, 1), images.flip(-1), images)
        return {
            "images": images,
            "labels": self._image_set.labels[indices],
            "source_ids": self._image_set.source_ids[indices],
            "flipped": flipped,
            "rows": numbers,
        }
