"""Checkpoint conversion: imports VQ-GANs from taming-transformers, imports and exports diffusers' `VQModel` folders.

Their networks compute the same as smalti's under other names. Layers are matched by their order, which is the same in
all of them. Every weight must be matched; only the training losses' weights (`loss.`) are dropped.
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
    """Another system's names of layers, by stage `i` and index `j` in the stage, and of the parts of a block."""

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
    fine_first: bool  # whether the decoder's stages are counted from the image inwards, not from the codes outwards


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
# names of attention layers in diffusers until version 0.16, and the current ones
_OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def from_taming(weights: Path, description: Path) -> VQGAN:
    """Imports a checkpoint of taming-transformers, a `VQModel` or `GumbelVQ`.

    Args:
        weights: its `.ckpt` file.
        description: the `.yaml` file that describes its network.

    Raises:
        UserError: if either file cannot be read, or the network differs from smalti's VQ-GAN.
    """
    if not description.exists():
        raise UserError(f"{description} does not exist; use --description to name the checkpoint's .yaml file")
    try:
        model = yaml.safe_load(description.read_text())["model"]
        params, network = model["params"], model["params"]["ddconfig"]
        samples = model["target"].endswith("GumbelVQ")
        if network["ch_mult"][0] != 1 or network["in_channels"] != network["out_ch"] or network.get("double_z"):
            raise UserError(
                f"{description} describes a network that smalti's VQ-GAN does not support: ch_mult must begin with 1, "
                "in_channels must equal out_ch, and double_z must be false"
            )
        if params.get("remap"):
            raise UserError(f"{description} remaps codes by a file that is not in the checkpoint; remove its remap")
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
            code_width=params["embed_dim"],
            branching=params["n_embed"],
            quantizer="gumbel" if samples else "nearest",
        )
    except (OSError, UnicodeDecodeError, yaml.YAMLError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{description} does not describe a VQ-GAN ({_one_line(error)})") from error
    state = _unpickled(weights)
    state = {name: tensor for name, tensor in state.get("state_dict", state).items() if not name.startswith("loss.")}
    return _import_weights(config, state, _TAMING, weights)


def from_diffusers(folder: Path) -> VQGAN:
    """Imports a `VQModel` from a folder that diffusers saved.

    Raises:
        UserError: if the folder cannot be read, or the network differs from smalti's VQ-GAN.
    """
    try:
        described = json.loads((folder / _DIFFUSERS_CONFIG).read_text())
        downs, ups = described["down_block_types"], described["up_block_types"]
        kinds = {"DownEncoderBlock2D": False, "AttnDownEncoderBlock2D": True}
        kinds_up = {"UpDecoderBlock2D": False, "AttnUpDecoderBlock2D": True}
        attends = [kinds[kind] for kind in downs]
        fixed = {"norm_type": "group", "mid_block_add_attention": True, "act_fn": "silu"}
        if odd := {name: described[name] for name, value in fixed.items() if described.get(name, value) != value}:
            settings = ", ".join(f"{name} {value}" for name, value in odd.items())
            raise UserError(f"{folder}: smalti's VQ-GAN does not support {settings}")
        same_channels = described["in_channels"] == described["out_channels"]
        if [kinds_up[kind] for kind in reversed(ups)] != attends or not same_channels:
            raise UserError(f"{folder}: smalti's VQ-GAN needs a decoder that mirrors the encoder; this one does not")
        config = _config(
            size=described["sample_size"],
            image_channels=described["in_channels"],
            widths=tuple(described["block_out_channels"]),
            residual_blocks=described["layers_per_block"],
            attention_stages=tuple(stage for stage, attention in enumerate(attends) if attention),
            latent_width=described["latent_channels"],
            code_width=described.get("vq_embed_dim") or described["latent_channels"],
            branching=described["num_vq_embeddings"],
            norm_groups=described["norm_num_groups"],
        )
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise UserError(f"{folder} does not hold a VQModel of diffusers ({_one_line(error)})") from error
    path = folder / _DIFFUSERS_WEIGHTS
    try:
        state = load_file(path) if path.exists() else _unpickled(path.with_suffix(".bin"))
    except SafetensorError as error:
        raise UserError(f"{path} cannot be read ({error}); download it again") from error
    return _import_weights(
        config, {_new_attention_name(name): tensor for name, tensor in state.items()}, _DIFFUSERS, path
    )


def to_diffusers(model: VQGAN, folder: Path) -> None:
    """Exports a folder that `diffusers.VQModel.from_pretrained` loads.

    Raises:
        UserError: if diffusers does not support the model's quantizer.
    """
    config = model.config
    if config.quantizer != "nearest" or config.depth > 1:
        raise UserError(
            "diffusers supports only flat codebooks with nearest-codeword search; this VQ-GAN's quantizer differs"
        )
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
    ours, names = model.state_dict(), dict(_matched_names(model, _DIFFUSERS))
    state = {theirs: _as_diffusers(ours[mine].detach().cpu(), theirs) for mine, theirs in names.items()}
    with whole_folder(folder) as partial:
        save_file(state, partial / _DIFFUSERS_WEIGHTS, metadata={"format": "pt"})
        write_json(partial / _DIFFUSERS_CONFIG, described)


def _config(*, size: int, **network: Any) -> VQGANConfig:
    """Returns a config that continues training as the imported network was trained: codebooks learn by gradients."""
    training = {"codebook_learning": "gradient", "kmeans_start": False, "revive_below": 0.0}
    return VQGANConfig(height=size, width=size, **training, **network)


def _import_weights(config: VQGANConfig, state: dict[str, Any], names: _Names, source: Path) -> VQGAN:
    model = VQGAN(config)
    expected, matched = model.state_dict(), dict(_matched_names(model, names))
    weights = {name: tensor for name, tensor in state.items() if isinstance(tensor, Tensor)}
    missing, unknown = set(matched.values()) - set(weights), set(state) - set(matched.values())
    if missing or unknown:
        problems = (("lacks", missing), ("also has", unknown))
        examples = [f"{verb} {', '.join(sorted(some)[:3])}" for verb, some in problems if some]
        raise UserError(f"{source} does not match its description: it {' and '.join(examples)}")
    converted: dict[str, Tensor] = {}
    for mine, theirs in matched.items():
        if weights[theirs].squeeze().shape != expected[mine].squeeze().shape:  # 1x1 convolutions may be matrices
            shapes = f"{tuple(weights[theirs].shape)}, not {tuple(expected[mine].shape)}"
            raise UserError(f"{source} does not match its description: {theirs} is {shapes}")
        converted[mine] = weights[theirs].float().reshape(expected[mine].shape)
    model.load_state_dict(converted)
    model.provenance = {"converted_from": source.name}
    return model.eval()


def _matched_names(model: VQGAN, names: _Names) -> Iterator[tuple[str, str]]:
    """Yields smalti's name and the other system's name of every weight."""
    config = model.config
    for network, layers, their_layers in (
        ("encoder", model.encoder, _encoder_layers(config, names)),
        ("decoder", model.decoder, _decoder_layers(config, names)),
    ):
        weighted = [(number, layer) for number, layer in enumerate(layers) if not isinstance(layer, nn.SiLU)]
        for (number, layer), their_layer in zip(weighted, their_layers, strict=True):
            parts = names.in_block if isinstance(layer, ResidualBlock) else {}
            parts = names.in_attention if isinstance(layer, Attention) else parts
            for name in layer.state_dict():
                part, _, weight = name.rpartition(".")
                their_name = f"{parts.get(part, part)}.{weight}" if part else weight
                yield f"{network}.{number}.{name}", f"{their_layer}.{their_name}"
    if config.quantizer == "nearest":
        yield "quantizer.codebook_0", "quantize.embedding.weight"
    else:
        yield "quantizer.codebook", "quantize.embed.weight"
        yield from ((f"quantizer.logits.{name}", f"quantize.proj.{name}") for name in ("weight", "bias"))


def _encoder_layers(config: VQGANConfig, names: _Names) -> list[str]:
    """Returns the other system's names of the encoder's layers with weights, in order."""
    layers, last = ["conv_in"], len(config.widths) - 1
    for i in range(last + 1):
        for j in range(config.residual_blocks):
            layers.append(names.down.format(i=i, j=j))
            layers += [names.down_attention.format(i=i, j=j)] if i in config.attention_stages else []
        layers += [names.downsample.format(i=i)] if i < last else []
    return [*(f"encoder.{layer}" for layer in (*layers, *names.middle, names.norm, "conv_out")), "quant_conv"]


def _decoder_layers(config: VQGANConfig, names: _Names) -> list[str]:
    """Returns the other system's names of the decoder's layers with weights, in order."""
    layers, last = ["conv_in", *names.middle], len(config.widths) - 1
    for stage in reversed(range(last + 1)):
        i = stage if names.fine_first else last - stage
        for j in range(config.residual_blocks + 1):
            layers.append(names.up.format(i=i, j=j))
            layers += [names.up_attention.format(i=i, j=j)] if stage in config.attention_stages else []
        layers += [names.upsample.format(i=i)] if stage else []
    return ["post_quant_conv", *(f"decoder.{layer}" for layer in (*layers, names.norm, "conv_out"))]


def _as_diffusers(tensor: Tensor, theirs: str) -> Tensor:
    """Reshapes a weight for diffusers: attention's 1x1 convolutions become matrices, codebooks lose the nodes axis."""
    if theirs.startswith("quantize."):
        return tensor.flatten(0, 1).contiguous()
    return (tensor.flatten(1) if re.search(r"\.to_\w+(\.0)?\.weight$", theirs) else tensor).contiguous()


def _new_attention_name(name: str) -> str:
    """Returns the current name of a weight that old versions of diffusers may have saved."""
    return re.sub(r"(attentions\.\d+)\.(\w+)\.", lambda m: f"{m[1]}.{_OLD_ATTENTION.get(m[2], m[2])}.", name)


class _Inert:
    """Stand-in for a class that a checkpoint names but that its weights do not need."""


def _unpickled(path: Path) -> dict[str, Any]:
    """Loads a checkpoint's tensors without running any code that it contains.

    Raises:
        UserError: if the file does not exist, or holds more than tensors and plain values.
    """
    # published checkpoints name this class as a key of their callbacks; without the stand-in they would be refused
    callback = (_Inert, "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint")
    try:
        with torch.serialization.safe_globals([callback]):
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist; name the file of the weights") from error
    except (pickle.UnpicklingError, EOFError, RuntimeError) as error:
        raise UserError(
            f"{path} was not loaded: it is damaged, or holds more than weights, which could run code "
            f"({_one_line(error)})"
        ) from error
    if not isinstance(checkpoint, dict):
        raise UserError(f"{path} holds a {type(checkpoint).__name__}, not weights by name")
    return checkpoint


def _one_line(error: BaseException) -> str:
    """Returns the type of an error and the first line of its message."""
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
