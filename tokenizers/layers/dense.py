"""Building blocks of selfVAE's networks: weight-normalised convolutions with a data-dependent start, dense blocks with
channel attention. What is made of them is in `selfvae_networks.py`.

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
    """A convolution whose weights have a direction and a length, learned apart (arXiv 1602.07868, Eq. 2).

    Args:
        before: channels of the input.
        after: channels of the output.
        kernel: 1 or 3; where the size changes it is 4.
        resize: -1 halves the size, 1 doubles it by a transposed convolution, 0 keeps it.
        gain: standard deviation of each channel at the data-dependent start.
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
        """Features to features."""
        axis = 1 if self.resize == 1 else 0
        others = [number for number in range(4) if number != axis]
        shape = [-1 if number == axis else 1 for number in range(4)]
        weight = self.direction * (self.length.view(shape) / vector_norm(self.direction, dim=others, keepdim=True))
        if self.resize == 1:
            return F.conv_transpose2d(x, weight, self.bias, stride=2, padding=1)
        return F.conv2d(x, weight, self.bias, stride=1 - self.resize, padding=self.padding)


@torch.no_grad()
def start_from_data(network: nn.Module, run: Callable[[], Any]) -> None:
    """Sets the lengths and biases so that every convolution's output has mean 0 and deviation `gain` on a batch.

    The data-dependent start of arXiv 1602.07868, Eq. 6, in one pass: each convolution is set as the batch reaches it.

    Args:
        network: whose convolutions are set.
        run: passes the batch through it.
    """

    def set_by(module: nn.Module, given: tuple[Tensor]) -> None:
        conv = cast(WeightNormConv, module)
        conv.length.fill_(1.0)
        conv.bias.zero_()
        deviation, mean = torch.std_mean(conv.forward(given[0]).float(), (0, 2, 3))
        scale = conv.gain / deviation.clamp(min=1e-3)
        conv.length.copy_(scale)
        conv.bias.copy_(-mean * scale)

    hooks = [m.register_forward_pre_hook(set_by) for m in network.modules() if isinstance(m, WeightNormConv)]
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()


class ChannelAttention(nn.Module):
    """Scales each channel by what the means of all say (arXiv 1807.02758, Section 3.3)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.squeeze = nn.Conv2d(channels, max(1, channels // 8), 1)
        self.excite = nn.Conv2d(max(1, channels // 8), channels, 1)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """Features to features of the same shape."""
        means = x.mean((2, 3), keepdim=True)
        return x * self.excite(F.elu(self.squeeze(means))).sigmoid()


class DenseBlock(nn.Module):
    """Layers that each see the outputs of all before (arXiv 1608.06993), brought back to width, and channel attention.

    Appendix A.1 has no shortcut around the block; one is here, so that deep stacks start near the identity.

    Args:
        channels: of input and output.
        growth: channels that each layer adds.
        layers: how many.
    """

    def __init__(self, channels: int, *, growth: int, layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(WeightNormConv(channels + i * growth, growth) for i in range(layers))
        self.join = WeightNormConv(channels + layers * growth, channels, kernel=1, gain=0.3)
        self.attention = ChannelAttention(channels)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """Features to features of the same shape."""
        seen = x
        for layer in self.layers:
            seen = torch.cat([seen, layer(F.elu(seen))], 1)
        return x + self.attention(self.join(F.elu(seen)))
