"""The 2-D hourglass transformer: a body that thinks about patches in its middle. Objectives and samplers are elsewhere.

Legend: b batch, h w grid, n positions (n = h w), d width, s shortening factor (patches are s x s).
"""

import math
from dataclasses import dataclass

import torch
from einops import rearrange
from jaxtyping import Float, Int64
from torch import Tensor, nn

from smalti.core.errors import UserError
from smalti.core.models import register
from smalti.priors.base import CodePrior, PriorConfig
from smalti.priors.methods.sundae import SUNDAE
from smalti.priors.networks.resampling import DOWN_AND_UP, Buckets, Resampling, bucket_sides, join, split
from smalti.priors.networks.rotary import AxialRotary

UNFUSED_POSITIONS = 256
"""The most positions for which attention is not fused where fusing is slow; see `Blocks.forward`."""


@dataclass(frozen=True)
class HourglassConfig(PriorConfig):
    """A 2-D hourglass transformer over one level of codes, small enough by default to learn in minutes on two cores.

    Raises:
        UserError: for values that make no network, naming them.
    """

    model_width: int = 192
    """Numbers at each position."""
    heads: int = 6
    """Attention heads; each has model_width / heads numbers, a multiple of 4."""
    depth: tuple[int, ...] = (0, 4, 0)
    """Blocks before the valley, in it, and after it; with more valleys, from the outside in and out again. Only the
    innermost valley needs any. Outside it a block costs shorten squared times as much: after 200 s of one core on emoji
    codes, (1, 3, 1) of width 128 reaches 3.32 nats held-out, (0, 4, 1) 3.22, and (0, 4, 0) of width 192 3.16."""
    shorten: tuple[int, ...] = (2,)
    """Side of the patches that each valley takes for one position, outermost first. None at all is a flat
    transformer."""
    resampling: Resampling = "linear"
    """How vectors of a patch become one: by a linear map of all of them, as their mean, or by that map and attention
    to them; and one becomes many by a linear map, or after the mean the same everywhere."""
    buckets: Buckets = "patches"
    """What a valley takes for one position: square patches, or runs of as many codes in raster order, as if a grid
    were text: the hourglass of arXiv 2110.13711, to compare with."""
    feedforward_mult: int = 4
    """Hidden numbers of a feed-forward layer, as a multiple of model_width."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.heads < 1 or self.model_width < 1 or self.model_width % (4 * self.heads):
            raise UserError(
                f"model_width must be a positive multiple of 4 x heads (pairs of numbers turn, on two axes), "
                f"got {self.model_width} for {self.heads} heads"
            )
        if len(self.depth) != 2 * len(self.shorten) + 1:
            raise UserError(
                f"shorten {self.shorten} makes {len(self.shorten)} valley(s), for which depth needs "
                f"{2 * len(self.shorten) + 1} numbers, got {self.depth}"
            )
        innermost = self.depth[len(self.shorten)]
        if min(self.depth) < 0 or innermost < 1 or min(self.shorten, default=2) < 2 or self.feedforward_mult < 1:
            raise UserError(
                f"feedforward_mult and the innermost valley's depth must be at least 1, other depths 0 and shorten 2, "
                f"got {self.feedforward_mult}, {self.depth} and {self.shorten}"
            )


@register
class Hourglass(CodePrior):
    """Hourglass transformer (arXiv 2110.13711) made 2-D, as the prior of arXiv 2206.12351.

    Non-causal; shortening over s x s patches; positions enter through axial rotary frequencies only, on every head, in
    units of codes. So nothing depends on where a patch lies on the canvas, and grids of any size run. No time input and
    no mask token: SUNDAE needs neither. Class and upper levels are more vectors in
    the sum at every position; that of a class begins at zero.

    A patch lies where its first code does. Deviation: a grid that s does not divide ends in partial patches, whose
    missing positions count as zeros and are never attended to.
    """

    kind = "hourglass"
    config_class = HourglassConfig
    method = SUNDAE

    def __init__(self, config: HourglassConfig) -> None:
        super().__init__(config)
        self.rotary = AxialRotary(config.model_width // config.heads)
        self.body = Stage(config, config.depth, config.shorten)
        self.norm = nn.LayerNorm(config.model_width)

    def recomputable(self) -> list[nn.Module]:
        """Every attention and feed-forward layer."""
        return [layer for blocks in self.modules() if isinstance(blocks, Blocks) for layer in blocks.layers]

    def embed(self, codes: Int64[Tensor, "b h w"]) -> Float[Tensor, "b n d"]:
        """What the body reads of codes."""
        return self.head.embed(codes)

    def features(
        self,
        codes: Int64[Tensor, "b h w"],
        labels: Int64[Tensor, " b"] | None = None,
        upper: tuple[Int64[Tensor, "b _y _x"], ...] = (),
    ) -> Float[Tensor, "b n d"]:
        """See `CodePrior.features`."""
        _, h, w = codes.shape
        x = self.embed(codes)  # b n d
        if self.of_upper:
            x = x + rearrange(self.of_upper(upper, h, w), "b h w d -> b (h w) d")
        if self.of_class:
            x = x + rearrange(self.of_class(labels, len(codes)), "b d -> b 1 d")
        if torch.is_autocast_enabled(x.device.type):  # else every layer would cast what it reads, and every sum back
            x = x.to(torch.get_autocast_dtype(x.device.type))
        grid = (h, w) if self.config.buckets == "patches" else (1, h * w)
        x = self.body(x, grid, self.rotary(h, w))  # b n d
        return self.norm(x.float())


class Stage(nn.Module):
    """Blocks at one resolution, around a valley: the same again on patches. The innermost stage is blocks alone.

    Args:
        config: for the sizes of a block.
        depth: blocks of this stage and those within, from the outside in and out again.
        shorten: sides of patches, outermost first.
    """

    def __init__(self, config: HourglassConfig, depth: tuple[int, ...], shorten: tuple[int, ...]) -> None:
        super().__init__()
        d = config.model_width
        self.before = Blocks(config, depth[0]) if depth[0] else None
        self.sides = bucket_sides(config.buckets, shorten[0]) if shorten else None
        if self.sides:
            down, up = DOWN_AND_UP[config.resampling]
            of = (d, math.prod(self.sides), d // config.heads)
            self.down = down(*of)
            self.valley = Stage(config, depth[1:-1], shorten[1:])
            self.norm = nn.LayerNorm(d)
            self.up = up(*of)
            self.after = Blocks(config, depth[-1]) if depth[-1] else None

    def forward(
        self, x: Float[Tensor, "b n d"], grid: tuple[int, int], angles: Float[Tensor, "1 n a"]
    ) -> Float[Tensor, "b n d"]:
        """Features in raster order over `grid` (rows, columns), at the rotations `angles`, to features."""
        if self.before:
            x = self.before(x, angles)
        if self.sides is None:
            return x
        there = split(torch.ones_like(angles[..., :1]), grid, self.sides)[0, ..., 0] > 0  # m s
        where = split(angles, grid, self.sides)[0]  # m s a
        smaller = tuple(-(-size // side) for size, side in zip(grid, self.sides, strict=True))

        pooled = self.down(split(x, grid, self.sides), there, where)  # b m d
        pooled = self.norm(self.valley(pooled, smaller, where[None, :, 0]))
        x = x + join(self.up(pooled), grid, self.sides)
        return self.after(x, angles) if self.after else x


class Blocks(nn.Module):
    """Pre-norm blocks of non-causal attention and a feed-forward layer, which end in the residual stream.

    LayerNorm and GELU: x-transformers' RMSNorm is five operations, and a gated layer of equal cost has two thirds of
    the width.
    """

    def __init__(self, config: HourglassConfig, depth: int) -> None:
        from x_transformers import Encoder  # here: it takes a second, and the config alone does without
        from x_transformers.attend import Attend
        from x_transformers.x_transformers import Attention, FeedForward

        super().__init__()
        self.encoder = Encoder(
            dim=config.model_width,
            depth=depth,
            heads=config.heads,
            attn_dim_head=config.model_width // config.heads,
            attn_flash=True,
            ff_mult=config.feedforward_mult,
            pre_norm_has_final_norm=False,
        )
        self.layers = [module for module in self.modules() if isinstance(module, Attention | FeedForward)]
        self.attends = [module for module in self.modules() if isinstance(module, Attend)]

    def forward(self, x: Float[Tensor, "b n d"], angles: Float[Tensor, "1 n a"]) -> Float[Tensor, "b n d"]:
        """Features to features; the queries and keys of every head are turned by `angles`."""
        # Torch's fused attention on CPUs is slow backward in bfloat16: forward and backward 74 ms, unfused 15 (64 rows,
        # 6 heads of 32, 64 positions, one core). At 256 positions they are on par; beyond, memory decides.
        half_on_cpu = x.device.type == "cpu" and torch.is_autocast_enabled("cpu") and torch.is_grad_enabled()
        for attend in self.attends:
            attend.flash = not (half_on_cpu and x.shape[1] <= UNFUSED_POSITIONS)
        return self.encoder(x, rotary_pos_emb=(angles, None))
