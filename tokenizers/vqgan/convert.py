"""Checkpoint conversion: imports VQ-GANs from taming-transformers, imports and exports diffusers' `VQModel` folders.

Their networks compute the same as smalti's under other names. Layers are matched by their order, which is the same in
all of them. Every weight must be matched; only the training losses' weights (`loss.`) are dropped.
"""

import dataclasses
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from smalti.core.checkpoint_checks import StoredTensor, build_without_weights, require_sizes, some
from smalti.core.config import added
from smalti.core.errors import UserError
from smalti.core.files import whole_folder, write_json
from smalti.core.models import save_tensors
from smalti.tokenizers.layers.attention_blocks import Attention, ResidualBlock
from smalti.tokenizers.vqgan.checkpoint_files import described, read_json, read_pickled, read_safetensors, read_yaml
from smalti.tokenizers.vqgan.vqgan import VQGAN, VQGANConfig

_MOST_STAGES = 16  # each halves the image
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


@dataclass(frozen=True)
class _TamingNetwork:
    ch: int
    ch_mult: tuple[int, ...]
    num_res_blocks: int
    attn_resolutions: tuple[int, ...]
    resolution: int
    in_channels: int
    out_ch: int
    z_channels: int
    double_z: bool | None = added(None)


@dataclass(frozen=True)
class _TamingParams:
    embed_dim: int
    n_embed: int
    ddconfig: dict[str, Any]
    remap: str | None = added(None)


@dataclass(frozen=True)
class _TamingModel:
    target: str
    params: dict[str, Any]


@dataclass(frozen=True)
class _DiffusersConfig:
    down_block_types: tuple[str, ...]
    up_block_types: tuple[str, ...]
    block_out_channels: tuple[int, ...]
    layers_per_block: int
    in_channels: int
    out_channels: int
    sample_size: int
    latent_channels: int
    num_vq_embeddings: int
    norm_num_groups: int
    vq_embed_dim: int | None = added(None)
    norm_type: str = added("group")
    mid_block_add_attention: bool = added(True)
    act_fn: str = added("silu")


