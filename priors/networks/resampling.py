"""How an hourglass goes from positions to the fewer ones of its valley, and back. Blocks and stages are in
`hourglass.py`.

Legend: b batch, n positions, m buckets, s positions of a bucket, d width, a rotated numbers of a head.
"""

from typing import Literal, TypeAlias

import torch
import torch.nn.functional as F
from einops import einsum, rearrange, repeat
from jaxtyping import Bool, Float
from rotary_embedding_torch import apply_rotary_emb
from torch import Tensor, nn

Resampling: TypeAlias = Literal["linear", "mean", "attention"]
Buckets: TypeAlias = Literal["patches", "runs"]


def bucket_sides(buckets: Buckets, shorten: int) -> tuple[int, int]:
    """Rows and columns of a bucket: a square; or as many positions of a grid that is one row."""
    return (shorten, shorten) if buckets == "patches" else (1, shorten**2)


def split(x: Tensor, grid: tuple[int, int], sides: tuple[int, int]) -> Float[Tensor, "b m s d"]:
    """Positions in raster order over `grid` (rows, columns), `(b, n, d)`, to those of each bucket, both in raster
    order; what the last buckets lack is zero."""
    (h, w), (high, wide) = grid, sides
    padded = F.pad(rearrange(x, "b (h w) d -> b h w d", h=h), (0, 0, 0, -w % wide, 0, -h % high))
    return rearrange(padded, "b (y s1) (x s2) d -> b (y x) (s1 s2) d", s1=high, s2=wide)


def join(buckets: Float[Tensor, "b m s d"], grid: tuple[int, int], sides: tuple[int, int]) -> Tensor:
    """The inverse of `split`: `(b, n, d)`."""
    (h, w), (high, wide) = grid, sides
    y, x = -(-h // high), -(-w // wide)
    whole = rearrange(buckets, "b (y x) (s1 s2) d -> b (y s1) (x s2) d", y=y, x=x, s1=high, s2=wide)
    return rearrange(whole[:, :h, :w], "b h w d -> b (h w) d")


class LinearDown(nn.Module):
    """A linear map of all vectors of a bucket together.

    Args:
        width: of a vector.
        size: positions of a bucket.
    """

    def __init__(self, width: int, size: int, _head_width: int) -> None:
        super().__init__()
        self.map = nn.Linear(size * width, width)

    def forward(
        self, x: Float[Tensor, "b m s d"], _there: Bool[Tensor, "m s"], _angles: Float[Tensor, "m s a"]
    ) -> Float[Tensor, "b m d"]:
        """Buckets, of which the positions that are `there` count, at their rotations `angles`, to a vector of each."""
        return self.map(rearrange(x, "b m s d -> b m (s d)"))


class MeanDown(nn.Module):
    """The mean of a bucket's vectors, of those that are there."""

    def __init__(self, _width: int, _size: int, _head_width: int) -> None:
        super().__init__()

    def forward(
        self, x: Float[Tensor, "b m s d"], there: Bool[Tensor, "m s"], _angles: Float[Tensor, "m s a"]
    ) -> Float[Tensor, "b m d"]:
        """See `LinearDown.forward`."""
        return x.sum(2) / there.sum(1, keepdim=True)


class AttentionDown(LinearDown):
    """What `LinearDown` makes of a bucket, and on top of it what it finds by attention to the bucket's own positions
    (attention resampling of arXiv 2110.13711, whose attention reaches all positions of a sequence)."""

    def __init__(self, width: int, size: int, head_width: int) -> None:
        super().__init__(width, size, head_width)
        self.head_width = head_width
        self.of_bucket, self.of_positions = nn.LayerNorm(width), nn.LayerNorm(width)
        self.to_query = nn.Linear(width, width, bias=False)
        self.to_keys_and_values = nn.Linear(width, 2 * width, bias=False)
        self.to_out = nn.Linear(width, width, bias=False)

    def forward(
        self, x: Float[Tensor, "b m s d"], there: Bool[Tensor, "m s"], angles: Float[Tensor, "m s a"]
    ) -> Float[Tensor, "b m d"]:
        """See `LinearDown.forward`."""
        pooled = super().forward(x, there, angles)
        queries = rearrange(self.to_query(self.of_bucket(pooled)), "b m (e a) -> b e m 1 a", a=self.head_width)
        keys, values = rearrange(
            self.to_keys_and_values(self.of_positions(x)), "b m s (two e a) -> two b e m s a", two=2, a=self.head_width
        )
        queries = apply_rotary_emb(angles[:, :1], queries)  # a bucket lies where its first position does
        scores = einsum(queries, apply_rotary_emb(angles, keys), "b e m one a, b e m s a -> b e m s")
        weights = (scores / self.head_width**0.5).masked_fill(~there, -torch.inf).softmax(-1)
        found = einsum(weights.to(values.dtype), values, "b e m s, b e m s a -> b m e a").flatten(2)
        return pooled + self.to_out(found)


class LinearUp(nn.Module):
    """A linear map to all vectors of a bucket together. See `LinearDown` for its arguments."""

    def __init__(self, width: int, size: int, _head_width: int) -> None:
        super().__init__()
        self.map, self.size = nn.Linear(width, size * width), size

    def forward(self, x: Float[Tensor, "b m d"]) -> Float[Tensor, "b m s d"]:
        """A vector of each bucket to those of its positions."""
        return rearrange(self.map(x), "b m (s d) -> b m s d", s=self.size)


class RepeatUp(nn.Module):
    """The same vector at each position of a bucket. See `LinearDown` for its arguments."""

    def __init__(self, _width: int, size: int, _head_width: int) -> None:
        super().__init__()
        self.size = size

    def forward(self, x: Float[Tensor, "b m d"]) -> Float[Tensor, "b m s d"]:
        """See `LinearUp.forward`."""
        return repeat(x, "b m d -> b m s d", s=self.size)


DOWN_AND_UP: dict[Resampling, tuple[type[nn.Module], type[nn.Module]]] = {
    "linear": (LinearDown, LinearUp),
    "mean": (MeanDown, RepeatUp),
    "attention": (AttentionDown, LinearUp),  # to attend to the one vector of a bucket would be linear too
}
