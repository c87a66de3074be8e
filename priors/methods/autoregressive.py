"""Autoregressive priors: maximum likelihood with teacher forcing, and ancestral sampling.

A causal prior (`CausalPrior`: PixelCNN, transformer) predicts each code from those before it in raster order.
Training sees all true codes at once (teacher forcing) and minimizes the exact negative log-likelihood. Ancestral
sampling draws one code after the other; the prior caches what it computed for earlier positions
(`CausalPrior.decode_stepwise`). For inpainting, several particles account for known codes that come later.

Legend: b batch, h w grid, n positions (n = h w), k digits of a code, p particles.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
import tyro
from einops import rearrange
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from smalti.core.errors import UserError, require_at_least_one
from smalti.core.randomness import Stream, derive, uniform
from smalti.priors.base import CausalPrior, Method, ObjectiveConfig, Prior
from smalti.priors.conditioning import Condition, no_condition
from smalti.priors.head import inverse_cdf
from smalti.priors.methods.sampling import Guidance, Sampling, check_inputs, require_temperature_and_guidance
from smalti.priors.row_caches import RowCaches


@dataclass(frozen=True)
class LikelihoodConfig(ObjectiveConfig):
    """Settings of the maximum-likelihood loss."""


class Likelihood(nn.Module):
    """The negative log-likelihood of the codes, exact, computed with teacher forcing.

    Every position is predicted from the true codes before it, all in one pass.

    Raises:
        UserError: if the prior is no `CausalPrior`: it could see the codes that it predicts, and not be sampled.
    """

    def __init__(self, prior: CausalPrior, config: LikelihoodConfig) -> None:
        super().__init__()
        if not isinstance(prior, CausalPrior):
            raise UserError(f"{type(prior).__name__} cannot learn autoregressively; derive it from CausalPrior")
        self.prior = prior
        self.config = config

    def forward(self, batch: dict[str, Any]) -> tuple[Float[Tensor, ""], dict[str, Float[Tensor, ""]]]:
        """Returns the loss, in nats per code, and its metrics.

        Args:
            batch: `codes` int64 `(b, h, w)`, `seeds` int64 `(b,)`, and what `CodePrior.conditioning` reads.

        Returns:
            The loss, and detached metrics: `bits_per_code`, the loss in bits; `nll_1`, `nll_2`, ... of the digits,
            which sum to the loss; `accuracy`, the share of codes that greedy decoding predicts.
        """
        codes = batch["codes"]
        conditioning = self.prior.conditioning(batch, self.config.label_dropout if self.training else 0.0)
        features = self.prior.features(codes, **conditioning)
        nll, hits = self.prior.head.score(features, codes.flatten(1))  # b n k, b n
        digits = nll.mean((0, 1))
        loss = digits.sum()
        metrics = {f"nll_{i + 1}": value for i, value in enumerate(digits.detach())}
        accuracy = hits.float().mean()
        return loss, {"bits_per_code": loss.detach() / math.log(2), **metrics, "accuracy": accuracy}


@dataclass(frozen=True)
class AncestralSampling(Sampling):
    """Settings of ancestral sampling for generation.

    Raises:
        UserError: for values outside their ranges.
    """

    temperature: float = 1.0
    """Divides the logits. 1 samples from the prior itself; lower values give likelier codes and less variety."""
    guidance: Guidance = 1.0
    particles: tyro.conf.Suppress[int] = 1
    """Particles per sample when codes are known; see `AncestralFilling`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_temperature_and_guidance(self.temperature, self.guidance)
        require_at_least_one(self, "particles")

    def calls(self, h: int, w: int) -> int:
        """Returns the calls of a sampler's callback: one per position."""
        return h * w


@dataclass(frozen=True)
class AncestralFilling(AncestralSampling):
    """Settings of ancestral sampling for inpainting, where several particles account for later known codes."""

    particles: int = 8
    """Particles per fill: grids that are sampled together. Those that make the known codes after their own likelier are
    continued more often, and one is kept. More particles fit these codes better and take longer."""


@torch.no_grad()
def sample_ancestral(
    prior: CausalPrior,
    *,
    known: Int64[Tensor, "b h w"],
    known_mask: Bool[Tensor, "b h w"],
    seeds: Int64[Tensor, " b"],
    condition: Condition | None = None,
    upper: tuple[Int64[Tensor, "b _y _x"], ...] = (),
    sampling: AncestralSampling = AncestralSampling(),
    callback: Callable[[int, Tensor], None] | None = None,
) -> Int64[Tensor, "b h w"]:
    """Samples unknown codes in raster order (ancestral sampling), each given all codes before it, known or sampled.

    With nothing known these are samples of the prior. With known codes, each draw has seen only those before it: grids
    are sampled from q = product over unknown codes of p(code | codes before), not from p(unknown | known). Of several
    `particles`, one is kept with a probability proportional to its weight p / q, the product over known codes of
    p(code | codes before) (sampling-importance-resampling, Rubin 1987). With more particles the result approaches
    p(unknown | known). `temperature` and `guidance` are part of p. With `top_p` below 1 the weights stay this product,
    and the result approaches the distribution proportional to q times the product.

    Where a run of known codes ends and the weights have become uneven (an effective sample size below half of the
    particles), the particles are resampled in proportion to their weights, which then are equal again (a particle
    filter, Gordon, Salmond and Smith 1993; systematic resampling, Kitagawa 1996). Otherwise, where known and unknown
    codes alternate over many rows, hardly more than one particle would count at the end.

    Runs in float32 whatever the autocast dtype, so that the codes equal those sampled from the features of the
    whole grid, recomputed at each position, up to draws within rounding error of a border between codes.

    Arguments and errors are those of `smalti.priors.base.Sampler`. `callback` is called once per position,
    with the codes of all particles, `(b p, h, w)`.
    """
    check_inputs(prior, known, known_mask, condition)
    b, particles, device = len(known), sampling.particles, known.device
    numbers = torch.arange(particles, device=device).repeat(b)
    with torch.autocast(device.type, enabled=False):
        codes, log_weights = _sample_particles(
            prior,
            torch.where(known_mask, known, 0).repeat_interleave(particles, 0),
            known_mask.repeat_interleave(particles, 0),
            derive(seeds.repeat_interleave(particles), Stream.PARTICLE, numbers),
            seeds,
            None if condition is None else condition.repeat_interleave(particles, 0),
            tuple(coarser.repeat_interleave(particles, 0) for coarser in upper),
            sampling,
            callback,
        )
    weights = rearrange(log_weights, "(b p) -> b p", b=b).softmax(-1)
    chosen = inverse_cdf(weights, uniform(derive(seeds, Stream.PARTICLE_CHOICE)))
    return rearrange(codes, "(b p) h w -> b p h w", b=b)[torch.arange(b, device=device), chosen]


