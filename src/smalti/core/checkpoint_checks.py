"""Checks of checkpoint folders that anyone may have written, before a network of their declared size is built."""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from smalti.core.config import LARGEST_JSON_BYTES, parse_json, read_json
from smalti.core.errors import UserError, one_line, unreadable
from smalti.core.files import open_regular
from smalti.core.provenance import RUN_NAME

WEIGHTS_NAME = "model.safetensors"
CONFIG_NAME = "config.json"
MODEL_NAMES = (CONFIG_NAME, WEIGHTS_NAME)
TOKENIZER_FOLDER = "tokenizer"
"""The folder of a prior that has the copy of its tokenizer."""

N = TypeVar("N", bound=nn.Module)

_DTYPES = {
    **{"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "BOOL": torch.bool},
    **{"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8},
}
LARGEST_FREE_INTEGER = 1 << 16
"""Largest integer in any config, such as an image's height; larger ones must be justified by as many weights."""
SPARE_MODULES, SPARE_BUFFER_BYTES = 256, 1 << 28
"""Limits of a network beyond what its weights' file shows: modules without weights, and buffers that are computed,
such as attention masks."""


_GIVE = "give the folder of a model that smalti trained, or convert this one with convert.py"


@dataclass(frozen=True)
class StoredTensor:
    """The shape and dtype of a tensor in a file."""

    shape: tuple[int, ...]
    dtype: torch.dtype


def read_config(folder: Path) -> dict[str, Any]:
    """Reads `config.json`.

    Raises:
        UserError: if it is missing, not JSON, or not smalti's.
    """
    path = folder / CONFIG_NAME
    try:
        described = read_json(path)
    except FileNotFoundError as error:
        if (folder / RUN_NAME).exists() or any(folder.glob(f"layer-*/{RUN_NAME}")):
            raise UserError(
                f"{folder} has no trained model yet, only a stopped training; the same training command resumes it"
            ) from error
        raise UserError(f"{folder} is not a smalti checkpoint: it has no {CONFIG_NAME}; {_GIVE}") from error
    except UserError:
        raise
    except OSError as error:
        raise unreadable(path, error) from error
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error}); the checkpoint is damaged") from error
    types = {"family": str, "kind": str, "config": dict, "digest": str, "provenance": dict}
    fields = described if isinstance(described, dict) else {}
    if missing := types.keys() - fields.keys():
        raise UserError(f"{path} is not smalti's: it lacks {', '.join(sorted(missing))}; {_GIVE}")
    if wrong := [name for name, kind in types.items() if not isinstance(fields[name], kind)]:
        raise UserError(f"{path} is not smalti's: its {wrong[0]} has the wrong type; {_GIVE}")
    return described


def read_header(path: Path) -> dict[str, StoredTensor]:
    """Reads the header of a safetensors file and checks that the tensors it declares fill the file.

    Raises:
        UserError: if it cannot be read, or is truncated or damaged.
    """
    try:
        with open_regular(path) as file:
            size = path.stat().st_size
            length = int.from_bytes(file.read(8), "little")
            if not 2 <= length <= min(size - 8, LARGEST_JSON_BYTES):
                raise ValueError(f"its header of {length} bytes does not fit its {size} bytes")
            header = parse_json(file.read(length))
        if not isinstance(header, dict):
            raise ValueError("its header is not an object")
        header.pop("__metadata__", None)
        tensors = {name: _described(name, entry) for name, entry in header.items()}
        declared = sum(math.prod(each.shape) * each.dtype.itemsize for each in tensors.values())
        if declared != size - 8 - length:
            raise ValueError(f"its tensors take {declared} bytes, but it has {size - 8 - length}")
    except UserError:
        raise
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path} cannot be read ({error}); the checkpoint is damaged, fetch or train it again"
        ) from error
    return tensors


def _described(name: str, entry: Any) -> StoredTensor:
    shape, dtype = (entry.get("shape"), entry.get("dtype")) if isinstance(entry, dict) else (None, None)
    if not isinstance(shape, list) or not all(type(size) is int and 0 <= size < 2**40 for size in shape[:16]):
        raise ValueError(f"{name} has no shape")
    if len(shape) > 8 or not isinstance(dtype, str) or dtype not in _DTYPES:
        raise ValueError(f"{name} has the shape {shape[:8]} and dtype {str(dtype)[:20]}, which are not read")
    return StoredTensor(tuple(shape), _DTYPES[dtype])


