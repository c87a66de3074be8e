"""Inference on large images in bounded memory: feature maps are computed in strips of rows, with an exact result.

The map of each layer has a function that computes any of its rows from rows of the map before it. Rows are computed
lazily. Rows that are read more than once are cached if the map is small enough, and recomputed otherwise. Memory is
therefore bounded whatever the size of the image, except for the image itself and the maps that attention reads whole.

The supported layers are those of `conv.py`, `attention_blocks.py` and `maskgit_blocks.py`.

Legend: b batch, c channels, h w map.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from smalti.tokenizers.layers.attention_blocks import Attention, Downsample, Upsample, twice_as_large
from smalti.tokenizers.layers.conv import Residual
from smalti.tokenizers.layers.maskgit_blocks import AddedConv, ToUnitRange

LARGEST_WHOLE = {"cpu": 2**26, "cuda": 2**27, "mps": 2**27}
"""Elements of the largest feature map that is computed whole, over all images of a batch, by device type; 2**27 are 128
channels of 1024x1024. It is larger on devices where recomputation costs more than memory."""
LARGEST_CACHED = 2**26
"""Elements of the largest map that is cached when images are computed in strips (256 MiB); at most three are cached."""
STRIP = 2**22
"""Elements of the largest strip that is computed at once, unless a single row has more."""


def in_bounded_memory(network: nn.Sequential, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c2 h2 w2"]:
    """Computes `network(x)` in bounded memory: small images in batches, large ones strip by strip.

    Strips give the same result as the whole image, up to float32 rounding, at every pixel: GroupNorm statistics are
    gathered over the whole map before it is normalized; attention runs over its whole map, which must fit in memory.
    Whether an image is computed in strips depends on its size alone. With gradients, which need every map, the network
    runs unchanged.
    """
    _, c, h, w = x.shape
    first_map = _Map((c, h, w), _rows_of(x[:1]))
    limit = LARGEST_WHOLE.get(x.device.type, LARGEST_WHOLE["cpu"])
    largest = _apply_layers(network, first_map).largest
    if torch.is_grad_enabled() or len(x) * largest <= limit:
        return network(x)
    if largest <= limit:
        return torch.cat([network(part) for part in x.split(limit // largest)])
    return torch.cat([_whole(_apply_layers(network, replace(first_map, rows=_rows_of(image)))) for image in x.split(1)])


@dataclass(frozen=True)
class _Map:
    """A feature map of one image, computed lazily.

    Attributes:
        shape: (c, h, w).
        rows: function of `first` and `last` that computes the rows in between, `(1, c, last - first, w)`.
        work: elements of the largest map that computing all rows involves, back to the last cached map.
        largest: elements of the largest of all maps up to this one.
    """

    shape: tuple[int, int, int]
    rows: Callable[[int, int], Tensor]
    work: int = 0
    largest: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "work", max(self.work, self.size))
        object.__setattr__(self, "largest", max(self.largest, self.size))

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    def then(self, shape: tuple[int, int, int], rows: Callable[[int, int], Tensor]) -> "_Map":
        """Returns a map that is computed from this one."""
        return _Map(shape, rows, self.work, self.largest)

    def strips(self) -> Iterator[tuple[int, int]]:
        """Splits all rows into strips, thin enough that no map involved in computing one is large."""
        height = self.shape[1]
        step = max(1, STRIP * height // self.work)
        return ((first, min(first + step, height)) for first in range(0, height, step))


def _rows_of(x: Tensor) -> Callable[[int, int], Tensor]:
    return lambda first, last: x[:, :, first:last]


def _whole(x: _Map) -> Tensor:
    """Computes a whole map, (1, c, h, w), strip by strip."""
    (c, h, w), whole = x.shape, None
    for first, last in x.strips():
        strip = x.rows(first, last)
        if whole is None:
            whole = strip.new_empty((1, c, h, w)).contiguous(memory_format=torch.channels_last)
        whole[:, :, first:last] = strip
    assert whole is not None
    return whole


@dataclass
class _CachedMap:
    """Rows of a map that is computed whole when any are first read, and kept."""

    compute: Callable[[], Tensor] | None
    whole: Tensor | None = None

    def __call__(self, first: int, last: int) -> Tensor:
        if self.whole is None:
            assert self.compute is not None
            self.whole, self.compute = self.compute(), None  # dropping `compute` frees the maps that it reads
        return self.whole[:, :, first:last]


@dataclass
class _CachedRows:
    """Rows of a map that is too large to keep: only those read last are kept, since the next read may repeat them."""

    rows: Callable[[int, int], Tensor]
    cached: Tensor | None = None
    first: int = 0
    last: int = 0

    def __call__(self, first: int, last: int) -> Tensor:
        if self.cached is None or first < self.first or last > self.last:
            self.cached, self.first, self.last = self.rows(first, last), first, last
        return self.cached[:, :, first - self.first : last - self.first]


def _cached(x: _Map) -> _Map:
    """Returns the map with a cache, for layers that read rows more than once."""
    if isinstance(x.rows, _CachedMap | _CachedRows):
        return x
    if x.size > LARGEST_CACHED:
        return replace(x, rows=_CachedRows(x.rows))
    return replace(x, rows=_CachedMap(lambda: _whole(x)), work=x.size)


def _apply_layers(layers: nn.Sequential | Sequence[nn.Module], x: _Map) -> _Map:
    """Returns the map that layers compute from `x`, lazily."""
    for layer in layers:
        x = _apply_layer(layer, x)
    return x


def _apply_layer(layer: nn.Module, x: _Map) -> _Map:
    match layer:
        case Residual():
            return _residual(layer, _cached(x))
        case Attention():
            return replace(x, rows=_CachedMap(lambda: layer(_whole(x))), work=x.size)
        case Downsample():
            return _convolved(layer, x, (0, 1, 0, 1))
        case Upsample():
            return _convolved(layer, _enlarged(twice_as_large, x, 2, x.shape[0]), (1, 1, 1, 1))
        case nn.SiLU() | nn.Identity() | ToUnitRange() | AddedConv():
            return x.then(x.shape, lambda first, last: layer(x.rows(first, last)))
        case nn.AvgPool2d():
            return x.then(
                (x.shape[0], x.shape[1] // 2, x.shape[2] // 2), lambda first, last: layer(x.rows(2 * first, 2 * last))
            )
        case nn.Conv2d():
            vertical, horizontal = (side for side in layer.padding if isinstance(side, int))
            return _convolved(layer, x, (horizontal, horizontal, vertical, vertical))
        case nn.PixelShuffle():
            return _enlarged(layer, x, layer.upscale_factor, x.shape[0] // layer.upscale_factor**2)
        case nn.GroupNorm():
            return _normalized(layer, _cached(x))
    raise AssertionError(f"{type(layer).__name__} cannot be computed in strips")


def _residual(layer: Residual, x: _Map) -> _Map:
    branch, shortcut = _apply_layers(layer.branch, x), _apply_layer(layer.shortcut, x)

    def rows(first: int, last: int) -> Tensor:
        branch_rows = branch.rows(first, last)  # before the shortcut: it reads more rows of x, which are then cached
        return shortcut.rows(first, last) + branch_rows

    return _Map(branch.shape, rows, max(branch.work, shortcut.work), branch.largest)


def _convolved(layer: nn.Conv2d, x: _Map, padding: tuple[int, int, int, int]) -> _Map:
    """Applies a convolution; `padding` is left, right, top, bottom."""
    (_, h, w), (left, right, top, bottom) = x.shape, padding
    (high, wide), (down, across) = layer.kernel_size, layer.stride
    shape = (layer.out_channels, (h + top + bottom - high) // down + 1, (w + left + right - wide) // across + 1)

    def rows(first: int, last: int) -> Tensor:
        start, end = first * down - top, (last - 1) * down - top + high
        inputs, outside = x.rows(max(start, 0), min(end, h)), (max(-start, 0), max(end - h, 0))
        if left == right and not any(outside):  # most strips need no copy
            return F.conv2d(inputs, layer.weight, layer.bias, layer.stride, (0, left))
        return F.conv2d(F.pad(inputs, (left, right, *outside)), layer.weight, layer.bias, layer.stride)

    return x.then(shape, rows)


def _enlarged(layer: Callable[[Tensor], Tensor], x: _Map, times: int, channels: int) -> _Map:
    """Applies a layer that turns each position into `times` x `times` positions."""
    _, h, w = x.shape

    def rows(first: int, last: int) -> Tensor:
        start = first // times
        enlarged = layer(x.rows(start, -(-last // times)))
        return enlarged[:, :, first - start * times : last - start * times]

    return x.then((channels, h * times, w * times), rows)


def _normalized(layer: nn.GroupNorm, x: _Map) -> _Map:
    """Applies a GroupNorm, whose statistics are gathered over all rows when any are first read."""
    c, h, _ = x.shape

    @cache
    def scale_and_shift() -> tuple[Tensor, Tensor]:
        shares, means, scales = [], [], []
        for first, last in x.strips():
            strip = x.rows(first, last).float().flatten(2).contiguous()  # not channels-last: see `GroupNorm`
            size = strip.shape[2]
            _, mean, scale = torch.native_group_norm(strip, None, None, 1, c, size, layer.num_groups, layer.eps)
            shares.append((last - first) / h)
            means.append(mean)
            scales.append(scale)
        # on the CPU, since GPUs may lack float64
        weights, device = torch.tensor(shares, dtype=torch.double)[:, None], scales[0].device
        strip_means, strip_scales = (torch.cat(each).cpu().double() for each in (means, scales))
        mean = (weights * strip_means).sum(0)
        variance = (weights * (strip_scales**-2 - layer.eps + (strip_means - mean).square())).sum(0)
        repeats = c // layer.num_groups
        scale, mean = (
            each.float().to(device).repeat_interleave(repeats) for each in ((variance + layer.eps).rsqrt(), mean)
        )
        scale = scale * layer.weight
        return scale.view(1, -1, 1, 1), (layer.bias - mean * scale).view(1, -1, 1, 1)

    def rows(first: int, last: int) -> Tensor:
        scale, shift = scale_and_shift()
        return torch.addcmul(shift, x.rows(first, last), scale)

    return x.then(x.shape, rows)
