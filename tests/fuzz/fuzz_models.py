"""Fuzzes the loading of model folders: `python tests/fuzz/fuzz_models.py --seconds N --seed S`."""

import functools
import json
import struct
import sys
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory
from typing import Any

sys.path.append(str(Path(__file__).parents[1]))

import torch
from fuzz.checkpoint_fuzzing import fuzz, mutated_bytes, mutated_value
from helpers.toys import KINDS, TINY
from safetensors.torch import load

from smalti.core import models
from smalti.core.config import config_from_json
from smalti.core.models import CONFIG_NAME, WEIGHTS_NAME
from smalti.tokenizers.base import Tokenizer

LARGEST_ENCODED = 64  # pixels along an edge of images that accepted models encode


@functools.cache
def saved(family: models.Family, kind: str) -> tuple[dict[str, Any], bytes]:
    """Returns the config and the weights' file of a tiny model."""
    torch.manual_seed(0)
    with TemporaryDirectory() as folder:
        models.class_of_kind(family, kind)(TINY[kind]).save(folder)
        return json.loads((Path(folder) / CONFIG_NAME).read_text()), (Path(folder) / WEIGHTS_NAME).read_bytes()


def header_of(content: bytes) -> Any:
    """Returns the header of a safetensors file."""
    return json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])


def with_header(header: Any, content: bytes) -> bytes:
    """Returns a safetensors file with a header and the values of another file."""
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + content[8 + int.from_bytes(content[:8], "little") :]


def with_own_digest(described: Any, weights: bytes) -> Any:
    """Returns a config with the digest of what it describes, as somebody who means harm would write it."""
    try:
        config_class = models.class_of_kind(described["family"], described["kind"]).config_class
        config = config_from_json(config_class, described["config"], "")
        return {**described, "digest": models.digest(described["kind"], config, load(weights))}
    except Exception:
        return described


def case(random: Random, folder: Path) -> None:
    """Mutates a model folder and loads it; a tokenizer that loads encodes an image."""
    family, kind = random.choice(KINDS)
    described, weights = saved(family, kind)
    header = header_of(weights)
    where = random.choice(("config", "config", "config", "header", "weights", "text"))
    for _ in range(random.choice((1, 1, 2, 4))):
        if where == "config":
            inner = isinstance(described, dict) and isinstance(described.get("config"), dict) and random.random() < 0.8
            described = (
                {**described, "config": mutated_value(described["config"], random)}
                if inner
                else mutated_value(described, random)
            )
        elif where == "header":
            header = mutated_value(header, random)
    weights = with_header(header, weights) if where == "header" else weights
    weights = mutated_bytes(weights, random) if where == "weights" else weights
    described = with_own_digest(described, weights) if random.random() < 0.7 else described
    text = json.dumps(described).encode()
    (folder / CONFIG_NAME).write_bytes(mutated_bytes(text, random) if where == "text" else text)
    (folder / WEIGHTS_NAME).write_bytes(weights)
    model = models.load(folder, family)
    if isinstance(model, Tokenizer):
        height, width = model.config.height, model.config.width
        if max(height, width) <= LARGEST_ENCODED:
            model.encode(torch.zeros(1, model.image_channels, height, width))


if __name__ == "__main__":
    sys.exit(bool(fuzz(case)))
