"""Images as NumPy arrays: one image in `.npy` bytes, and sets of images in `.npy` and `.npz` files.

A set's rows become `.npy` bytes of one image each, so that everything else treats them as files.

Legend: h w pixels, c channels.
"""

import ast
import struct
import zipfile
from collections.abc import Iterator, Sequence
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from smalti.core.errors import UserError, one_line
from smalti.images.formats.opening import LONGEST_SIDE, BadImageError, TooLargeError, refuse_expansion

NPY_MAGIC = b"\x93NUMPY"
LABELS = ("y", "labels", "label")
"""Names of the array of labels in a `.npz` file."""
_IMAGES = ("x", "images", "image", "arr_0")
_LONGEST_HEADER = 10_000
_DTYPES = (np.dtype("uint8"), np.dtype("uint16"))
_MOST_UNASKED_CHANNELS = 4
"""Largest side that counts as channels if it is not the number of channels that the model has."""


def npy_bytes(image: np.ndarray) -> bytes:
    """Returns an image in NumPy's format, version 1.0, with the same bytes whatever the version of NumPy."""
    image = np.ascontiguousarray(image, image.dtype.newbyteorder("<"))
    header = f"{{'descr': {image.dtype.str!r}, 'fortran_order': False, 'shape': {image.shape!r}, }}"
    start = len(NPY_MAGIC) + 4
    header += " " * (-(start + len(header) + 1) % 64) + "\n"
    return NPY_MAGIC + b"\x01\x00" + struct.pack("<H", len(header)) + header.encode("latin1") + image.tobytes()


def read_npy(encoded: bytes, channels: int, limit: int | None = None) -> np.ndarray:
    """Reads one image in NumPy's format, as `(h, w, c)` in uint8 or uint16.

    Args:
        encoded: the bytes of a file, of an array `(h, w)`, `(h, w, c)` or `(c, h, w)`.
        channels: the number of channels that decides which axis is the channels'; see `channel_axis`.
        limit: the most pixels; None for no limit.

    Raises:
        BadImageError: if the bytes are damaged, or the array has another rank or type.
    """
    shape, fortran, dtype, start = _header(encoded)
    if dtype not in _DTYPES:
        raise BadImageError(f"the array holds {dtype}; {_ADVICE}")
    if len(shape) not in (2, 3) or 0 in shape:
        raise BadImageError(f"the array has shape {shape}; an image is (height, width) or (height, width, channels)")
    if len(encoded) - start != prod(shape) * dtype.itemsize:
        raise BadImageError("the array's size is not that of its header; repair or remove it")
    image = np.frombuffer(encoded, dtype, offset=start).reshape(shape, order="F" if fortran else "C")
    axis = channel_axis(shape, channels)
    if axis is None:
        raise BadImageError(f"no axis of the array of shape {shape} is that of {channels} channels; transpose it")
    image = image[..., None] if len(shape) == 2 else np.moveaxis(image, axis, -1)
    height, width, _ = image.shape
    if limit is not None and height * width > limit:
        raise TooLargeError(f"the array has {width}x{height} pixels, and more than {limit} are not read; shrink it")
    if limit is None and max(height, width) > LONGEST_SIDE:
        raise TooLargeError(
            f"the array has {width}x{height} pixels, and a side of more than {LONGEST_SIDE} is not read"
        )
    return image


_ADVICE = "save pixels as uint8 (0 to 255), or as uint16 (0 to 65535) and read them with --image-depth 16"


def channel_axis(shape: Sequence[int], channels: int) -> int | None:
    """Returns the axis of an image's array that holds its channels: -1, also if it has none, or 0; None if neither can.

    The last axis is preferred. It is one if it has `channels` entries, or, as an image of another number is converted
    or refused later, at most four.
    """
    if len(shape) == 2 or shape[-1] == channels:
        return -1
    if shape[0] == channels:
        return 0
    if shape[-1] <= _MOST_UNASKED_CHANNELS:
        return -1
    return 0 if shape[0] <= _MOST_UNASKED_CHANNELS else None


def _header(encoded: bytes) -> tuple[tuple[int, ...], bool, np.dtype, int]:
    """Returns shape, Fortran order, dtype, and the position of the data; objects are never unpickled."""
    damaged = "the array's header is damaged; save it with numpy.save"
    try:
        wide = encoded[len(NPY_MAGIC)] > 1  # versions 2 and 3 have a longer length
        start = len(NPY_MAGIC) + 2
        (length,) = struct.unpack_from("<I" if wide else "<H", encoded, start)
        start += 4 if wide else 2
        if length > _LONGEST_HEADER:
            raise BadImageError(damaged)
        fields = ast.literal_eval(encoded[start : start + length].decode("latin1").strip())
        shape, dtype = fields["shape"], np.dtype(fields["descr"])
        valid = isinstance(shape, tuple) and all(type(side) is int and side >= 0 for side in shape)
    except (LookupError, ValueError, SyntaxError, TypeError, struct.error, MemoryError, RecursionError) as error:
        raise BadImageError(damaged) from error
    if not valid:
        raise BadImageError(damaged)
    return shape, bool(fields.get("fortran_order")), dtype, start + length


