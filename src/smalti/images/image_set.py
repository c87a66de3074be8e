"""Image sets: pixels, labels and source ids, and the rows of a split for training.

Decoding is in `decoding.py`, the sources of images in `sources.py`, labels and the held-out split in `contents.py`.

Legend: n images in a set, b rows of a batch, c channels, h w pixels.
"""

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Int64, Integer
from torch import Tensor
from torch.utils.data import Dataset

from smalti.core.codes import Split, row_numbers
from smalti.core.config import require_choice
from smalti.core.devices import cores
from smalti.core.errors import UserError, require_at_least_one
from smalti.core.files import as_name
from smalti.core.progress import SLOW_SECONDS, bar
from smalti.images import sources
from smalti.images.checks import Checks, load_checks, save_checks
from smalti.images.contents import Contents, common_folder, describe_classes, encoded, file_names, read_contents
from smalti.images.decoding import Decoded, decode_crops, decode_with_size
from smalti.images.fitting import Fit, describe, random_crops, require_shape, ten_crops
from smalti.images.formats.archives import shown_path
from smalti.images.formats.opening import BadImageError, TooLargeError, UnreadableImageError, bad_images_error
from smalti.images.formats.planes import Depth

CACHE_BYTES = 2**30
_DECODED_AT_ONCE = 64  # images; limits the encoded bytes in memory while the cache fills
_DECODING_THREADS = min(8, cores())  # Pillow releases the GIL, but small images gain little


