"""Imports and exports diffusers' `VQModel` folders."""

import dataclasses
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from torch import Tensor

from smalti.core.config import added
from smalti.core.errors import UserError
from smalti.core.files import whole_folder, write_json
from smalti.core.models import save_tensors
from smalti.tokenizers.vqgan.readers.files import described, read_description
from smalti.tokenizers.vqgan.readers.names import DIFFUSERS, matched_names
from smalti.tokenizers.vqgan.readers.weights import Checkpoint, config_of, import_weights
from smalti.tokenizers.vqgan.vqgan import VQGAN

CONFIG, WEIGHTS = "config.json", "diffusion_pytorch_model.safetensors"
# names of attention layers in diffusers until version 0.16, and the current ones
_OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


@dataclass(frozen=True)
class _Network:
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


def from_diffusers(checkpoint: Checkpoint) -> VQGAN:
    """Imports a `VQModel` with the `config.json` that diffusers saved beside it.

    Raises:
        UserError: if that file cannot be read, or the network differs from smalti's VQ-GAN.
    """
    path = checkpoint.description
    network = described(_Network, read_description(path), path)
    fixed = {"norm_type": "group", "act_fn": "silu"}
    if odd := [f"{name} {getattr(network, name)}" for name, value in fixed.items() if getattr(network, name) != value]:
        raise UserError(f"{path}: smalti's VQ-GAN does not support {', '.join(odd)}")
    attends = [kind == "AttnDownEncoderBlock2D" for kind in network.down_block_types]
    downs = tuple(_blocks(attends, "DownEncoderBlock2D"))
    if network.down_block_types != downs:
        raise UserError(f"{path} does not describe a VQModel with {' and '.join(dict.fromkeys(downs))} only")
    mirrored = tuple(_blocks(reversed(attends), "UpDecoderBlock2D"))
    if network.up_block_types != mirrored or network.in_channels != network.out_channels:
        raise UserError(f"{path}: smalti's VQ-GAN needs a decoder that mirrors the encoder; this one does not")
    config = config_of(
        checkpoint,
        size=network.sample_size,
        image_channels=network.in_channels,
        widths=network.block_out_channels,
        residual_blocks=network.layers_per_block,
        attention_stages=tuple(stage for stage, attention in enumerate(attends) if attention),
        middle_attention=network.mid_block_add_attention,
        latent_width=network.latent_channels,
        code_width=network.vq_embed_dim or network.latent_channels,
        branching=network.num_vq_embeddings,
        norm_groups=network.norm_num_groups,
    )
    state = {_new_attention_name(name): tensor for name, tensor in checkpoint.state.items()}
    current = dataclasses.replace(checkpoint, state=state)
    return import_weights(config, current, partial(matched_names, names=DIFFUSERS))


def to_diffusers(model: VQGAN, folder: Path) -> None:
    """Exports a folder that `diffusers.VQModel.from_pretrained` loads.

    Raises:
        UserError: if diffusers does not support the model's quantizer or network.
    """
    config = model.config
    if config.quantizer != "linked" or config.depth > 1:
        raise UserError(
            "diffusers supports only flat codebooks with nearest-codeword search; this VQ-GAN's quantizer differs"
        )
    if config.architecture != "vqgan":
        raise UserError(f"diffusers does not support the architecture {config.architecture}")
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
        "num_vq_embeddings": model.radices[0],
        "norm_num_groups": config.norm_groups,
        "vq_embed_dim": config.code_width,
        "mid_block_add_attention": config.middle_attention,
    }
    ours, names = model.state_dict(), dict(matched_names(model, DIFFUSERS))
    state = {theirs: _as_diffusers(ours[mine].detach().cpu(), theirs) for mine, theirs in names.items()}
    with whole_folder(folder) as partial_folder:
        save_tensors(state, partial_folder / WEIGHTS, {"format": "pt"})
        write_json(partial_folder / CONFIG, description)


def _blocks(attends: Iterable[bool], kind: str) -> Iterator[str]:
    return (("Attn" if attention else "") + kind for attention in attends)


def _as_diffusers(tensor: Tensor, theirs: str) -> Tensor:
    """Reshapes a weight for diffusers: attention's 1x1 convolutions become matrices, codebooks lose the nodes axis."""
    if theirs.startswith("quantize."):
        return tensor.flatten(0, 1).contiguous()
    return (tensor.flatten(1) if re.search(r"\.to_\w+(\.0)?\.weight$", theirs) else tensor).contiguous()


def _new_attention_name(name: str) -> str:
    """Returns the current name of a weight that old versions of diffusers may have saved."""
    return re.sub(r"(attentions\.\d+)\.(\w+)\.", lambda m: f"{m[1]}.{_OLD_ATTENTION.get(m[2], m[2])}.", name)
