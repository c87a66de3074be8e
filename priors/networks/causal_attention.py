"""Causal self-attention over a grid in raster order: of all positions at once, or position by position with a KV cache.

Legend: b batch, h w grid, n positions (n = h w), d width, m heads, e width of a head.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from rotary_embedding_torch import apply_rotary_emb
from torch import Tensor, nn

from smalti.priors.networks.positions import AxialRotary
from smalti.priors.row_caches import RowCaches


class CausalAttention(nn.Module):
    """Causal multi-head self-attention with a residual connection: each position attends to itself and those before it.

    Positions are encoded by axial rotary embeddings, as in the hourglass.

    Args:
        width: channels of a position, a multiple of 4 x heads.
        heads: attention heads.
        qk_norm: whether a LayerNorm normalizes the queries and keys of each head (QK-norm, as in arXiv 2302.05442), so
            that their scale cannot grow the attention logits.
        dropout: probability of zeroing an output in training.
    """

    def __init__(self, width: int, heads: int, *, qk_norm: bool = False, dropout: float = 0.0) -> None:
        super().__init__()
        self.heads, self.head_width = heads, width // heads
        self.norm = nn.LayerNorm(width)
        self.asked = nn.Linear(width, 3 * width, bias=False)  # queries, keys and values
        self.out = nn.Linear(width, width, bias=False)
        self.rotary = AxialRotary(self.head_width)
        self.qk_norms = nn.ModuleList(nn.LayerNorm(self.head_width, bias=False) for _ in range(2 if qk_norm else 0))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Float[Tensor, "b h w d"]) -> Float[Tensor, "b h w d"]:
        """Attends over the whole grid at once, as in training."""
        _, h, w, _ = x.shape
        queries, keys, values = self._project(rearrange(x, "b h w d -> b (h w) d"), self.rotary(h, w)[0])
        attended = F.scaled_dot_product_attention(queries, keys, values, is_causal=True)
        return x + self.dropout(self.out(rearrange(attended, "b m (h w) e -> b h w (m e)", h=h)))

    def kv_cached(self, caches: RowCaches, b: int, h: int, w: int) -> Callable[[Tensor, int], Tensor]:
        """Returns `forward` with a KV cache: a function (x `(b, d)`, position) -> `(b, d)`.

        It must be called for the positions in order. It stores the keys and values of the earlier ones in `caches`.
        """
        angles = self.rotary(h, w)[0]
        keys, values = (caches.zeros(self.out.weight, b, self.heads, h * w, self.head_width) for _ in range(2))

        def attend(x: Tensor, position: int) -> Tensor:
            now = slice(position, position + 1)
            query, keys[:, :, now], values[:, :, now] = self._project(x[:, None], angles[now])
            past = slice(position + 1)  # the position itself included
            attended = F.scaled_dot_product_attention(query, keys[:, :, past], values[:, :, past])
            return x + self.out(rearrange(attended, "b m 1 e -> b (m e)"))

        return attend

    def _project(self, x: Tensor, angles: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Returns queries, keys and values `(b, m, n, e)`; the first two are normalized and rotated by `angles`."""
        parts = rearrange(self.asked(self.norm(x)), "b n (p m e) -> p b m n e", p=3, m=self.heads)
        unrotated = parts[:2].flatten(0, 1)
        if self.qk_norms:
            unrotated = torch.cat([norm(part) for norm, part in zip(self.qk_norms, parts[:2], strict=True)])
        rotated = apply_rotary_emb(angles, unrotated)
        queries, keys = rotated.unflatten(0, (2, len(x)))
        return queries, keys, parts[2].to(rotated.dtype)