def is_set(path: Path, channels: int) -> bool:
    """Returns whether a `.npy` file holds several images: an array of rank 4, or of rank 3 with no axis of channels."""
    shape = _open(path).shape
    return len(shape) == 4 or (len(shape) == 3 and channel_axis(shape, channels) is None)


def describe_arrays(described: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yields the images of `.npy` and `.npz` files, and their labels, as rows of a table.

    Args:
        described: `paths` of the files; `channels`, see `channel_axis`; and `stamps`, so that `datasets` caches the
            rows until a file changes.

    Raises:
        UserError: if an array cannot be read, or is of another rank or type.
    """
    channels = described["channels"]
    for path in map(Path, described["paths"]):
        images, labels = _images_and_labels(path)
        if images.dtype.newbyteorder("=") not in _DTYPES:
            raise UserError(f"{path} holds images of {images.dtype}; {_ADVICE}")
        axis = channel_axis(images.shape[1:], channels) if images.ndim in (3, 4) and images.size else None
        if axis is None:
            raise UserError(
                f"{path} holds an array of shape {images.shape}; images are (n, h, w), (n, h, w, c) or (n, c, h, w)"
            )
        if labels is not None and (labels.shape != images.shape[:1] or labels.dtype.kind not in "iuUb"):
            raise UserError(
                f"{path} has labels {labels.dtype} of shape {labels.shape}; give one integer or text for each of its "
                f"{len(images)} images"
            )
        for number, image in enumerate(images):
            encoded = npy_bytes(np.moveaxis(image, axis, -1) if image.ndim == 3 else image)
            label = None if labels is None else labels[number].item()
            yield {"image": {"bytes": encoded, "path": None}, "label": label}


def kind_of_labels(paths: Sequence[Path]) -> str:
    """Returns the type of the labels in files of arrays, "int64" or "string"."""
    labels = [labels for path in paths if (labels := _read(path, LABELS)) is not None]
    return "string" if any(each.dtype.kind == "U" for each in labels) else "int64"


def _images_and_labels(path: Path) -> tuple[np.ndarray, np.ndarray | None]:
    images = _read(path, _IMAGES)
    assert images is not None
    return images, _read(path, LABELS)


def _read(path: Path, names: Sequence[str]) -> np.ndarray | None:
    """Returns the array of images, or that of labels, which may be None.

    Raises:
        UserError: if the file cannot be read, or its arrays have other names.
    """
    opened = _open(path)
    if isinstance(opened, np.ndarray):
        return None if names is LABELS else opened
    labels = [name for name in opened.files if name.lower() in LABELS]
    others = [name for name in opened.files if name not in labels]
    images = others if len(others) == 1 else [name for name in others if name.lower() in _IMAGES]
    if len(images) != 1 or len(labels) > 1:
        raise UserError(
            f"{path} holds arrays called {', '.join(opened.files) or 'nothing'}; call the images 'x' or 'images' and "
            "the labels 'y' or 'labels'"
        )
    chosen = labels if names is LABELS else images
    try:
        return opened[chosen[0]] if chosen else None
    except _DAMAGED as error:
        raise UserError(f"{path} cannot be read ({one_line(error)}); save it with numpy.savez") from error


def _open(path: Path) -> Any:
    """Opens a file of arrays: one mapped into memory, or several that are read when they are asked for."""
    try:
        if path.suffix.lower() == ".npz":
            with zipfile.ZipFile(path) as archive:
                for member in archive.infolist():
                    refuse_expansion(member.file_size, member.compress_size)
            return np.load(path, allow_pickle=False)
        with path.open("rb") as file:
            dtype = _header(file.read(_LONGEST_HEADER))[2]
        if dtype.hasobject:
            raise BadImageError(f"the array holds objects; {_ADVICE}")
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except BadImageError as error:
        raise UserError(f"{path}: {error}") from error
    except _DAMAGED as error:
        raise UserError(f"{path} cannot be read ({one_line(error)}); save it with numpy.save or numpy.savez") from error


_DAMAGED = (OSError, ValueError, EOFError, LookupError, SyntaxError, MemoryError, zipfile.BadZipFile, TypeError)
