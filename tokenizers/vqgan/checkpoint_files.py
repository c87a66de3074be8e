"""Reads the files of other systems' checkpoints, which anyone may have written. Nothing here knows a network.

Every reader checks what a file declares against its own size before anything is allocated, and runs no code from it.
"""

import dataclasses
import io
import math
import pickle
import struct
import warnings
import zipfile
from pathlib import Path
from typing import Any, TypeVar

import torch
import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from smalti.core.checkpoint_checks import StoredTensor, read_header
from smalti.core.config import DEEPEST_JSON, LARGEST_JSON_BYTES, config_from_json, open_regular, parse_json
from smalti.core.errors import UserError

LARGEST_YAML_BYTES = 1 << 15
"""A description of a network has about 2 kB; PyYAML reads 100 kB a second."""
LARGEST_PICKLE_BYTES = 1 << 21
"""Names and shapes of a checkpoint, without the values of its tensors, have some 200 kB."""
_STORAGES = {
    **{"DoubleStorage": torch.float64, "FloatStorage": torch.float32, "HalfStorage": torch.float16},
    **{"BFloat16Storage": torch.bfloat16, "LongStorage": torch.int64, "IntStorage": torch.int32},
    **{"ShortStorage": torch.int16, "CharStorage": torch.int8, "ByteStorage": torch.uint8, "BoolStorage": torch.bool},
}
_CALLBACK = "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint"

MALFORMED = (
    *(ValueError, LookupError, TypeError, AttributeError, ArithmeticError, AssertionError, RuntimeError, MemoryError),
    *(OSError, EOFError, StopIteration, struct.error, pickle.PickleError, zipfile.BadZipFile, yaml.YAMLError),
)
"""The exceptions that parsers and unpicklers raise for malformed or hostile files, which decide what is called."""

T = TypeVar("T")


def described(kind: type[T], fields: Any, source: Path) -> T:
    """Returns the fields of a dataclass from a description that has more of them, with their types checked.

    Raises:
        UserError: if a field is missing or has another type.
    """
    if not isinstance(fields, dict):
        raise UserError(f"{source} does not describe a VQ-GAN: it lacks the fields of {kind.__name__.strip('_')}")
    names = [field.name for field in dataclasses.fields(kind) if field.name in fields]  # type: ignore[arg-type]
    return config_from_json(kind, {name: fields[name] for name in names}, str(source))


def read_yaml(path: Path) -> Any:
    """Reads a small YAML file with plain values and no aliases, which could stand for exponentially many values.

    Raises:
        UserError: if it cannot be read.
    """
    try:
        with open_regular(path) as file:
            content = file.read(LARGEST_YAML_BYTES + 1)
        if len(content) > LARGEST_YAML_BYTES:
            raise ValueError(f"more than {LARGEST_YAML_BYTES} bytes")
        return yaml.load(content.decode(), _PlainLoader)
    except UserError:
        raise
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist; use --description to name the checkpoint's .yaml file") from error
    except MALFORMED as error:  # PyYAML's constructors raise errors of many types for malformed values
        raise UserError(f"{path} does not describe a VQ-GAN ({_one_line(error)})") from error


class _PlainLoader(yaml.SafeLoader):
    depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise ValueError("aliases are not read; write out what they stand for")
        self.depth += 1
        if self.depth > DEEPEST_JSON:
            raise ValueError(f"it is nested deeper than {DEEPEST_JSON} levels")
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


def read_json(path: Path) -> Any:
    """Reads a JSON file.

    Raises:
        UserError: if it cannot be read.
    """
    try:
        with open_regular(path) as file:
            return parse_json(file.read(LARGEST_JSON_BYTES + 1))
    except FileNotFoundError as error:
        raise UserError(f"{path.parent} does not hold a VQModel of diffusers: it has no {path.name}") from error
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({_one_line(error)}); download it again") from error


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """Loads the tensors of a safetensors file.

    Raises:
        UserError: if it cannot be read.
    """
    read_header(path)
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} cannot be read ({_one_line(error)}); download it again") from error


def read_pickled(path: Path) -> dict[str, Tensor]:
    """Loads the tensors of a checkpoint that `torch.save` wrote, from its `state_dict` if it has one.

    The pickle is read twice. First every function that it may call is replaced by one that only notes shapes, which
    are checked against the file. Then torch loads it with `weights_only`, and maps the values instead of reading them.

    Raises:
        UserError: if the file does not exist, is damaged, or holds more than tensors and plain values.
    """
    try:
        with open_regular(path):
            pass
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist; name the file of the weights") from error
    try:
        state, callback = _weights(_without_values(path)), (_Inert, _CALLBACK)
        with torch.serialization.safe_globals([callback]), warnings.catch_warnings(action="ignore"):
            loaded = _weights(torch.load(path, map_location="cpu", weights_only=True, mmap=True))
        if {name: _shape(tensor) for name, tensor in loaded.items()} != state:
            raise ValueError("its tensors are not as they were declared")
    except MALFORMED as error:  # unpicklers do what the file says, so that they may raise anything
        reason = str(error) if isinstance(error, UserError) else "it is damaged, or holds more than weights"
        raise UserError(f"{path} was not loaded: {reason}; download it again, from a source that you trust") from error
    return loaded


def _weights(checkpoint: Any) -> dict[str, Any]:
    """Returns the entries of a checkpoint by name, without the weights of training losses."""
    if not isinstance(checkpoint, dict):
        raise UserError(f"it holds a {type(checkpoint).__name__}, not weights by name")
    state = checkpoint.get("state_dict", checkpoint)
    if not isinstance(state, dict) or not all(isinstance(name, str) for name in state):
        raise UserError("its state_dict does not hold weights by name")
    weights = {name: value for name, value in state.items() if not name.startswith("loss.")}
    if wrong := [name for name, value in weights.items() if not isinstance(value, Tensor | StoredTensor)]:
        raise UserError(f"it also has {wrong[0]}, which is no tensor")
    return weights


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
            case known if known == _CALLBACK:
                return type("ModelCheckpoint", (), {})
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


class _Inert:
    """Stand-in for a class that published checkpoints name as a key of their callbacks, but not their weights."""


def _one_line(error: BaseException) -> str:
    """Returns the type of an error and its message on one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]
