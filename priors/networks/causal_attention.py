"""Causal attention over a grid in raster order: over the whole of it, or a position at a time.

Legend: b batch, h w grid, n positions (n = h w), d width, m heads, e width of a head.
"""

from collections.abc import Callable

import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from rotary_embedding_torch import apply_rotary_emb
from torch import Tensor, nn

from smalti.priors.networks.rotary import AxialRotary


class CausalAttention(nn.Module):
    """Each position attends to itself and to all before it; what they say is added to what it is.

    Positions enter through axial rotary frequencies, as in the hourglass.

    Args:
        width: numbers at each position, a multiple of 4 x heads.
        heads: of attention.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.head_width = heads, width // heads
        self.norm = nn.LayerNorm(width)
        self.asked = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.rotary = AxialRotary(self.head_width)

    def forward(self, x: Float[Tensor, "b h w d"]) -> Float[Tensor, "b h w d"]:
        """The whole grid at once."""
        _, h, w, _ = x.shape
        queries, keys, values = self._asked(rearrange(x, "b h w d -> b (h w) d"), self.rotary(h, w)[0])
        found = F.scaled_dot_product_attention(queries, keys, values, is_causal=True)
        return x + self.out(rearrange(found, "b m (h w) e -> b h w (m e)", h=h))

    def kv_cached(self, b: int, h: int, w: int) -> Callable[[Tensor, int], Tensor]:
        """A function (x `(b, d)`, position) -> `(b, d)`: the same, for positions given one after the other; it keeps
        the keys and values of those before."""
        angles = self.rotary(h, w)[0]
        keys, values = self.out.weight.new_zeros(2, b, self.heads, h * w, self.head_width)

        def attend(x: Tensor, position: int) -> Tensor:
            here = slice(position, position + 1)
            query, keys[:, :, here], values[:, :, here] = self._asked(x[:, None], angles[here])
            known = slice(position + 1)
            found = F.scaled_dot_product_attention(query, keys[:, :, known], values[:, :, known])
            return x + self.out(rearrange(found, "b m 1 e -> b (m e)"))

        return attend

    def _asked(self, x: Tensor, angles: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of positions, `(b, m, n, e)`, the first two turned."""
        parts = rearrange(self.asked(self.norm(x)), "b n (p m e) -> p b m n e", p=3, m=self.heads)
        turned = apply_rotary_emb(angles, parts[:2].flatten(0, 1))
        queries, keys = turned.unflatten(0, (2, len(x)))
        return queries, keys, parts[2].to(turned.dtype)