class ImageSet:
    """Images of one size, in a fixed order, decoded on access.

    Attributes:
        source: the argument of `open_images`.
        label_names: names of the labels 0, 1, ...; empty if the images have none.
        labels: one for each image, -1 if it has none.
        source_ids: one for each image, in [0, 2**63). Images of one original, such as an emoji's skin tones, share one.
        fingerprint: SHA-256 over source ids, labels and encoded images in order; the same on every machine.
        held_out: marks the images that training never uses.
        preprocessing: the description of the preprocessing and of the requested selection, as JSON.
        notes: what of the source was left out and why, a sentence each.
        left_out: marks the images that `leave_out` excluded from all splits.
        captions: reads the captions: one for each image, "" for none; None if there are none.
    """

    def __init__(
        self,
        source: str,
        contents: Contents,
        *,
        size: dict[str, Any],
        most_pixels: int | None,
        selection: dict[str, Any],
        cache_bytes: int,
    ) -> None:
        self.source, self.notes = source, contents.notes
        self.preprocessing: dict[str, Any] = {**describe(**size), **selection}
        self.labels, self.label_names = contents.labels, contents.label_names
        self.source_ids: Int64[Tensor, " n"] = contents.source_ids
        self.held_out: Bool[Tensor, " n"] = contents.held_out
        self.fingerprint, self.captions = contents.fingerprint, contents.captions
        self.left_out: Bool[Tensor, " n"] = torch.zeros(len(self.source_ids), dtype=torch.bool)
        self._encoded, self._column, self._cache_bytes = contents.images, contents.column, cache_bytes
        self._form: dict[str, Any] = {**size, "limit": most_pixels}
        self._shape = (size["channels"], size["height"], size["width"])
        self._dtype, self._cached_dtype = {8: (torch.uint8,) * 2, 16: (torch.int32, torch.uint16)}[size["depth"]]
        self._errors: dict[int, str] = {}
        self._cache: Integer[Tensor, "n c h w"] | None = None

    def __len__(self) -> int:
        return len(self.source_ids)

    def summary(self) -> list[str]:
        """Returns lines for the user: how many images of which classes were found, and what was left out and why."""
        classes = describe_classes(self.labels, self.label_names)
        return [f"{len(self)} image{'s' * (len(self) != 1)} from {self.source}, {classes}", *self.notes]

    def pixels(
        self, indices: Sequence[int] | Int64[Tensor, " b"], *, bad: dict[int, str] | None = None
    ) -> Integer[Tensor, "b c h w"]:
        """Returns the images at `indices`, from the cache if it is filled, else decoded now; see `open_images`.

        Args:
            indices: in [0, len), in any order, repeated or not.
            bad: receives the error of each image that cannot be decoded, which is black; without it they raise.

        Raises:
            BadImageError: with file and row, for images that cannot be decoded.
        """
        numbers: list[int] = row_numbers(indices).tolist()
        if self._cache is not None:
            errors = {index: self._errors[index] for index in numbers if index in self._errors}
            pixels = self._cache[torch.tensor(numbers, dtype=torch.int64)].to(self._dtype)
        else:
            errors = {}
            pixels = torch.zeros((len(numbers), *self._shape), dtype=self._dtype)
            for position, (index, image) in enumerate(zip(numbers, self._encoded[numbers][self._column], strict=True)):
                try:
                    pixels[position] = self._decode(image).pixels
                except BadImageError as error:
                    errors[index] = str(error)
        if (named := self._named(errors)) and bad is None:
            raise bad_images_error(named)
        if bad is not None:
            bad.update(named)
        return pixels

    def crops(self, indices: Sequence[int], count: int | None) -> Integer[Tensor, "b n c h w"]:
        """Returns `count` random crops of each image, the same every time, or `fitting.ten_crops` if it is None.

        They are taken from the original images, of any size. Those of an image that cannot be decoded are black.
        """
        fixed, numbers = ten_crops(), torch.from_numpy(row_numbers(indices))
        drawn = [fixed] * len(indices) if count is None else random_crops(numbers, count)
        pixels = torch.zeros((len(indices), count or len(fixed), *self._shape), dtype=self._dtype)
        images = self._encoded[numbers.tolist()][self._column]
        for position, (image, crops) in enumerate(zip(images, drawn, strict=True)):
            with suppress(BadImageError):
                pixels[position] = decode_crops(encoded(image), crops, **self._form)
        return pixels

    def check(self) -> Checks:
        """Decodes every image once, on threads, unless an earlier command has; returns errors and original sizes.

        A set that fits into `cache_bytes` stays in memory. The errors name the file and row.
        """
        checks = load_checks(self.fingerprint, self._form)
        if checks is None or any(index >= len(self) for index in checks.errors):
            checks = self._decode_all(keep=self._fits())
            save_checks(checks, self.fingerprint, self._form)
        return Checks(self._named(checks.errors), checks.sizes)

    def file_names(self) -> list[str] | None:
        """Returns the name of each image's file, with its subfolders; None if an image is in no file of its own."""
        return file_names(self._encoded, self._column)

    def without_folder(self, errors: Mapping[int, str]) -> dict[int, str]:
        """Returns errors that name files below the folder that all are in, so that they do not depend on its path."""
        return {index: error.removeprefix(self._folder) for index, error in errors.items()}

    @cached_property
    def _folder(self) -> str:
        return f"{common_folder(self._encoded, self._column) or os.path.dirname(self.source)}{os.sep}"

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
        return torch.Size((len(self), *self._shape)).numel() * self._cached_dtype.itemsize <= self._cache_bytes

    def _decode_all(self, *, keep: bool) -> Checks:
        """Decodes every image; with `keep`, fills the cache, with black for images that cannot be decoded."""
        errors, unreadable = dict[int, str](), list[int]()
        sizes: list[tuple[int, int] | None] = [None] * len(self)
        cache = torch.empty((len(self) if keep else 0, *self._shape), dtype=self._cached_dtype)

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
        try:
            return decode_with_size(encoded(image), **self._form)
        except TooLargeError as error:
            raise BadImageError(f"{error}, or raise --most-pixels") from error

    def _named(self, errors: dict[int, str]) -> dict[int, str]:
        """Adds the file's name, or the table's, and the row to errors."""
        if not errors:
            return {}
        images = self._encoded[list(errors)][self._column]
        paths = [image.get("path") if isinstance(image, dict) else None for image in images]
        names = [shown_path(path) if path else self.source for path in paths]
        return {
            index: f"{name}, row {index}: {error}" for name, (index, error) in zip(names, errors.items(), strict=True)
        }


