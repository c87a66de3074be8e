"""Masked codes (MaskGIT): the loss and the sampler.

MaskGIT (arXiv 2202.04200) trains a network to predict masked codes from the others, with masking ratios that
follow a cosine schedule. Sampling starts from a fully masked grid; each decoding step reveals more codes, by
the same cosine schedule. It needs a network in which every position sees the whole grid and that accepts
`MASK_TOKEN`, such as `MaskGIT`. Unlike SUNDAE's denoising, a revealed code is never changed again.

Legend: b batch, h w grid, n positions (n = h w), k digits of a code.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from smalti.core.errors import UserError, require_at_least_one
from smalti.core.randomness import Stream, derive, gumbel, uniform
from smalti.priors.base import CodePrior, Method, ObjectiveConfig
from smalti.priors.conditioning import Condition
from smalti.priors.methods.compiled_step import compiled
from smalti.priors.methods.orders import Order, halton_ranks, ranks
from smalti.priors.methods.sampling import (
    Compiled,
    Guidance,
    Sampling,
    check_inputs,
    guided_features,
    linear_schedule,
    require_temperature_and_guidance,
)

MASK_TOKEN = -1
"""Replaces a masked code in the grids that a network reads."""


@dataclass(frozen=True)
class MaskedConfig(ObjectiveConfig):
    """Settings of the masked-code loss."""


class MaskedCodes(nn.Module):
    """The MaskGIT loss: cross-entropy of masked codes (arXiv 2202.04200, Eq. 1 and section 3.1).

    In each row ceil(gamma(r) n) positions are masked, with r uniform on [0, 1) and the cosine schedule
    gamma(r) = cos(pi r / 2). The loss is the mean over rows of the mean cross-entropy of a row's masked codes.

    Deviation: Eq. 1 sums over the masked codes. The mean weights rows equally, whether few or many of their
    codes are masked, and makes the loss independent of how a batch is split into micro-batches.
    """

    def __init__(self, prior: CodePrior, config: MaskedConfig) -> None:
        super().__init__()
        self.prior = prior
        self.config = config

    def forward(self, batch: dict[str, Any]) -> tuple[Float[Tensor, ""], dict[str, Float[Tensor, ""]]]:
        """Returns the loss, in nats per masked code, and its metrics.

        Args:
            batch: `codes` int64 `(b, h, w)`; `seeds` int64 `(b,)`, different for each row and training step; and
                what `CodePrior.conditioning` reads.

        Returns:
            The loss, and detached metrics: `nll_1`, `nll_2`, ... of the digits, which sum to the loss; `accuracy`,
            the mean share of masked codes that greedy decoding predicts; `hidden`, the share of masked codes.
        """
        codes, seeds = batch["codes"], batch["seeds"]
        conditioning = self.prior.conditioning(batch, self.config.label_dropout if self.training else 0.0)
        masked = random_mask(seeds, codes[0].numel())  # b n
        features = self.prior.features(codes.masked_fill(masked.view_as(codes), MASK_TOKEN), **conditioning)
        nll, hits = self.prior.head.score(features, codes.flatten(1))  # b n k, b n
        weight = masked / masked.sum(1, keepdim=True) / len(codes)  # b n, sums to 1
        digits = (nll * weight[..., None]).sum((0, 1))
        metrics = {f"nll_{i + 1}": value for i, value in enumerate(digits.detach())}
        return digits.sum(), {**metrics, "accuracy": (hits * weight).sum(), "hidden": masked.float().mean()}


def random_mask(seeds: Int64[Tensor, " b"], positions: int) -> Bool[Tensor, "b n"]:
    """Draws which positions are masked in training, by the cosine masking schedule; at least one in each row."""
    count = (torch.cos(uniform(derive(seeds, Stream.MASKED_RATE), 1) * math.pi / 2) * positions).ceil()  # b 1
    return ranks(uniform(derive(seeds, Stream.MASKED_POSITIONS), positions)) < count


@dataclass(frozen=True)
class MaskedSampling(Sampling):
    """Settings of the MaskGIT sampler for generation. The temperature is interpolated linearly over the steps.

    Raises:
        UserError: for values outside their ranges.
    """

    steps: int = 16
    """Decoding steps. Each reveals more codes than the one before (MaskGIT's cosine schedule)."""
    order: Order = "halton"
    """Selects the codes to reveal first. halton: evenly spread over the grid (arXiv 2503.17076). confidence: the most
    confident ones (MaskGIT). random: any."""
    temperature: tuple[float, float] = (1.0, 1.0)
    """Divides the logits, at the first and at the last step. Lower values give likelier codes and less variety."""
    choice_temperature: float = 4.5
    """Scale of the Gumbel noise added to the confidence, falling linearly to 0 at the last step; used with order
    confidence only. Without noise samples lose variety."""
    guidance: Guidance = 1.5
    compile: Compiled = False

    def __post_init__(self) -> None:
        super().__post_init__()
        require_at_least_one(self, "steps")
        require_temperature_and_guidance(self.temperature, self.guidance)
        if self.choice_temperature < 0:
            raise UserError(f"choice_temperature must not be negative, got {self.choice_temperature}")

    def calls(self, _h: int, _w: int) -> int:
        """Returns the calls of a sampler's callback: one per decoding step."""
        return self.steps


@dataclass(frozen=True)
class MaskedFilling(MaskedSampling):
    """Settings of the MaskGIT sampler for inpainting.

    Cooler than generation, since a fill must agree with its surroundings rather than vary.
    """

    temperature: tuple[float, float] = (0.7, 0.3)


@torch.no_grad()
def sample_masked(
    prior: CodePrior,
    *,
    known: Int64[Tensor, "b h w"],
    known_mask: Bool[Tensor, "b h w"],
    seeds: Int64[Tensor, " b"],
    condition: Condition | None = None,
    upper: tuple[Int64[Tensor, "b _y _x"], ...] = (),
    sampling: MaskedSampling = MaskedSampling(),
    callback: Callable[[int, Tensor], None] | None = None,
) -> Int64[Tensor, "b h w"]:
    """Samples unknown codes by iterative decoding (MaskGIT, arXiv 2202.04200, section 3.2).

    All unknown codes start masked. Decoding step t of T samples every masked code, then masks
    floor(cos(pi t / 2T) times the number of unknown codes) of them again; the others stay as sampled.
    Deviation: the paper rounds that number up. The authors' code rounds it down too, but leaves at least one code
    masked before the last step, and reveals at least one in each.
    Canvases larger than the grids in training are read through windows (see `canvas_features`).

    Arguments and errors are those of `smalti.priors.base.Sampler`; the prior must accept `MASK_TOKEN`.
    `callback` is called once per decoding step; masked codes are shown as sampled.
    """
    check_inputs(prior, known, known_mask, condition)
    b, h, w = known.shape
    masked, codes = ~known_mask.flatten(1), known.flatten(1)  # b n
    unknown = masked.sum(1, keepdim=True)  # b 1
    decode = compiled(_decoding_step, codes.device) if sampling.compile else _decoding_step
    for step in range(sampling.steps):
        done = (step + 1) / sampling.steps
        temperature = linear_schedule(sampling.temperature, step, sampling.steps)
        order_step = () if sampling.order == "random" else (step,)  # a random order is drawn once for all steps
        rank_seeds = derive(seeds, *order_step, Stream.MASKED_RANK)
        schedule = (temperature, done, math.cos(math.pi / 2 * done))
        settings = (*schedule, condition, upper, derive(seeds, step), rank_seeds, sampling)
        codes, masked = decode(prior, codes.view(b, h, w), masked, unknown, *settings)
        if callback is not None:
            callback(step, codes.view(b, h, w))
    return rearrange(codes, "b (h w) -> b h w", h=h)


def _decoding_step(
    prior: CodePrior,
    codes: Int64[Tensor, "b h w"],
    masked: Bool[Tensor, "b n"],
    unknown: Int64[Tensor, "b 1"],
    temperature: float | Tensor,
    done: float | Tensor,
    ratio: float | Tensor,
    condition: Condition | None,
    upper: tuple[Int64[Tensor, "b _y _x"], ...],
    seeds: Int64[Tensor, " b"],
    rank_seeds: Int64[Tensor, " b"],
    sampling: MaskedSampling,
) -> tuple[Int64[Tensor, "b n"], Bool[Tensor, "b n"]]:
    """Returns the codes after one step, and which of them are masked again.

    Args:
        prior: as for `sample_masked`, like condition, upper and sampling.
        codes: the codes before the step; values at masked positions are ignored.
        masked: the masked positions.
        unknown: number of unknown codes in each row.
        temperature: divides the logits.
        done: share of the decoding steps that are finished with this one.
        ratio: share of the unknown codes to mask again (the cosine schedule).
        condition: the class or the vector of each row.
        upper: the codes of the coarser levels.
        seeds: for the sampled codes and the windows.
        rank_seeds: for the order in which codes are revealed.
        sampling: the settings.
    """
    head, (b, h, w) = prior.head, codes.shape
    inputs = codes.masked_fill(masked.view_as(codes), MASK_TOKEN)
    window_seeds = derive(seeds, Stream.MASKED_WINDOW)
    guided = guided_features(prior, inputs, condition, upper, window_seeds, temperature, sampling.guidance)
    draws = uniform(derive(seeds, Stream.MASKED_DRAW), h * w, len(head.radices))
    sampled = head.sample(uniforms=draws, top_p=sampling.top_p, **guided)
    flat = torch.where(masked, sampled, codes.flatten(1))
    match sampling.order:  # the smallest keys are masked again
        case "halton":
            keys = -halton_ranks(h, w).to(codes.device, torch.float32).expand(b, -1)
        case "random":
            keys = uniform(rank_seeds, h * w)
        case "confidence":
            noise = sampling.choice_temperature * (1 - done)
            keys = -head.nll(codes=sampled, **guided) + noise * gumbel(rank_seeds, h * w)
    return flat, masked & (ranks(keys.masked_fill(~masked, torch.inf)) < (unknown * ratio).floor())


MASKED = Method(
    objective=MaskedCodes,
    objective_config=MaskedConfig,
    sampler=sample_masked,
    sampling=MaskedSampling,
    filling=MaskedFilling,
)
"""Masked-code prediction (MaskGIT), for non-causal networks that accept `MASK_TOKEN`."""
