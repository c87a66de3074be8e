"""Building blocks of selfVAE: weight-normalized convolutions with data-dependent initialization, and dense blocks.

The networks built from them are in `selfvae/networks.py`.

Legend: b batch, c channels, h w grid.
"""

from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.linalg import vector_norm


class WeightNormConv(nn.Module):
    """Weight normalization: a convolution that learns direction and length of its weights (arXiv 1602.07868, Eq. 2).

    Args:
        before: channels of the input.
        after: channels of the output.
        kernel: kernel size, 1 or 3; with `resize` it is always 4.
        resize: -1 halves height and width, 1 doubles them by a transposed convolution, 0 keeps them.
        gain: standard deviation of each output channel after data-dependent initialization.
    """

    def __init__(self, before: int, after: int, *, kernel: int = 3, resize: int = 0, gain: float = 1.0) -> None:
        super().__init__()
        self.resize, self.gain, self.padding = resize, gain, 1 if resize else kernel // 2
        kernel = 4 if resize else kernel
        channels = (before, after) if resize == 1 else (after, before)
        self.direction = nn.Parameter(torch.randn(*channels, kernel, kernel) * 0.05)
        self.length = nn.Parameter(torch.ones(after))
        self.bias = nn.Parameter(torch.zeros(after))

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b _c _h _w"]:
        """Maps features to features, with the weight direction * length / norm(direction)."""
        axis = 1 if self.resize == 1 else 0
        others = [number for number in range(4) if number != axis]
        shape = [-1 if number == axis else 1 for number in range(4)]
        weight = self.direction * (self.length.view(shape) / vector_norm(self.direction, dim=others, keepdim=True))
        if self.resize == 1:
            return F.conv_transpose2d(x, weight, self.bias, stride=2, padding=1)
        return F.conv2d(x, weight, self.bias, stride=1 - self.resize, padding=self.padding)


@torch.no_grad()
def init_weight_norm_from_data(network: nn.Module, run: Callable[[], Any]) -> None:
    """Initializes from data: gives every convolution's output mean 0 and deviation `gain` on a batch.

    Sets lengths and biases as in arXiv 1602.07868, Eq. 6, in one pass: each convolution when the batch reaches it.

    Args:
        network: network whose `WeightNormConv`s are initialized.
        run: passes the batch through the network.
    """

    def initialize(module: nn.Module, inputs: tuple[Tensor]) -> None:
        conv = cast(WeightNormConv, module)
        conv.length.fill_(1.0)
        conv.bias.zero_()
        deviation, mean = torch.std_mean(conv.forward(inputs[0]).float(), (0, 2, 3))
        scale = conv.gain / deviation.clamp(min=1e-3)
        conv.length.copy_(scale)
        conv.bias.copy_(-mean * scale)

    hooks = [m.register_forward_pre_hook(initialize) for m in network.modules() if isinstance(m, WeightNormConv)]
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()


class ChannelAttention(nn.Module):
    """Channel attention: scales each channel by a factor computed from all channels' means (arXiv 1807.02758, 3.3)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.squeeze = nn.Conv2d(channels, max(1, channels // 8), 1)
        self.excite = nn.Conv2d(max(1, channels // 8), channels, 1)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """Maps features to features of the same shape."""
        means = x.mean((2, 3), keepdim=True)
        return x * self.excite(F.elu(self.squeeze(means))).sigmoid()


class DenseBlock(nn.Module):
    """Dense block (arXiv 1608.06993) with channel attention: each layer's input holds the outputs of all before it.

    Deviation: a shortcut around the block, which selfVAE's Appendix A.1 lacks, so that deep stacks start near the
    identity.

    Args:
        channels: channels of input and output.
        growth: channels that each layer adds.
        layers: number of layers.
    """

    def __init__(self, channels: int, *, growth: int, layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(WeightNormConv(channels + i * growth, growth) for i in range(layers))
        self.join = WeightNormConv(channels + layers * growth, channels, kernel=1, gain=0.3)
        self.attention = ChannelAttention(channels)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """Maps features to features of the same shape."""
        features = x
        for layer in self.layers:
            features = torch.cat([features, layer(F.elu(features))], 1)
        return x + self.attention(self.join(F.elu(features)))
