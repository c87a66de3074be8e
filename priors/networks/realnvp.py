"""The prior of latents that are real numbers: a RealNVP, alone on a latent set. The bijection is in `smalti.core.realnvp_flow`.

Legend: b batch, c channels, h w grid.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import tyro
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from smalti.core.codes import Level
from smalti.core.errors import UserError
from smalti.core.models import register
from smalti.core.randomness import normal
from smalti.core.realnvp_flow import Flow
from smalti.priors.base import Method, Prior


@dataclass(frozen=True)
class RealNVPConfig:
    """Settings of a RealNVP; the grid and its channels are the latent set's."""

    height: tyro.conf.Suppress[int] = 8
    """Rows of the grid trained on; other grids run too."""
    width: tyro.conf.Suppress[int] = 8
    """Columns of the grid trained on."""
    channels: tyro.conf.Suppress[int] = 16
    """Real numbers at each position."""
    layers: int = 12
    """Couplings (F in selfVAE's Eq. 13); four in turn let every number decide once."""
    model_width: int = 64
    """Channels of the couplings' networks."""

    def __post_init__(self) -> None:
        if self.layers < 1 or self.model_width < 1:
            raise UserError(f"layers and model_width must be at least 1, not {self.layers} and {self.model_width}")


@dataclass(frozen=True)
class DensityConfig:
    """Maximum likelihood, of real numbers."""


class Density(nn.Module):
    """-ln p of grids of real numbers, exactly."""

    def __init__(self, prior: "RealNVP", _config: DensityConfig) -> None:
        super().__init__()
        self.prior = prior

    def forward(self, batch: dict[str, Any]) -> tuple[Float[Tensor, ""], dict[str, Float[Tensor, ""]]]:
        """The loss, in nats for each number, and the same in bits.

        Args:
            batch: `codes` float32 `(b, c, h, w)`.
        """
        latents = batch["codes"]
        loss = -self.prior.flow.log_prob(latents).mean() / latents[0].numel()
        return loss, {"bits_per_number": loss.detach() / math.log(2)}


@dataclass(frozen=True)
class FlowSampling:
    """How grids of real numbers are drawn.

    Raises:
        UserError: for a temperature that is none.
    """

    temperature: float = 1.0
    """Multiplies the normal numbers that the flow starts from; below 1 draws likelier latents, with less variety."""

    def __post_init__(self) -> None:
        if self.temperature < 0:
            raise UserError(f"temperature must not be negative, got {self.temperature}")

    def calls(self, _h: int, _w: int) -> int:
        """See `Method.sampling`: a grid is drawn at once."""
        return 1


def sample_flow(
    prior: "RealNVP",
    *,
    known: Float[Tensor, "b c h w"],
    known_mask: Bool[Tensor, "b h w"],
    seeds: Int64[Tensor, " b"],
    labels: Int64[Tensor, " b"] | None = None,
    upper: tuple[Int64[Tensor, "b _y _x"], ...] = (),
    sampling: FlowSampling = FlowSampling(),
    callback: Callable[[int, Tensor], None] | None = None,
) -> Float[Tensor, "b c h w"]:
    """Grids of real numbers, whole: f of normal numbers (Eq. 3), one for each seed.

    Labels and upper levels are those of other kinds: there are none. Nothing is known: a flow cannot be told a part.
    """
    assert labels is None
    assert not upper
    assert not known_mask.any()
    drawn = prior.flow.from_base(sampling.temperature * normal(seeds, *known.shape[1:]))
    if callback is not None:
        callback(0, drawn)
    return drawn


@register
class RealNVP(Prior):
    """A RealNVP (arXiv 1605.08803; selfVAE, Eqs. 3, 5, 12 and 13) over one continuous level, such as selfVAE's u.

    It knows no classes, and no levels above its own.
    """

    kind: ClassVar[str] = "realnvp"
    config_class: ClassVar[type] = RealNVPConfig
    method = Method(
        objective=Density,
        objective_config=DensityConfig,
        sampler=sample_flow,
        sampling=FlowSampling,
        filling=FlowSampling,
    )

    def __init__(self, config: RealNVPConfig) -> None:
        super().__init__(config)
        self.level = Level(config.height, config.width, channels=config.channels)
        self.flow = Flow(config.channels, layers=config.layers, width=config.model_width)

    def recomputable(self) -> list[nn.Module]:
        """The couplings' networks."""
        return self.flow.networks()
