"""RealNVP on grids of real-valued latents: a normalizing flow with exact inverse, log-determinant and density.

It is in core because two wings use it: selfVAE has a flow as the prior in its ELBO, and the prior `realnvp` trains one
on a latent set.

Legend: b batch, c channels, h w grid.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn


class Coupling(nn.Module):
    """One affine coupling layer (selfVAE, Section 2.2): half of the latents determine scale and shift of the rest.

    The halves are alternating channels, or a checkerboard of positions (arXiv 1605.08803, Section 3.4), which works at
    any size. As in that paper, a learned number per channel bounds the logarithm of the scale.

    Args:
        channels: latents at each position.
        width: channels of the hidden layers.
        by_channel: whether to split by channels; otherwise by positions.
        odd: which half stays as it is and determines the other.
    """

    def __init__(self, channels: int, width: int, *, by_channel: bool, odd: bool) -> None:
        super().__init__()
        self.by_channel, self.odd = by_channel, odd
        last = nn.Conv2d(width, 2 * channels, 3, padding=1)
        for parameter in last.parameters():  # start as the identity
            nn.init.zeros_(parameter)
        self.net = nn.Sequential(
            nn.Conv2d(channels, width, 3, padding=1), nn.ELU(), nn.Conv2d(width, width, 1), nn.ELU(), last
        )
        self.bound = nn.Parameter(torch.ones(channels, 1, 1))

    def forward(self, v: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """Computes f_i: v_b becomes exp(s(v_a)) v_b + t(v_a); v_a is unchanged."""
        s, t = self._scale_and_shift(v)
        return v * s.exp() + t

    def inverse(self, z: Float[Tensor, "b c h w"]) -> tuple[Float[Tensor, "b c h w"], Float[Tensor, " b"]]:
        """Computes the inverse of f_i and its log-determinant, -sum s (Eq. 5 has the sign of f_i's own)."""
        s, t = self._scale_and_shift(z)
        return (z - t) * (-s).exp(), -s.sum((1, 2, 3))

    def _scale_and_shift(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Returns s and t, both zero for the half that determines them."""
        _, c, h, w = x.shape
        if self.by_channel:
            parity = torch.arange(c, device=x.device).view(c, 1, 1)
        else:
            parity = torch.arange(h, device=x.device).view(1, h, 1) + torch.arange(w, device=x.device)
        unchanged = parity % 2 == self.odd
        s, t = self.net(x * unchanged).chunk(2, 1)
        return (self.bound * s.tanh()).masked_fill(unchanged, 0), t.masked_fill(unchanged, 0)


class Flow(nn.Module):
    """The flow p(z) of Eq. 3: a chain of couplings from standard normal v, on grids of any size.

    It computes in float32 under autocast too.

    Args:
        channels: latents at each position.
        layers: number of couplings; after four, every latent has determined others.
        width: channels of the hidden layers.
    """

    def __init__(self, channels: int, *, layers: int, width: int) -> None:
        super().__init__()
        self.couplings = nn.ModuleList(
            Coupling(channels, width, by_channel=number % 4 < 2, odd=number % 2 == 1) for number in range(layers)
        )

    def from_base(self, v: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """Computes z = f(v) from standard normal v."""
        with torch.autocast(v.device.type, enabled=False):
            z = v.float()
            for coupling in self.couplings:
                z = coupling(z)
        return z

    def to_base(self, z: Float[Tensor, "b c h w"]) -> tuple[Float[Tensor, "b c h w"], Float[Tensor, " b"]]:
        """Computes v, the inverse of f at z, and the log-determinant of that inverse."""
        with torch.autocast(z.device.type, enabled=False):
            v, log_det = z.float(), z.new_zeros(len(z), dtype=torch.float32)
            for coupling in reversed(self.couplings):
                assert isinstance(coupling, Coupling)
                v, coupling_log_det = coupling.inverse(v)
                log_det = log_det + coupling_log_det
        return v, log_det

    def log_prob(self, z: Float[Tensor, "b c h w"]) -> Float[Tensor, " b"]:
        """Returns ln p(z) of each grid, in nats (Eqs. 3, 12 and 13)."""
        v, log_det = self.to_base(z)
        return -0.5 * (v.square() + math.log(2 * math.pi)).sum((1, 2, 3)) + log_det

    def networks(self) -> list[nn.Module]:
        """Returns the couplings' networks, the blocks that gradient checkpointing recomputes."""
        return [coupling.net for coupling in self.couplings if isinstance(coupling, Coupling)]
