"""Reads checkpoints that `torch.save` wrote, which anyone may have written, without running code from them.

What a pickle declares is checked against the file's size before anything is allocated.
"""

import io
import math
import pickle
import struct
import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from smalti.core.checkpoint_checks import StoredTensor
from smalti.core.errors import UserError, one_line

LARGEST_PICKLE_BYTES = 1 << 21
"""Names and shapes of a checkpoint, without the values of its tensors, have some 200 kB."""
_STORAGES = {
    **{"DoubleStorage": torch.float64, "FloatStorage": torch.float32, "HalfStorage": torch.float16},
    **{"BFloat16Storage": torch.bfloat16, "LongStorage": torch.int64, "IntStorage": torch.int32},
    **{"ShortStorage": torch.int16, "CharStorage": torch.int8, "ByteStorage": torch.uint8, "BoolStorage": torch.bool},
}
_INERT = (
    "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint",
    *("numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar", "numpy.dtype"),
)
"""Classes and functions that published checkpoints name in what Lightning stores beside the weights: the key of a
callback, and scores as numpy's scalars."""
_STATES = ("ema", "state_dict", "model")
"""Keys of the weights in a training's checkpoint. The averaged weights come first, as in LlamaGen's own scripts."""

MALFORMED = (
    *(ValueError, LookupError, TypeError, AttributeError, ArithmeticError, AssertionError, RuntimeError, MemoryError),
    *(OSError, EOFError, StopIteration, struct.error, pickle.PickleError, zipfile.BadZipFile),
)
"""The exceptions that unpicklers and parsers raise for malformed or hostile files, which decide what is called."""


def read_pickled(path: Path) -> dict[str, Tensor]:
    """Loads the tensors of a checkpoint that `torch.save` wrote, from its `ema`, `state_dict` or `model` if it has one.

    The pickle is read twice. First every function that it may call is replaced by one that only notes shapes, which
    are checked against the file. Then torch loads it with `weights_only`, and maps the values instead of reading them.

    Raises:
        UserError: if the file is damaged, or holds more than tensors and plain values.
    """
    try:
        state = _weights(_without_values(path))
        inert: list[Any] = [(_stand_in(), name) for name in _INERT]
        with torch.serialization.safe_globals(inert), warnings.catch_warnings(action="ignore"):
            loaded = _weights(torch.load(path, map_location="cpu", weights_only=True, mmap=True))
        if {name: _shape(tensor) for name, tensor in loaded.items()} != state:
            raise ValueError("its tensors are not as they were declared")
    except MALFORMED as error:  # unpicklers do what the file says, so that they may raise anything
        reason = str(error) if isinstance(error, UserError) else "it is damaged, or holds more than weights"
        raise UserError(f"{path} was not loaded: {reason}; download it again, from a source that you trust") from error
    return loaded


def _weights(checkpoint: Any) -> dict[str, Any]:
    """Returns the entries of a checkpoint by name."""
    if not isinstance(checkpoint, dict):
        raise UserError(f"it holds a {type(checkpoint).__name__}, not weights by name")
    nested = [checkpoint[key] for key in _STATES if isinstance(checkpoint.get(key), dict | list)]
    state = nested[0] if nested else checkpoint
    if not isinstance(state, dict) or not all(isinstance(name, str) for name in state):
        raise UserError("it does not hold weights by name")
    if wrong := [name for name, value in state.items() if not isinstance(value, Tensor | StoredTensor)]:
        raise UserError(f"it also has {wrong[0]}, which is no tensor")
    return state


def _shape(tensor: Tensor) -> StoredTensor:
    return StoredTensor(tuple(tensor.shape), tensor.dtype)


def _without_values(path: Path) -> Any:
    """Unpickles a checkpoint with a `StoredTensor` in the place of every tensor.

    Raises:
        UserError: if it is no checkpoint of torch 1.6 or later, or its declared sizes contradict the file's.
        Exception: for a damaged or hostile file.
    """
    if not zipfile.is_zipfile(path):
        raise UserError("it is truncated, or not a file of torch 1.6 or later")
    with zipfile.ZipFile(path) as archive:
        sizes = {entry.filename: entry.file_size for entry in archive.infolist()}
        plain = all(entry.compress_type == zipfile.ZIP_STORED for entry in archive.infolist())
        if not plain or len(sizes) < len(archive.infolist()) or sum(sizes.values()) > path.stat().st_size:
            raise UserError("it has packed entries; torch stores them as they are")
        (pickled,) = (name for name in sizes if name.endswith("/data.pkl"))
        if sizes[pickled] > LARGEST_PICKLE_BYTES:
            raise UserError(f"names and shapes take {sizes[pickled]} bytes, the most is {LARGEST_PICKLE_BYTES}")
        return _ShapeUnpickler(archive.read(pickled), sizes, pickled.removesuffix(".pkl")).load()


class _ShapeUnpickler(pickle._Unpickler):  # type: ignore[attr-defined] - the one in C allocates by declared sizes
    """Unpickler that finds stand-ins in the place of torch's functions, and nothing else."""

    def __init__(self, content: bytes, sizes: dict[str, int], folder: str) -> None:
        super().__init__(io.BytesIO(content))
        self.sizes, self.folder = sizes, folder

    def find_class(self, module: str, name: str) -> Any:
        """Returns a stand-in made for this one call, so that a file which changes it changes no other."""
        if module == "torch" and name in _STORAGES:
            return _STORAGES[name]
        match f"{module}.{name}":
            case "collections.OrderedDict":
                return type("OrderedDict", (dict,), {"__init__": lambda self: None, "__new__": lambda cls: _new(cls)})
            case "torch._utils._rebuild_tensor_v2":
                return lambda storage, offset, shape, *_: _stored(storage, shape)
            case "torch._utils._rebuild_parameter":
                return lambda tensor, *_: tensor
            case "torch.Size":
                return lambda sizes: tuple(sizes)
            case "_codecs.encode":
                return lambda text, *_: text  # bytes in old pickles, here those of a numpy scalar
            case known if known in _INERT:
                return _stand_in()
        raise UserError(f"it holds more than weights, {module}.{name}, which could run code")

    def persistent_load(self, pid: Any) -> StoredTensor:
        """Returns a storage as a tensor of one axis."""
        _, dtype, key, _, length = pid
        if self.sizes[f"{self.folder}/{key}"] != length * dtype.itemsize:
            raise UserError(f"storage {key} is declared with {length} values, but the file has another size")
        return StoredTensor((length,), dtype)


def _new(cls: type) -> Any:
    return dict.__new__(cls)


def _stored(storage: StoredTensor, shape: tuple[int, ...]) -> StoredTensor:
    if min(shape, default=0) < 0 or math.prod(shape) > storage.shape[0]:
        raise UserError(f"a tensor of shape {shape[:8]} is declared, larger than the {storage.shape[0]} values it has")
    return StoredTensor(tuple(shape), storage.dtype)


def _stand_in() -> type:
    """Returns a new class that takes any arguments and any state, and keeps none of them."""
    methods = {"__init__": lambda self, *_: None, "__setstate__": lambda self, _: None}
    return type("StandIn", (), {"__new__": lambda cls, *_: object.__new__(cls), **methods})


def type_and_message(error: BaseException) -> str:
    """Returns the type of an error and its message, on one line and shortened."""
    return one_line(f"{type(error).__name__}: {error}")[:200]
