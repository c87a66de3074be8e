"""The causal transformer: predicts each code from all codes before it in raster order.

Its loss and sampler are in `smalti.priors.methods.autoregressive`. Training computes all positions at once
(`features`); decoding code by code stores the keys and values of earlier positions (KV cache, `decode_stepwise`).

Legend: b batch, h w grid, n positions (n = h w), d width.
"""

from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int64
from torch import Tensor, nn

from smalti.core.config import added
from smalti.core.errors import require_at_least_one
from smalti.core.models import register
from smalti.priors.base import CausalPrior, PriorConfig, require_dropout
from smalti.priors.conditioning import Condition
from smalti.priors.methods.autoregressive import AUTOREGRESSIVE
from smalti.priors.methods.causal_canvas import decode_windows, exceeds_training, window_features
from smalti.priors.networks.causal_attention import CausalAttention
from smalti.priors.networks.positions import require_rotary_heads, sinusoidal_positions
from smalti.priors.row_caches import RowCaches


@dataclass(frozen=True)
class TransformerConfig(PriorConfig):
    """A causal transformer over one level of codes; the defaults have the size of the default hourglass.

    Raises:
        UserError: for values that make no network, naming them.
    """

    model_width: int = 192
    """Channels of a position."""
    heads: int = 6
    """Attention heads; each has model_width / heads channels, which must be a multiple of 4."""
    layers: int = 8
    """Transformer blocks, each with attention and a feed-forward layer."""
    feedforward_mult: int = 4
    """Hidden width of the feed-forward layers, as a multiple of model_width."""
    dropout: float = 0.0
    """Dropout on the output of every attention and feed-forward layer in training. Raise it, for example to 0.1, if the
    held-out loss rises while the training loss falls."""
    absolute_positions: bool = added(off=False, default=True)
    """Absolute position embeddings: sinusoids of row and column, added to the input. Rotary embeddings encode only the
    offset between two positions; with both, a prior of aligned images such as portraits learns faster."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_rotary_heads(self.model_width, self.heads)
        require_at_least_one(self, "layers", "feedforward_mult")
        require_dropout(self.dropout)


class Block(nn.Module):
    """A pre-norm transformer block: causal self-attention with QK-norm, then a feed-forward layer.

    Args:
        config: of the transformer.
    """

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        width, hidden = config.model_width, config.feedforward_mult * config.model_width
        self.attention = CausalAttention(width, config.heads, qk_norm=True, dropout=config.dropout)
        self.norm = nn.LayerNorm(width)
        self.hidden = nn.Linear(width, hidden)
        self.out = nn.Linear(hidden, width)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Float[Tensor, "b h w d"]) -> Float[Tensor, "b h w d"]:
        """Applies the block to the whole grid."""
        return self.feedforward(self.attention(x))

    def feedforward(self, x: Float[Tensor, "*n d"]) -> Float[Tensor, "*n d"]:
        """Applies the feed-forward layer, with its residual connection, to each position."""
        return x + self.dropout(self.out(F.gelu(self.hidden(self.norm(x)))))

    def kv_cached(self, caches: RowCaches, b: int, h: int, w: int) -> Callable[[Tensor, int], Tensor]:
        """Returns `forward` for one position at a time; see `CausalAttention.kv_cached`."""
        attend = self.attention.kv_cached(caches, b, h, w)
        return lambda x, position: self.feedforward(attend(x, position))


@register
class Transformer(CausalPrior):
    """Decoder-only transformer over codes in raster order, as in VQ-GAN (arXiv 2012.09841) and LlamaGen (2406.06525).

    The input at a position is the embedding of the code before it, at the first position a learned vector. The vectors
    of the condition, of the coarser levels and of the absolute position are added at the position whose code is
    predicted. Every head has axial rotary embeddings too.

    Grids larger than those in training are read through windows of the trained size
    (`smalti.priors.methods.causal_canvas`), since attention has learned no larger offsets.

    Deviations: 2-D rotary embeddings, and sinusoidal instead of learned absolute ones, so that smaller grids work too;
    QK-norm; one factorized head, so the digits of a code are predicted one after the other from the same features.
    """

    kind = "transformer"
    config_class = TransformerConfig
    method = AUTOREGRESSIVE

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__(config)
        self.start = nn.Parameter(torch.randn(config.model_width))
        self.layers = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.model_width)

    def recomputable(self) -> list[nn.Module]:
        """Returns every block, for gradient checkpointing."""
        return [*self.layers]

    def features(
        self,
        codes: Int64[Tensor, "b h w"],
        condition: Condition | None = None,
        upper: tuple[Int64[Tensor, "b _y _x"], ...] = (),
    ) -> Float[Tensor, "b n d"]:
        """Computes features; see `CodePrior.features`. Those of a position depend only on the codes before it."""
        b, h, w = codes.shape
        if exceeds_training(self, h, w):
            return window_features(self, codes, condition, upper)
        start = self.start.expand(b, 1, -1)
        x = torch.cat([start, self.head.embed(codes)[:, :-1]], dim=1)
        x = rearrange(x, "b (h w) d -> b h w d", h=h)
        vectors = self.condition_vectors(b, h, w, condition, upper)
        if vectors is not None:
            x = x + vectors
        if torch.is_autocast_enabled(x.device.type):  # otherwise every layer and residual sum would cast
            x = x.to(torch.get_autocast_dtype(x.device.type))
        for layer in self.layers:
            x = layer(x)
        return self.norm(rearrange(x, "b h w d -> b (h w) d").float())

    def decode_stepwise(
        self,
        b: int,
        h: int,
        w: int,
        condition: Condition | None = None,
        upper: tuple[Int64[Tensor, "b _y _x"], ...] = (),
        caches: RowCaches | None = None,
    ) -> Generator[Float[Tensor, "b 1 d"], Int64[Tensor, "b 1"], None]:
        """Decodes code by code with a KV cache; see `CausalPrior.decode_stepwise`."""
        caches = caches or RowCaches()
        if exceeds_training(self, h, w):
            yield from decode_windows(self, b, h, w, condition, upper, caches)
            return
        vectors = self.condition_vectors(b, h, w, condition, upper)
        if vectors is not None:
            vectors = rearrange(vectors.expand(b, h, w, -1), "b h w d -> b (h w) d")
        layers = [layer.kv_cached(caches, b, h, w) for layer in cast(list[Block], list(self.layers))]
        x = self.start.expand(b, -1)
        for position in range(h * w):
            if vectors is not None:
                x = x + vectors[:, position]
            for layer in layers:
                x = layer(x, position)
            codes = yield self.norm(x)[:, None]
            x = self.head.embed(codes)[:, 0]

    def position_vectors(self, h: int, w: int) -> Float[Tensor, "1 h w d"] | None:
        """See `CausalPrior.position_vectors`."""
        if not self.config.absolute_positions:
            return None
        positions = sinusoidal_positions(h, w, self.start.shape[-1], self.start.device)
        return rearrange(positions, "(h w) d -> 1 h w d", h=h)
