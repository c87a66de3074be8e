"""Position embeddings of grids: axial rotary embeddings (RoPE) for attention, and sinusoidal ones for the input.

Legend: h w grid, n positions (n = h w), a rotated channels of a head, d width.
"""

import torch
from einops import rearrange, repeat
from jaxtyping import Float
from rotary_embedding_torch import RotaryEmbedding
from torch import Tensor, nn

from smalti.core.errors import UserError

ROTARY_THETA = 100
"""Base of the rotary frequencies. Wavelengths run from 6 to some 400 positions, the range of code grids. With the
10 000 of language models most channels of a head would hardly rotate."""


def require_rotary_heads(model_width: int, heads: int) -> None:
    """Refuses a width that `AxialRotary` cannot divide over the heads.

    Raises:
        UserError: if `model_width` is no positive multiple of 4 x heads.
    """
    if heads < 1 or model_width < 1 or model_width % (4 * heads):
        raise UserError(
            f"model_width must be a positive multiple of 4 x heads (rotary embeddings rotate pairs of channels on "
            f"two axes), got {model_width} for {heads} heads"
        )


class AxialRotary(nn.Module):
    """Rotary embeddings on two axes: half of a head's channels rotate with the row, half with the column.

    Attention depends on offsets only, so grids of any size work. The unit is one code.

    Args:
        head_width: channels of a head, a multiple of 4.
    """

    def __init__(self, head_width: int) -> None:
        super().__init__()
        axis_width = head_width // 2
        # computed here, since the library divides by zero for an axis of two channels
        frequencies = 1.0 / ROTARY_THETA ** (torch.arange(0, axis_width, 2).float() / axis_width)
        # without the library's cache, which ignores which positions are asked for
        self.rotary = RotaryEmbedding(
            head_width, custom_freqs=frequencies, cache_if_possible=False, cache_max_seq_len=1
        )

    def forward(self, h: int, w: int) -> Float[Tensor, "1 n a"]:
        """Returns the rotation angles of each position of a grid, in raster order."""
        device = self.rotary.freqs.device
        row, column = (self.rotary(torch.arange(size, device=device)) for size in (h, w))
        return torch.cat([repeat(row, "h a -> 1 (h w) a", w=w), repeat(column, "w a -> 1 (h w) a", h=h)], dim=-1)


def sinusoidal_positions(h: int, w: int, width: int, device: torch.device) -> Float[Tensor, "n d"]:
    """Returns fixed embeddings of the positions of a grid, in raster order, to add to the input of a network.

    A quarter of the channels each are sines and cosines of the row, and of the column (the sinusoidal encodings of
    arXiv 1706.03762, section 3.5, on two axes), with the wavelengths of `AxialRotary` and the variance of the
    embeddings of codes, 1. Unlike rotary embeddings, which encode offsets, they encode the position itself.

    Args:
        h: rows of the grid.
        w: its columns.
        width: channels of a position, a multiple of 4.
        device: where to compute them.
    """
    frequencies = ROTARY_THETA ** -(torch.arange(width // 4, device=device) / (width // 4))
    row, column = (torch.arange(size, device=device)[:, None] * frequencies for size in (h, w))
    angles = torch.stack([repeat(row, "h f -> h w f", w=w), repeat(column, "w f -> h w f", h=h)], dim=2)
    embedded = rearrange([angles.sin(), angles.cos()], "functions h w axes f -> (h w) (axes functions f)")
    return embedded * 2**0.5
