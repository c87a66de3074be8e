"""Helpers that the samplers of codes share: settings, schedules, guidance and the choice of positions.

The samplers are in `sundae.py`, `masked.py` and `autoregressive.py`. All have the signature of
`smalti.priors.base.Sampler`, where its arguments are described; generation is inpainting with
nothing known.

Legend: b batch, h w grid, n positions (n = h w), d width.
"""

from dataclasses import dataclass
from typing import Annotated, Any, TypeAlias

import torch
import tyro
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from smalti.core.config import require_choices
from smalti.core.errors import UserError, require_numbers
from smalti.core.randomness import gumbel
from smalti.priors.base import CodePrior
from smalti.priors.conditioning import Condition, no_condition, require_fitting
from smalti.priors.methods.canvas import canvas_features
from smalti.priors.methods.orders import halton_ranks, ranks

LEAST_TEMPERATURE = 1e-6
"""Far below it logits overflow. At 0.01 the likeliest code is sampled already."""

Guidance: TypeAlias = Annotated[
    float,
    tyro.conf.arg(
        help="Scale of classifier-free guidance: 0 samples without the class or vector, 1 conditionally, above 1 codes "
        "more typical of it with less variety. Values other than 1 take twice the time. No effect without classes or "
        "vectors."
    ),
]
"""A sampler's setting with its help text. A field of `Sampling` would come before the samplers' own in their order."""
Compiled: TypeAlias = Annotated[
    bool,
    tyro.conf.arg(
        help="Compile each step with torch.compile, on a GPU as a CUDA graph. Takes a minute at the start; worth it "
        "for many samples."
    ),
]
"""Another such setting, of samplers with few steps."""


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """The settings that every sampler of codes has.

    Raises:
        UserError: for a top-p outside (0, 1], a setting that is none of its choices, or no number where one is needed.
    """

    top_p: float = 1.0
    """Nucleus (top-p) sampling: each digit of a code is sampled from the fewest values that hold this share of the
    probability together. Values below 1 exclude unlikely digits."""

    def __post_init__(self) -> None:
        require_choices(self)
        require_numbers(self)
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p must be above 0 and at most 1, got {self.top_p}; 1 excludes nothing")


def require_temperature_and_guidance(temperature: float | tuple[float, float], guidance: float) -> None:
    """Checks a sampler's temperature, or its first and last one, and its scale of guidance.

    Raises:
        UserError: for a temperature that is too low, or a negative scale.
    """
    temperatures = temperature if isinstance(temperature, tuple | list) else (temperature,)
    if min(temperatures) < LEAST_TEMPERATURE:
        least = f"temperature must be at least {LEAST_TEMPERATURE:f}, not {temperature}"
        raise UserError(f"{least}; use 0.01 for the likeliest codes")
    if guidance < 0:
        raise UserError(f"guidance must not be negative, got {guidance}; 0 samples without the class or vector")


def linear_schedule(ends: tuple[float, float], step: int, steps: int) -> float:
    """Returns the value at a step, counted from 0, interpolated from the first of `steps` to the last."""
    first, last = ends
    return first + step / max(steps - 1, 1) * (last - first)


def select_positions(
    unknown: Bool[Tensor, "b h w"],
    proportion: float | Tensor,
    selected_before: Int64[Tensor, "b 1"],
    nll: Float[Tensor, "b n"] | None,
    seeds: Int64[Tensor, " b"],
) -> tuple[Bool[Tensor, "b h w"], Int64[Tensor, "b 1"]]:
    """Selects a share of each row's unknown positions, by confidence or in Halton order.

    Args:
        unknown: the positions that may be selected.
        proportion: the share of them to select, in (0, 1], rounded up to whole positions.
        selected_before: how many positions of each row earlier steps selected.
        nll: -log p of the current codes. Positions are drawn without replacement with weights 1 / p (Gumbel
            top-k), so unconfident ones come first. None selects in the order of a Halton sequence, from
            where the last step stopped.
        seeds: for these draws.

    Returns:
        The selected positions, and the count of selected positions up to now.
    """
    (b, h, w), number = unknown.shape, unknown.sum((1, 2))[:, None]  # b 1
    count = (proportion * number).ceil().long()
    if nll is None:
        keys = halton_ranks(h, w).to(unknown.device, torch.float32).expand(b, -1)
    else:
        keys = -nll - gumbel(seeds, h * w)
    rank = ranks(keys.masked_fill(~unknown.flatten(1), torch.inf))  # b n
    if nll is None:
        rank = (rank - selected_before) % number.clamp_min(1)
    return (rank < count).view(b, h, w) & unknown, selected_before + count


def guided_features(
    prior: CodePrior,
    codes: Int64[Tensor, "b h w"],
    condition: Condition | None,
    upper: tuple[Int64[Tensor, "b _y _x"], ...],
    seeds: Int64[Tensor, " b"],
    temperature: float | Tensor,
    guidance: float,
) -> dict[str, Any]:
    """Returns the arguments of `FactorizedHead.sample` and `score` for a step with classifier-free guidance.

    With guidance, the features with and without the condition are computed in one batched pass. `seeds`
    choose the windows of a canvas (see `canvas_features`).
    """
    if condition is None or not prior.conditional or guidance == 1:
        return {"features": canvas_features(prior, codes, condition, upper, seeds), "temperature": temperature}
    both_conditions = torch.cat([condition, no_condition(condition)])
    both_upper = tuple(torch.cat([coarser, coarser]) for coarser in upper)
    both = canvas_features(prior, torch.cat([codes, codes]), both_conditions, both_upper, torch.cat([seeds, seeds]))
    conditional, unconditional = both.chunk(2)
    return {
        "features": conditional,
        "temperature": temperature,
        "unconditional": unconditional,
        "guidance": guidance,
    }


def check_inputs(
    prior: CodePrior,
    known: Int64[Tensor, "b h w"],
    known_mask: Bool[Tensor, "b h w"],
    condition: Condition | None,
) -> None:
    """Checks the known codes and the condition that a sampler receives.

    Raises:
        UserError: for a known code outside the codebook, a label that the prior has no class for, or vectors of
            another width.
    """
    kept = known[known_mask]
    if kept.numel() and not 0 <= kept.min() <= kept.max() < prior.head.codebook_size:
        raise UserError(
            f"known codes must be from 0 to {prior.head.codebook_size - 1}, got {int(kept.min())} to {int(kept.max())}"
        )
    if condition is not None:
        require_fitting(condition, prior.classes, prior.condition_width)
