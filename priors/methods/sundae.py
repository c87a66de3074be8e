"""SUNDAE: step-unrolled denoising autoencoders over discrete codes, the loss and the sampler.

SUNDAE (arXiv 2112.06749; on image codes arXiv 2206.12351) trains a network to denoise corrupted codes. The
loss is unrolled: the network's own sample is the corrupted input of the next denoising step. Sampling
starts from uniformly random codes and applies denoising steps until nothing changes. It needs a network in
which every position sees the whole grid, such as the hourglass.

Legend: b batch, h w grid, n positions (n = h w), k digits of a code.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from smalti.core.errors import UserError, require_at_least_one
from smalti.core.randomness import Stream, derive, uniform
from smalti.priors.base import CodePrior, Method, ObjectiveConfig
from smalti.priors.conditioning import Condition
from smalti.priors.head import FactorizedHead
from smalti.priors.methods.compiled_step import compiled
from smalti.priors.methods.orders import Order
from smalti.priors.methods.sampling import (
    Compiled,
    Guidance,
    Sampling,
    check_inputs,
    guided_features,
    linear_schedule,
    require_temperature_and_guidance,
    select_positions,
)


@dataclass(frozen=True)
class SundaeConfig(ObjectiveConfig):
    """Settings of the SUNDAE loss (step-unrolled denoising).

    Raises:
        UserError: for fewer than one unrolled step, or a label dropout outside [0, 1].
    """

    unrolled_steps: int = 2
    """Denoising steps per training step. The first denoises corrupted codes, each further one denoises a sample of the
    step before."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_at_least_one(self, "unrolled_steps")


class Sundae(nn.Module):
    """The SUNDAE loss: step-unrolled denoising (arXiv 2112.06749, Eq. 7; on image codes arXiv 2206.12351).

    The codes are corrupted (see `corrupt`) and the prior predicts the original codes. A sample of the
    prediction, at temperature 1 and without gradient, is the input of the next unrolled step. The loss is the
    mean cross-entropy over all unrolled steps and all positions, corrupted or not.
    """

    def __init__(self, prior: CodePrior, config: SundaeConfig) -> None:
        super().__init__()
        self.prior = prior
        self.config = config

    def forward(self, batch: dict[str, Any]) -> tuple[Float[Tensor, ""], dict[str, Float[Tensor, ""]]]:
        """Returns the loss, in nats per code, and its metrics.

        Args:
            batch: `codes` int64 `(b, h, w)`; `seeds` int64 `(b,)`, different for each row and training step,
                which decide all draws; and what `CodePrior.conditioning` reads.

        Returns:
            The loss, and detached metrics: `loss_1`, `loss_2`, ... of the unrolled steps; `nll_1`, `nll_2`, ...
            of the digits, which sum to the loss; `accuracy`, the share of codes for which greedy decoding of the
            first step gives the original code.
        """
        codes, seeds = batch["codes"], batch["seeds"]
        head, (_, h, w) = self.prior.head, codes.shape
        target = codes.flatten(1)  # b n
        conditioning = self.prior.conditioning(batch, self.config.label_dropout if self.training else 0.0)
        features = self.prior.features(corrupt(head, codes, seeds), **conditioning)  # b n d
        scores = [head.score(features, target)]
        for step in range(1, self.config.unrolled_steps):
            draws = uniform(derive(seeds, Stream.SUNDAE_UNROLL, step), h * w, len(head.radices))
            features = self.prior.features(head.sample(features, draws).view_as(codes), **conditioning)
            scores.append(head.score(features, target))
        nll, hits = zip(*scores, strict=True)  # b n k and b n, of each step
        table = torch.stack([step_nll.mean((0, 1)) for step_nll in nll])  # steps k
        loss = table.sum(1).mean()
        metrics = {f"loss_{i + 1}": value for i, value in enumerate(table.detach().sum(1))}
        metrics |= {f"nll_{i + 1}": value for i, value in enumerate(table.detach().mean(0))}
        return loss, metrics | {"accuracy": hits[0].float().mean()}


def corrupt(
    head: FactorizedHead, codes: Int64[Tensor, "b h w"], seeds: Int64[Tensor, " b"], rate: float | None = None
) -> Int64[Tensor, "b h w"]:
    """Replaces codes by uniformly random ones, each with probability `rate`; without it, every row draws its own.

    A row's probability is uniform in [0, 1).
    """
    _, h, w = codes.shape
    rates = uniform(derive(seeds, Stream.SUNDAE_RATE), 1, 1) if rate is None else rate  # b 1 1
    corrupted = uniform(derive(seeds, Stream.SUNDAE_POSITIONS), h, w) < rates
    return torch.where(corrupted, head.random_codes(derive(seeds, Stream.SUNDAE_CODES), h, w), codes)


