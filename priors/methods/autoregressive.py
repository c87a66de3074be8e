"""Drawing codes one after the other, in raster order, from a prior that knows each from those before it.

What is computed once and kept is the prior's (`CausalPrior.decode_stepwise`). Legend: b batch, h w grid, n positions, k digits.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import tyro
from einops import rearrange
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from smalti.core.errors import UserError
from smalti.core.randomness import Stream, derive, uniform
from smalti.priors.base import CausalPrior, Method, ObjectiveConfig
from smalti.priors.head import inverse_cdf
from smalti.priors.methods.sampling import Sampling, check_given


@dataclass(frozen=True)
class AncestralSampling(Sampling):
    """How codes are drawn one after the other.

    Raises:
        UserError: for values outside their ranges.
    """

    temperature: float = 1.0
    """Divides the logits; below 1 draws likelier codes, with less variety. 1 draws from the prior itself."""
    guidance: float = 1.0
    """How far to go from what is likely in any class (0) past what is likely in the given one (1); other values than 1
    take twice the time, and change nothing for images of no class."""
    particles: tyro.conf.Suppress[int] = 1
    """Grids drawn for each one kept, where some codes are given; see `AncestralFilling`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.temperature <= 0:
            raise UserError(f"temperature must be above 0, got {self.temperature}; use 0.01 for the likeliest codes")
        if self.guidance < 0:
            raise UserError(f"guidance must not be negative, got {self.guidance}")
        if self.particles < 1:
            raise UserError(f"particles must be at least 1, got {self.particles}")

    def calls(self, h: int, w: int) -> int:
        """How often a callback hears of progress."""
        return h * w


@dataclass(frozen=True)
class AncestralFilling(AncestralSampling):
    """The same for the missing part of given codes, of which those that come after it are to count too."""

    particles: int = 8
    """Grids drawn for each one kept, which is chosen by how likely it makes the given codes that come after its own:
    one grid sees only those that come before."""


@torch.no_grad()
def sample_ancestral(
    prior: CausalPrior,
    *,
    known: Int64[Tensor, "b h w"],
    known_mask: Bool[Tensor, "b h w"],
    seeds: Int64[Tensor, " b"],
    labels: Int64[Tensor, " b"] | None = None,
    upper: tuple[Int64[Tensor, "b _y _x"], ...] = (),
    sampling: AncestralSampling = AncestralSampling(),
    callback: Callable[[int, Tensor], None] | None = None,
) -> Int64[Tensor, "b h w"]:
    """Draws the unknown codes in raster order, each given all before it, known or drawn.

    With nothing known these are draws from the prior. With known codes each draw has seen those before it only: the
    grids are drawn from q = product over unknown codes of p(code | before), not from p(unknown | known). Of several
    `particles`, one is kept with a probability in proportion to p / q, which is the product of p(code | before) over
    the known codes (sampling-importance-resampling, Rubin 1987); as they grow in number, draws become those from
    p(unknown | known). `temperature` and `guidance` are part of p; `top_p` is of q's draws only.

    In float32 whatever the autocast, so that with the same seeds the codes are those that drawing from the features of
    the whole grid gives, at each position anew: but for a draw within the rounding of sums of a border between codes.

    Args:
        prior: in evaluation mode, on the device of the codes.
        known: codes to keep; what stands where the mask is False does not matter.
        known_mask: True = keep.
        seeds: one for each row.
        labels: the class of each row, -1 for any; None is any for all.
        upper: the codes of the levels above, where the prior has any.
        sampling: temperature, guidance and particles.
        callback: called after each position with its number, from 0, and the codes as they are: of all particles.

    Raises:
        UserError: for a known code outside the codebook, a label that the prior has no class for, or upper levels that
            do not go with it.
    """
    check_given(prior, known, known_mask, labels)
    b, particles, where = len(known), sampling.particles, known.device
    numbers = torch.arange(particles, device=where).repeat(b)
    with torch.autocast(where.type, enabled=False):
        codes, log_weights = _draw(
            prior,
            torch.where(known_mask, known, 0).repeat_interleave(particles, 0),
            known_mask.repeat_interleave(particles, 0),
            derive(seeds.repeat_interleave(particles), Stream.PARTICLE, numbers),
            None if labels is None else labels.repeat_interleave(particles),
            tuple(of_level.repeat_interleave(particles, 0) for of_level in upper),
            sampling,
            callback,
        )
    weights = rearrange(log_weights, "(b p) -> b p", b=b).softmax(-1)
    chosen = inverse_cdf(weights, uniform(derive(seeds, Stream.PARTICLE_CHOICE)))
    return rearrange(codes, "(b p) h w -> b p h w", b=b)[torch.arange(b, device=where), chosen]


