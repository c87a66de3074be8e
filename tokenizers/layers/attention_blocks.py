"""Convolutional encoder and decoder of VQ-GAN: residual blocks, attention, GroupNorm. No quantization, no losses here.

Fully convolutional: any height and width divisible by 2**(stages - 1). The order of layers, and what each computes, are
those of the published checkpoints, which `foreign.py` reads. Legend: b batch, c channels, h w grid.
"""

from collections.abc import Collection, Sequence
from itertools import pairwise

import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from smalti.tokenizers.layers.conv import Residual

EPSILON = 1e-6  # of every GroupNorm
LARGEST_SUMMED = 2**12  # positions of a channels-last map whose naive sums are exact to some 1e-6


class GroupNorm(nn.GroupNorm):
    """Of c channels in so many groups.

    On CPUs torch sums channels-last maps one position after the other, in float32: of 1024x1024 positions its results
    are off by 0.003 (torch 2.13). In the other layout it does not; so large maps change theirs.
    """

    def __init__(self, groups: int, channels: int) -> None:
        super().__init__(groups, channels, EPSILON)

    def forward(self, input: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """Features to features of the same shape."""
        off = input.device.type == "cpu" and input.shape[2] * input.shape[3] > LARGEST_SUMMED
        return super().forward(input.contiguous() if off else input)


class ResidualBlock(Residual):
    """shortcut(x) + conv(silu(norm(conv(silu(norm(x)))))), where `shortcut` changes the channels, if need be."""

    def __init__(self, before: int, after: int, groups: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = GroupNorm(groups, before), nn.Conv2d(before, after, 3, padding=1)
        self.norm2, self.conv2 = GroupNorm(groups, after), nn.Conv2d(after, after, 3, padding=1)
        self.shortcut = nn.Identity() if before == after else nn.Conv2d(before, after, 1)
        self.silu = nn.SiLU()

    @property
    def branch(self) -> Sequence[nn.Module]:
        """See `Residual`."""
        return self.norm1, self.silu, self.conv1, self.norm2, self.silu, self.conv2


class Attention(nn.Module):
    """x + attention of every position to all, with one head."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.norm = GroupNorm(groups, channels)
        self.q, self.k, self.v, self.out = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """Features to features of the same shape."""
        h, normed = x.shape[2], self.norm(x)
        q, k, v = (rearrange(layer(normed), "b c h w -> b 1 (h w) c") for layer in (self.q, self.k, self.v))
        seen = F.scaled_dot_product_attention(q, k, v)
        return x + self.out(rearrange(seen, "b 1 (h w) c -> b c h w", h=h))


class Downsample(nn.Conv2d):
    """Halves the grid; pads below and to the right only, as the published networks do."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, channels, 3, stride=2)

    def forward(self, input: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h2 w2"]:
        """Features to features on a grid of half the height and width."""
        return super().forward(F.pad(input, (0, 1, 0, 1)))


class Upsample(nn.Conv2d):
    """Doubles the grid: repeats every position 2x2 times, then convolves."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, channels, 3, padding=1)

    def forward(self, input: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h2 w2"]:
        """Features to features on a grid of twice the height and width."""
        return super().forward(twice_as_large(input))


def twice_as_large(x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h2 w2"]:
    """Every position repeated 2x2 times."""
    return F.interpolate(x, scale_factor=2.0, mode="nearest")


def encoder_and_decoder(
    *,
    image_channels: int,
    widths: Sequence[int],
    residual_blocks: int,
    attention_stages: Collection[int],
    latent_width: int,
    code_width: int,
    groups: int,
) -> tuple[nn.Sequential, nn.Sequential]:
    """Images to z_e, at 1 / 2**(len(widths) - 1) of their size: every stage but the last halves it; and the mirror of
    that, z_q to images, with one more residual block in each stage.
    """
    last = len(widths) - 1
    inwards: list[nn.Module] = [nn.Conv2d(image_channels, widths[0], 3, padding=1)]
    for stage, (before, width) in enumerate(pairwise((widths[0], *widths))):
        inwards += _stage(before, width, residual_blocks, groups, attention=stage in attention_stages)
        inwards += [Downsample(width)] if stage < last else []
    inwards += [*_middle(widths[-1], groups), *_last(widths[-1], latent_width, groups)]
    inwards.append(nn.Conv2d(latent_width, code_width, 1))
    outwards = [nn.Conv2d(code_width, latent_width, 1), nn.Conv2d(latent_width, widths[-1], 3, padding=1)]
    outwards += _middle(widths[-1], groups)
    for stage in range(last, -1, -1):
        before, width = widths[min(stage + 1, last)], widths[stage]
        outwards += _stage(before, width, residual_blocks + 1, groups, attention=stage in attention_stages)
        outwards += [Upsample(width)] if stage else []
    outwards += _last(widths[0], image_channels, groups)
    return nn.Sequential(*inwards), nn.Sequential(*outwards)


def _stage(before: int, width: int, blocks: int, groups: int, *, attention: bool) -> list[nn.Module]:
    layers: list[nn.Module] = []
    for number in range(blocks):
        layers.append(ResidualBlock(width if number else before, width, groups))
        layers += [Attention(width, groups)] if attention else []
    return layers


def _middle(width: int, groups: int) -> list[nn.Module]:
    return [ResidualBlock(width, width, groups), Attention(width, groups), ResidualBlock(width, width, groups)]


def _last(width: int, after: int, groups: int) -> list[nn.Module]:
    return [GroupNorm(groups, width), nn.SiLU(), nn.Conv2d(width, after, 3, padding=1)]
