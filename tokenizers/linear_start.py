"""A data-dependent start for one stage of encoder and decoder: the best linear code of 2x2 patches. Only the start.

Legend: b batch, c channels, h w grid, p numbers in a patch, r principal components.
"""

from typing import cast

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from smalti.tokenizers.blocks import ResidualBlock


@torch.no_grad()
def start_linear(encoder: nn.Sequential, decoder: nn.Sequential, given: Float[Tensor, "b c h w"]) -> None:
    """Sets one stage of `blocks.encoder` and `blocks.decoder` so that, together, they project patches onto their
    principal components, as many as the stage has channels for: half of them, or the code width if that is less.

    What an encoder makes of a patch is then its components, and what a decoder makes of components the patch that is
    nearest: quantized at k-means centres, the stage codes patches as k-means does before the first step of training.
    A component goes through the nonlinearities as two channels of opposite signs, as silu(x) - silu(-x) = x; channels
    that are left over keep their random start, and nothing comes of them yet.

    Args:
        encoder: of one stage, from c channels.
        decoder: of one stage, to c channels.
        given: what the encoder is given, of an even height and width.
    """
    first, last = (cast(nn.Conv2d, encoder[place]) for place in (0, -1))
    back, made = (cast(nn.Conv2d, decoder[place]) for place in (0, -2))
    patches = rearrange(given.float(), "b c (h i) (w j) -> (b h w) (c i j)", i=2, j=2)
    mean = patches.mean(0)
    variances, vectors = torch.linalg.eigh((patches - mean).T.double() @ (patches - mean).double() / len(patches))
    count = min(last.in_channels // 2, last.out_channels, len(mean))
    axes = rearrange(vectors.flip(1)[:, :count].float(), "(c i j) r -> r c i j", i=2, j=2)
    gain = variances.flip(0)[:count].mean().clamp_min(1e-12).rsqrt().float()  # channels then vary by about 1
    for block in (*encoder, *decoder):
        if isinstance(block, ResidualBlock):
            cast(Tensor, block.second.bias).zero_()  # its weights are zero: it starts as the identity
    outside, middle = int(first.padding[0]), int(back.padding[0])
    shift, inner = axes.flatten(1) @ mean, slice(outside, outside + 2)
    signed = torch.cat([gain.expand(count), -gain.expand(count)])  # of the channels of each component, both
    twice, channels = torch.arange(count).repeat(2), slice(0, 2 * count)
    for layer in (first, back):
        layer.weight[channels] = 0
        cast(Tensor, layer.bias)[channels] = 0
    for layer in (last, made):
        layer.weight.zero_()
        cast(Tensor, layer.bias).zero_()
    first.weight[channels, :, inner, inner] = signed[:, None, None, None] * axes[twice]
    cast(Tensor, first.bias)[channels] = -signed * shift[twice]
    last.weight[twice, torch.arange(2 * count)] = 1 / signed[:, None, None]
    back.weight[torch.arange(2 * count), twice, middle, middle] = signed
    made.weight[:, channels, middle, middle] = axes[twice].flatten(1).T / signed
    cast(Tensor, made.bias).copy_(mean)
