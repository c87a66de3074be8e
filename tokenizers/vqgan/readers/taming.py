"""Imports checkpoints with the names of taming-transformers: its own, latent diffusion's first stages, IBQ, Chameleon.

Their networks are described by a file: a `.yaml` of taming-transformers, latent diffusion or Lightning's command line,
or the `config.json` that transformers writes for Chameleon.
"""

import dataclasses
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from smalti.core.checkpoint_checks import some
from smalti.core.config import added
from smalti.core.errors import UserError
from smalti.tokenizers.vqgan.readers.files import described, read_description, read_yaml
from smalti.tokenizers.vqgan.readers.names import TAMING, matched_names
from smalti.tokenizers.vqgan.readers.weights import MOST_STAGES, Checkpoint, config_of, import_weights
from smalti.tokenizers.vqgan.vqgan import VQGAN

_QUANTIZERS: dict[str, Literal["linked", "gumbel", "dot"]] = {
    **dict.fromkeys(["VQModel", "VQModelInterface", "VQSegmentationModel", "VQNoDiscModel"], "linked"),
    "GumbelVQ": "gumbel",
    "IBQ": "dot",
}
"""Quantizers by the class that a description names; `VQModelInterface` is latent diffusion's."""
_COLORS = "colorize"  # random colours in which segmentations are shown
_AVERAGED = "model_ema."


@dataclass(frozen=True)
class _Network:
    ch: int
    ch_mult: tuple[int, ...]
    num_res_blocks: int
    attn_resolutions: tuple[int, ...]
    resolution: int
    in_channels: int
    out_ch: int
    z_channels: int
    double_z: bool | None = added(None)
    attn_type: str = added("vanilla")
    use_linear_attn: bool = added(False)
    tanh_out: bool = added(False)


@dataclass(frozen=True)
class _Params:
    embed_dim: int
    n_embed: int
    ddconfig: dict[str, Any]
    remap: str | None = added(None)
    l2_normalize: bool = added(False)


@dataclass(frozen=True)
class _Model:
    target: str
    params: dict[str, Any]


@dataclass(frozen=True)
class _LightningModel:
    class_path: str
    init_args: dict[str, Any]


@dataclass(frozen=True)
class _ChameleonNetwork:
    base_channels: int
    channel_multiplier: tuple[int, ...]
    num_res_blocks: int
    resolution: int
    in_channels: int
    latent_channels: int
    embed_dim: int
    num_embeddings: int
    attn_resolutions: tuple[int, ...] | None = added(None)
    attn_type: str | None = added("vanilla")
    double_latent: bool = added(False)


def from_taming(checkpoint: Checkpoint) -> VQGAN:
    """Imports a VQ-GAN that a `.yaml` file describes.

    Raises:
        UserError: if the file cannot be read, or the network differs from smalti's VQ-GAN.
    """
    path = checkpoint.description
    model = _model(read_yaml(path), path)
    kind = model.target.rpartition(".")[2]
    if kind not in _QUANTIZERS:
        raise UserError(f"{path} describes a {kind[:100]}; convert reads {', '.join(_QUANTIZERS)}")
    params = described(_Params, model.params, path)
    if params.remap:
        raise UserError(f"{path} remaps codes by a file that is not in the checkpoint; remove its remap")
    if params.l2_normalize and kind != "IBQ":
        raise UserError(f"{path} describes a {kind} with l2_normalize, which convert does not read")
    named = dataclasses.replace(checkpoint, format=f"{kind}{checkpoint.format}")
    network = described(_Network, params.ddconfig, path)
    return _import(named, network, params, quantizer=_QUANTIZERS[kind])


