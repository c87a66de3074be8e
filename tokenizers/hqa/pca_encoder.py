"""Principal component analysis (PCA) of 2x2 patches: a fixed encoder, and an initialization of learned networks.

Legend: b batch, c channels, h w grid, p values in a patch, r principal components, d code width.
"""

from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from smalti.tokenizers.layers.conv import ResidualBlock

_FLOAT64_BATCH_SIZE = 64  # images whose patches are converted to float64 at a time


class Components(NamedTuple):
    """Principal components of 2x2 patches.

    Attributes:
        axes: orthonormal principal axes, by decreasing variance.
        variances: variance of the patches along each axis.
        mean: mean of the patches.
    """

    axes: Float[Tensor, "r c 2 2"]
    variances: Float[Tensor, " r"]
    mean: Float[Tensor, "c 2 2"]


def principal_components(inputs: Float[Tensor, "b c h w"], most: int) -> Components:
    """Returns up to `most` principal components of all 2x2 patches of `inputs`, whose height and width must be even."""
    length = 4 * inputs.shape[1]
    count, total, products = 0, inputs.new_zeros(length).double(), inputs.new_zeros(length, length).double()
    for batch in inputs.split(_FLOAT64_BATCH_SIZE):
        patches = rearrange(batch, "b c (h i) (w j) -> (b h w) (c i j)", i=2, j=2).double()
        count, total, products = count + len(patches), total + patches.sum(0), products + patches.T @ patches
    mean = total / count
    variances, vectors = torch.linalg.eigh(products / count - mean.outer(mean))
    axes = rearrange(vectors.flip(1)[:, :most].float(), "(c i j) r -> r c i j", i=2, j=2)
    return Components(axes, variances.flip(0)[:most].float(), mean.float().view(-1, 2, 2))


class PCAEncoder(nn.Module):
    """Encodes 2x2 patches by their principal components, times one learned factor.

    The components are buffers and are not trained. Distances between features are therefore those between the inputs,
    up to the factor and to what the components leave out. Before `init_from_data` the encoder copies the first values
    of each patch.

    Args:
        channels: channels of the inputs.
        code_width: channels of z_e; channels beyond the number of values in a patch stay 0.
    """

    axes: Tensor
    shift: Tensor

    def __init__(self, channels: int, code_width: int) -> None:
        super().__init__()
        self.register_buffer("axes", torch.eye(code_width, 4 * channels).view(code_width, channels, 2, 2))
        self.register_buffer("shift", torch.zeros(code_width))
        self.log_factor = nn.Parameter(torch.zeros(1))

    def forward(self, inputs: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d _h _w"]:
        """Encodes images or features to z_e at half their size."""
        return F.conv2d(inputs, self.axes, self.shift, stride=2) * self.log_factor.exp()

    @torch.no_grad()
    def init_from_data(self, inputs: Float[Tensor, "b c h w"]) -> None:
        """Sets the axes to the principal components of `inputs`, whose height and width must be even."""
        components = principal_components(inputs, len(self.axes))
        count = len(components.axes)
        self.axes.zero_()[:count] = components.axes
        self.shift.zero_()[:count] = -(components.axes.flatten(1) @ components.mean.flatten())

    @torch.no_grad()
    def multiply(self, factor: Tensor) -> None:
        """Scales all further outputs by a factor."""
        self.log_factor.add_(factor.log())


@torch.no_grad()
def init_linear(encoder: nn.Sequential, decoder: nn.Sequential, inputs: Float[Tensor, "b c h w"]) -> None:
    """Initializes a one-stage encoder and decoder of `layers.conv` so that together they compute a PCA of 2x2 patches.

    The encoder then maps a patch to its principal components, the decoder maps components to the nearest patch. With
    k-means codewords, the stage quantizes patches as k-means would before its first training step. The number of
    components is half the stage's channels, or the code width if that is less: each passes the nonlinearities as two
    channels of opposite sign, since silu(x) - silu(-x) = x. Channels left over keep their random weights and do not
    affect the output yet.

    Args:
        encoder: encoder of one stage, from c channels.
        decoder: decoder of one stage, to c channels.
        inputs: inputs of the encoder, of even height and width.
    """
    first, last = (cast(nn.Conv2d, encoder[index]) for index in (0, -1))
    decoder_first, decoder_last = (cast(nn.Conv2d, decoder[index]) for index in (0, -2))
    axes, variances, mean = principal_components(inputs, min(last.in_channels // 2, last.out_channels))
    count = len(axes)
    variance = variances.mean()
    gain = torch.where(variance > 1e-12, variance.rsqrt(), 1.0)  # gives channels a variance of about 1
    for block in (*encoder, *decoder):
        if isinstance(block, ResidualBlock):
            cast(Tensor, block.second.bias).zero_()  # with weights of zero, the block is the identity
    padding, middle = int(first.padding[0]), int(decoder_first.padding[0])
    shift, patch = axes.flatten(1) @ mean.flatten(), slice(padding, padding + 2)  # the kernel's inner 2x2
    gains = torch.cat([gain.expand(count), -gain.expand(count)])  # two channels of opposite sign per component
    component, channels = torch.arange(count).repeat(2), slice(0, 2 * count)
    for layer in (first, decoder_first):
        layer.weight[channels] = 0
        cast(Tensor, layer.bias)[channels] = 0
    for layer in (last, decoder_last):
        layer.weight.zero_()
        cast(Tensor, layer.bias).zero_()
    first.weight[channels, :, patch, patch] = gains[:, None, None, None] * axes[component]
    cast(Tensor, first.bias)[channels] = -gains * shift[component]
    last.weight[component, torch.arange(2 * count)] = 1 / gains[:, None, None]
    decoder_first.weight[torch.arange(2 * count), component, middle, middle] = gains
    decoder_last.weight[:, channels, middle, middle] = axes[component].flatten(1).T / gains
    cast(Tensor, decoder_last.bias).copy_(mean.flatten())
