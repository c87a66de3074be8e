"""The SUNDAE objective: learning to repair corrupted codes, and what one's own repairs left wrong. Networks and
samplers are elsewhere.

Legend: b batch, h w grid, n positions, k digits.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from smalti.core.errors import UserError
from smalti.core.randomness import Stream, derive, uniform
from smalti.priors.base import CodePrior, Method, ObjectiveConfig
from smalti.priors.head import FactorizedHead
from smalti.priors.methods.compiled_step import fused
from smalti.priors.methods.orders import Order
from smalti.priors.methods.sampling import Sampling, between, check_given, guided_features, select_positions


@dataclass(frozen=True)
class SundaeConfig(ObjectiveConfig):
    """Step-unrolled denoising.

    Raises:
        UserError: for fewer than one unrolled step, or a share that is none.
    """

    unrolled_steps: int = 2
    """Repairs in a row that are trained together: the first of corrupted codes, each next of what the one before
    drew."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.unrolled_steps < 1:
            raise UserError(f"unrolled_steps must be at least 1, got {self.unrolled_steps}")


class Sundae(nn.Module):
    """Step-unrolled denoising autoencoder (arXiv 2112.06749, Eq. 7; on image codes arXiv 2206.12351).

    The codes are corrupted, at a rate uniform on [0, 1) for each row, by codes uniform over the codebook. The prior
    predicts the codes from them; a draw from the prediction, at temperature 1 and without gradient, is what the next
    unrolled step starts from. The loss is the mean cross-entropy of all unrolled steps over all positions, corrupted or
    not.
    """

    def __init__(self, prior: CodePrior, config: SundaeConfig) -> None:
        super().__init__()
        self.prior = prior
        self.config = config

    def forward(self, batch: dict[str, Any]) -> tuple[Float[Tensor, ""], dict[str, Float[Tensor, ""]]]:
        """The loss, in nats per code, and its parts.

        Args:
            batch: `codes` int64 `(b, h, w)`, and `seeds` int64 `(b,)`, another for each row and step of training: they
            decide all draws; and what `CodePrior.told` reads.

        Returns:
            The loss, and detached: `loss_1`, `loss_2`, ... of each unrolled step; `nll_1`, `nll_2`, ... of each digit,
            which sum to the loss; `accuracy`, the share of codes that the first step's likeliest digits repair or keep.
        """
        codes, seeds = batch["codes"], batch["seeds"]
        head, (_, h, w) = self.prior.head, codes.shape
        target = codes.flatten(1)  # b n
        more = self.prior.conditioning(batch, self.config.label_dropout if self.training else 0.0)
        features = self.prior.features(corrupt(head, codes, seeds), **more)  # b n d
        scores = [head.score(features, target)]
        for step in range(1, self.config.unrolled_steps):
            draws = uniform(derive(seeds, Stream.SUNDAE_UNROLL, step), h * w, len(head.radices))
            features = self.prior.features(head.sample(features, draws).view_as(codes), **more)
            scores.append(head.score(features, target))
        nll, hits = zip(*scores, strict=True)  # b n k and b n, of each step
        table = torch.stack([of_step.mean((0, 1)) for of_step in nll])  # steps k
        loss = table.sum(1).mean()
        metrics = {f"loss_{i + 1}": value for i, value in enumerate(table.detach().sum(1))}
        metrics |= {f"nll_{i + 1}": value for i, value in enumerate(table.detach().mean(0))}
        return loss, metrics | {"accuracy": hits[0].float().mean()}


def corrupt(head: FactorizedHead, codes: Int64[Tensor, "b h w"], seeds: Int64[Tensor, " b"]) -> Int64[Tensor, "b h w"]:
    """Replaces each code by one drawn uniformly from the codebook, with a probability drawn uniformly for its row."""
    _, h, w = codes.shape
    rate = uniform(derive(seeds, Stream.SUNDAE_RATE), 1, 1)  # b 1 1
    corrupted = uniform(derive(seeds, Stream.SUNDAE_POSITIONS), h, w) < rate
    return torch.where(corrupted, head.random_codes(derive(seeds, Stream.SUNDAE_CODES), h, w), codes)


