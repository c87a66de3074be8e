"""Hourglasses with other ways of down- and upsampling, to compare with the linear resampling of patches in `Hourglass`.

Each is a kind of prior of its own, registered on import: `hourglass-runs`, `hourglass-mean` and
`hourglass-attention`. The study of priors trains `hourglass-runs`.

Legend: b batch, n positions, d width, m patches, s positions of a patch, a rotated channels of a head.
"""

import math

import torch
from einops import einsum, rearrange, repeat
from jaxtyping import Bool, Float
from rotary_embedding_torch import apply_rotary_emb
from torch import Tensor, nn

from smalti.core.models import register
from smalti.priors.networks.hourglass import Hourglass, HourglassConfig, LinearDown, Stage, to_patches


class RunsStage(Stage):
    """Downsamples runs of consecutive codes in raster order, as many as a patch has, as if the grid were text."""

    def __init__(self, config: HourglassConfig, depth: tuple[int, ...], shorten: tuple[int, ...]) -> None:
        super().__init__(config, depth, shorten)
        self.patch = (1, shorten[0] ** 2) if shorten else None

    def forward(
        self, x: Float[Tensor, "b n d"], grid: tuple[int, int], angles: Float[Tensor, "1 n a"]
    ) -> Float[Tensor, "b n d"]:
        """Maps features to features like `Stage.forward`; the grid is read as a single row."""
        return super().forward(x, (1, math.prod(grid)), angles)


class MeanDown(nn.Module):
    """Average pooling over the positions of a patch that exist. It has no parameters."""

    def __init__(self, _config: HourglassConfig, _positions: int) -> None:
        super().__init__()

    def forward(self, patches: Float[Tensor, "b m s d"], valid: Bool[Tensor, "m s"]) -> Float[Tensor, "b m d"]:
        """Returns the mean vector of each patch over its `valid` positions; the others must be zero."""
        return patches.sum(2) / valid.sum(1, keepdim=True)


class RepeatUp(nn.Module):
    """Nearest-neighbour upsampling: every position of a patch gets the patch's vector. It has no parameters."""

    def __init__(self, _config: HourglassConfig, positions: int) -> None:
        super().__init__()
        self.positions = positions

    def forward(self, x: Float[Tensor, "b m d"]) -> Float[Tensor, "b m s d"]:
        """Returns the vectors of each patch's positions."""
        return repeat(x, "b m d -> b m s d", s=self.positions)


class MeanStage(Stage):
    """Downsamples by average pooling and upsamples by repetition."""

    down_class, up_class = MeanDown, RepeatUp

    def downsample(
        self, x: Float[Tensor, "b n d"], grid: tuple[int, int], angles: Float[Tensor, "1 n a"]
    ) -> Float[Tensor, "b m d"]:
        """Returns one vector for each patch."""
        assert self.patch is not None
        return self.down(to_patches(x, grid, self.patch), valid_positions(angles, grid, self.patch))


class AttentionDown(LinearDown):
    """Attention downsampling: the linear map, plus attention from its result to the patch's own positions.

    In arXiv 2110.13711, whose attention resampling this is, the attention reaches all positions of a sequence.
    """

    def __init__(self, config: HourglassConfig, positions: int) -> None:
        super().__init__(config, positions)
        width = config.model_width
        self.head_width = width // config.heads
        self.query_norm, self.key_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.to_query = nn.Linear(width, width, bias=False)
        self.to_keys_and_values = nn.Linear(width, 2 * width, bias=False)
        self.to_out = nn.Linear(width, width, bias=False)

    def attend(
        self,
        patches: Float[Tensor, "b m s d"],
        pooled: Float[Tensor, "b m d"],
        valid: Bool[Tensor, "m s"],
        angles: Float[Tensor, "m s a"],
    ) -> Float[Tensor, "b m d"]:
        """Returns what each patch's vector `pooled` attends to in the patch's `valid` positions."""
        queries = rearrange(self.to_query(self.query_norm(pooled)), "b m (e a) -> b e m 1 a", a=self.head_width)
        keys, values = rearrange(
            self.to_keys_and_values(self.key_norm(patches)),
            "b m s (two e a) -> two b e m s a",
            two=2,
            a=self.head_width,
        )
        queries = apply_rotary_emb(angles[:, :1], queries)  # a patch has the position of its first code
        scores = einsum(queries, apply_rotary_emb(angles, keys), "b e m one a, b e m s a -> b e m s")
        weights = (scores / self.head_width**0.5).masked_fill(~valid, -torch.inf).softmax(-1)
        attended = einsum(weights.to(values.dtype), values, "b e m s, b e m s a -> b m e a").flatten(2)
        return self.to_out(attended)


class AttentionStage(Stage):
    """Downsamples by attention. Upsampling stays linear: attention to the single vector of a patch would be too."""

    down_class = AttentionDown
    down: AttentionDown

    def downsample(
        self, x: Float[Tensor, "b n d"], grid: tuple[int, int], angles: Float[Tensor, "1 n a"]
    ) -> Float[Tensor, "b m d"]:
        """Returns one vector for each patch."""
        assert self.patch is not None
        patches, pooled = to_patches(x, grid, self.patch), super().downsample(x, grid, angles)
        patch_angles = to_patches(angles, grid, self.patch)[0]  # m s a
        return pooled + self.down.attend(patches, pooled, valid_positions(angles, grid, self.patch), patch_angles)


def valid_positions(
    angles: Float[Tensor, "1 n a"], grid: tuple[int, int], patch: tuple[int, int]
) -> Bool[Tensor, "m s"]:
    """Returns which positions of each patch exist; those that pad partial patches do not."""
    return to_patches(torch.ones_like(angles[..., :1]), grid, patch)[0, ..., 0] > 0


@register
class RunsHourglass(Hourglass):
    """The hourglass of arXiv 2110.13711: it downsamples runs of consecutive codes rather than patches."""

    kind = "hourglass-runs"
    stage_class = RunsStage


@register
class MeanHourglass(Hourglass):
    """The 2-D hourglass with average pooling and nearest-neighbour upsampling."""

    kind = "hourglass-mean"
    stage_class = MeanStage


@register
class AttentionHourglass(Hourglass):
    """The 2-D hourglass with attention downsampling."""

    kind = "hourglass-attention"
    stage_class = AttentionStage
