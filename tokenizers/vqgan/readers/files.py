"""Reads the files of other systems' checkpoints, which anyone may have written. Nothing here knows a network.

Every function checks what a file declares against its own size before anything is allocated, and runs no code from it.
"""

import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeVar

import yaml
from safetensors import SafetensorError, safe_open
from torch import Tensor

from smalti.core.checkpoint_checks import read_header
from smalti.core.config import DEEPEST_JSON, config_from_json, read_json
from smalti.core.errors import UserError
from smalti.core.files import open_regular
from smalti.tokenizers.vqgan.readers.pickles import MALFORMED, read_pickled, type_and_message

LARGEST_YAML_BYTES = 1 << 15
"""A description of a network has about 2 kB; PyYAML reads 100 kB a second."""

T = TypeVar("T")


def described(kind: type[T], fields: Any, source: Path) -> T:
    """Returns the fields of a dataclass from a description that has more of them, with their types checked.

    Raises:
        UserError: if a field is missing or has another type.
    """
    if not isinstance(fields, dict):
        raise UserError(f"{source} does not describe a VQ-GAN: it lacks the fields of {kind.__name__.strip('_')}")
    known = dataclasses.fields(kind)  # pyright: ignore[reportArgumentType] - `kind` is a dataclass
    names = [field.name for field in known if field.name in fields]
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
    except (
        *MALFORMED,
        yaml.YAMLError,
    ) as error:  # PyYAML's constructors raise errors of many types for malformed values
        raise UserError(f"{path} does not describe a VQ-GAN ({type_and_message(error)})") from error


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


def read_description(path: Path) -> Any:
    """Reads the JSON file that describes a network.

    Raises:
        UserError: if it cannot be read.
    """
    try:
        return read_json(path)
    except FileNotFoundError as error:
        raise UserError(f"{path.parent} has no {path.name}, which describes the network") from error
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({type_and_message(error)}); download it again") from error


def read_weights(path: Path) -> dict[str, Tensor]:
    """Loads the tensors of a safetensors file, or of one that `torch.save` wrote; their values are mapped, not read.

    Raises:
        UserError: if the file does not exist, is damaged, or holds more than tensors and plain values.
    """
    try:
        with open_regular(path):
            pass
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist; name the file of the weights") from error
    if path.suffix != ".safetensors":
        return read_pickled(path)
    try:
        names = read_header(path)
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in names}
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} cannot be read ({type_and_message(error)}); download it again") from error


def weights_files(folder: Path, prefixes: Iterable[str]) -> list[Path]:
    """Returns the files of the weights in a folder, by the names that Hugging Face's libraries give them.

    Args:
        folder: the folder.
        prefixes: beginnings of the names of the wanted weights, for a large model whose weights are in many files.

    Raises:
        UserError: if there are none.
    """
    stems = ("model", "diffusion_pytorch_model", "pytorch_model")
    names = [f"{stem}{suffix}" for suffix in (".safetensors", ".bin") for stem in stems]
    for name in names:
        if (folder / name).exists():
            return [folder / name]
        if (index := folder / f"{name}.index.json").exists():
            return [folder / part for part in _parts(index, tuple(prefixes))]
    if (folder / "model_index.json").exists():
        raise UserError(f"{folder} is a pipeline of diffusers; name the folder of its VQModel, such as {folder}/vqvae")
    raise UserError(f"{folder} has no weights: none of {', '.join(names)}")


def _parts(index: Path, prefixes: tuple[str, ...]) -> list[str]:
    """Returns the names of the files that an index gives for weights of the prefixes."""
    content = read_description(index)
    files = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(files, dict) or not all(isinstance(file, str) for file in files.values()):
        raise UserError(f"{index} has no weight_map of the files of all weights; download it again")
    parts = sorted({file for name, file in files.items() if name.startswith(prefixes)})
    if not parts:
        raise UserError(f"{index} lists no weights of a tokenizer, whose names begin with {' or '.join(prefixes)}")
    if odd := [part for part in parts if Path(part).name != part]:
        raise UserError(f"{index} names the file {odd[0][:100]}, which is not in its folder")
    return parts
