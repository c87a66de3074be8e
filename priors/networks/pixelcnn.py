"""The gated PixelCNN: a body in which each position sees only those before it. Objectives and samplers are elsewhere.

A causal convolution is written as a linear layer over what lies at fixed offsets, so that drawing codes one by one
(`decode_stepwise`) runs the very weights that training runs over the whole grid (`features`).

Legend: b batch, h w grid, n positions (n = h w), d width, r rows and c columns of a kernel, l layers.
"""

from collections.abc import Generator
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int64
from torch import Tensor, nn

from smalti.core.errors import UserError
from smalti.core.models import register
from smalti.priors.base import CausalPrior, PriorConfig
from smalti.priors.methods.autoregressive import AUTOREGRESSIVE
from smalti.priors.networks.causal_attention import CausalAttention


@dataclass(frozen=True)
class PixelCNNConfig(PriorConfig):
    """A gated PixelCNN over one level of codes, small enough by default to learn in minutes on two cores.

    Raises:
        UserError: for values that make no network, naming them.
    """

    model_width: int = 128
    """Numbers at each position, in either stack."""
    layers: int = 8
    """Gated layers; each lets a position see kernel // 2 further on every side."""
    kernel: int = 3
    """Side of the convolutions whose causal part each layer computes, odd."""
    attention_every: int = 0
    """A layer of causal attention follows each so many gated ones, so that a position sees all before it; 0 for
    none."""
    heads: int = 4
    """Heads of such attention; each has model_width / heads numbers, a multiple of 4."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.model_width < 1 or self.layers < 1:
            raise UserError(f"model_width and layers must be at least 1, got {self.model_width} and {self.layers}")
        if self.kernel < 3 or self.kernel % 2 == 0:
            raise UserError(f"kernel must be odd and at least 3, got {self.kernel}")
        if not 0 <= self.attention_every <= self.layers:
            raise UserError(f"attention_every must be from 0 to layers ({self.layers}), got {self.attention_every}")
        if self.attention_every and (self.heads < 1 or self.model_width % (4 * self.heads)):
            raise UserError(
                f"with attention model_width must be a multiple of 4 x heads (pairs of numbers turn, on two axes), "
                f"got {self.model_width} for {self.heads} heads"
            )


@register
class PixelCNN(CausalPrior):
    """Gated PixelCNN (arXiv 1606.05328, Fig. 2), with the attention of arXiv 1712.09763 on request.

    A vertical stack sees all rows above, a horizontal one what is left in the row, and is told by the vertical one: so
    there is no blind spot. Classes and upper levels enter every gate (Eq. 4). The one reads codes that are moved on
    by a row, the other by a position (from the end of a row to the start of the next, or else attention would not find
    the last column); then every layer is the same, and none must hide its middle.

    Deviations: the vertical stack has residual connections as well, without which deep ones begin with next to nothing
    at their end; a LayerNorm ends the body in place of two layers, as the head's weights expect.
    """

    kind = "pixelcnn"
    config_class = PixelCNNConfig
    method = AUTOREGRESSIVE

    def __init__(self, config: PixelCNNConfig) -> None:
        super().__init__(config)
        d = config.model_width
        conditional = bool(config.classes or config.upper_radices)
        every = config.attention_every
        attentive = range(every, config.layers + 1, every) if every else ()
        self.layers = nn.ModuleList(
            GatedLayer(d, config.kernel, conditional, config.heads if number in attentive else 0)
            for number in range(1, config.layers + 1)
        )
        self.norm = nn.LayerNorm(d)

    def recomputable(self) -> list[nn.Module]:
        """Every layer."""
        return [*self.layers]

    def features(
        self,
        codes: Int64[Tensor, "b h w"],
        labels: Int64[Tensor, " b"] | None = None,
        upper: tuple[Int64[Tensor, "b _y _x"], ...] = (),
    ) -> Float[Tensor, "b n d"]:
        """See `CodePrior.features`; those of a position hang on the codes before it only."""
        b, h, w = codes.shape
        x = self.head.embed(codes)  # b n d
        condition = self._condition(b, h, w, labels, upper)  # b h w d, b 1 1 d or None
        vertical, horizontal = (
            rearrange(F.pad(x[:, :-moved], (0, 0, moved, 0)), "b (h w) d -> b h w d", h=h) for moved in (w, 1)
        )
        for layer in self.layers:
            vertical, horizontal = layer(vertical, horizontal, condition)
        return self.norm(rearrange(horizontal, "b h w d -> b (h w) d").float())

    def decode_stepwise(
        self,
        b: int,
        h: int,
        w: int,
        labels: Int64[Tensor, " b"] | None = None,
        upper: tuple[Int64[Tensor, "b _y _x"], ...] = (),
    ) -> Generator[Float[Tensor, "b 1 d"], Int64[Tensor, "b 1"], None]:
        """See `CausalPrior.decode_stepwise`.

        A row of the vertical stack is computed once, when the row above is whole, and with it all that the horizontal
        stack will hear of it. A position then costs two products a layer, with what its layers read at the positions
        left of it.
        """
        condition = self._condition(b, h, w, labels, upper)
        layers, d, c = cast(list[GatedLayer], list(self.layers)), self.config.model_width, self.config.kernel // 2 + 1
        new = self.norm.weight.new_zeros
        memories = [new(b, c - 1, w, d) for _ in layers]  # the rows above that each layer reads
        recalls = [layer.attention.kv_cached(b, h, w) if layer.attention else None for layer in layers]
        embedded, x = new(b, w, d), new(b, d)
        for y in range(h):
            here = condition if condition is None or condition.shape[1] == 1 else condition[:, y : y + 1]
            vertical, heard = embedded[:, None], []
            for number, layer in enumerate(layers):
                rows = torch.cat([memories[number], vertical], dim=1)
                memories[number] = rows[:, 1:]
                vertical, told = layer.downwards(rows, here)
                heard.append(rearrange(told, "b 1 w d -> w b d").contiguous())
            embedded = new(b, w, d)
            read = [new(b, (w + c - 1) * d) for _ in layers]  # what each layer read in this row, after its padding
            for column in range(w):
                for layer, seen, told, kv_cached in zip(layers, read, heard, recalls, strict=True):
                    seen[:, (column + c - 1) * d : (column + c) * d] = x
                    x = layer.onwards(x, seen[:, column * d : (column + c) * d], told[column])
                    if kv_cached:
                        x = kv_cached(x, y * w + column)
                codes = yield self.norm(x)[:, None]
                x = self.head.embed(codes)[:, 0]
                embedded[:, column] = x

    def _condition(self, b: int, h: int, w: int, labels: Tensor | None, upper: tuple[Tensor, ...]) -> Tensor | None:
        """What classes and upper levels say to every position; None without either."""
        said = self.of_upper(upper, h, w) if self.of_upper else None
        if self.of_class:
            of_class = rearrange(self.of_class(labels, b), "b d -> b 1 1 d")
            said = of_class if said is None else said + of_class
        return said


def gate(x: Float[Tensor, "*n d2"]) -> Float[Tensor, "*n d"]:
    """tanh of one half, by the sigmoid of the other (Eq. 2)."""
    value, opening = x.chunk(2, dim=-1)
    return value.tanh() * opening.sigmoid()


def windows(x: Float[Tensor, "b y x d"], rows: int, columns: int) -> Float[Tensor, "b h w rcd"]:
    """Side by side, all that lies in each window of `rows` by `columns` that fits into a grid."""
    h, w = x.shape[1] - rows + 1, x.shape[2] - columns + 1
    return torch.cat([x[:, r : r + h, c : c + w] for r in range(rows) for c in range(columns)], dim=-1)


class GatedLayer(nn.Module):
    """One layer of both stacks, over the whole grid or, with the same weights, a row and a position at a time.

    Args:
        width: numbers at each position, in either stack.
        kernel: side of the convolutions.
        conditional: whether it is told a condition.
        heads: of the attention that follows; 0 for none.
    """

    def __init__(self, width: int, kernel: int, conditional: bool, heads: int) -> None:
        super().__init__()
        self.kernel, self.reach = kernel, kernel // 2 + 1  # rows and columns of the causal part, the position's own in
        self.vertical = nn.Linear(self.reach * kernel * width, 2 * width)
        self.horizontal = nn.Linear(self.reach * width, 2 * width)
        self.down = nn.Linear(2 * width, 2 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.condition = nn.Linear(width, 4 * width, bias=False) if conditional else None
        self.attention = CausalAttention(width, heads) if heads else None

    def forward(
        self,
        vertical: Float[Tensor, "b h w d"],
        horizontal: Float[Tensor, "b h w d"],
        condition: Float[Tensor, "b _h _w d"] | None,  # one position alone is every position's
    ) -> tuple[Float[Tensor, "b h w d"], Float[Tensor, "b h w d"]]:
        """Both stacks, a layer on."""
        above = F.pad(vertical, (0, 0, 0, 0, self.reach - 1, 0))
        vertical, told = self.downwards(above, condition)
        left = F.pad(horizontal, (0, 0, self.reach - 1, 0))
        gates = F.linear(windows(left, 1, self.reach), self.horizontal.weight) + told
        horizontal = horizontal + self.out(gate(gates))
        return vertical, self.attention(horizontal) if self.attention else horizontal

    def downwards(
        self, rows: Float[Tensor, "b y w d"], condition: Float[Tensor, "b _h _w d"] | None
    ) -> tuple[Float[Tensor, "b h w d"], Float[Tensor, "b h w d2"]]:
        """The vertical stack, and all that it, condition and bias tell the gates of the horizontal one.

        Args:
            rows: of the vertical stack, the `self.reach - 1` above the first included.
            condition: of the rows without these.
        """
        side = self.kernel // 2
        seen = self.vertical(windows(F.pad(rows, (0, 0, side, side)), self.reach, self.kernel))
        told = F.linear(seen, self.down.weight, self.horizontal.bias)
        if self.condition is not None:
            to_vertical, to_horizontal = self.condition(condition).chunk(2, dim=-1)
            seen, told = seen + to_vertical, told + to_horizontal
        return rows[:, self.reach - 1 :] + gate(seen), told

    def onwards(
        self, x: Float[Tensor, "b d"], left: Float[Tensor, "b cd"], told: Float[Tensor, "b d2"]
    ) -> Float[Tensor, "b d"]:
        """The horizontal stack at one position, without attention: what it is there, what the layer reads there and
        left of it, and what it is told."""
        gates = torch.addmm(told, left, self.horizontal.weight.T)
        return torch.addmm(x, gate(gates), self.out.weight.T)
