"""VQ-GANs of other systems: taming-transformers' checkpoints read, diffusers' `VQModel` folders read and written.

Their networks compute what smalti's does, under other names: layers are matched by their order, which is the same
everywhere. Every weight must find its place; nothing is dropped but what trained the network there (its `loss.`).
"""

import json
import pickle
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from smalti.core.errors import UserError
from smalti.core.files import whole_folder, write_json
from smalti.tokenizers.layers.attention_blocks import Attention, ResidualBlock
from smalti.tokenizers.vqgan.vqgan import VQGAN, VQGANConfig

_DIFFUSERS_CONFIG, _DIFFUSERS_WEIGHTS = "config.json", "diffusion_pytorch_model.safetensors"


@dataclass(frozen=True)
class _Names:
    """Another system's names: of layers, by stage `i` and number `j` in it, and of what is in a block."""

    down: str
    down_attention: str
    downsample: str
    up: str
    up_attention: str
    upsample: str
    middle: tuple[str, str, str]
    norm: str
    in_block: Mapping[str, str]
    in_attention: Mapping[str, str]
    fine_first: bool  # whether the decoder's stages are counted from the image's size, not from the codes'


_TAMING = _Names(
    down="down.{i}.block.{j}",
    down_attention="down.{i}.attn.{j}",
    downsample="down.{i}.downsample.conv",
    up="up.{i}.block.{j}",
    up_attention="up.{i}.attn.{j}",
    upsample="up.{i}.upsample.conv",
    middle=("mid.block_1", "mid.attn_1", "mid.block_2"),
    norm="norm_out",
    in_block={"shortcut": "nin_shortcut"},
    in_attention={"out": "proj_out"},
    fine_first=True,
)
_DIFFUSERS = _Names(
    down="down_blocks.{i}.resnets.{j}",
    down_attention="down_blocks.{i}.attentions.{j}",
    downsample="down_blocks.{i}.downsamplers.0.conv",
    up="up_blocks.{i}.resnets.{j}",
    up_attention="up_blocks.{i}.attentions.{j}",
    upsample="up_blocks.{i}.upsamplers.0.conv",
    middle=("mid_block.resnets.0", "mid_block.attentions.0", "mid_block.resnets.1"),
    norm="conv_norm_out",
    in_block={"shortcut": "conv_shortcut"},
    in_attention={"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "out": "to_out.0"},
    fine_first=False,
)
# what diffusers called its attention's layers until version 0.16
_OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def from_taming(weights: Path, description: Path) -> VQGAN:
    """A checkpoint of taming-transformers, `VQModel` or `GumbelVQ`.

    Args:
        weights: its `.ckpt`.
        description: the `.yaml` beside it.

    Raises:
        UserError: if either cannot be read, or describes a network that smalti's is not.
    """
    if not description.exists():
        raise UserError(f"{description} is not there; give --description, the .yaml of the checkpoint")
    try:
        model = yaml.safe_load(description.read_text())["model"]
        given, network = model["params"], model["params"]["ddconfig"]
        drawn = model["target"].endswith("GumbelVQ")
        if network["ch_mult"][0] != 1 or network["in_channels"] != network["out_ch"] or network.get("double_z"):
            raise UserError(
                f"{description} describes another network than smalti's VQ-GAN: its ch_mult must begin with 1, "
                "in_channels be out_ch, and double_z false"
            )
        if given.get("remap"):
            raise UserError(f"{description} remaps codes, by a file that no checkpoint holds; remove its remap")
        config = _config(
            size=network["resolution"],
            image_channels=network["in_channels"],
            widths=tuple(network["ch"] * multiplier for multiplier in network["ch_mult"]),
            residual_blocks=network["num_res_blocks"],
            attention_stages=tuple(
                stage
                for stage in range(len(network["ch_mult"]))
                if network["resolution"] // 2**stage in network["attn_resolutions"]
            ),
            latent_width=network["z_channels"],
            code_width=given["embed_dim"],
            branching=given["n_embed"],
            quantizer="gumbel" if drawn else "nearest",
        )
    except (OSError, UnicodeDecodeError, yaml.YAMLError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{description} is no description of a VQ-GAN ({_said(error)})") from error
    state = _unpickled(weights)
    state = {name: tensor for name, tensor in state.get("state_dict", state).items() if not name.startswith("loss.")}
    return _filled(config, state, _TAMING, weights)


def from_diffusers(folder: Path) -> VQGAN:
    """A `VQModel` that diffusers saved in a folder.

    Raises:
        UserError: if it cannot be read, or is a network that smalti's is not.
    """
    try:
        given = json.loads((folder / _DIFFUSERS_CONFIG).read_text())
        downs, ups = given["down_block_types"], given["up_block_types"]
        kinds = {"DownEncoderBlock2D": False, "AttnDownEncoderBlock2D": True}
        kinds_up = {"UpDecoderBlock2D": False, "AttnUpDecoderBlock2D": True}
        attends = [kinds[kind] for kind in downs]
        fixed = {"norm_type": "group", "mid_block_add_attention": True, "act_fn": "silu"}
        if odd := {name: given[name] for name, value in fixed.items() if given.get(name, value) != value}:
            raise UserError(f"{folder}: smalti's VQ-GAN has no {', '.join(f'{k} {v}' for k, v in odd.items())}")
        if [kinds_up[kind] for kind in reversed(ups)] != attends or given["in_channels"] != given["out_channels"]:
            raise UserError(f"{folder}: its decoder is not the mirror of its encoder, as smalti's VQ-GAN is")
        config = _config(
            size=given["sample_size"],
            image_channels=given["in_channels"],
            widths=tuple(given["block_out_channels"]),
            residual_blocks=given["layers_per_block"],
            attention_stages=tuple(stage for stage, attention in enumerate(attends) if attention),
            latent_width=given["latent_channels"],
            code_width=given.get("vq_embed_dim") or given["latent_channels"],
            branching=given["num_vq_embeddings"],
            norm_groups=given["norm_num_groups"],
        )
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise UserError(f"{folder} holds no VQModel of diffusers ({_said(error)})") from error
    path = folder / _DIFFUSERS_WEIGHTS
    try:
        state = load_file(path) if path.exists() else _unpickled(path.with_suffix(".bin"))
    except SafetensorError as error:
        raise UserError(f"{path} cannot be read ({error}); fetch it again") from error
    return _filled(config, {_renamed(name): tensor for name, tensor in state.items()}, _DIFFUSERS, path)


def to_diffusers(model: VQGAN, folder: Path) -> None:
    """Writes a `VQModel` folder, which `diffusers.VQModel.from_pretrained` opens.

    Raises:
        UserError: for a quantizer that diffusers does not have.
    """
    config = model.config
    if config.quantizer != "nearest" or config.depth > 1:
        raise UserError("diffusers has flat codebooks with the nearest codeword's search only; this VQ-GAN has another")
    attends, stages = config.attention_stages, range(len(config.widths))
    described = {
        "_class_name": "VQModel",
        "in_channels": config.image_channels,
        "out_channels": config.image_channels,
        "down_block_types": [("Attn" if i in attends else "") + "DownEncoderBlock2D" for i in stages],
        "up_block_types": [("Attn" if i in attends else "") + "UpDecoderBlock2D" for i in reversed(stages)],
        "block_out_channels": list(config.widths),
        "layers_per_block": config.residual_blocks,
        "latent_channels": config.latent_width,
        "sample_size": config.height,
        "num_vq_embeddings": config.branching,
        "norm_num_groups": config.norm_groups,
        "vq_embed_dim": config.code_width,
    }
    ours, names = model.state_dict(), dict(_names(model, _DIFFUSERS))
    state = {theirs: _shaped(ours[mine].detach().cpu(), theirs) for mine, theirs in names.items()}
    with whole_folder(folder) as partial:
        save_file(state, partial / _DIFFUSERS_WEIGHTS, metadata={"format": "pt"})
        write_json(partial / _DIFFUSERS_CONFIG, described)


def _config(*, size: int, **given: Any) -> VQGANConfig:
    """As such networks were trained, so that going on with their training keeps to it."""
    learned = {"codebook_learning": "gradient", "kmeans_start": False, "revive_below": 0.0}
    return VQGANConfig(height=size, width=size, **learned, **given)


def _filled(config: VQGANConfig, state: dict[str, Any], names: _Names, source: Path) -> VQGAN:
    model = VQGAN(config)
    expected, found = model.state_dict(), dict(_names(model, names))
    weights = {name: tensor for name, tensor in state.items() if isinstance(tensor, Tensor)}
    missing, unknown = set(found.values()) - set(weights), set(state) - set(found.values())
    if missing or unknown:
        few = [f"{what} {', '.join(sorted(of)[:3])}" for what, of in (("lacks", missing), ("has also", unknown)) if of]
        raise UserError(f"{source} is not the network that its description says: it {' and '.join(few)}")
    filled: dict[str, Tensor] = {}
    for mine, theirs in found.items():
        if weights[theirs].squeeze().shape != expected[mine].squeeze().shape:  # 1x1 convolutions may be matrices
            shapes = f"{tuple(weights[theirs].shape)}, not {tuple(expected[mine].shape)}"
            raise UserError(f"{source} is not the network that its description says: {theirs} is {shapes}")
        filled[mine] = weights[theirs].float().reshape(expected[mine].shape)
    model.load_state_dict(filled)
    model.provenance = {"converted_from": source.name}
    return model.eval()


def _names(model: VQGAN, names: _Names) -> Iterator[tuple[str, str]]:
    """Our name and theirs, of every weight."""
    config = model.config
    for part, layers, places in (
        ("encoder", model.encoder, _encoder_places(config, names)),
        ("decoder", model.decoder, _decoder_places(config, names)),
    ):
        filled = [(number, layer) for number, layer in enumerate(layers) if not isinstance(layer, nn.SiLU)]
        for (number, layer), place in zip(filled, places, strict=True):
            inside = names.in_block if isinstance(layer, ResidualBlock) else {}
            inside = names.in_attention if isinstance(layer, Attention) else inside
            for name in layer.state_dict():
                first, _, rest = name.rpartition(".")
                within = f"{inside.get(first, first)}.{rest}" if first else rest
                yield f"{part}.{number}.{name}", f"{place}.{within}"
    if config.quantizer == "nearest":
        yield "quantizer.codebook_0", "quantize.embedding.weight"
    else:
        yield "quantizer.codebook", "quantize.embed.weight"
        yield from ((f"quantizer.logits.{name}", f"quantize.proj.{name}") for name in ("weight", "bias"))


def _encoder_places(config: VQGANConfig, names: _Names) -> list[str]:
    places, last = ["conv_in"], len(config.widths) - 1
    for i in range(last + 1):
        for j in range(config.residual_blocks):
            places.append(names.down.format(i=i, j=j))
            places += [names.down_attention.format(i=i, j=j)] if i in config.attention_stages else []
        places += [names.downsample.format(i=i)] if i < last else []
    return [*(f"encoder.{place}" for place in (*places, *names.middle, names.norm, "conv_out")), "quant_conv"]


def _decoder_places(config: VQGANConfig, names: _Names) -> list[str]:
    places, last = ["conv_in", *names.middle], len(config.widths) - 1
    for stage in reversed(range(last + 1)):
        i = stage if names.fine_first else last - stage
        for j in range(config.residual_blocks + 1):
            places.append(names.up.format(i=i, j=j))
            places += [names.up_attention.format(i=i, j=j)] if stage in config.attention_stages else []
        places += [names.upsample.format(i=i)] if stage else []
    return ["post_quant_conv", *(f"decoder.{place}" for place in (*places, names.norm, "conv_out"))]


def _shaped(tensor: Tensor, theirs: str) -> Tensor:
    """Our weight as diffusers has it: attention's 1x1 convolutions are matrices there, a codebook has no nodes."""
    if theirs.startswith("quantize."):
        return tensor.flatten(0, 1).contiguous()
    return (tensor.flatten(1) if re.search(r"\.to_\w+(\.0)?\.weight$", theirs) else tensor).contiguous()


def _renamed(name: str) -> str:
    """Today's name of a layer of diffusers'."""
    return re.sub(r"(attentions\.\d+)\.(\w+)\.", lambda m: f"{m[1]}.{_OLD_ATTENTION.get(m[2], m[2])}.", name)


class _Inert:
    """Stands for a class that a checkpoint names and nobody needs."""


def _unpickled(path: Path) -> dict[str, Any]:
    """A checkpoint's tensors; nothing in it is run.

    Raises:
        UserError: if it is not there, or holds more than tensors and plain values.
    """
    # as a key in the dictionary of callbacks, by which the published checkpoints would be refused
    callback = (_Inert, "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint")
    try:
        with torch.serialization.safe_globals([callback]):
            found = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise UserError(f"{path} is not there; give the file of the weights") from error
    except (pickle.UnpicklingError, EOFError, RuntimeError) as error:
        raise UserError(
            f"{path} is not loaded: it is damaged, or holds more than weights, which could run as a program "
            f"({_said(error)})"
        ) from error
    if not isinstance(found, dict):
        raise UserError(f"{path} holds a {type(found).__name__}, not weights by name")
    return found


def _said(error: BaseException) -> str:
    """An error in a line."""
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