def from_taming(weights: Path, description: Path) -> VQGAN:
    """Imports a checkpoint of taming-transformers, a `VQModel` or `GumbelVQ`.

    Args:
        weights: its `.ckpt` file.
        description: the `.yaml` file that describes its network.

    Raises:
        UserError: if either file cannot be read, or the network differs from smalti's VQ-GAN.
    """
    content = read_yaml(description)
    model = described(_TamingModel, content.get("model") if isinstance(content, dict) else None, description)
    params = described(_TamingParams, model.params, description)
    network = described(_TamingNetwork, params.ddconfig, description)
    if network.ch_mult[:1] != (1,) or network.in_channels != network.out_ch or network.double_z:
        raise UserError(
            f"{description} describes a network that smalti's VQ-GAN does not support: ch_mult must begin with 1, "
            "in_channels must equal out_ch, and double_z must be false"
        )
    if params.remap:
        raise UserError(f"{description} remaps codes by a file that is not in the checkpoint; remove its remap")
    stages = range(min(len(network.ch_mult), _MOST_STAGES))
    config = _config(
        description,
        size=network.resolution,
        image_channels=network.in_channels,
        widths=tuple(network.ch * multiplier for multiplier in network.ch_mult),
        residual_blocks=network.num_res_blocks,
        attention_stages=tuple(i for i in stages if network.resolution // 2**i in network.attn_resolutions),
        latent_width=network.z_channels,
        code_width=params.embed_dim,
        branching=params.n_embed,
        quantizer="gumbel" if model.target.endswith("GumbelVQ") else "nearest",
    )
    return _import_weights(config, read_pickled(weights), _TAMING, description, weights)


def from_diffusers(folder: Path) -> VQGAN:
    """Imports a `VQModel` from a folder that diffusers saved.

    Raises:
        UserError: if the folder cannot be read, or the network differs from smalti's VQ-GAN.
    """
    description = folder / _DIFFUSERS_CONFIG
    network = described(_DiffusersConfig, read_json(description), description)
    fixed = {"norm_type": "group", "mid_block_add_attention": True, "act_fn": "silu"}
    if odd := [f"{name} {getattr(network, name)}" for name, value in fixed.items() if getattr(network, name) != value]:
        raise UserError(f"{folder}: smalti's VQ-GAN does not support {', '.join(odd)}")
    attends = [kind == "AttnDownEncoderBlock2D" for kind in network.down_block_types]
    downs = tuple(_blocks(attends, "DownEncoderBlock2D"))
    if network.down_block_types != downs:
        raise UserError(f"{folder} does not hold a VQModel of diffusers with {' and '.join(dict.fromkeys(downs))} only")
    mirrored = tuple(_blocks(reversed(attends), "UpDecoderBlock2D"))
    if network.up_block_types != mirrored or network.in_channels != network.out_channels:
        raise UserError(f"{folder}: smalti's VQ-GAN needs a decoder that mirrors the encoder; this one does not")
    config = _config(
        description,
        size=network.sample_size,
        image_channels=network.in_channels,
        widths=network.block_out_channels,
        residual_blocks=network.layers_per_block,
        attention_stages=tuple(stage for stage, attention in enumerate(attends) if attention),
        latent_width=network.latent_channels,
        code_width=network.vq_embed_dim or network.latent_channels,
        branching=network.num_vq_embeddings,
        norm_groups=network.norm_num_groups,
    )
    path = folder / _DIFFUSERS_WEIGHTS
    if not path.exists():
        path = path.with_suffix(".bin")
    state = read_safetensors(path) if path.name == _DIFFUSERS_WEIGHTS else read_pickled(path)
    state = {_new_attention_name(name): tensor for name, tensor in state.items()}
    return _import_weights(config, state, _DIFFUSERS, description, path)


def _blocks(attends: Iterable[bool], kind: str) -> Iterator[str]:
    return (("Attn" if attention else "") + kind for attention in attends)


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
    attends = [stage in config.attention_stages for stage in range(len(config.widths))]
    description = {
        "_class_name": "VQModel",
        "in_channels": config.image_channels,
        "out_channels": config.image_channels,
        "down_block_types": list(_blocks(attends, "DownEncoderBlock2D")),
        "up_block_types": list(_blocks(reversed(attends), "UpDecoderBlock2D")),
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
        save_tensors(state, partial / _DIFFUSERS_WEIGHTS, {"format": "pt"})
        write_json(partial / _DIFFUSERS_CONFIG, description)


def _config(source: Path, *, size: int, widths: tuple[int, ...], norm_groups: int = 32, **network: Any) -> VQGANConfig:
    """Returns a config that continues training as the imported network was trained: codebooks learn by gradients.

    Raises:
        UserError: if a declared size is impossible, whatever the weights.
    """
    sizes = {"stages": len(widths), "size": size, "groups": norm_groups}
    sizes |= {name: value for name, value in network.items() if isinstance(value, int)}
    if wrong := [name for name, value in sizes.items() if value < (name != "residual_blocks")]:
        raise UserError(f"{source} does not describe a VQ-GAN: its {wrong[0]} is {sizes[wrong[0]]}")
    if len(widths) > _MOST_STAGES:
        raise UserError(f"{source} does not describe a VQ-GAN: it has {len(widths)} stages, the most is {_MOST_STAGES}")
    if odd := [width for width in widths if width < 1 or width % norm_groups]:
        raise UserError(f"{source} does not describe a VQ-GAN: a width of {odd[0]} has no {norm_groups} groups")
    training = {"codebook_learning": "gradient", "kmeans_start": False, "revive_below": 0.0}
    network |= {"height": size, "width": size, "widths": widths, "norm_groups": norm_groups}
    return VQGANConfig(**training, **network)


def _import_weights(
    config: VQGANConfig, state: dict[str, Tensor], names: _Names, description: Path, source: Path
) -> VQGAN:
    """Builds a network and fills it, after the sizes in its description were compared with the weights.

    Raises:
        UserError: if they do not match, or a weight is not a finite floating-point number.
    """
    header = {name: StoredTensor(tuple(tensor.shape), tensor.dtype) for name, tensor in state.items()}
    require_sizes(dataclasses.asdict(config), header, description, source)
    network = build_without_weights(lambda: VQGAN(config), header, description, source)
    assert network is not None
    expected, matched = network.state_dict(), dict(_matched_names(network, names))
    missing, unknown = set(matched.values()) - set(state), set(state) - set(matched.values())
    if missing or unknown:
        problems = (("lacks", missing), ("also has", unknown))
        examples = [f"{verb} {some(sorted(which))}" for verb, which in problems if which]
        raise UserError(f"{source} does not match its description: it {' and '.join(examples)}")
    converted: dict[str, Tensor] = {}
    for mine, theirs in matched.items():
        tensor, needed = state[theirs], expected[mine].shape
        if [n for n in tensor.shape if n > 1] != [n for n in needed if n > 1]:  # 1x1 convolutions may be matrices
            shapes = f"{tuple(tensor.shape)}, not {tuple(needed)}"
            raise UserError(f"{source} does not match its description: {theirs} is {shapes}")
        converted[mine] = tensor.float().reshape(needed) if tensor.is_floating_point() else tensor
        if not tensor.is_floating_point() or not converted[mine].isfinite().all():
            raise UserError(f"{source}: {theirs} has values that are not finite numbers; download it again")
    model = VQGAN(config)
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
