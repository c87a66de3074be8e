"""Fuzzes checkpoint conversion: `python tests/fuzz/fuzz_checkpoints.py --seconds N --seed S`."""

import functools
import io
import json
import sys
import zipfile
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory
from typing import Any

sys.path.append(str(Path(__file__).parents[1]))

import torch
import yaml
from fuzz.checkpoint_fuzzing import fuzz, mutated_bytes, mutated_value
from fuzz.fuzz_models import header_of, with_header
from safetensors.torch import load

from smalti.tokenizers.vqgan import convert
from smalti.tokenizers.vqgan.convert import from_diffusers, from_taming, to_diffusers
from smalti.tokenizers.vqgan.vqgan import VQGAN, VQGANConfig

CONFIG, WEIGHTS = "config.json", "diffusion_pytorch_model.safetensors"


def small_model() -> VQGAN:
    """Returns an untrained VQ-GAN of two stages, one with attention."""
    torch.manual_seed(0)
    config = VQGANConfig(
        *(16, 16), widths=(32, 64), residual_blocks=1, attention_stages=(1,), latent_width=4, code_width=3, branching=5
    )
    return VQGAN(config)


@functools.cache
def taming() -> tuple[Any, bytes]:
    """Returns the description and the pickled weights of a checkpoint in the format of taming-transformers."""
    model = small_model()
    state = model.state_dict()
    weights = {theirs: state[mine].clone() for mine, theirs in convert._matched_names(model, convert._TAMING)}
    weights["quantize.embedding.weight"] = weights["quantize.embedding.weight"].flatten(0, 1)
    network = {"ch": 32, "ch_mult": [1, 2], "num_res_blocks": 1, "attn_resolutions": [8], "resolution": 16}
    network |= {"in_channels": 3, "out_ch": 3, "z_channels": 4, "double_z": False, "dropout": 0.0}
    params = {"embed_dim": 3, "n_embed": 5, "ddconfig": network, "lossconfig": {"target": "none"}}
    file = io.BytesIO()
    torch.save({"state_dict": {**weights, "loss.x": torch.zeros(2)}, "global_step": 5}, file)
    return {"model": {"target": "taming.models.vqgan.VQModel", "params": params}}, file.getvalue()


@functools.cache
def diffusers() -> tuple[Any, bytes]:
    """Returns the description and the weights of a folder in the format of diffusers."""
    with TemporaryDirectory() as folder:
        to_diffusers(small_model(), Path(folder) / "vq")
        return json.loads((Path(folder) / "vq" / CONFIG).read_text()), (Path(folder) / "vq" / WEIGHTS).read_bytes()


def with_mutated_entries(content: bytes, random: Random) -> bytes:
    """Returns a zip file with the names and shapes of its tensors, or one other entry, mutated; checksums are right."""
    file = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(file, "w") as new:
        chosen = random.choice(old.namelist())
        for name in old.namelist():
            changed = name == chosen if random.random() < 0.3 else name.endswith("/data.pkl")
            compression = zipfile.ZIP_DEFLATED if random.random() < 0.001 else zipfile.ZIP_STORED
            new.writestr(name, mutated_bytes(old.read(name), random) if changed else old.read(name), compression)
    return file.getvalue()


def mutated_weights(content: bytes, random: Random) -> bytes:
    """Returns a weights' file with mutated bytes, zip entries, or safetensors header."""
    if content[:2] == b"PK":
        return (mutated_bytes if random.random() < 0.3 else with_mutated_entries)(content, random)
    if random.random() < 0.5:
        return mutated_bytes(content, random)
    return with_header(mutated_value(header_of(content), random), content)


def case(random: Random, folder: Path) -> None:
    """Mutates a checkpoint of taming-transformers or diffusers and imports it."""
    kind = random.choice(("taming", "diffusers", "pickled diffusers"))
    description, weights = taming() if kind == "taming" else diffusers()
    if kind == "pickled diffusers":
        file = io.BytesIO()
        torch.save(load(weights), file)
        weights = file.getvalue()
    where = random.choice(("description", "text", "weights", "both"))
    for _ in range(random.choice((1, 1, 2, 4)) if where in ("description", "both") else 0):
        description = mutated_value(description, random)
    weights = mutated_weights(weights, random) if where in ("weights", "both") else weights
    text = _yaml(description) if kind == "taming" else json.dumps(description).encode()
    text = mutated_bytes(text, random) if where == "text" else text
    if kind == "taming":
        (folder / "a.yaml").write_bytes(text)
        (folder / "a.ckpt").write_bytes(weights)
        from_taming(folder / "a.ckpt", folder / "a.yaml")
    else:
        (folder / CONFIG).write_bytes(text)
        (folder / (WEIGHTS if kind == "diffusers" else "diffusion_pytorch_model.bin")).write_bytes(weights)
        from_diffusers(folder)


def _yaml(description: Any) -> bytes:
    try:
        return yaml.safe_dump(description).encode()
    except (RecursionError, UnicodeEncodeError):
        return json.dumps(description).encode()


if __name__ == "__main__":
    sys.exit(bool(fuzz(case)))
