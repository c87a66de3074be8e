"""Convolutional encoder and decoder of the VQ-VAE family: strided stages with residual blocks. No quantization here.

The networks are fully convolutional: they take any height and width divisible by 2**stages.

Legend: b batch, c channels, h w grid.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor, nn


class Residual(nn.Module, ABC):
    """Computes shortcut(x) + branch(x), where `branch` is a sequence of layers."""

    shortcut: nn.Module

    @property
    @abstractmethod
    def branch(self) -> Sequence[nn.Module]:
        """Layers of the branch, in order."""

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c2 h w"]:
        """Maps features to features on the same grid."""
        inner = x
        for layer in self.branch:
            inner = layer(inner)
        return self.shortcut(x) + inner


class ResidualBlock(Residual):
    """Computes x + conv(silu(conv(silu(x)))).

    The last weights start at zero, so that a deep stack starts near the identity.

    Args:
        channels: channels of input and output.
        kernel: kernel size of the first convolution, an odd number.
    """

    def __init__(self, channels: int, kernel: int = 3) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, channels, kernel, padding=kernel // 2)
        self.second = nn.Conv2d(channels, channels, 1)
        self.shortcut, self.silu = nn.Identity(), nn.SiLU()
        nn.init.zeros_(self.second.weight)

    @property
    def branch(self) -> Sequence[nn.Module]:
        """Layers of the branch, in order."""
        return self.silu, self.first, self.silu, self.second


def encoder(
    *, image_channels: int, widths: Sequence[int], residual_blocks: int, code_width: int, alone: bool = False
) -> nn.Sequential:
    """Builds an encoder from images to z_e, at 1 / 2**len(widths) of their size.

    Each stage is a stride-2 convolution followed by residual blocks.

    Args:
        image_channels: channels of the images.
        widths: channels of each stage.
        residual_blocks: residual blocks per stage.
        code_width: channels of z_e.
        alone: whether each output position depends on its own 2x2 patch only, without its neighbours. On a grid of one
            position there are no neighbours, and the kernels have a ninth of the weights.
    """
    layers: list[nn.Module] = []
    for before, width in zip((image_channels, *widths), widths, strict=False):
        layers += [
            nn.Conv2d(before, width, 2, stride=2) if alone else nn.Conv2d(before, width, 4, stride=2, padding=1),
            *(ResidualBlock(width, 1 if alone else 3) for _ in range(residual_blocks)),
        ]
    return nn.Sequential(*layers, nn.SiLU(), nn.Conv2d(widths[-1], code_width, 1))


def decoder(
    *, image_channels: int, widths: Sequence[int], residual_blocks: int, code_width: int, alone: bool = False
) -> nn.Sequential:
    """Builds the mirror of `encoder`: per stage, residual blocks, then a convolution and a pixel shuffle to 2x size."""
    kernel = 1 if alone else 3
    layers: list[nn.Module] = [nn.Conv2d(code_width, widths[-1], kernel, padding=kernel // 2)]
    for width, after in zip(reversed(widths), (*reversed(widths[:-1]), image_channels), strict=True):
        layers += [*(ResidualBlock(width, kernel) for _ in range(residual_blocks)), nn.SiLU()]
        layers += [nn.Conv2d(width, 4 * after, kernel, padding=kernel // 2), nn.PixelShuffle(2)]
    return nn.Sequential(*layers)