def open_images(
    source: str | Path = sources.DEFAULT,
    *,
    height: int = 32,
    width: int = 32,
    channels: int = 3,
    fit: Fit = "crop",
    depth: Depth = 8,
    image_column: str | None = None,
    label_column: str | None = None,
    split: str | None = None,
    limit: int | None = None,
    held_out: str | Path | float | None = None,
    most_pixels: int | None = None,
    caption_column: str | None = None,
    cache_bytes: int = CACHE_BYTES,
) -> ImageSet:
    """Opens a set of images, without decoding them yet.

    Args:
        source: `portraits` or `emoji` (9 000 drawn portraits and 3 786 Noto emoji of 32x32 pixels, both in the
            package); a folder, read recursively in the order of sorted names, with the subfolders' names as labels; one
            image; tar or zip archives; arrays (`.npy`, `.npz`); a list of paths (`.csv`, `.tsv`, `.txt`, `.jsonl`); a
            Parquet file; a folder or glob of any one kind; a range or URL of archives (`shards-{0000..0127}.tar`); or a
            hub id, optionally as `id@config:split` (the default split is `train`). A `Path` is never in the package.
        height: in pixels.
        width: in pixels.
        channels: 1 for grey, 3 for RGB; 2 and 4 keep the alpha channel; see `decoding.decode`.
        fit: what happens to images of other proportions; see `decoding.decode`.
        depth: 16 gives pixels as int32 from 0 to 65535 instead of uint8.
        image_column: the column of images, if a table has several.
        label_column: the column of labels; by default `label` or the only column of classes.
        split: the split to read; by default that of training.
        limit: the number of images to read, the first ones.
        held_out: `none`, a fraction such as `0.05`, or another source, to add as that split; by default 0.1.
        most_pixels: the most pixels of an image; by default Pillow's limit, and less for possible decompression bombs.
        caption_column: the column of captions; by default the `.txt` beside images in shards.
        cache_bytes: limit of the decoded size up to which `ImageRows` keeps a set in memory.

    Raises:
        UserError: if there is nothing at `source`, it cannot be read or holds no images; if a column or split is
            missing or ambiguous; or if the size or the number of channels is invalid.
    """
    source, held_out = as_name(source), held_out if held_out is None else as_name(held_out)
    require_shape(height, width, channels)
    limits = {"--limit": limit, "--most-pixels": most_pixels}
    require_at_least_one({flag: value for flag, value in limits.items() if value is not None})
    chosen = {"image_column": image_column, "label_column": label_column, "caption_column": caption_column}
    columns: dict[str, Any] = {**chosen, "split": split, "limit": limit}
    table = sources.open_table(source, **columns, channels=channels)
    selection = {name: value for name, value in {**columns, "held_out": held_out}.items() if value is not None}
    return ImageSet(
        source,
        read_contents(table, held_out, channels, chosen),
        size={"channels": channels, "height": height, "width": width, "fit": fit, "depth": depth},
        most_pixels=most_pixels,
        selection=selection,
        cache_bytes=cache_bytes,
    )


class ImageRows(Dataset):
    """The rows of one split. `__getitems__` returns whole batches, without collation; see `LatentRows`.

    With `flips` every image is two rows: 2i is the image, 2i + 1 its mirror image, in the same split.

    The constructor decodes the set into memory if it fits (see `open_images`), so that workers need not do so.

    Raises:
        UserError: if there is no such split, or that of training is empty. The held-out split of a small set may be.
    """

    def __init__(self, image_set: ImageSet, *, split: Split, flips: bool) -> None:
        require_choice("split", split, Split)
        out = image_set.held_out
        selected = {"train": ~out, "held_out": out, "all": torch.ones_like(out)}[split] & ~image_set.left_out
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

    def spread(self, count: int) -> Integer[Tensor, "b c h w"]:
        """Returns the images of `count` evenly spaced rows; with fewer rows than that, some repeat."""
        return self.__getitems__([i * len(self) // count for i in range(count)])["images"]

    def __getitem__(self, row: int) -> dict[str, Tensor]:
        """Returns one row, without the dimension of the batch; see `__getitems__`, which is faster for many."""
        return {name: column[0] for name, column in self.__getitems__([row]).items()}

    def __getitems__(self, rows: Sequence[int]) -> dict[str, Tensor]:
        """Returns a batch.

        Args:
            rows: numbers in [0, len), in any order, repeated or not.

        Returns:
            `images` `(b, c, h, w)`, uint8 or int32, and, for each row, `labels` int64 (-1 if none), `source_ids`
            int64, `flipped` bool and `rows` int64.
        """
        numbers = torch.from_numpy(row_numbers(rows))
        indices = self._images[numbers // self._rows_per_image]
        flipped = numbers % self._rows_per_image == 1
        images = self._image_set.pixels(indices)
        return {
            "images": torch.where(flipped.view(-1, 1, 1, 1), images.flip(-1), images),
            "labels": self._image_set.labels[indices],
            "source_ids": self._image_set.source_ids[indices],
            "flipped": flipped,
            "rows": numbers,
        }
