"""Convolutional encoder and decoder of VQ-GAN: residual blocks, attention, GroupNorm. No quantization, no losses here.

The networks are fully convolutional: they take any height and width divisible by 2**(stages - 1). Their layers compute
the same, in the same order, as the published checkpoints, which `vqgan/convert.py` reads. MaskGIT's network, with some
of these layers, is in `maskgit_blocks.py`.

Legend: b batch, c channels, h w grid.
"""

from collections.abc import Collection, Sequence
from itertools import pairwise
from typing import Any, cast

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from smalti.tokenizers.layers.conv import Residual

EPSILON = 1e-6  # epsilon of every GroupNorm of encoders and decoders
LARGEST_SUMMED = 2**12  # up to this many positions, torch's sums over channels-last maps are accurate to about 1e-6


class GroupNorm(nn.GroupNorm):
    """GroupNorm that is accurate on large maps and fast on channels-last ones.

    On CPUs torch sums channels-last maps position by position in float32, which is off by 0.003 at 1024x1024 positions
    (torch 2.13). Contiguous maps are summed accurately, so large maps are converted. The gradients of smaller ones are
    computed here, because torch's kernel for them is slow (docs/benchmarks.md).
    """

    def __init__(self, groups: int, channels: int, epsilon: float = EPSILON) -> None:
        super().__init__(groups, channels, epsilon)

    def forward(self, input: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """Maps features to features of the same shape."""
        channels_last = not input.is_contiguous() and input.is_contiguous(memory_format=torch.channels_last)
        if input.device.type == "cpu" and channels_last:
            if input.shape[2] * input.shape[3] > LARGEST_SUMMED:
                input = input.contiguous()
            elif torch.is_grad_enabled():
                normed = _ChannelsLastGroupNorm.apply(input, self.weight, self.bias, self.num_groups, self.eps)
                return cast(Tensor, normed)
        return super().forward(input)


class _ChannelsLastGroupNorm(torch.autograd.Function):
    """GroupNorm of channels-last maps on CPUs by torch's kernel, with gradients in few passes over the maps."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, groups: int, epsilon: float) -> Tensor:
        b, c, h, w = x.shape
        normed, mean, scale = torch.native_group_norm(x, weight, bias, b, c, h * w, groups, epsilon)
        ctx.save_for_backward(x, weight, mean, scale)
        return normed

    @staticmethod
    @once_differentiable
    @torch.autocast("cpu", enabled=False)  # gradients within a forward pass would have products in bfloat16
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride] - by the decorator
        """Returns the gradients of the maps, the weight and the bias.

        With n = (x - mean) * scale, the gradient of x is scale * (g - mean of g - n * mean of g * n), where g is
        that of the output times `weight` and means are over the group.
        """
        x, weight, mean, scale = ctx.saved_tensors
        b, c, h, w = x.shape
        per_group = c // mean.shape[1]
        # products and sums in float32; a product with a matrix of ones is the fastest sum over positions
        wide = torch.promote_types(x.dtype, torch.float32)
        x_rows, gradient_rows = (rearrange(each, "b c h w -> b (h w) c").to(wide) for each in (x, gradients[0]))
        ones = x_rows.new_ones(b, 1, h * w)
        sums, products = (torch.bmm(ones, each).squeeze(1) for each in (gradient_rows, gradient_rows * x_rows))
        mean, scale = (each.to(wide).repeat_interleave(per_group, 1) for each in (mean, scale))
        products = (products - sums * mean) * scale  # of the gradient and n, per image and channel

        def group_mean(each: Tensor) -> Tensor:
            means = (each * weight).unflatten(1, (-1, per_group)).mean(2) / (h * w)
            return means.repeat_interleave(per_group, 1)

        slope = -scale.square() * group_mean(products)
        offset = -scale * group_mean(sums) - slope * mean
        slope, offset, factor = (each.unsqueeze(1) for each in (slope, offset, scale * weight))
        x_gradient = (x_rows * slope).add_(offset).addcmul_(gradient_rows, factor).to(x.dtype)
        x_gradient = rearrange(x_gradient, "b (h w) c -> b c h w", h=h)
        return x_gradient, products.sum(0), sums.sum(0), None, None


class ResidualBlock(Residual):
    """Computes shortcut(x) + conv(silu(norm(conv(silu(norm(x)))))); `shortcut` adapts the number of channels."""

    def __init__(self, before: int, after: int, groups: int, *, bias: bool = True) -> None:
        super().__init__()
        self.norm1, self.conv1 = GroupNorm(groups, before), nn.Conv2d(before, after, 3, padding=1, bias=bias)
        self.norm2, self.conv2 = GroupNorm(groups, after), nn.Conv2d(after, after, 3, padding=1, bias=bias)
        self.shortcut = nn.Identity() if before == after else nn.Conv2d(before, after, 1)
        self.silu = nn.SiLU()

    @property
    def branch(self) -> Sequence[nn.Module]:
        """Layers of the branch, in order."""
        return self.norm1, self.silu, self.conv1, self.norm2, self.silu, self.conv2


class Attention(nn.Module):
    """Computes x + self-attention over all positions, with one head."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.norm = GroupNorm(groups, channels)
        self.q, self.k, self.v, self.out = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """Maps features to features of the same shape."""
        h, normed = x.shape[2], self.norm(x)
        q, k, v = (rearrange(layer(normed), "b c h w -> b 1 (h w) c") for layer in (self.q, self.k, self.v))
        attended = F.scaled_dot_product_attention(q, k, v)
        return x + self.out(rearrange(attended, "b 1 (h w) c -> b c h w", h=h))


class Downsample(nn.Conv2d):
    """Halves the grid by a stride-2 convolution that pads below and to the right only, as the published networks do."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, channels, 3, stride=2)

    def forward(self, input: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h2 w2"]:
        """Maps features to features on a grid of half the height and width."""
        return super().forward(F.pad(input, (0, 1, 0, 1)))


class Upsample(nn.Conv2d):
    """Doubles the grid by nearest-neighbour upsampling and a convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, channels, 3, padding=1)

    def forward(self, input: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h2 w2"]:
        """Maps features to features on a grid of twice the height and width."""
        return super().forward(twice_as_large(input))


def twice_as_large(x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h2 w2"]:
    """Repeats every position 2x2 times (nearest-neighbour upsampling)."""
    return F.interpolate(x, scale_factor=2.0, mode="nearest")


def encoder_and_decoder(
    *,
    image_channels: int,
    widths: Sequence[int],
    residual_blocks: int,
    attention_stages: Collection[int],
    middle_attention: bool,
    latent_width: int,
    code_width: int,
    groups: int,
) -> tuple[nn.Sequential, nn.Sequential]:
    """Builds an encoder from images to z_e, at 1 / 2**(len(widths) - 1) of their size, and the mirrored decoder.

    Every stage of the encoder but the last halves the grid. The decoder has one more residual block per stage.

    Args:
        image_channels: channels of the images.
        widths: channels of each stage, from the image inwards.
        residual_blocks: residual blocks per stage of the encoder.
        attention_stages: stages, counted from 0 at the image's size, whose residual blocks are followed by attention.
        middle_attention: whether there is attention between the two residual blocks on the coarsest grid.
        latent_width: channels between the networks and the 1x1 convolutions to and from codewords.
        code_width: channels of z_e and z_q.
        groups: groups of every GroupNorm.
    """
    last = len(widths) - 1
    encoder_layers: list[nn.Module] = [nn.Conv2d(image_channels, widths[0], 3, padding=1)]
    for stage, (before, width) in enumerate(pairwise((widths[0], *widths))):
        encoder_layers += _stage(before, width, residual_blocks, groups, attention=stage in attention_stages)
        encoder_layers += [Downsample(width)] if stage < last else []
    encoder_layers += [*_middle(widths[-1], groups, middle_attention), *_last(widths[-1], latent_width, groups)]
    encoder_layers.append(nn.Conv2d(latent_width, code_width, 1))
    decoder_layers = [nn.Conv2d(code_width, latent_width, 1), nn.Conv2d(latent_width, widths[-1], 3, padding=1)]
    decoder_layers += _middle(widths[-1], groups, middle_attention)
    for stage in range(last, -1, -1):
        before, width = widths[min(stage + 1, last)], widths[stage]
        decoder_layers += _stage(before, width, residual_blocks + 1, groups, attention=stage in attention_stages)
        decoder_layers += [Upsample(width)] if stage else []
    decoder_layers += _last(widths[0], image_channels, groups)
    return nn.Sequential(*encoder_layers), nn.Sequential(*decoder_layers)


def _stage(before: int, width: int, blocks: int, groups: int, *, attention: bool) -> list[nn.Module]:
    layers: list[nn.Module] = []
    for number in range(blocks):
        layers.append(ResidualBlock(width if number else before, width, groups))
        layers += [Attention(width, groups)] if attention else []
    return layers


def _middle(width: int, groups: int, attention: bool) -> list[nn.Module]:
    layers: list[nn.Module] = [ResidualBlock(width, width, groups)]
    layers += [Attention(width, groups)] if attention else []
    return [*layers, ResidualBlock(width, width, groups)]


def _last(width: int, after: int, groups: int) -> list[nn.Module]:
    return [GroupNorm(groups, width), nn.SiLU(), nn.Conv2d(width, after, 3, padding=1)]
