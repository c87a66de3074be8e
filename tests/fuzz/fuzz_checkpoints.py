"""Fuzzes checkpoint conversion: `python tests/fuzz/fuzz_checkpoints.py --seconds N --seed S`."""

import functools
import io
import json
import sys
import zipfile
from collections.abc import Iterable
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

from smalti.tokenizers.vqgan.convert import import_checkpoint
from smalti.tokenizers.vqgan.readers.diffusers import to_diffusers
from smalti.tokenizers.vqgan.readers.names import LLAMAGEN, TAMING, matched_maskgit_names, matched_names
from smalti.tokenizers.vqgan.vqgan import VQGAN, VQGANConfig

CONFIG, WEIGHTS = "config.json", "diffusion_pytorch_model.safetensors"


def small_model(**changes: Any) -> VQGAN:
    """Returns an untrained VQ-GAN of two stages, one with attention."""
    torch.manual_seed(0)
    sizes = {"widths": (32, 64), "residual_blocks": 1, "latent_width": 4, "code_width": 3, "branching": 5}
    return VQGAN(VQGANConfig(16, 16, **{"attention_stages": (1,), **sizes, **changes}))


def renamed(model: VQGAN, names: Iterable[tuple[str, str]]) -> dict[str, torch.Tensor]:
    """Returns a model's weights under another system's names."""
    state = {theirs: model.state_dict()[mine].clone() for mine, theirs in names}
    name = "quantize.embedding.weight"
    return {**state, name: state[name].flatten(0, -2)}


def pickled(value: Any) -> bytes:
    """Returns what `torch.save` writes."""
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


@functools.cache
def taming() -> tuple[Any, bytes]:
    """Returns the description and the pickled weights of a checkpoint in the format of taming-transformers."""
    model = small_model()
    weights = renamed(model, matched_names(model, TAMING))
    network = {"ch": 32, "ch_mult": [1, 2], "num_res_blocks": 1, "attn_resolutions": [8], "resolution": 16}
    network |= {"in_channels": 3, "out_ch": 3, "z_channels": 4, "double_z": False, "dropout": 0.0}
    params = {"embed_dim": 3, "n_embed": 5, "ddconfig": network, "lossconfig": {"target": "none"}}
    saved = pickled({"state_dict": {**weights, "loss.x": torch.zeros(2)}, "global_step": 5})
    return {"model": {"target": "taming.models.vqgan.VQModel", "params": params}}, saved


@functools.cache
def ibq() -> tuple[Any, bytes]:
    """Returns the description and the pickled weights of an IBQ tokenizer with averaged weights."""
    description, _ = taming()
    model = small_model(quantizer="dot")
    weights = renamed(model, matched_names(model, TAMING))
    averages = {f"model_ema.{name.replace('.', '')}": tensor for name, tensor in weights.items()}
    described = {"class_path": "src.IBQ.models.ibqgan.IBQ", "init_args": description["model"]["params"]}
    return {"model": described}, pickled({"state_dict": {**weights, **averages}})


@functools.cache
def llamagen() -> bytes:
    """Returns the pickled weights of a tokenizer of LlamaGen."""
    model = small_model(quantizer="cosine")
    return pickled({"model": renamed(model, matched_names(model, LLAMAGEN))})


@functools.cache
def maskgit() -> bytes:
    """Returns the pickled weights of a MaskGIT-VQGAN."""
    network = {"architecture": "maskgit", "attention_stages": (), "middle_attention": False, "latent_width": 3}
    model = small_model(**network)
    return pickled(
        renamed(model, matched_maskgit_names(model, middle="mid.", first=0, upsample="up.{i}.upsample_conv"))
    )


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
    """Mutates a checkpoint of a published format and imports it."""
    kind = random.choice(("taming", "ibq", "diffusers", "pickled diffusers", "llamagen", "maskgit"))
    description, weights = {
        "taming": taming,
        "ibq": ibq,
        "llamagen": lambda: ({}, llamagen()),
        "maskgit": lambda: ({}, maskgit()),
    }.get(kind, diffusers)()
    if kind == "pickled diffusers":
        weights = pickled(load(weights))
    where = random.choice(("description", "text", "weights", "both")) if description else "weights"
    for _ in range(random.choice((1, 1, 2, 4)) if where in ("description", "both") else 0):
        description = mutated_value(description, random)
    weights = mutated_weights(weights, random) if where in ("weights", "both") else weights
    in_folder = kind.endswith("diffusers")
    text = json.dumps(description).encode() if in_folder else _yaml(description)
    text = mutated_bytes(text, random) if where == "text" else text
    if in_folder:
        (folder / CONFIG).write_bytes(text)
        (folder / (WEIGHTS if kind == "diffusers" else "diffusion_pytorch_model.bin")).write_bytes(weights)
        import_checkpoint(folder)
    else:
        (folder / "a.yaml").write_bytes(text)
        (folder / "a.ckpt").write_bytes(weights)
        import_checkpoint(folder / "a.ckpt")


def _yaml(description: Any) -> bytes:
    try:
        return yaml.safe_dump(description).encode()
    except (RecursionError, UnicodeEncodeError):
        return json.dumps(description).encode()


if __name__ == "__main__":
    sys.exit(bool(fuzz(case)))
