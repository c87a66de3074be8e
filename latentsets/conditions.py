"""Vectors that priors can be conditioned on: read from a file, computed from images, or added to a finished set.

A set holds them in float16, one for each row. Rows made from one image by mirroring or cropping share the image's.
"""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Integer
from torch import Tensor

from smalti.core.errors import UserError
from smalti.core.files import import_from_here, input_digest
from smalti.core.provenance import command
from smalti.latentsets.copies import copy_set
from smalti.latentsets.reader import LatentSet

MOST_NUMBERS = 1 << 16
"""Most numbers in a vector."""
_NUMBERS_AT_ONCE = 1 << 22
FLOATS = (np.float16, np.float32, np.float64)


def read_vectors(path: Path) -> np.ndarray:
    """Returns the vectors in a `.npy` file, `(n, width)`, memory-mapped.

    Raises:
        UserError: if it is no array of floats of this shape, or has a number that is not finite in float16.
    """
    try:
        vectors = np.load(path, mmap_mode="r", allow_pickle=False)
    except OSError as error:
        raise UserError(f"--conditions {path} cannot be read ({error.strerror or error}); check the name") from error
    except (ValueError, EOFError) as error:
        raise UserError(
            f"--conditions {path} cannot be read: it is no array of numbers that numpy.save wrote"
        ) from error
    if not isinstance(vectors, np.ndarray):
        raise UserError(f"--conditions {path} holds several arrays; give one array, as numpy.save writes it")
    require_vectors(vectors, f"--conditions {path}")
    return vectors


def require_vectors(vectors: np.ndarray, name: str) -> None:
    """Refuses an array that is not one of vectors; the error calls it `name`.

    Raises:
        UserError: as `read_vectors` does.
    """
    if vectors.ndim != 2 or 0 in vectors.shape or vectors.shape[1] > MOST_NUMBERS:
        raise UserError(f"{name} has the shape {vectors.shape}; give (n, width), a vector in each row")
    if vectors.dtype.newbyteorder("=") not in FLOATS:
        raise UserError(f"{name} holds {vectors.dtype}; give float16, float32 or float64")
    step = max(1, _NUMBERS_AT_ONCE // vectors.shape[1])
    for start in range(0, len(vectors), step):
        bad = ~np.isfinite(to_half(vectors[start : start + step]).numpy()).all(1)
        if bad.any():
            row = start + int(bad.argmax())
            finite = np.isfinite(vectors[row]).all()
            what = "a number beyond 65504, the largest of float16" if finite else "NaN or infinity"
            raise UserError(f"{name} has {what} in row {row}; every number must be finite in float16")


def to_half(vectors: np.ndarray) -> Float[Tensor, "n v"]:
    """Returns vectors in float16."""
    with np.errstate(over="ignore"):
        return torch.from_numpy(vectors.astype(np.float16))


class ConditionSource:
    """Vectors of the images of a set, by their numbers: rows of a file, or what a function computes from the images.

    Args:
        requested: `FILE.npy` with a vector for each image, in the order of the images; or `module:function`, which
            receives a batch of images `(b, c, h, w)` as they are decoded (uint8 from 0 to 255, or int32 from 0 to 65535
            at 16 bits) on the device that encodes, and returns floats `(b, width)`, a tensor or an array.
        images: number of images.
        blank: an image `(1, c, h, w)`, to learn the function's width with.

    Attributes:
        width: numbers in a vector.
        source: the name of the function or file and the SHA-256 of the file; a change of it changes the vectors.

    Raises:
        UserError: if the file or the function does not fit; see `read_vectors`.
    """

    def __init__(self, requested: str, images: int, blank: Integer[Tensor, "1 c h w"]) -> None:
        self._requested, self._vectors, self._function = requested, None, None
        if requested.lower().endswith(".npy"):
            path = Path(requested)
            self._vectors = read_vectors(path)
            if len(self._vectors) != images:
                raise UserError(
                    f"--conditions {path} has {len(self._vectors)} rows, but there are {images} images; give one row "
                    "for each image"
                )
            self.width, name = self._vectors.shape[1], path.name
        else:
            self._function, path = _find_function(requested)
            self.width, name = self._computed(blank).shape[1], requested
        self.source = f"{name}, SHA-256 {input_digest(path)}"

    def __call__(self, numbers: Sequence[int], pixels: Integer[Tensor, "b c h w"]) -> Float[Tensor, "b v"]:
        """Returns the vectors of images, given their numbers and themselves, in float16 on the CPU.

        Raises:
            UserError: if the function returns another shape or type, or numbers that are not finite.
        """
        if self._vectors is not None:
            return to_half(self._vectors[list(numbers)])
        vectors = self._computed(pixels)
        if vectors.shape != (len(pixels), self.width):
            raise UserError(
                f"{self._requested} returned {vectors.shape}, but {(len(pixels), self.width)} is expected; return as "
                "many numbers for every image"
            )
        return to_half(vectors)

    @torch.no_grad()
    def _computed(self, pixels: Tensor) -> np.ndarray:
        assert self._function is not None
        with torch.autocast(pixels.device.type, enabled=False):
            vectors = to_array(self._function(pixels))
        require_vectors(vectors, f"what {self._requested} returned")
        return vectors


def _find_function(requested: str) -> tuple[Callable[[Tensor], Any], Path]:
    """Returns the function that `module:function` names, and the file of its module."""
    module_name, colon, name = requested.partition(":")
    if not colon or not all(part.isidentifier() for part in (*module_name.split("."), name)):
        raise UserError(
            f"--conditions {requested} is neither FILE.npy nor module:function, such as colours:mean_colours"
        )
    module = import_from_here(module_name, f"--conditions {requested}")
    function = getattr(module, name, None)
    if not callable(function):
        raise UserError(f"--conditions {requested}: {module_name} has no function {name!r}; check its name")
    return function, Path(inspect.getfile(module))


def add_conditions(
    latent_set: LatentSet, vectors: Float[np.ndarray, "rows v"] | Float[Tensor, "rows v"], path: str | Path, source: str
) -> LatentSet:
    """Writes a copy of a set with a vector for each of its rows, without encoding the images again.

    Args:
        latent_set: the set. Vectors that it has are replaced.
        vectors: floats, a vector for each row. Rows of one image follow each other: with mirror images and no crops
            they are `np.repeat(vectors_of_images, 2, axis=0)`.
        path: the file to write, whole or not at all; that of the set itself is replaced.
        source: where the vectors come from, such as the name of an encoder, for the provenance.

    Raises:
        UserError: if there are not as many vectors as rows, one is not finite in float16, or the source is empty.
    """
    array = to_array(vectors)
    require_vectors(array, "the array of vectors")
    if len(array) != len(latent_set):
        raise UserError(f"there are {len(array)} vectors, but {latent_set.path} has {len(latent_set)} rows")
    if not source:
        raise UserError("give the source of the vectors, such as the name of the encoder")
    provenance = replace(latent_set.provenance, condition_source=source, command=command())
    copy_set(latent_set, provenance, Path(path), conditions=to_half(array))
    return LatentSet(path)


def to_array(vectors: Any) -> np.ndarray:
    """Returns vectors as an array, also those of a tensor on any device."""
    return vectors.detach().float().cpu().numpy() if isinstance(vectors, Tensor) else np.asarray(vectors)
