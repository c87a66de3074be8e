"""RealNVP on grids of real numbers: a bijection with an exact inverse and log-determinant, and the density it makes.

In the spine, as both wings stand on it: selfVAE trains one within its bound, the prior `realnvp` one on a latent set.

Legend: b batch, c channels, h w grid.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn


class Coupling(nn.Module):
    """One affine coupling (selfVAE, Section 2.2): of the numbers, one half decides how the other is scaled and moved.

    The halves are every second channel, or the fields of a chessboard (arXiv 1605.08803, Section 3.4), which needs no
    fixed size. The logarithm of the scale is bounded by a learned number for each channel, as there.

    Args:
        channels: numbers at each position.
        width: of the network.
        by_channel: halves of channels; else of positions.
        odd: which half decides.
    """

    def __init__(self, channels: int, width: int, *, by_channel: bool, odd: bool) -> None:
        super().__init__()
        self.by_channel, self.odd = by_channel, odd
        last = nn.Conv2d(width, 2 * channels, 3, padding=1)
        for parameter in last.parameters():  # the start is the identity
            nn.init.zeros_(parameter)
        self.net = nn.Sequential(
            nn.Conv2d(channels, width, 3, padding=1), nn.ELU(), nn.Conv2d(width, width, 1), nn.ELU(), last
        )
        self.bound = nn.Parameter(torch.ones(channels, 1, 1))

    def forward(self, v: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """f_i: exp(s(v_a)) v_b + t(v_a), and v_a as it is."""
        s, t = self._scale_and_shift(v)
        return v * s.exp() + t

    def inverse(self, z: Float[Tensor, "b c h w"]) -> tuple[Float[Tensor, "b c h w"], Float[Tensor, " b"]]:
        """The inverse of f_i, and the logarithm of its Jacobian's determinant: -sum s (Eq. 5 has the sign of f_i's)."""
        s, t = self._scale_and_shift(z)
        return (z - t) * (-s).exp(), -s.sum((1, 2, 3))

    def _scale_and_shift(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """s and t, both zero where x decides."""
        _, c, h, w = x.shape
        if self.by_channel:
            parity = torch.arange(c, device=x.device).view(c, 1, 1)
        else:
            parity = torch.arange(h, device=x.device).view(1, h, 1) + torch.arange(w, device=x.device)
        decides = parity % 2 == self.odd
        s, t = self.net(x * decides).chunk(2, 1)
        return (self.bound * s.tanh()).masked_fill(decides, 0), t.masked_fill(decides, 0)


class Flow(nn.Module):
    """p(z) of Eq. 3: couplings in turn from standard normal numbers v, on grids of any size. In float32 throughout.

    Args:
        channels: numbers at each position.
        layers: couplings; four in turn have let every number decide.
        width: of their networks.
    """

    def __init__(self, channels: int, *, layers: int, width: int) -> None:
        super().__init__()
        self.couplings = nn.ModuleList(
            Coupling(channels, width, by_channel=number % 4 < 2, odd=number % 2 == 1) for number in range(layers)
        )

    def from_base(self, v: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """f: what standard normal numbers become."""
        with torch.autocast(v.device.type, enabled=False):
            z = v.float()
            for coupling in self.couplings:
                z = coupling(z)
        return z

    def to_base(self, z: Float[Tensor, "b c h w"]) -> tuple[Float[Tensor, "b c h w"], Float[Tensor, " b"]]:
        """The inverse of f, and the logarithm of its Jacobian's determinant."""
        with torch.autocast(z.device.type, enabled=False):
            v, log_det = z.float(), z.new_zeros(len(z), dtype=torch.float32)
            for coupling in reversed(self.couplings):
                assert isinstance(coupling, Coupling)
                v, of_coupling = coupling.inverse(v)
                log_det = log_det + of_coupling
        return v, log_det

    def log_prob(self, z: Float[Tensor, "b c h w"]) -> Float[Tensor, " b"]:
        """ln p(z), nats, of each grid (Eqs. 3, 12 and 13)."""
        v, log_det = self.to_base(z)
        return -0.5 * (v.square() + math.log(2 * math.pi)).sum((1, 2, 3)) + log_det

    def networks(self) -> list[nn.Module]:
        """Those of the couplings: the blocks that gradient checkpointing computes again."""
        return [coupling.net for coupling in self.couplings if isinstance(coupling, Coupling)]