def _draw(
    prior: CausalPrior,
    codes: Tensor,
    known_mask: Tensor,
    seeds: Tensor,
    labels: Tensor | None,
    upper: tuple[Tensor, ...],
    sampling: AncestralSampling,
    callback: Callable[[int, Tensor], None] | None,
) -> tuple[Tensor, Tensor]:
    """Whole grids, and the log-probability `(b,)` of what was known of them, each code given those before it, nats."""
    head, (b, h, w) = prior.head, codes.shape
    answers = 1
    if labels is not None and prior.classes and sampling.guidance != 1:
        answers, labels = 2, torch.cat([labels, torch.full_like(labels, -1)])
    decode_stepwise = prior.decode_stepwise(
        answers * b, h, w, labels, tuple(of_level.repeat(answers, 1, 1) for of_level in upper)
    )
    draws = uniform(derive(seeds, Stream.AUTOREGRESSIVE_DRAW), h * w, len(head.radices))
    codes, known_mask = codes.flatten(1), known_mask.flatten(1)  # b n
    given = known_mask.any(0).tolist()  # looked at once, not at each position: a device is waited for
    weigh = sampling.particles > 1
    log_weights, code = draws.new_zeros(b, 1), None
    for position in range(h * w):
        here = slice(position, position + 1)
        features = next(decode_stepwise) if code is None else decode_stepwise.send(code.repeat(answers, 1))
        features, *without = features.chunk(answers)
        how: dict[str, Any] = {"temperature": sampling.temperature, "guidance": sampling.guidance}
        how["without_class"] = without[0] if without else None
        code = head.sample(features, draws[:, here], top_p=sampling.top_p, **how)
        if given[position]:
            code = torch.where(known_mask[:, here], codes[:, here], code)
            if weigh:
                log_weights = log_weights - head.nll(features, code, **how) * known_mask[:, here]
        codes[:, here] = code
        if callback is not None:
            callback(position, rearrange(codes.clone(), "b (h w) -> b h w", h=h))
    return rearrange(codes, "b (h w) -> b h w", h=h), log_weights[:, 0]


@dataclass(frozen=True)
class LikelihoodConfig(ObjectiveConfig):
    """Maximum likelihood."""


class Likelihood(nn.Module):
    """-log p(codes), exactly: every position predicted from those before it."""

    def __init__(self, prior: CausalPrior, config: LikelihoodConfig) -> None:
        super().__init__()
        self.prior = prior
        self.config = config

    def forward(self, batch: dict[str, Any]) -> tuple[Float[Tensor, ""], dict[str, Float[Tensor, ""]]]:
        """The loss, in nats per code, and its parts.

        Args:
            batch: `codes` int64 `(b, h, w)`, what `CodePrior.told` reads, and `seeds` int64 `(b,)`.

        Returns:
            The loss, and detached: `bits_per_code`, the same in bits; `nll_1`, `nll_2`, ... of each digit, which sum to
            the loss; `accuracy`, the share of codes that the likeliest digits hit.
        """
        codes = batch["codes"]
        more = self.prior.conditioning(batch, self.config.label_dropout if self.training else 0.0)
        nll, hits = self.prior.head.score(self.prior.features(codes, **more), codes.flatten(1))  # b n k, b n
        digits = nll.mean((0, 1))
        loss = digits.sum()
        metrics = {f"nll_{i + 1}": value for i, value in enumerate(digits.detach())}
        accuracy = hits.float().mean()
        return loss, {"bits_per_code": loss.detach() / math.log(2), **metrics, "accuracy": accuracy}


AUTOREGRESSIVE = Method(
    objective=Likelihood,
    objective_config=LikelihoodConfig,
    sampler=sample_ancestral,
    sampling=AncestralSampling,
    filling=AncestralFilling,
)
"""Learns each code from those before it, and draws them in that order: for causal bodies."""