def from_chameleon(checkpoint: Checkpoint) -> VQGAN:
    """Imports Chameleon's or Anole's VQ-GAN with the `config.json` of transformers.

    Raises:
        UserError: if the file cannot be read, or the weights are those of the encoder alone.
    """
    path = checkpoint.description
    content = read_description(path)
    nested = isinstance(content, dict) and "vq_config" in content  # in the config of a whole Chameleon
    content = content["vq_config"] if nested else content
    kind = content.get("model_type", "chameleon_vqgan") if isinstance(content, dict) else None
    if isinstance(kind, str) and kind != "chameleon_vqgan":  # Janus's has the same fields and another quantizer
        raise UserError(f"{path} describes a {kind[:100]}; convert reads chameleon_vqgan")
    fields = described(_ChameleonNetwork, content, path)
    checkpoint = dataclasses.replace(checkpoint, format=f"VQ-GAN of Chameleon{checkpoint.format}")
    if not any(name.startswith("decoder.") for name in checkpoint.state):
        raise UserError(
            f"{checkpoint.source} holds Chameleon's encoder alone; take Meta's vqgan.ckpt, or Anole's files"
        )
    network = _Network(
        ch=fields.base_channels,
        ch_mult=fields.channel_multiplier,
        num_res_blocks=fields.num_res_blocks,
        attn_resolutions=fields.attn_resolutions or (),
        resolution=fields.resolution,
        in_channels=fields.in_channels,
        out_ch=fields.in_channels,
        z_channels=fields.latent_channels,
        double_z=fields.double_latent,
        attn_type=fields.attn_type or "none",
    )
    return _import(checkpoint, network, _Params(fields.embed_dim, fields.num_embeddings, {}), quantizer="linked")


def _model(content: Any, path: Path) -> _Model:
    """Returns the description of the tokenizer, which may be the first stage of a latent-diffusion model."""
    model = content.get("model") if isinstance(content, dict) else None
    if isinstance(model, dict) and "class_path" in model:
        lightning = described(_LightningModel, model, path)
        return _Model(lightning.class_path, lightning.init_args)
    outer = described(_Model, model, path)
    first_stage = outer.params.get("first_stage_config")
    return outer if first_stage is None else described(_Model, first_stage, path)


def _import(
    checkpoint: Checkpoint, network: _Network, params: _Params, *, quantizer: Literal["linked", "gumbel", "dot"]
) -> VQGAN:
    attends = network.attn_type == "vanilla" and not network.use_linear_attn
    other_ends = network.in_channels != network.out_ch or network.double_z or network.tanh_out
    if network.ch_mult[:1] != (1,) or other_ends:
        raise UserError(
            f"{checkpoint.description} describes a network that smalti's VQ-GAN does not support: ch_mult must begin "
            "with 1, in_channels must equal out_ch, and double_z and tanh_out must be false"
        )
    if not attends and (network.use_linear_attn or network.attn_type != "none"):
        raise UserError(f"{checkpoint.description} describes linear attention, which smalti's VQ-GAN does not support")
    stages = range(min(len(network.ch_mult), MOST_STAGES))
    config = config_of(
        checkpoint,
        size=network.resolution,
        image_channels=network.in_channels,
        widths=tuple(network.ch * multiplier for multiplier in network.ch_mult),
        residual_blocks=network.num_res_blocks,
        attention_stages=tuple(i for i in stages if attends and network.resolution // 2**i in network.attn_resolutions),
        middle_attention=attends,
        latent_width=network.z_channels,
        code_width=params.embed_dim,
        branching=params.n_embed,
        quantizer=quantizer,
    )
    return import_weights(config, _averaged(checkpoint.without(_COLORS)), partial(matched_names, names=TAMING))


def _averaged(checkpoint: Checkpoint) -> Checkpoint:
    """Returns the averaged weights in the place of the last ones, if the checkpoint has both.

    Lightning modules store the average of `a.b.weight` as `model_ema.abweight`, because names of buffers have no dots.

    Raises:
        UserError: if only some weights have an average.
    """
    averages = {
        name.removeprefix(_AVERAGED): tensor
        for name, tensor in checkpoint.state.items()
        if name.startswith(_AVERAGED) and not name.startswith(f"{_AVERAGED}loss")
    }
    if not averages:
        return checkpoint
    last = [name for name in checkpoint.state if not name.startswith(_AVERAGED)]
    if missing := sorted(name for name in last if name.replace(".", "") not in averages):
        raise UserError(f"{checkpoint.source} lacks the averages of {some(missing)}; remove all {_AVERAGED} weights")
    state: dict[str, Tensor] = {name: averages.pop(name.replace(".", "")) for name in last}
    extra = {f"{_AVERAGED}{name}": averages[name] for name in averages.keys() - {"decay", "num_updates"}}
    named = f"{checkpoint.format}, averaged weights"
    return dataclasses.replace(checkpoint, state={**state, **extra}, format=named)
