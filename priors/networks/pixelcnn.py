"""The gated PixelCNN: causal convolutions, and optionally causal attention.

Its loss and sampler are in `smalti.priors.methods.autoregressive`. A causal convolution is a linear layer over
the vectors at fixed offsets, so training over the whole grid (`features`) and decoding code by code with
convolution and KV caches (`decode_stepwise`) use the same weights.

Legend: b batch, h w grid, n positions (n = h w), d width, r rows and c columns of a causal kernel.
"""

from collections.abc import Generator
from dataclasses import dataclass
from functools import partial
from typing import cast

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int64
from torch import Tensor, nn

from smalti.core.config import added
from smalti.core.errors import UserError, require_at_least_one
from smalti.core.models import register
from smalti.priors.base import CausalPrior, PriorConfig, require_dropout
from smalti.priors.conditioning import Condition
from smalti.priors.methods.autoregressive import AUTOREGRESSIVE
from smalti.priors.methods.causal_canvas import decode_windows, exceeds_training, window_features
from smalti.priors.networks.causal_attention import CausalAttention
from smalti.priors.networks.positions import require_rotary_heads
from smalti.priors.row_caches import RowCaches


@dataclass(frozen=True)
class PixelCNNConfig(PriorConfig):
    """A gated PixelCNN over one level of codes; the defaults train in minutes on two CPU cores.

    Raises:
        UserError: for values that make no network, naming them.
    """

    model_width: int = 128
    """Channels of a position, in each of the two stacks."""
    layers: int = 8
    """Gated layers. Each extends the receptive field by kernel // 2 on every side."""
    kernel: int = 3
    """Side of the convolutions, odd; only the causal part is computed."""
    attention_every: int = 0
    """Add a causal attention layer after every so many gated layers, which extends the receptive field to all earlier
    positions; 0 for none."""
    heads: int = 4
    """Heads of the attention layers; each has model_width / heads channels, which must be a multiple of 4."""
    dropout: float = added(off=0.0)
    """Dropout on the gated outputs of both stacks in training. Raise it, for example to 0.1, if the held-out loss rises
    while the training loss falls."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_at_least_one(self, "model_width", "layers")
        if self.kernel < 3 or self.kernel % 2 == 0:
            raise UserError(f"kernel must be odd and at least 3, got {self.kernel}")
        if not 0 <= self.attention_every <= self.layers:
            raise UserError(f"attention_every must be from 0 to layers ({self.layers}), got {self.attention_every}")
        if self.attention_every:
            require_rotary_heads(self.model_width, self.heads)
        require_dropout(self.dropout)


def gate(x: Float[Tensor, "*n d2"]) -> Float[Tensor, "*n d"]:
    """Returns tanh of the first half times the sigmoid of the second half (Eq. 2)."""
    value, opening = x.chunk(2, dim=-1)
    return value.tanh() * opening.sigmoid()


def windows(x: Float[Tensor, "b y x d"], rows: int, columns: int) -> Float[Tensor, "b h w rcd"]:
    """Concatenates the vectors in each window of `rows` x `columns` that lies within the grid.

    A linear layer over the result is a convolution without padding.
    """
    h, w = x.shape[1] - rows + 1, x.shape[2] - columns + 1
    return torch.cat([x[:, r : r + h, c : c + w] for r in range(rows) for c in range(columns)], dim=-1)


class GatedLayer(nn.Module):
    """One layer of both stacks: over the whole grid or, with the same weights, row by row and position by position.

    Args:
        width: channels of a position, in each stack.
        kernel: side of the convolutions, odd.
        conditional: whether it has weights for a conditioning vector.
        heads: heads of the attention that follows; 0 for none.
        dropout: probability of zeroing a gated output in training.
    """

    def __init__(self, width: int, kernel: int, conditional: bool, heads: int, dropout: float) -> None:
        super().__init__()
        self.kernel, self.reach = kernel, kernel // 2 + 1  # reach: rows or columns of the causal part, its own included
        self.vertical = nn.Linear(self.reach * kernel * width, 2 * width)
        self.horizontal = nn.Linear(self.reach * width, 2 * width)
        self.down = nn.Linear(2 * width, 2 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.condition = nn.Linear(width, 4 * width, bias=False) if conditional else None
        self.attention = CausalAttention(width, heads) if heads else None
        self.dropout = nn.Dropout(dropout)

    def forward(
        self,
        vertical: Float[Tensor, "b h w d"],
        horizontal: Float[Tensor, "b h w d"],
        condition: Float[Tensor, "b _h _w d"] | None,
    ) -> tuple[Float[Tensor, "b h w d"], Float[Tensor, "b h w d"]]:
        """Applies the layer to both stacks over the whole grid.

        `condition` has the conditioning vector of each position, or a single one for all positions.
        """
        above = F.pad(vertical, (0, 0, 0, 0, self.reach - 1, 0))
        vertical, from_vertical = self.vertical_step(above, condition)
        left = F.pad(horizontal, (0, 0, self.reach - 1, 0))
        gates = F.linear(windows(left, 1, self.reach), self.horizontal.weight) + from_vertical
        horizontal = horizontal + self.out(self.dropout(gate(gates)))
        return vertical, self.attention(horizontal) if self.attention else horizontal

    def vertical_step(
        self, rows: Float[Tensor, "b y w d"], condition: Float[Tensor, "b _h _w d"] | None
    ) -> tuple[Float[Tensor, "b h w d"], Float[Tensor, "b h w d2"]]:
        """Computes rows of the vertical stack, and their contribution to the horizontal stack's gates.

        The contribution includes the conditioning and the bias.

        Args:
            rows: input of the vertical stack, with `self.reach - 1` more rows above the first.
            condition: the conditioning vectors of the rows without these.
        """
        side = self.kernel // 2
        gates = self.vertical(windows(F.pad(rows, (0, 0, side, side)), self.reach, self.kernel))
        from_vertical = F.linear(gates, self.down.weight, self.horizontal.bias)
        if self.condition is not None:
            to_vertical, to_horizontal = self.condition(condition).chunk(2, dim=-1)
            gates, from_vertical = gates + to_vertical, from_vertical + to_horizontal
        return rows[:, self.reach - 1 :] + self.dropout(gate(gates)), from_vertical

    def horizontal_step(
        self, x: Float[Tensor, "b d"], left: Float[Tensor, "b cd"], from_vertical: Float[Tensor, "b d2"]
    ) -> Float[Tensor, "b d"]:
        """Computes one position of the horizontal stack, without attention.

        Args:
            x: input at the position.
            left: inputs at the positions that the convolution covers, `x` last.
            from_vertical: contribution of the vertical stack (see `vertical_step`).
        """
        gates = torch.addmm(from_vertical, left, self.horizontal.weight.T)
        return torch.addmm(x, gate(gates), self.out.weight.T)


@register
class PixelCNN(CausalPrior):
    """Gated PixelCNN (arXiv 1606.05328, Fig. 2), optionally with the attention of arXiv 1712.09763.

    A vertical stack covers all rows above a position, a horizontal stack the positions left of it in its row. The
    vertical stack feeds the horizontal one, so there is no blind spot. Condition and coarser levels enter every gate
    (Eq. 4, and the map of Eq. 5). The vertical stack's input is shifted down by one row, the horizontal stack's by one
    position in raster order (so that attention reaches the last column of the row above). No layer then needs a mask.
    Convolutions read grids of any size; with attention, larger ones are read through windows, as it has only learned
    the offsets within the trained size.

    Deviations: the vertical stack has residual connections too, without which deep stacks start with vanishing
    signals; a LayerNorm ends the network instead of two layers, as the head's initial weights expect.
    """

    kind = "pixelcnn"
    config_class = PixelCNNConfig
    method = AUTOREGRESSIVE

    def __init__(self, config: PixelCNNConfig) -> None:
        super().__init__(config)
        d = config.model_width
        conditional = bool(config.classes or config.condition_width or config.upper_radices)
        every = config.attention_every
        attentive = range(every, config.layers + 1, every) if every else ()
        self.layers = nn.ModuleList(
            GatedLayer(d, config.kernel, conditional, config.heads if number in attentive else 0, config.dropout)
            for number in range(1, config.layers + 1)
        )
        self.norm = nn.LayerNorm(d)

    def recomputable(self) -> list[nn.Module]:
        """Returns every layer, for gradient checkpointing."""
        return [*self.layers]

    def features(
        self,
        codes: Int64[Tensor, "b h w"],
        condition: Condition | None = None,
        upper: tuple[Int64[Tensor, "b _y _x"], ...] = (),
    ) -> Float[Tensor, "b n d"]:
        """Computes features; see `CodePrior.features`. Those of a position depend only on the codes before it."""
        b, h, w = codes.shape
        if self.config.attention_every and exceeds_training(self, h, w):
            return window_features(self, codes, condition, upper)
        x = self.head.embed(codes)  # b n d
        vectors = self.condition_vectors(b, h, w, condition, upper)  # b h w d, b 1 1 d or None
        vertical, horizontal = (
            rearrange(F.pad(x[:, :-shift], (0, 0, shift, 0)), "b (h w) d -> b h w d", h=h) for shift in (w, 1)
        )
        for layer in self.layers:
            vertical, horizontal = layer(vertical, horizontal, vectors)
        return self.norm(rearrange(horizontal, "b h w d -> b (h w) d").float())

    def decode_stepwise(
        self,
        b: int,
        h: int,
        w: int,
        condition: Condition | None = None,
        upper: tuple[Int64[Tensor, "b _y _x"], ...] = (),
        caches: RowCaches | None = None,
    ) -> Generator[Float[Tensor, "b 1 d"], Int64[Tensor, "b 1"], None]:
        """Decodes code by code with convolution and KV caches; see `CausalPrior.decode_stepwise`.

        A row of the vertical stack is computed once, when the row above is complete, together with its contribution
        to the horizontal stack. A position then costs two matrix products per layer.
        """
        caches = caches or RowCaches()
        if self.config.attention_every and exceeds_training(self, h, w):
            yield from decode_windows(self, b, h, w, condition, upper, caches)
            return
        vectors = self.condition_vectors(b, h, w, condition, upper)
        layers, d, c = cast(list[GatedLayer], list(self.layers)), self.config.model_width, self.config.kernel // 2 + 1
        zeros = partial(caches.zeros, self.norm.weight)
        rows_above = [zeros(b, c - 1, w, d) for _ in layers]  # convolution cache: those that each layer reads
        row_inputs = [zeros(b, (w + c - 1) * d) for _ in layers]  # convolution cache: each layer's inputs in a row
        contributions = [zeros(b, w, 2 * d) for _ in layers]  # of the vertical stack to the gates in a row
        attends = [layer.attention.kv_cached(caches, b, h, w) if layer.attention else None for layer in layers]
        embedded, x = zeros(b, w, d), self.norm.weight.new_zeros(b, d)
        for y in range(h):
            row_vectors = vectors if vectors is None or vectors.shape[1] == 1 else vectors[:, y : y + 1]
            vertical = embedded[:, None]
            for layer, above, from_vertical in zip(layers, rows_above, contributions, strict=True):
                rows = torch.cat([above, vertical], dim=1)
                above.copy_(rows[:, 1:])
                vertical, from_vertical[:, None] = layer.vertical_step(rows, row_vectors)
            for column in range(w):
                for layer, inputs, from_vertical, attend in zip(
                    layers, row_inputs, contributions, attends, strict=True
                ):
                    inputs[:, (column + c - 1) * d : (column + c) * d] = x
                    x = layer.horizontal_step(x, inputs[:, column * d : (column + c) * d], from_vertical[:, column])
                    if attend:
                        x = attend(x, y * w + column)
                codes = yield self.norm(x)[:, None]
                x = self.head.embed(codes)[:, 0]
                embedded[:, column] = x
