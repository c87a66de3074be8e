"""Axial rotary frequencies: how attention over a grid knows where its positions lie. What attends is elsewhere.

Legend: h w grid, n positions (n = h w), a rotated numbers of a head.
"""

import torch
from einops import repeat
from jaxtyping import Float
from rotary_embedding_torch import RotaryEmbedding
from torch import Tensor, nn

ROTARY_THETA = 100
"""Wavelengths run from 6 to some 400 positions, the range of code grids; language models' 10 000 would leave most of a
head unturned."""


class AxialRotary(nn.Module):
    """Rotations of the numbers of one head, half of them by the row, half by the column, in units of codes.

    Attention sees differences only, so any grid runs.

    Args:
        head_width: numbers of a head, a multiple of 4.
    """

    def __init__(self, head_width: int) -> None:
        super().__init__()
        # without its cache, which forgets the positions it was asked for
        self.rotary = RotaryEmbedding(head_width // 2, theta=ROTARY_THETA, cache_if_possible=False, cache_max_seq_len=1)

    def forward(self, h: int, w: int) -> Float[Tensor, "1 n a"]:
        """The rotation of each position of a grid, in raster order."""
        device = self.rotary.freqs.device
        row, column = (self.rotary(torch.arange(size, device=device)) for size in (h, w))
        return torch.cat([repeat(row, "h a -> 1 (h w) a", w=w), repeat(column, "w a -> 1 (h w) a", h=h)], dim=-1)
