"""Drawing grids of codes from a prior. Generation is inpainting with nothing known: there is one path.

Legend: b batch, h w grid, n positions, k digits.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from smalti.errors import UserError
from smalti.priors.canvases import canvas_features
from smalti.priors.orders import Order, halton_ranks, ranks
from smalti.priors.prior import CodePrior
from smalti.priors.steps import fused
from smalti.randomness import derive, gumbel, uniform

START, STEP, PROPOSE, UPDATE, LABEL, WINDOW = range(6)
"""Streams of a row's seed: what each of its draws is for."""


def between(ends: tuple[float, float], step: int, steps: int) -> float:
    """The value at a step, counted from 0, on the straight way from the first of `steps` to the last."""
    first, last = ends
    return first + step / max(steps - 1, 1) * (last - first)


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """What every way of drawing codes can be told.

    Raises:
        UserError: for a share that is none.
    """

    top_p: float = 1.0
    """Each digit of a code is drawn from the fewest values that have this share of the probability together; below 1
    leaves unlikely ones out."""

    def __post_init__(self) -> None:
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p must be above 0 and at most 1, got {self.top_p}; 1 leaves nothing out")


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
    codes = torch.where(known_mask, known, prior.head.random_codes(derive(seeds, START), h, w))
    unfinished = torch.ones(b, 1, 1, dtype=torch.bool, device=known.device)
    had_turn = torch.zeros(b, 1, dtype=torch.int64, device=known.device)
    repair = fused(_repair, codes.device) if sampling.compile else _repair
    for step in range(sampling.steps):
        given = (*sampling.at(step), labels, upper, derive(seeds, STEP, step), sampling)
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
    draws = uniform(derive(seeds, PROPOSE), h * w, len(head.radices))
    seen = look(prior, codes, labels, upper, derive(seeds, WINDOW), temperature, sampling.guidance)
    proposal = head.sample(uniforms=draws, top_p=sampling.top_p, **seen).view_as(codes)
    if sampling.order == "random":
        turn = uniform(derive(seeds, UPDATE), h, w) < proportion
    else:
        surprise = head.nll(codes=codes.flatten(1), **seen) if sampling.order == "confidence" else None
        turn, had_turn = take_turns(unknown, proportion, had_turn, surprise, derive(seeds, UPDATE))
    update = turn & unknown & unfinished
    changed = update & (proposal != codes)
    return torch.where(update, proposal, codes), had_turn, changed.any(dim=(1, 2), keepdim=True)


def take_turns(
    unknown: Bool[Tensor, "b h w"],
    proportion: float | Tensor,
    had_turn: Int64[Tensor, "b 1"],
    surprise: Float[Tensor, "b n"] | None,
    seeds: Int64[Tensor, " b"],
) -> tuple[Bool[Tensor, "b h w"], Int64[Tensor, "b 1"]]:
    """Whose turn it is, that share of a row's unknown positions, rounded up; and how many turns there were by then.

    Args:
        unknown: the positions that have turns at all.
        proportion: the share, in (0, 1].
        had_turn: how many turns each row has had.
        surprise: -log p of the codes as they are: they are drawn with weights 1 / p, without replacement (Gumbel's top
            k). None lets positions follow each other in the order of a Halton sequence.
        seeds: for these draws.
    """
    (b, h, w), number = unknown.shape, unknown.sum((1, 2))[:, None]  # b 1
    count = (proportion * number).ceil().long()
    if surprise is None:
        keys = halton_ranks(h, w).to(unknown.device, torch.float32).expand(b, -1)
    else:
        keys = -surprise - gumbel(seeds, h * w)
    place = ranks(keys.masked_fill(~unknown.flatten(1), torch.inf))  # b n
    if surprise is None:
        place = (place - had_turn) % number.clamp_min(1)
    return (place < count).view(b, h, w) & unknown, had_turn + count


def look(
    prior: CodePrior,
    codes: Int64[Tensor, "b h w"],
    labels: Int64[Tensor, " b"] | None,
    upper: tuple[Int64[Tensor, "b _y _x"], ...],
    seeds: Int64[Tensor, " b"],
    temperature: float | Tensor,
    guidance: float,
) -> dict[str, Any]:
    """What the head takes to draw codes from and to weigh them by, beside draws and codes; guided, both answers of the
    network come from one pass. `seeds` choose windows, see `canvas_features`."""
    if labels is None or not prior.classes or guidance == 1:
        return {"features": canvas_features(prior, codes, labels, upper, seeds), "temperature": temperature}
    told = torch.cat([labels, torch.full_like(labels, -1)])
    above = tuple(torch.cat([of_level, of_level]) for of_level in upper)
    both = canvas_features(prior, torch.cat([codes, codes]), told, above, torch.cat([seeds, seeds]))
    features, without = both.chunk(2)
    return {"features": features, "temperature": temperature, "without_class": without, "guidance": guidance}


def check_given(
    prior: CodePrior,
    known: Int64[Tensor, "b h w"],
    known_mask: Bool[Tensor, "b h w"],
    labels: Int64[Tensor, " b"] | None,
) -> None:
    """Refuses what the prior does not know.

    Raises:
        UserError: for a known code outside the codebook, or a label that the prior has no class for.
    """
    kept = known[known_mask]
    if kept.numel() and not 0 <= kept.min() <= kept.max() < prior.head.codebook_size:
        raise UserError(
            f"known codes must be from 0 to {prior.head.codebook_size - 1}, got {int(kept.min())} to {int(kept.max())}"
        )
    if labels is not None and labels.numel() and not -1 <= labels.min() <= labels.max() < prior.classes:
        raise UserError(
            f"labels must be from -1 (any class) to {prior.classes - 1}, got {int(labels.min())} to {int(labels.max())}"
        )
