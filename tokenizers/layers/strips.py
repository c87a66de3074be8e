"""Networks over images whose maps are too large to hold: computed strip by strip of rows, with the whole's result.

Each layer's map knows how to compute any of its rows from rows of the map before. Nothing is computed until it is asked
for, and what is read more than once is held if it is small enough, else computed again. So memory is bounded whatever
the size of the image, but for the image itself and for what attention must see at once; and nothing is approximate.

Which layers there are is `blocks.py`'s and `vqgan_blocks.py`'s. Legend: b batch, c channels, h w map.
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

LARGEST_WHOLE = {"cpu": 2**26, "cuda": 2**27, "mps": 2**27}
"""Numbers of the largest map that a network makes at once, of one image or several; 2**27 is 128 channels of 1024x1024.
It is larger where computing again what was not held costs more than memory does."""
LARGEST_HELD = 2**26
"""Numbers of the largest map that is held where images are computed in strips, 256 MiB; at most three at a time."""
STRIP = 2**22
"""Numbers of the largest strip of a map that is computed at once, if it has more rows than a few."""


def in_bounded_memory(network: nn.Sequential, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c2 h2 w2"]:
    """`network(x)`: as many images at once as there is no large map of, and larger images in strips.

    What is computed in strips is equal to the whole to float32 rounding, at every pixel: the statistics of a GroupNorm
    are those of the whole map, gathered before it is applied; attention runs over the whole of its map, which must fit.
    Which way an image goes hangs on its size alone. With gradients, which need every map, the network runs as it is.
    """
    _, c, h, w = x.shape
    given = _Map((c, h, w), _rows_of(x[:1]))
    largest, limit = _applied(network, given).largest, LARGEST_WHOLE.get(x.device.type, LARGEST_WHOLE["cpu"])
    if torch.is_grad_enabled() or len(x) * largest <= limit:
        return network(x)
    if largest <= limit:
        return torch.cat([network(part) for part in x.split(limit // largest)])
    return torch.cat([_whole(_applied(network, replace(given, rows=_rows_of(image)))) for image in x.split(1)])


@dataclass(frozen=True)
class _Map:
    """A feature map of one image, none of which need be there yet.

    Attributes:
        shape: (c, h, w).
        rows: computes `(1, c, last - first, w)`, its rows from `first` to before `last`.
        work: numbers of the largest map that is computed for all of its rows.
        largest: the same, of all maps up to this one.
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
        """How many numbers it has."""
        return math.prod(self.shape)

    def then(self, shape: tuple[int, int, int], rows: Callable[[int, int], Tensor]) -> "_Map":
        """A map that is computed from this one."""
        return _Map(shape, rows, self.work, self.largest)

    def strips(self) -> Iterator[tuple[int, int]]:
        """All rows, so many at once that no map on the way to them is large."""
        height = self.shape[1]
        step = max(1, STRIP * height // self.work)
        return ((first, min(first + step, height)) for first in range(0, height, step))


def _rows_of(x: Tensor) -> Callable[[int, int], Tensor]:
    return lambda first, last: x[:, :, first:last]


def _whole(x: _Map) -> Tensor:
    """All of a map, (1, c, h, w)."""
    (c, h, w), found = x.shape, None
    for first, last in x.strips():
        part = x.rows(first, last)
        if found is None:
            found = part.new_empty((1, c, h, w)).contiguous(memory_format=torch.channels_last)
        found[:, :, first:last] = part
    assert found is not None
    return found


@dataclass
class _Held:
    """Rows of a map that is computed whole once any are asked for."""

    compute: Callable[[], Tensor] | None
    found: Tensor | None = None

    def __call__(self, first: int, last: int) -> Tensor:
        if self.found is None:
            assert self.compute is not None
            self.found, self.compute = self.compute(), None  # and with it goes all that it was computed from
        return self.found[:, :, first:last]


@dataclass
class _Last:
    """Rows of a map that is too large: those asked for last are kept, as what is asked for next may be among them."""

    rows: Callable[[int, int], Tensor]
    found: Tensor | None = None
    first: int = 0
    last: int = 0

    def __call__(self, first: int, last: int) -> Tensor:
        if self.found is None or first < self.first or last > self.last:
            self.found, self.first, self.last = self.rows(first, last), first, last
        return self.found[:, :, first - self.first : last - self.first]


def _held(x: _Map) -> _Map:
    """A map whose rows are asked for more than once."""
    if isinstance(x.rows, _Held | _Last):
        return x
    if x.size > LARGEST_HELD:
        return replace(x, rows=_Last(x.rows))
    return replace(x, rows=_Held(lambda: _whole(x)), work=x.size)


def _applied(layers: nn.Sequential | Sequence[nn.Module], x: _Map) -> _Map:
    """What layers make of a map."""
    for layer in layers:
        x = _of_layer(layer, x)
    return x


def _of_layer(layer: nn.Module, x: _Map) -> _Map:
    match layer:
        case Residual():
            return _residual(layer, _held(x))
        case Attention():
            return replace(x, rows=_Held(lambda: layer(_whole(x))), work=x.size)
        case Downsample():
            return _convolved(layer, x, (0, 1, 0, 1))
        case Upsample():
            return _convolved(layer, _enlarged(twice_as_large, x, 2, x.shape[0]), (1, 1, 1, 1))
        case nn.Conv2d():
            above, beside = (side for side in layer.padding if isinstance(side, int))
            return _convolved(layer, x, (beside, beside, above, above))
        case nn.PixelShuffle():
            return _enlarged(layer, x, layer.upscale_factor, x.shape[0] // layer.upscale_factor**2)
        case nn.GroupNorm():
            return _normalized(layer, _held(x))
        case nn.SiLU() | nn.Identity():
            return x.then(x.shape, lambda first, last: layer(x.rows(first, last)))
    raise AssertionError(f"{type(layer).__name__} is not among the layers that strips know")


def _residual(layer: Residual, x: _Map) -> _Map:
    branch, shortcut = _applied(layer.branch, x), _of_layer(layer.shortcut, x)

    def rows(first: int, last: int) -> Tensor:
        found = branch.rows(first, last)  # first, as it asks for more rows of x, among which are the shortcut's
        return shortcut.rows(first, last) + found

    return _Map(branch.shape, rows, max(branch.work, shortcut.work), branch.largest)


def _convolved(layer: nn.Conv2d, x: _Map, padding: tuple[int, int, int, int]) -> _Map:
    """By a convolution that pads by so much: left, right, above, below."""
    (_, h, w), (left, right, above, below) = x.shape, padding
    (high, wide), (down, across) = layer.kernel_size, layer.stride
    shape = (layer.out_channels, (h + above + below - high) // down + 1, (w + left + right - wide) // across + 1)

    def rows(first: int, last: int) -> Tensor:
        start, end = first * down - above, (last - 1) * down - above + high
        seen, outside = x.rows(max(start, 0), min(end, h)), (max(-start, 0), max(end - h, 0))
        if left == right and not any(outside):  # most strips need no copy
            return F.conv2d(seen, layer.weight, layer.bias, layer.stride, (0, left))
        return F.conv2d(F.pad(seen, (left, right, *outside)), layer.weight, layer.bias, layer.stride)

    return x.then(shape, rows)


def _enlarged(layer: Callable[[Tensor], Tensor], x: _Map, times: int, channels: int) -> _Map:
    """By a layer that makes `times` x `times` positions of each."""
    _, h, w = x.shape

    def rows(first: int, last: int) -> Tensor:
        start = first // times
        made = layer(x.rows(start, -(-last // times)))
        return made[:, :, first - start * times : last - start * times]

    return x.then((channels, h * times, w * times), rows)


def _normalized(layer: nn.GroupNorm, x: _Map) -> _Map:
    """By a GroupNorm: the first rows asked for wait for the statistics of all."""
    c, h, _ = x.shape

    @cache
    def scale_and_shift() -> tuple[Tensor, Tensor]:
        shares, means, scales = [], [], []
        for first, last in x.strips():
            part = x.rows(first, last).float().flatten(2).contiguous()  # channels first: see `GroupNorm`
            _, mean, scale = torch.native_group_norm(part, None, None, 1, c, part.shape[2], layer.num_groups, layer.eps)
            shares.append((last - first) / h)
            means.append(mean)
            scales.append(scale)
        of_strips, device = torch.tensor(shares, dtype=torch.double)[:, None], scales[0].device
        mean_of, scale_of = (torch.cat(each).cpu().double() for each in (means, scales))  # GPUs may lack float64
        mean = (of_strips * mean_of).sum(0)
        variance = (of_strips * (scale_of**-2 - layer.eps + (mean_of - mean).square())).sum(0)
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