def require_sizes(fields: Any, header: Mapping[str, StoredTensor], config: Path, path: Path) -> None:
    """Refuses a config with an integer that is larger than the number of weights in the file can explain.

    Args:
        fields: The config as JSON.
        header: The tensors in the file.
        config: The file of the config, for errors.
        path: The file of the weights, for errors.

    Raises:
        UserError: naming the integer.
    """
    most = max(LARGEST_FREE_INTEGER, sum(math.prod(tensor.shape) for tensor in header.values()))
    pending = [fields]
    while pending:
        value = pending.pop()
        if isinstance(value, dict | list):
            pending += value.values() if isinstance(value, dict) else value
        elif isinstance(value, int) and abs(value) > most:
            raise UserError(f"{config} has the size {value}, larger than {path.name} allows; fetch or train it again")


def require_shapes(
    build: Callable[[], nn.Module], header: Mapping[str, StoredTensor], config: Path, path: Path
) -> None:
    """Compares a network with the weights' file before it is built; see `build_without_weights` for the arguments.

    Raises:
        UserError: if they differ, or there is no such network.
    """
    network = build_without_weights(build, header, config, path)
    if network is not None:
        require_matching(path, expected=network.state_dict(), stored=header)


def build_without_weights(
    build: Callable[[], N], header: Mapping[str, StoredTensor], config: Path, path: Path
) -> N | None:
    """Builds a network on torch's meta device, which allocates nothing.

    Building stops as soon as the network is larger than the file: the config may ask for a million layers.

    Args:
        build: Returns the network.
        header: The tensors in the file.
        config: The file that the network is described in, for errors.
        path: The file of the weights, for errors.

    Returns:
        The network, or None for a kind from elsewhere that computes with values while it is built.

    Raises:
        UserError: if there is no such network.
    """
    try:
        with torch.random.fork_rng(devices=[]), torch.device("meta"), _bounded(header, config, path):
            return build()
    except UserError:
        raise
    except (ArithmeticError, LookupError, TypeError, ValueError, AssertionError, RuntimeError, MemoryError) as error:
        if "meta" in str(error):
            return None
        raise UserError(
            f"{config} does not describe a network ({type(error).__name__}: {one_line(error)[:200]})"
        ) from error


@contextmanager
def _bounded(header: Mapping[str, StoredTensor], config: Path, path: Path) -> Iterator[None]:
    """Stops the construction of a network with many more modules, parameters or buffers than a file holds."""
    most = {"parameters": 4 * len(header) + SPARE_MODULES, "modules": 16 * len(header) + SPARE_MODULES}
    counts, stored_bytes = dict.fromkeys(most, 0), 0
    for tensor in header.values():
        stored_bytes += math.prod(tensor.shape) * tensor.dtype.itemsize
    buffer_bytes = 0

    def count(kind: str) -> None:
        counts[kind] += 1
        if counts[kind] > most[kind]:
            raise UserError(f"{config} asks for a larger network than {path.name} holds; fetch or train it again")

    def on_parameter(_module: nn.Module, _name: str, _parameter: Any) -> None:
        count("parameters")

    def on_module(_module: nn.Module, _name: str, _child: Any) -> None:
        count("modules")

    def on_buffer(_module: nn.Module, name: str, buffer: Tensor | None) -> None:
        nonlocal buffer_bytes
        buffer_bytes += 0 if buffer is None else buffer.numel() * buffer.itemsize
        if buffer_bytes > stored_bytes + SPARE_BUFFER_BYTES:
            raise UserError(f"{config} asks for {name} of {buffer_bytes} bytes; fetch or train it again")

    hooks = (
        torch_module.register_module_parameter_registration_hook(on_parameter),
        torch_module.register_module_module_registration_hook(on_module),
        torch_module.register_module_buffer_registration_hook(on_buffer),
    )
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def require_matching(path: Path, *, expected: Mapping[str, Tensor], stored: Mapping[str, StoredTensor]) -> None:
    """Compares names, shapes and dtypes. A float32 weight may be stored as float16.

    Raises:
        UserError: naming the first that differs.
    """
    if missing := sorted(set(expected) - set(stored)):
        raise UserError(f"{path} lacks {some(missing)}; it is not of this version's network, train it again")
    if unknown := sorted(set(stored) - set(expected)):
        raise UserError(
            f"{path} has unknown weights {some(unknown)}; it is not of this version's network, train it again"
        )
    for name, tensor in expected.items():
        half = (tensor.dtype, stored[name].dtype) == (torch.float32, torch.float16)
        if tensor.shape != stored[name].shape or not (half or tensor.dtype == stored[name].dtype):
            same = tensor.shape == stored[name].shape
            has, needs = (each.dtype if same else tuple(each.shape) for each in (stored[name], tensor))
            raise UserError(
                f"{path}: {name} is {has}, the config asks for {needs}; it is a damaged or edited checkpoint, "
                "train it again"
            )


def some(names: list[str]) -> str:
    """Lists the first three names, and how many more there are."""
    return ", ".join(name[:100] for name in names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
