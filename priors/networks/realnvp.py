"""The prior over real-valued latents: a RealNVP normalizing flow, with its loss and its sampler.

The bijection itself is in `smalti.core.realnvp_flow`.

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
from smalti.core.errors import UserError, require_at_least_one, require_numbers
from smalti.core.models import register
from smalti.core.randomness import normal
from smalti.core.realnvp_flow import Flow
from smalti.priors.base import Method, Prior
from smalti.priors.conditioning import Condition


@dataclass(frozen=True)
class RealNVPConfig:
    """Settings of a RealNVP. The command fills in the grid and its channels from the latent set.

    Raises:
        UserError: for fewer than one layer or channel.
    """

    height: tyro.conf.Suppress[int] = 8
    """Rows of the grid in training; other grids can be sampled too."""
    width: tyro.conf.Suppress[int] = 8
    """Columns of the grid in training."""
    channels: tyro.conf.Suppress[int] = 16
    """Channels of the latents."""
    layers: int = 12
    """Coupling layers (F in selfVAE's Eq. 13). Four in a row transform both halves of the channels and of the
    positions."""
    model_width: int = 64
    """Hidden channels of the coupling layers' networks."""

    def __post_init__(self) -> None:
        require_at_least_one(self, "layers", "model_width")


@dataclass(frozen=True)
class DensityConfig:
    """Settings of the maximum-likelihood loss over real-valued latents."""


class Density(nn.Module):
    """The negative log-likelihood of real-valued latents, exact."""

    def __init__(self, prior: "RealNVP", _config: DensityConfig) -> None:
        super().__init__()
        self.prior = prior

    def forward(self, batch: dict[str, Any]) -> tuple[Float[Tensor, ""], dict[str, Float[Tensor, ""]]]:
        """Returns the loss in nats per dimension, and as a detached metric in bits.

        Args:
            batch: `codes` float32 `(b, c, h, w)`.
        """
        latents = batch["codes"]
        loss = -self.prior.flow.log_prob(latents).mean() / latents[0].numel()
        return loss, {"bits_per_number": loss.detach() / math.log(2)}


@dataclass(frozen=True)
class FlowSampling:
    """Settings of sampling from the flow.

    Raises:
        UserError: for a temperature that is negative or no number.
    """

    temperature: float = 1.0
    """Scales the Gaussian noise that the flow maps to latents. Lower values give likelier latents and less variety."""

    def __post_init__(self) -> None:
        require_numbers(self)
        if self.temperature < 0:
            raise UserError(f"temperature must not be negative, got {self.temperature}")

    def calls(self, _h: int, _w: int) -> int:
        """Returns the calls of a sampler's callback: a grid is sampled in one step."""
        return 1


def sample_flow(
    prior: "RealNVP",
    *,
    known: Float[Tensor, "b c h w"],
    known_mask: Bool[Tensor, "b h w"],
    seeds: Int64[Tensor, " b"],
    condition: Condition | None = None,
    upper: tuple[Int64[Tensor, "b _y _x"], ...] = (),
    sampling: FlowSampling = FlowSampling(),
    callback: Callable[[int, Tensor], None] | None = None,
) -> Float[Tensor, "b c h w"]:
    """Samples whole grids of real-valued latents: f of Gaussian noise (selfVAE, Eq. 3).

    Arguments are those of `smalti.priors.base.Sampler`, but nothing may be known and there is no
    conditioning: a flow cannot be conditioned on a part of its output.
    """
    assert condition is None
    assert not upper
    assert not known_mask.any()
    latents = prior.flow.from_base(sampling.temperature * normal(seeds, *known.shape[1:]))
    if callback is not None:
        callback(0, latents)
    return latents


@register
class RealNVP(Prior):
    """A RealNVP (arXiv 1605.08803; selfVAE, Eqs. 3, 5, 12 and 13) over one continuous level, such as selfVAE's u.

    It is conditioned neither on classes nor on coarser levels.
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
        """Returns the coupling layers' networks, for gradient checkpointing."""
        return self.flow.networks()
