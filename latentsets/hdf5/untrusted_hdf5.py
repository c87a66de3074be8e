"""Opening HDF5 files that anyone may have written: every reader of latent sets passes here.

HDF5 can make a file refer to other files (external storage, external links, virtual datasets) and declare sizes that
it does not hold. Both are refused before anything is read or allocated. The format itself is in `format.py`.
"""

import math
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import h5py
import numpy as np

from smalti.core.config import LARGEST_JSON_BYTES
from smalti.core.errors import UserError

LARGEST_CHUNK_ROWS = 1 << 20
"""HDF5 allocates whole chunks, whatever the size of the dataset."""
_FILTERS = (h5py.h5z.FILTER_DEFLATE, h5py.h5z.FILTER_SHUFFLE, h5py.h5z.FILTER_FLETCHER32, h5py.h5z.FILTER_LZF)
_DAMAGE = (OSError, RuntimeError, ValueError, TypeError, KeyError, AttributeError, OverflowError, MemoryError)
"""The exceptions that h5py raises for damaged files."""


@contextmanager
def opened(path: Path) -> Iterator[h5py.File]:
    """Opens the file for reading without a lock: many may read at once, and some shared file systems lack locks.

    Raises:
        UserError: if there is no such file, it cannot be read, or it is not a whole HDF5 file.
    """
    try:
        mode = path.stat().st_mode
        if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):  # a pipe would block; HDF5 reports folders itself
            raise UserError(f"{path} is not a regular file; give a latent set made by build_latents.py")
        with h5py.File(path, "r", locking=False) as file:
            yield file
    except FileNotFoundError as error:
        raise UserError(f"there is no latent set at {path}; build one with build_latents.py") from error
    except UserError:
        raise
    except _DAMAGE as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise UserError(f"{path} cannot be read: {os.strerror(error.errno)}") from error
        if not h5py.is_hdf5(path):
            raise UserError(f"{path} is not an HDF5 file; give a latent set made by build_latents.py") from error
        raise UserError(f"{path} is truncated or damaged; copy it again, or build it again") from error


def attribute(file: h5py.File, name: str) -> str | int | None:
    """Returns a root attribute that is one string or one integer; None if it is anything else or missing.

    Raises:
        ValueError: if it is larger than smalti reads, or text that is not UTF-8.
    """
    if not h5py.h5a.exists(file.id, name.encode()):
        return None
    stored = h5py.h5a.open(file.id, name.encode())
    if stored.shape != () or stored.get_space().get_simple_extent_type() != h5py.h5s.SCALAR:
        return None
    if stored.get_storage_size() > LARGEST_JSON_BYTES:
        raise ValueError(f"{name} takes {stored.get_storage_size()} bytes, more than the {LARGEST_JSON_BYTES} read")
    if stored.get_type().get_class() not in (h5py.h5t.STRING, h5py.h5t.INTEGER):
        return None
    if stored.get_type().get_class() == h5py.h5t.STRING and not stored.get_type().is_variable_str():
        text = np.empty((), stored.dtype)  # a quarter of the time that `file.attrs` takes
        stored.read(text)
        return text.tobytes().rstrip(b"\0").decode()
    value = file.attrs[name]
    if isinstance(value, str):
        value.encode()  # h5py reads bytes that are not UTF-8 as lone surrogates
        return value
    return int(value) if isinstance(value, np.integer) else None


def dataset(path: Path, file: h5py.File, name: str) -> h5py.Dataset:
    """Returns a dataset whose values are all in this file.

    Raises:
        UserError: if there is none, or it is a link to or reads from another file.
    """
    parts = name.split("/")
    for length in range(1, len(parts) + 1):
        node = "/".join(parts[:length])
        link = file.get(node, getlink=True)
        if link is None:
            raise UserError(f"{path} lacks {name}; build the latent set again")
        if not isinstance(link, h5py.HardLink):  # also links within the file, which may lead to a link out of it
            raise UserError(f"{path}: {node} is a link, maybe to another file; give a set with its values in the file")
        if length < len(parts) and file.get(node, getclass=True) is not h5py.Group:
            raise UserError(f"{path} lacks {name}; build the latent set again")
    found = file.get(name)
    if not isinstance(found, h5py.Dataset):
        raise UserError(f"{path} lacks {name}; build the latent set again")
    creation = found.id.get_create_plist()
    if creation.get_layout() == h5py.h5d.VIRTUAL or creation.get_external_count():
        raise UserError(f"{path}: {name} reads from another file; give a set with its values in the file")
    return found


def require_extent(path: Path, stored: h5py.Dataset, name: str, dtype: np.dtype, shape: tuple[int, ...]) -> None:
    """Refuses a dataset of another type or shape, before anything of its declared size is allocated.

    Raises:
        UserError: naming both.
    """
    if stored.shape is None or (stored.dtype, stored.shape) != (dtype, shape):
        has = f"{stored.shape} {stored.dtype}"
        raise UserError(f"{path}: {name} is {has}, not {shape} {dtype}; build the latent set again")


def contiguous_offset(path: Path, stored: h5py.Dataset, name: str) -> int:
    """Returns the offset in bytes of a dataset that is contiguous in the file, and all of it.

    Raises:
        UserError: if it is chunked, compressed, not written yet, or reaches beyond the end of the file.
    """
    contiguous = stored.id.get_create_plist().get_layout() == h5py.h5d.CONTIGUOUS
    offset = stored.id.get_offset() if contiguous else None
    if offset is None:
        raise UserError(f"{path}: its codes are chunked or compressed, not contiguous; undo the repacking")
    size, file_size = math.prod(stored.shape) * stored.dtype.itemsize, path.stat().st_size
    if not 0 < offset <= file_size - size:
        raise UserError(
            f"{path} is truncated or damaged: {name} takes {size} bytes at {offset}, but the file has {file_size}; "
            "copy it again, or build it again"
        )
    return offset


def column(path: Path, stored: h5py.Dataset, name: str) -> np.ndarray:
    """Reads a column, whose extent was checked.

    Raises:
        UserError: as `require_readable` does.
    """
    require_readable(path, stored, name)
    return stored[:]


def require_readable(path: Path, stored: h5py.Dataset, name: str) -> None:
    """Refuses a compressed dataset that cannot be read in bounded memory.

    Raises:
        UserError: if its chunks or filters are none that smalti reads.
    """
    creation = stored.id.get_create_plist()
    filters = {creation.get_filter(number)[0] for number in range(creation.get_nfilters())}
    if filters - set(_FILTERS):
        raise UserError(f"{path}: {name} is compressed by a filter that is not read; repack it with gzip")
    if stored.chunks and stored.chunks[0] > max(LARGEST_CHUNK_ROWS, stored.shape[0]):
        raise UserError(f"{path}: {name} has chunks of {stored.chunks[0]} rows; build the latent set again")
