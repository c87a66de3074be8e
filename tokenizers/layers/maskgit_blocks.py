"""Convolutional encoder and decoder of MaskGIT's VQGAN (arXiv 2202.04200), which has no attention.

It differs from `attention_blocks.py` in its downsampling, its blocks that change the width, and its biases. The
networks take any height and width divisible by 2**(stages - 1).

Legend: b batch, c channels, h w grid.
"""

from collections.abc import Sequence
from itertools import pairwise

from jaxtyping import Float
from torch import Tensor, nn

from smalti.tokenizers.layers.attention_blocks import GroupNorm, ResidualBlock, Upsample


class ToUnitRange(nn.Module):
    """Maps images from [-1, 1] to [0, 1], the range that this network was published with.

    It is a layer because the first convolution pads with zeros, which are black only in this range.
    """

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """Maps images to images of the same shape."""
        return (x + 1) / 2


class AddedConv(nn.Conv2d):
    """Computes x + conv(x) with a 1x1 convolution.

    It ends a block that changes the width: the published network applies the shortcut's convolution to the branch's
    output instead of the block's input, and published weights are trained that way.
    """

    def __init__(self, channels: int) -> None:
        super().__init__(channels, channels, 1, bias=False)

    def forward(self, input: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """Maps features to features of the same shape."""
        return input + super().forward(input)


def encoder_and_decoder(
    *, image_channels: int, widths: Sequence[int], residual_blocks: int, code_width: int, groups: int
) -> tuple[nn.Sequential, nn.Sequential]:
    """Builds an encoder from images to z_e, at 1 / 2**(len(widths) - 1) of their size, and the mirrored decoder.

    Args:
        image_channels: channels of the images.
        widths: channels of each stage, from the image inwards.
        residual_blocks: residual blocks per stage and in the middle, in encoder and decoder.
        code_width: channels of z_e and z_q.
        groups: groups of every GroupNorm.
    """
    last = len(widths) - 1
    encoder: list[nn.Module] = [ToUnitRange(), nn.Conv2d(image_channels, widths[0], 3, padding=1, bias=False)]
    for stage, (before, width) in enumerate(pairwise((widths[0], *widths))):
        encoder += _blocks(before, width, residual_blocks, groups)
        encoder += [nn.AvgPool2d(2)] if stage < last else []
    encoder += _blocks(widths[-1], widths[-1], residual_blocks, groups)
    encoder += [GroupNorm(groups, widths[-1]), nn.SiLU(), nn.Conv2d(widths[-1], code_width, 1)]
    decoder: list[nn.Module] = [nn.Conv2d(code_width, widths[-1], 3, padding=1)]
    decoder += _blocks(widths[-1], widths[-1], residual_blocks, groups)
    for stage in range(last, -1, -1):
        decoder += _blocks(widths[min(stage + 1, last)], widths[stage], residual_blocks, groups)
        decoder += [Upsample(widths[stage])] if stage else []
    decoder += [GroupNorm(groups, widths[0]), nn.SiLU(), nn.Conv2d(widths[0], image_channels, 3, padding=1)]
    return nn.Sequential(*encoder), nn.Sequential(*decoder)


def _blocks(before: int, width: int, count: int, groups: int) -> list[nn.Module]:
    layers: list[nn.Module] = []
    for number in range(count):
        if number or before == width:
            layers.append(ResidualBlock(width, width, groups, bias=False))
        else:
            layers += [GroupNorm(groups, before), nn.SiLU(), nn.Conv2d(before, width, 3, padding=1, bias=False)]
            layers += [GroupNorm(groups, width), nn.SiLU(), nn.Conv2d(width, width, 3, padding=1, bias=False)]
            layers.append(AddedConv(width))
    return layers
