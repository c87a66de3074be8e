"""Names of layers in other systems' checkpoints. Layers are matched by their order, which is the same in all."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from torch import nn

from smalti.tokenizers.layers.attention_blocks import Attention, ResidualBlock
from smalti.tokenizers.vqgan.vqgan import VQGAN, VQGANConfig


@dataclass(frozen=True)
class Names:
    """Another system's names of layers, by stage `i` and index `j` in the stage, and of the parts of a block."""

    down: str
    down_attention: str
    downsample: str
    up: str
    up_attention: str
    upsample: str
    middle: tuple[str, str, str]
    norm: str = "norm_out"
    in_block: Mapping[str, str] = field(default_factory=lambda: {"shortcut": "nin_shortcut"})
    in_attention: Mapping[str, str] = field(default_factory=lambda: {"out": "proj_out"})
    fine_first: bool = False
    """True if the decoder's stages are counted from the image inwards, not from the codes outwards."""


TAMING = Names(
    down="down.{i}.block.{j}",
    down_attention="down.{i}.attn.{j}",
    downsample="down.{i}.downsample.conv",
    up="up.{i}.block.{j}",
    up_attention="up.{i}.attn.{j}",
    upsample="up.{i}.upsample.conv",
    middle=("mid.block_1", "mid.attn_1", "mid.block_2"),
    fine_first=True,
)
DIFFUSERS = Names(
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
)
LLAMAGEN = Names(
    down="conv_blocks.{i}.res.{j}",
    down_attention="conv_blocks.{i}.attn.{j}",
    downsample="conv_blocks.{i}.downsample.conv",
    up="conv_blocks.{i}.res.{j}",
    up_attention="conv_blocks.{i}.attn.{j}",
    upsample="conv_blocks.{i}.upsample.conv",
    middle=("mid.0", "mid.1", "mid.2"),
)


def matched_names(model: VQGAN, names: Names) -> Iterator[tuple[str, str]]:
    """Yields smalti's name and the other system's name of every weight, for the architecture `vqgan`."""
    config = model.config
    for network, layers, their_layers in (
        ("encoder", model.encoder, _encoder_layers(config, names)),
        ("decoder", model.decoder, _decoder_layers(config, names)),
    ):
        yield from _matched_layers(network, layers, their_layers, names)
    match config.quantizer:
        case "gumbel":
            yield "quantizer.codebook", "quantize.embed.weight"
            yield from ((f"quantizer.logits.{name}", f"quantize.proj.{name}") for name in ("weight", "bias"))
        case "dot":
            yield "quantizer.codebook", "quantize.embedding.weight"
        case _:
            yield "quantizer.codebook_0", "quantize.embedding.weight"


def matched_maskgit_names(model: VQGAN, *, middle: str, first: int, upsample: str) -> Iterator[tuple[str, str]]:
    """Yields smalti's name and the other system's name of every weight, for the architecture `maskgit`.

    Args:
        model: the network.
        middle: the beginning of the names of the middle's blocks.
        first: the number of the first of these blocks.
        upsample: the name of stage `i`'s convolution after upsampling.
    """
    config, last = model.config, len(model.config.widths) - 1
    middle_blocks = [f"{middle}{first + j}" for j in range(config.residual_blocks)]
    down, up, before = [], [], config.widths[0]
    for i, width in enumerate(config.widths):
        down += _block_layers(f"down.{i}.block", before, width, config.residual_blocks)
        before = width
    for i in range(last, -1, -1):
        up += _block_layers(f"up.{i}.block", before, config.widths[i], config.residual_blocks)
        up += [upsample.format(i=i)] if i else []
        before = config.widths[i]
    names = Names("", "", "", "", "", "", middle=("", "", ""))
    for network, layers, their_layers in (
        ("encoder", model.encoder, ["conv_in", *down, *middle_blocks, "norm_out", "conv_out"]),
        ("decoder", model.decoder, ["conv_in", *middle_blocks, *up, "norm_out", "conv_out"]),
    ):
        yield from _matched_layers(network, layers, [f"{network}.{layer}" for layer in their_layers], names)
    yield "quantizer.codebook_0", "quantize.embedding.weight"


def _block_layers(stage: str, before: int, width: int, count: int) -> list[str]:
    """Returns the names of a stage's layers; a block that changes the width is several layers."""
    blocks = [f"{stage}.{j}" for j in range(count)]
    if before == width or not count:
        return blocks
    return [*(f"{stage}.0.{part}" for part in ("norm1", "conv1", "norm2", "conv2", "nin_shortcut")), *blocks[1:]]


def _matched_layers(
    network: str, layers: nn.Sequential, their_layers: list[str], names: Names
) -> Iterator[tuple[str, str]]:
    weighted = [(number, layer) for number, layer in enumerate(layers) if layer.state_dict()]
    for (number, layer), their_layer in zip(weighted, their_layers, strict=True):
        parts = names.in_block if isinstance(layer, ResidualBlock) else {}
        parts = names.in_attention if isinstance(layer, Attention) else parts
        for name in layer.state_dict():
            part, _, weight = name.rpartition(".")
            their_name = f"{parts.get(part, part)}.{weight}" if part else weight
            yield f"{network}.{number}.{name}", f"{their_layer}.{their_name}"


def _middle(config: VQGANConfig, names: Names) -> list[str]:
    first, attention, second = names.middle
    return [first, *([attention] if config.middle_attention else []), second]


def _encoder_layers(config: VQGANConfig, names: Names) -> list[str]:
    """Returns the other system's names of the encoder's layers with weights, in order."""
    layers, last = ["conv_in"], len(config.widths) - 1
    for i in range(last + 1):
        for j in range(config.residual_blocks):
            layers.append(names.down.format(i=i, j=j))
            layers += [names.down_attention.format(i=i, j=j)] if i in config.attention_stages else []
        layers += [names.downsample.format(i=i)] if i < last else []
    layers += [*_middle(config, names), names.norm, "conv_out"]
    return [*(f"encoder.{layer}" for layer in layers), "quant_conv"]


def _decoder_layers(config: VQGANConfig, names: Names) -> list[str]:
    """Returns the other system's names of the decoder's layers with weights, in order."""
    layers, last = ["conv_in", *_middle(config, names)], len(config.widths) - 1
    for stage in reversed(range(last + 1)):
        i = stage if names.fine_first else last - stage
        for j in range(config.residual_blocks + 1):
            layers.append(names.up.format(i=i, j=j))
            layers += [names.up_attention.format(i=i, j=j)] if stage in config.attention_stages else []
        layers += [names.upsample.format(i=i)] if stage else []
    return ["post_quant_conv", *(f"decoder.{layer}" for layer in (*layers, names.norm, "conv_out"))]
