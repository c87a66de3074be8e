"""The 2-D hourglass transformer: self-attention over patches between a down- and an upsampling of the grid.

The network of the SUNDAE prior and, with a mask token, of MaskGIT. Losses and samplers are in
`smalti.priors.methods`.

Legend: b batch, h w grid, n positions (n = h w), d width, m patches, s positions of a patch, a rotated channels of a
head.
"""

import copyreg
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn.attention import SDPBackend

from smalti.core.config import added
from smalti.core.errors import UserError
from smalti.core.models import register
from smalti.priors.base import CodePrior, PriorConfig, require_dropout
from smalti.priors.conditioning import Condition
from smalti.priors.methods.sundae import SUNDAE
from smalti.priors.networks.positions import AxialRotary, require_rotary_heads, sinusoidal_positions

UNFUSED_POSITIONS = 256
"""The most positions for which attention is not fused where the fused kernel is slow; see `Blocks.forward`."""


def _backend(name: str) -> SDPBackend:
    """Returns a kernel of attention by its name."""
    return getattr(SDPBackend, name)


copyreg.pickle(SDPBackend, lambda backend: (_backend, (backend.name,)))  # pyright: ignore[reportArgumentType] - an enum made in C++
"""Lets models be pickled: x-transformers keeps its kernels in them, and torch's enum cannot be found by its name."""


@dataclass(frozen=True)
class HourglassConfig(PriorConfig):
    """A 2-D hourglass transformer over one level of codes; the defaults train in minutes on two CPU cores.

    Raises:
        UserError: for values that make no network, naming them.
    """

    model_width: int = 192
    """Channels of a position."""
    heads: int = 6
    """Attention heads; each has model_width / heads channels, which must be a multiple of 4."""
    depth: tuple[int, ...] = (0, 4, 0)
    """Transformer blocks of each stage: before each downsampling, from the outside in; at the lowest resolution; and
    after each upsampling. Only the lowest resolution needs any; the others cost about shorten squared times as much
    per block."""
    shorten: tuple[int, ...] = (2,)
    """Side of the square patches that each downsampling merges into one position, from the outside in. Empty: a flat
    transformer without downsampling."""
    feedforward_mult: int = 4
    """Hidden width of the feed-forward layers, as a multiple of model_width."""
    dropout: float = added(off=0.0)
    """Dropout on the output of every attention and feed-forward layer in training. Raise it, for example to 0.1, if the
    held-out loss rises while the training loss falls."""
    absolute_positions: bool = added(off=False, default=True)
    """Absolute position embeddings: sinusoids of row and column, added to the input. Rotary embeddings encode only the
    offset between two positions; with both, a prior of aligned images such as portraits learns faster. Turn it off for
    textures that are to be sampled on larger canvases."""
    qk_norm: bool = added(off=False, default=True)
    """QK-norm: RMSNorm on the queries and keys of each attention head, so that their length, which sets how sharp
    attention is, is learned. A prior learns faster with it (docs/notebook/priors.md)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_rotary_heads(self.model_width, self.heads)
        if len(self.depth) != 2 * len(self.shorten) + 1:
            raise UserError(
                f"shorten {self.shorten} downsamples {len(self.shorten)} time(s), for which depth needs "
                f"{2 * len(self.shorten) + 1} numbers, got {self.depth}"
            )
        innermost = self.depth[len(self.shorten)]
        if min(self.depth) < 0 or innermost < 1 or min(self.shorten, default=2) < 2 or self.feedforward_mult < 1:
            raise UserError(
                f"feedforward_mult and the innermost depth must be at least 1, other depths at least 0 and shorten at "
                f"least 2, got {self.feedforward_mult}, {self.depth} and {self.shorten}"
            )
        require_dropout(self.dropout)


class LinearDown(nn.Module):
    """Downsampling: one linear map of all vectors of a patch to a single vector.

    Args:
        config: of the hourglass.
        positions: positions of a patch.
    """

    def __init__(self, config: HourglassConfig, positions: int) -> None:
        super().__init__()
        self.map = nn.Linear(positions * config.model_width, config.model_width)

    def forward(self, patches: Float[Tensor, "b m s d"]) -> Float[Tensor, "b m d"]:
        """Returns one vector for each patch."""
        return self.map(rearrange(patches, "b m s d -> b m (s d)"))


class LinearUp(nn.Module):
    """Upsampling: one linear map of a patch's vector to vectors of all its positions. Arguments as for `LinearDown`."""

    def __init__(self, config: HourglassConfig, positions: int) -> None:
        super().__init__()
        self.map, self.positions = nn.Linear(config.model_width, positions * config.model_width), positions

    def forward(self, x: Float[Tensor, "b m d"]) -> Float[Tensor, "b m s d"]:
        """Returns the vectors of each patch's positions."""
        return rearrange(self.map(x), "b m (s d) -> b m s d", s=self.positions)