@dataclass(frozen=True)
class SundaeSampling(Sampling):
    """Settings of the SUNDAE sampler, for generation and for inpainting.

    Temperature and proportion are interpolated linearly from the first step to the last. In SUNDAE the order is random,
    and there is no guidance. The defaults were measured against others on seven priors (docs/notebook/priors.md).

    Raises:
        UserError: for values outside their ranges.
    """

    steps: int = 25
    """Denoising steps at most. With fewer, raise the proportion, so that each code is updated as often."""
    temperature: tuple[float, float] = (1.0, 0.6)
    """Divides the logits, at the first and at the last step. Lower values give likelier codes and less variety."""
    proportion: tuple[float, float] = (0.5, 0.5)
    """Share of positions updated at a step, at the first and at the last step, in (0, 1]."""
    order: Order = "confidence"
    """Selects the positions to update. random: each position independently, as in SUNDAE. confidence: those whose codes
    are least likely, drawn without replacement with weights 1 / p. halton: all positions in turn, in the order of a
    Halton sequence, which is evenly spread at every step."""
    min_steps: int = 10
    """A sample is finished after a step that changes nothing, but not before this many steps; in random and Halton
    order also not before every position was selected."""
    guidance: Guidance = 1.5
    compile: Compiled = False

    def __post_init__(self) -> None:
        super().__post_init__()
        require_at_least_one(self, "steps", "min_steps")
        require_temperature_and_guidance(self.temperature, self.guidance)
        if not 0 < min(self.proportion) <= max(self.proportion) <= 1:
            raise UserError(f"proportion must be above 0 and at most 1 from first step to last, got {self.proportion}")

    def calls(self, _h: int, _w: int) -> int:
        """Returns the most calls of a sampler's callback: one per denoising step."""
        return self.steps

    def at(self, step: int) -> tuple[float, float]:
        """Returns temperature and proportion of a step, counted from 0."""
        return linear_schedule(self.temperature, step, self.steps), linear_schedule(self.proportion, step, self.steps)


@torch.no_grad()
def sample_sundae(
    prior: CodePrior,
    *,
    known: Int64[Tensor, "b h w"],
    known_mask: Bool[Tensor, "b h w"],
    seeds: Int64[Tensor, " b"],
    condition: Condition | None = None,
    upper: tuple[Int64[Tensor, "b _y _x"], ...] = (),
    sampling: SundaeSampling = SundaeSampling(),
    callback: Callable[[int, Tensor], None] | None = None,
) -> Int64[Tensor, "b h w"]:
    """Samples unknown codes by denoising steps (arXiv 2112.06749, section 2.3; for inpainting arXiv 2206.12351).

    Unknown positions start uniform over the codebook. Each denoising step samples a code for every position
    given all of them, and updates the unknown positions that `sampling.order` selects. A row is finished,
    and no longer changes, after a step that changes nothing in it; the loop ends with the last unfinished row.
    Deviation from the authors' code: in random and Halton order a row is not finished before each of its unknown
    positions was selected. A step that selects few positions may change nothing; the others would keep their random
    start.
    Canvases larger than the grids in training are read through windows (see `canvas_features`).

    Arguments and errors are those of `smalti.priors.base.Sampler`. `callback` is called once per denoising step.
    """
    b, h, w = known.shape
    check_inputs(prior, known, known_mask, condition)
    codes = torch.where(known_mask, known, prior.head.random_codes(derive(seeds, Stream.SUNDAE_START), h, w))
    unfinished = torch.ones(b, 1, 1, dtype=torch.bool, device=known.device)
    selected_before = torch.zeros(b, 1, dtype=torch.int64, device=known.device)
    waiting = ~known_mask  # unknown positions that no step selected yet
    denoise = compiled(_denoising_step, codes.device) if sampling.compile else _denoising_step
    for step in range(sampling.steps):
        settings = (*sampling.at(step), condition, upper, derive(seeds, Stream.SUNDAE_STEP, step), sampling)
        codes, selected_before, selected, changed = denoise(
            prior, codes, ~known_mask, unfinished, selected_before, *settings
        )
        if sampling.order != "confidence":  # which selects the least likely first, and so every random start
            waiting = waiting & ~selected
            changed = changed | waiting.any(dim=(1, 2), keepdim=True)
        if callback is not None:
            callback(step, codes)
        if step + 1 >= sampling.min_steps:
            unfinished = unfinished & changed
            if not unfinished.any():
                break
    return codes


def _denoising_step(
    prior: CodePrior,
    codes: Int64[Tensor, "b h w"],
    unknown: Bool[Tensor, "b h w"],
    unfinished: Bool[Tensor, "b 1 1"],
    selected_before: Int64[Tensor, "b 1"],
    temperature: float | Tensor,
    proportion: float | Tensor,
    condition: Condition | None,
    upper: tuple[Int64[Tensor, "b _y _x"], ...],
    seeds: Int64[Tensor, " b"],
    sampling: SundaeSampling,
) -> tuple[Int64[Tensor, "b h w"], Int64[Tensor, "b 1"], Bool[Tensor, "b h w"], Bool[Tensor, "b 1 1"]]:
    """Returns the codes after one step, the positions selected up to now, those selected now, and which rows changed.

    See `select_positions` for `selected_before`. `seeds` differ at every step.
    """
    head, (_, h, w) = prior.head, codes.shape
    draws = uniform(derive(seeds, Stream.SUNDAE_PROPOSAL), h * w, len(head.radices))
    window_seeds = derive(seeds, Stream.SUNDAE_WINDOW)
    guided = guided_features(prior, codes, condition, upper, window_seeds, temperature, sampling.guidance)
    proposal = head.sample(uniforms=draws, top_p=sampling.top_p, **guided).view_as(codes)
    if sampling.order == "random":
        selected = uniform(derive(seeds, Stream.SUNDAE_UPDATE), h, w) < proportion
    else:
        nll = head.nll(codes=codes.flatten(1), **guided) if sampling.order == "confidence" else None
        selected, selected_before = select_positions(
            unknown, proportion, selected_before, nll, derive(seeds, Stream.SUNDAE_UPDATE)
        )
    update = selected & unknown & unfinished
    changed = update & (proposal != codes)
    return torch.where(update, proposal, codes), selected_before, selected, changed.any(dim=(1, 2), keepdim=True)


SUNDAE = Method(
    objective=Sundae,
    objective_config=SundaeConfig,
    sampler=sample_sundae,
    sampling=SundaeSampling,
    filling=SundaeSampling,
)
"""Step-unrolled denoising, for non-causal networks."""