def _sample_particles(
    prior: CausalPrior,
    codes: Tensor,
    known_mask: Tensor,
    draw_seeds: Tensor,
    resampling_seeds: Tensor,
    condition: Condition | None,
    upper: tuple[Tensor, ...],
    sampling: AncestralSampling,
    callback: Callable[[int, Tensor], None] | None,
) -> tuple[Tensor, Tensor]:
    """Returns particles and their log-weights `(b p,)`: the log-likelihood of known codes since resampling, nats.

    Seeds of draws are those of particles `(b p,)`, seeds of resampling those of fills `(b,)`.
    """
    head, (rows, h, w) = prior.head, codes.shape
    passes = 1  # through the network: with guidance one with and one without the condition, in one batch
    if condition is not None and prior.conditional and sampling.guidance != 1:
        passes, condition = 2, torch.cat([condition, no_condition(condition)])
    upper, caches = tuple(coarser.repeat(passes, 1, 1) for coarser in upper), RowCaches()
    steps = prior.decode_stepwise(passes * rows, h, w, condition, upper, caches)
    draws = uniform(derive(draw_seeds, Stream.AUTOREGRESSIVE_DRAW), h * w, len(head.radices))
    codes, known_mask = codes.flatten(1), known_mask.flatten(1)  # (b p) n
    run_ends = known_mask & ~F.pad(known_mask[:, 1:], (0, 1), value=True)
    # read once: reading at each position would wait for the device
    any_known, any_run_ends = torch.stack([known_mask, run_ends]).any(1).tolist()
    log_weights, code = draws.new_zeros(rows, 1), None
    for position in range(h * w):
        now = slice(position, position + 1)
        features = next(steps) if code is None else steps.send(code.repeat(passes, 1))
        features, *unconditional = features.chunk(passes)
        options: dict[str, Any] = {"temperature": sampling.temperature, "guidance": sampling.guidance}
        options["unconditional"] = unconditional[0] if unconditional else None
        code = head.sample(features, draws[:, now], top_p=sampling.top_p, **options)
        if any_known[position]:
            code = torch.where(known_mask[:, now], codes[:, now], code)
            if sampling.particles > 1:
                log_weights = log_weights - head.nll(features, code, **options) * known_mask[:, now]
        codes[:, now] = code
        if sampling.particles > 1 and any_run_ends[position]:
            taken, uneven = _resampled(
                log_weights, run_ends[:, now], uniform(derive(resampling_seeds, Stream.PARTICLE_RESAMPLING, position))
            )
            if bool(uneven.any()):
                codes, code, log_weights = codes[taken], code[taken], torch.where(uneven, 0, log_weights)
                caches.take(torch.cat([taken + each * rows for each in range(passes)]))
        if callback is not None:
            callback(position, rearrange(codes.clone(), "b (h w) -> b h w", h=h))
    return rearrange(codes, "b (h w) -> b h w", h=h), log_weights[:, 0]


def _resampled(log_weights: Tensor, run_ends: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the row that continues in each row `(b p,)`, and whether its fill is resampled `(b p, 1)`.

    A fill is resampled if a run of its known codes ends, and its effective sample size is below half of its particles.
    It is systematic, with one of the `uniforms` `(b,)` a fill: a particle of weight v continues in p v rows, rounded up
    or down.
    """
    b, device = len(uniforms), log_weights.device
    weights = rearrange(log_weights, "(b p) 1 -> b p", b=b).softmax(-1)
    particles = weights.shape[1]
    uneven = run_ends & (weights.square().sum(-1) * particles > 2).repeat_interleave(particles)[:, None]
    numbers = torch.arange(particles, device=device)
    points = ((numbers + uniforms[:, None]) / particles).clamp(max=1 - 2.0**-24)  # the sum may round to p
    drawn = inverse_cdf(weights[:, None].expand(b, particles, particles), points)  # b p
    rows = torch.arange(b * particles, device=device)
    taken = (torch.arange(b, device=device)[:, None] * particles + drawn).flatten()
    return torch.where(uneven[:, 0], taken, rows), uneven


AUTOREGRESSIVE = Method(
    objective=Likelihood,
    objective_config=LikelihoodConfig,
    sampler=sample_ancestral,
    sampling=AncestralSampling,
    filling=AncestralFilling,
)
"""Maximum likelihood and ancestral sampling, for causal networks."""


def require_causal(prior: Prior) -> CausalPrior:
    """Returns the prior if it has exact likelihoods of codes.

    Raises:
        UserError: if it is no `CausalPrior`.
    """
    if not isinstance(prior, CausalPrior):
        raise UserError(f"a {prior.kind} has no exact likelihood of codes; use a transformer or a pixelcnn")
    return prior
