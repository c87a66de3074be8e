"""The 2-D hourglass transformer: a body that thinks about patches in its middle. Objectives and samplers are elsewhere.

Legend: b batch, h w grid, n positions (n = h w), d width, s shortening factor (patches are s x s).
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int64
from torch import Tensor, nn

from smalti.errors import UserError
from smalti.priors.methods import REPAIRS
from smalti.priors.prior import Prior, PriorConfig
from smalti.priors.rotary import AxialRotary
from smalti.registry import register

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
class Hourglass(Prior):
    """Hourglass transformer (arXiv 2110.13711) made 2-D, as the prior of arXiv 2206.12351.

    Non-causal; shortening over s x s patches; positions enter through axial rotary frequencies only, on every head, in
    units of codes. So nothing depends on where a patch lies on the canvas, and grids of any size run. No time input and
    no mask token: SUNDAE needs neither. Class and upper levels are more vectors in
    the sum at every position; that of a class begins at zero.

    Deviation: a grid that s does not divide ends in partial patches, whose missing positions count as zeros and are
    never attended to.
    """

    kind = "hourglass"
    config_class = HourglassConfig
    method = REPAIRS

    def __init__(self, config: HourglassConfig) -> None:
        super().__init__(config)
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
        """See `Prior.features`."""
        _, h, w = codes.shape
        x = self.embed(codes)  # b n d
        if self.of_upper:
            x = x + rearrange(self.of_upper(upper, h, w), "b h w d -> b (h w) d")
        if self.of_class:
            x = x + rearrange(self.of_class(labels, len(codes)), "b d -> b 1 d")
        if torch.is_autocast_enabled(x.device.type):  # else every layer would cast what it reads, and every sum back
            x = x.to(torch.get_autocast_dtype(x.device.type))
        x = self.body(x, (h, w))  # b n d
        return self.norm(x.float())


class Stage(nn.Module):
    """Blocks at one resolution, around a valley: the same again on patches. The innermost stage is blocks alone.

    Args:
        config: for the sizes of a block.
        depth: blocks of this stage and those within, from the outside in and out again.
        shorten: sides of patches, outermost first.
        stride: codes between neighbouring positions of this stage.
    """

    def __init__(
        self, config: HourglassConfig, depth: tuple[int, ...], shorten: tuple[int, ...], stride: int = 1
    ) -> None:
        super().__init__()
        d = config.model_width
        self.rotary = AxialRotary(d // config.heads, stride)
        self.before = Blocks(config, depth[0]) if depth[0] else None
        self.shorten = shorten[0] if shorten else None
        if self.shorten:
            s = self.shorten
            self.down = nn.Linear(s * s * d, d)
            self.valley = Stage(config, depth[1:-1], shorten[1:], stride * s)
            self.norm = nn.LayerNorm(d)
            self.up = nn.Linear(d, s * s * d)
            self.after = Blocks(config, depth[-1]) if depth[-1] else None

    def forward(self, x: Float[Tensor, "b n d"], grid: tuple[int, int]) -> Float[Tensor, "b n d"]:
        """Features in raster order over `grid` (rows, columns) to features."""
        h, w = grid
        angles = self.rotary(h, w)  # 1 n a
        if self.before:
            x = self.before(x, angles)
        if self.shorten is None:
            return x
        s = self.shorten
        below, right = -h % s, -w % s  # what the last patches lack
        rows, columns = (h + below) // s, (w + right) // s

        patches = F.pad(rearrange(x, "b (h w) d -> b h w d", h=h), (0, 0, 0, right, 0, below))
        patches = rearrange(patches, "b (y s1) (x s2) d -> b (y x) (s1 s2 d)", s1=s, s2=s)
        patches = self.valley(self.down(patches), (rows, columns))  # b (y x) d
        patches = self.up(self.norm(patches))
        patches = rearrange(patches, "b (y x) (s1 s2 d) -> b (y s1) (x s2) d", y=rows, s1=s, s2=s)
        x = x + rearrange(patches[:, :h, :w], "b h w d -> b (h w) d")
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