@dataclass(frozen=True)
class SundaeSampling(Sampling):
    """How a chain of repairs runs. Temperature and proportion go linearly from the first step's value to the last's.

    The small, falling proportion is for young priors, whose chains drift to plain areas at a constant half.

    Raises:
        UserError: for values outside their ranges.
    """

    steps: int = 100
    """Most steps of the chain."""
    temperature: tuple[float, float] = (1.0, 0.6)
    """Divides the logits, from first step to last; below 1 draws likelier codes, with less variety."""
    proportion: tuple[float, float] = (0.3, 0.1)
    """Share of positions that take their newly drawn code, from first step to last, in (0, 1]."""
    order: Order = "random"
    """Which positions these are: any, each by itself, as SUNDAE has it; those whose code the prior has least confidence
    in, drawn without replacement, one that is half as likely twice as readily; or all in turn, in the order of a Halton
    sequence, which is spread evenly at every step."""
    min_steps: int = 10
    """A sample is finished once a step changes nothing, but not before this many steps."""
    guidance: float = 1.5
    """How far to go from what is likely in any class (0) past what is likely in the given one (1), at the cost of
    variety; other values than 1 take twice the time. Without classes it is nothing."""

    compile: bool = False
    """Make one program of all that a step does, on a GPU a CUDA graph: a minute to start with, then faster steps."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.steps < 1 or self.min_steps < 1:
            raise UserError(f"steps and min_steps must be at least 1, got {self.steps} and {self.min_steps}")
        if min(self.temperature) <= 0:
            raise UserError(f"temperature must be above 0, got {self.temperature}; use 0.01 for the likeliest codes")
        if self.guidance < 0:
            raise UserError(f"guidance must not be negative, got {self.guidance}")
        if not 0 < min(self.proportion) <= max(self.proportion) <= 1:
            raise UserError(f"proportion must be above 0 and at most 1 from first step to last, got {self.proportion}")

    def calls(self, _h: int, _w: int) -> int:
        """How often a callback hears of progress, at most."""
        return self.steps

    def at(self, step: int) -> tuple[float, float]:
        """Temperature and proportion of a step, counted from 0."""
        return between(self.temperature, step, self.steps), between(self.proportion, step, self.steps)


@dataclass(frozen=True)
class SundaeFilling(SundaeSampling):
    """The same for the missing part of given codes: cooler, and in less time, as it is to agree with what surrounds it
    before it is to be one of many, and has that to start from."""

    steps: int = 60
    temperature: tuple[float, float] = (0.7, 0.3)
    proportion: tuple[float, float] = (0.5, 0.2)


@torch.no_grad()
def sample_sundae(
    prior: CodePrior,
    *,
    known: Int64[Tensor, "b h w"],
    known_mask: Bool[Tensor, "b h w"],
    seeds: Int64[Tensor, " b"],
    labels: Int64[Tensor, " b"] | None = None,
    upper: tuple[Int64[Tensor, "b _y _x"], ...] = (),
    sampling: SundaeSampling = SundaeSampling(),
    callback: Callable[[int, Tensor], None] | None = None,
) -> Int64[Tensor, "b h w"]:
    """Fills in the unknown codes by a chain of repairs (arXiv 2112.06749, section 2.3; for inpainting arXiv
    2206.12351).

    Unknown positions start uniform over the codebook. At each step a code is drawn for every position given all of
    them, and every unknown position takes its new code with probability `proportion`, or by another `order` that share
    of them do. A row is finished, and stays,
    once a step changes nothing in it. The loop ends with the last unfinished row.

    On a canvas larger than the prior was trained on, through windows: see `canvas_features`.

    A row's result is a function of its own codes, mask and seed: another batch around it changes nothing but the
    rounding of sums.

    Args:
        prior: in evaluation mode, on the device of the codes.
        known: codes to keep; what stands where the mask is False does not matter.
        known_mask: True = keep.
        seeds: one for each row.
        labels: the class of each row, -1 for any; None is any for all.
        upper: the codes of the levels above, where the prior has any.
        sampling: the chain.
        callback: called after each step with its number, from 0, and the codes as they are.

    Raises:
        UserError: for a known code outside the codebook, a label that the prior has no class for, or upper levels that
            do not go with it.
    """
    b, h, w = known.shape
    check_given(prior, known, known_mask, labels)
    codes = torch.where(known_mask, known, prior.head.random_codes(derive(seeds, Stream.SUNDAE_START), h, w))
    unfinished = torch.ones(b, 1, 1, dtype=torch.bool, device=known.device)
    had_turn = torch.zeros(b, 1, dtype=torch.int64, device=known.device)
    repair = fused(_repair, codes.device) if sampling.compile else _repair
    for step in range(sampling.steps):
        given = (*sampling.at(step), labels, upper, derive(seeds, Stream.SUNDAE_STEP, step), sampling)
        codes, had_turn, changed = repair(prior, codes, ~known_mask, unfinished, had_turn, *given)
        if callback is not None:
            callback(step, codes)
        if step + 1 >= sampling.min_steps:
            unfinished = unfinished & changed
            if not unfinished.any():
                break
    return codes


def _repair(
    prior: CodePrior,
    codes: Int64[Tensor, "b h w"],
    unknown: Bool[Tensor, "b h w"],
    unfinished: Bool[Tensor, "b 1 1"],
    had_turn: Int64[Tensor, "b 1"],
    temperature: float | Tensor,
    proportion: float | Tensor,
    labels: Int64[Tensor, " b"] | None,
    upper: tuple[Int64[Tensor, "b _y _x"], ...],
    seeds: Int64[Tensor, " b"],
    sampling: SundaeSampling,
) -> tuple[Int64[Tensor, "b h w"], Int64[Tensor, "b 1"], Bool[Tensor, "b 1 1"]]:
    """One step: the codes after it, how many turns there were by then, and whether anything in a row changed."""
    head, (_, h, w) = prior.head, codes.shape
    draws = uniform(derive(seeds, Stream.SUNDAE_PROPOSAL), h * w, len(head.radices))
    seen = guided_features(
        prior, codes, labels, upper, derive(seeds, Stream.SUNDAE_WINDOW), temperature, sampling.guidance
    )
    proposal = head.sample(uniforms=draws, top_p=sampling.top_p, **seen).view_as(codes)
    if sampling.order == "random":
        turn = uniform(derive(seeds, Stream.SUNDAE_UPDATE), h, w) < proportion
    else:
        nll = head.nll(codes=codes.flatten(1), **seen) if sampling.order == "confidence" else None
        turn, had_turn = select_positions(unknown, proportion, had_turn, nll, derive(seeds, Stream.SUNDAE_UPDATE))
    update = turn & unknown & unfinished
    changed = update & (proposal != codes)
    return torch.where(update, proposal, codes), had_turn, changed.any(dim=(1, 2), keepdim=True)


SUNDAE = Method(
    objective=Sundae,
    objective_config=SundaeConfig,
    sampler=sample_sundae,
    sampling=SundaeSampling,
    filling=SundaeFilling,
)
"""Learns to repair corrupted codes, and draws by a chain of repairs: for bodies that see the whole grid."""
