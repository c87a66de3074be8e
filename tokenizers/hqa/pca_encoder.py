"""Principal components of 2x2 patches, the best linear code of them: an encoder that is fixed at them, and a start for
one that is learned.

Legend: b batch, c channels, h w grid, p numbers in a patch, r principal components, d code width.
"""

from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from smalti.tokenizers.layers.conv import ResidualBlock

_AT_ONCE = 64  # images whose patches are in float64 together


class Components(NamedTuple):
    """Of 2x2 patches.

    Attributes:
        axes: orthonormal, those along which patches vary most first.
        variances: along them.
        mean: of the patches.
    """

    axes: Float[Tensor, "r c 2 2"]
    variances: Float[Tensor, " r"]
    mean: Float[Tensor, "c 2 2"]


def components_of(given: Float[Tensor, "b c h w"], most: int) -> Components:
    """The principal components of what is given, of an even height and width; at most so many, or as many as patches
    have numbers."""
    length = 4 * given.shape[1]
    count, total, products = 0, given.new_zeros(length).double(), given.new_zeros(length, length).double()
    for part in given.split(_AT_ONCE):
        patches = rearrange(part, "b c (h i) (w j) -> (b h w) (c i j)", i=2, j=2).double()
        count, total, products = count + len(patches), total + patches.sum(0), products + patches.T @ patches
    mean = total / count
    variances, vectors = torch.linalg.eigh(products / count - mean.outer(mean))
    axes = rearrange(vectors.flip(1)[:, :most].float(), "(c i j) r -> r c i j", i=2, j=2)
    return Components(axes, variances.flip(0)[:most].float(), mean.float().view(-1, 2, 2))


class PrincipalEncoder(nn.Module):
    """2x2 patches to their principal components, times one learned factor. The components are buffers: nothing trains
    them, so distances between two images' features are, up to that factor, those between the images, but for what the
    components leave out.

    Until `init_from_data` it takes the first numbers of each patch.

    Args:
        channels: of what is encoded.
        code_width: channels of z_e; those past the numbers in a patch stay 0.
    """

    axes: Tensor
    shift: Tensor

    def __init__(self, channels: int, code_width: int) -> None:
        super().__init__()
        self.register_buffer("axes", torch.eye(code_width, 4 * channels).view(code_width, channels, 2, 2))
        self.register_buffer("shift", torch.zeros(code_width))
        self.log_factor = nn.Parameter(torch.zeros(1))

    def forward(self, given: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d _h _w"]:
        """z_e, at half the size."""
        return F.conv2d(given, self.axes, self.shift, stride=2) * self.log_factor.exp()

    @torch.no_grad()
    def init_from_data(self, given: Float[Tensor, "b c h w"]) -> None:
        """Takes the principal components of what is given, of an even height and width."""
        found = components_of(given, len(self.axes))
        count = len(found.axes)
        self.axes.zero_()[:count] = found.axes
        self.shift.zero_()[:count] = -(found.axes.flatten(1) @ found.mean.flatten())

    @torch.no_grad()
    def multiply(self, factor: Tensor) -> None:
        """Makes all that is encoded so many times as long."""
        self.log_factor.add_(factor.log())


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
    axes, variances, mean = components_of(given, min(last.in_channels // 2, last.out_channels))
    count = len(axes)
    gain = variances.mean().clamp_min(1e-12).rsqrt()  # channels then vary by about 1
    for block in (*encoder, *decoder):
        if isinstance(block, ResidualBlock):
            cast(Tensor, block.second.bias).zero_()  # its weights are zero: it starts as the identity
    outside, middle = int(first.padding[0]), int(back.padding[0])
    shift, inner = axes.flatten(1) @ mean.flatten(), slice(outside, outside + 2)
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
    cast(Tensor, made.bias).copy_(mean.flatten())