def to_patches(x: Tensor, grid: tuple[int, int], patch: tuple[int, int]) -> Float[Tensor, "b m s d"]:
    """Groups positions into patches; patches and the positions in each are in raster order.

    Args:
        x: vectors in raster order, `(b, n, d)`.
        grid: its rows and columns.
        patch: rows and columns of a patch. Where they do not divide the grid, the last patches are padded with zeros.
    """
    (h, w), (rows, columns) = grid, patch
    padded = F.pad(rearrange(x, "b (h w) d -> b h w d", h=h), (0, 0, 0, -w % columns, 0, -h % rows))
    return rearrange(padded, "b (y s1) (x s2) d -> b (y x) (s1 s2) d", s1=rows, s2=columns)


def from_patches(patches: Float[Tensor, "b m s d"], grid: tuple[int, int], patch: tuple[int, int]) -> Tensor:
    """Inverts `to_patches`: returns `(b, n, d)`, without the padding."""
    (h, w), (rows, columns) = grid, patch
    y, x = -(-h // rows), -(-w // columns)
    whole = rearrange(patches, "b (y x) (s1 s2) d -> b (y s1) (x s2) d", y=y, x=x, s1=rows, s2=columns)
    return rearrange(whole[:, :h, :w], "b h w d -> b (h w) d")


class Blocks(nn.Module):
    """Pre-norm transformer blocks: non-causal self-attention and a feed-forward layer each, without a final norm.

    LayerNorm and GELU, since x-transformers' RMSNorm takes five operations, and a gated feed-forward layer of equal
    cost has two thirds of the width.
    """

    def __init__(self, config: HourglassConfig, depth: int) -> None:
        from x_transformers import Encoder  # not at the top: it takes a second, and the config does not need it
        from x_transformers.attend import Attend
        from x_transformers.x_transformers import Attention, FeedForward

        super().__init__()
        self.encoder = Encoder(
            dim=config.model_width,
            depth=depth,
            heads=config.heads,
            attn_dim_head=config.model_width // config.heads,
            attn_flash=True,
            attn_qk_rmsnorm=config.qk_norm,
            ff_mult=config.feedforward_mult,
            attn_sublayer_dropout=config.dropout,
            ff_sublayer_dropout=config.dropout,
            pre_norm_has_final_norm=False,
        )
        self.layers = [module for module in self.modules() if isinstance(module, Attention | FeedForward)]
        self.attends = [module for module in self.modules() if isinstance(module, Attend)]

    def forward(self, x: Float[Tensor, "b n d"], angles: Float[Tensor, "1 n a"]) -> Float[Tensor, "b n d"]:
        """Applies the blocks; `angles` rotate the queries and keys of every head (rotary embeddings)."""
        # Torch's fused attention on CPUs has a slow backward pass in bfloat16: five times that of unfused attention at
        # 64 positions, equal at 256. Beyond, unfused attention takes too much memory.
        half_on_cpu = x.device.type == "cpu" and torch.is_autocast_enabled("cpu") and torch.is_grad_enabled()
        for attend in self.attends:
            attend.flash = not (half_on_cpu and x.shape[1] <= UNFUSED_POSITIONS)
        return self.encoder(x, rotary_pos_emb=(angles, None))


class Stage(nn.Module):
    """One resolution of the hourglass: blocks, downsampling, the next stage on patches, upsampling, blocks.

    The innermost stage has blocks only.

    Args:
        config: for the sizes of a block.
        depth: blocks of this stage and those within, from the outside in and out again.
        shorten: sides of patches, outermost first.
    """

    def __init__(self, config: HourglassConfig, depth: tuple[int, ...], shorten: tuple[int, ...]) -> None:
        super().__init__()
        self.before = Blocks(config, depth[0]) if depth[0] else None
        self.patch = (shorten[0], shorten[0]) if shorten else None  # rows and columns
        if shorten:
            positions = shorten[0] ** 2
            self.down = LinearDown(config, positions)
            self.valley = type(self)(config, depth[1:-1], shorten[1:])  # the next stage, on patches
            self.norm = nn.LayerNorm(config.model_width)
            self.up = LinearUp(config, positions)
            self.after = Blocks(config, depth[-1]) if depth[-1] else None

    def forward(
        self, x: Float[Tensor, "b n d"], grid: tuple[int, int], angles: Float[Tensor, "1 n a"]
    ) -> Float[Tensor, "b n d"]:
        """Maps features to features, both in raster order over `grid` (rows, columns).

        `angles` are the rotary embeddings of the positions. A patch has the angles of its first position.
        """
        if self.before:
            x = self.before(x, angles)
        if self.patch is None:
            return x
        patch_angles = to_patches(angles, grid, self.patch)[:, :, 0]  # 1 m a
        patch_grid = (-(-grid[0] // self.patch[0]), -(-grid[1] // self.patch[1]))

        pooled = self.down(to_patches(x, grid, self.patch))  # b m d
        pooled = self.norm(self.valley(pooled, patch_grid, patch_angles))
        x = x + from_patches(self.up(pooled), grid, self.patch)
        return self.after(x, angles) if self.after else x


@register
class Hourglass(CodePrior):
    """Hourglass transformer (arXiv 2110.13711) made 2-D, as the prior of arXiv 2206.12351.

    Non-causal, with downsampling over s x s patches and axial rotary embeddings on every head, in units of codes.
    There is no time input and no mask token, since SUNDAE needs neither. The vectors of the condition and of the
    coarser levels are added to the input at every position.

    Deviations: absolute position embeddings are added to the input, unless `absolute_positions` is false. Without them,
    features depend only on offsets between positions. Queries and keys are normalized, unless `qk_norm` is false (as in
    arXiv 2302.05442, with RMSNorm for LayerNorm). Down- and upsampling are linear maps alone: the hourglass paper, and
    the authors' code of the prior, add cross-attention to them (attention resampling). The features of the lower
    resolution are normalized before they are upsampled. A grid that s does not divide ends in partial patches, whose
    missing positions count as zeros and are never attended to.
    """

    kind = "hourglass"
    config_class = HourglassConfig
    method = SUNDAE
    stage_class: ClassVar[type[Stage]] = Stage

    def __init__(self, config: HourglassConfig) -> None:
        super().__init__(config)
        self.rotary = AxialRotary(config.model_width // config.heads)
        self.body = self.stage_class(config, config.depth, config.shorten)
        self.norm = nn.LayerNorm(config.model_width)

    def recomputable(self) -> list[nn.Module]:
        """Returns every attention and feed-forward layer, for gradient checkpointing."""
        return [layer for blocks in self.modules() if isinstance(blocks, Blocks) for layer in blocks.layers]

    def embed(self, codes: Int64[Tensor, "b h w"]) -> Float[Tensor, "b n d"]:
        """Embeds codes; `MaskGIT` overrides it to embed the mask token too."""
        return self.head.embed(codes)

    def features(
        self,
        codes: Int64[Tensor, "b h w"],
        condition: Condition | None = None,
        upper: tuple[Int64[Tensor, "b _y _x"], ...] = (),
    ) -> Float[Tensor, "b n d"]:
        """Computes features; see `CodePrior.features`."""
        _, h, w = codes.shape
        x = self.embed(codes)  # b n d
        if self.config.absolute_positions:
            x = x + sinusoidal_positions(h, w, x.shape[-1], x.device)
        if self.of_upper:
            x = x + rearrange(self.of_upper(upper, h, w), "b h w d -> b (h w) d")
        if (vector := self.condition_vector(condition, len(codes))) is not None:
            x = x + rearrange(vector, "b d -> b 1 d")
        if torch.is_autocast_enabled(x.device.type):  # otherwise every layer and residual sum would cast
            x = x.to(torch.get_autocast_dtype(x.device.type))
        x = self.body(x, (h, w), self.rotary(h, w))  # b n d
        return self.norm(x.float())
