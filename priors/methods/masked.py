"""Masked codes: learning to name the hidden codes of a grid, and drawing grids in rounds that each show some more of
them. The strongest neighbour of step-unrolled denoising, on the same network and head.

Legend: b batch, h w grid, n positions, k digits.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from smalti.core.errors import UserError
from smalti.core.randomness import Stream, derive, gumbel, uniform
from smalti.priors.base import CodePrior, Method, ObjectiveConfig
from smalti.priors.methods.compiled_step import fused
from smalti.priors.methods.orders import Order, halton_ranks, ranks
from smalti.priors.methods.sampling import Sampling, between, check_given, guided_features

HIDDEN = -1
"""Stands in a grid for a code that is not shown."""


@dataclass(frozen=True)
class MaskedConfig(ObjectiveConfig):
    """Masked codes."""


class MaskedCodes(nn.Module):
    """Naming hidden codes from shown ones (MaskGIT, arXiv 2202.04200, Eq. 1 and section 3.1).

    In each row ceil(gamma(r) n) positions are hidden, r uniform on [0, 1), gamma(r) = cos(pi r / 2): most of them
    mostly. The loss is the mean over rows of the mean cross-entropy of their hidden codes.

    Deviation: Eq. 1 sums over the hidden codes. A row's mean makes a row with few of them, which has seen the most,
    count as much as one with many, and keeps the loss the same in whatever slices a batch is cut.
    """

    def __init__(self, prior: CodePrior, config: MaskedConfig) -> None:
        super().__init__()
        self.prior = prior
        self.config = config

    def forward(self, batch: dict[str, Any]) -> tuple[Float[Tensor, ""], dict[str, Float[Tensor, ""]]]:
        """The loss, in nats per hidden code, and its parts.

        Args:
            batch: `codes` int64 `(b, h, w)`, what `CodePrior.told` reads, and `seeds` int64 `(b,)`.

        Returns:
            The loss, and detached: `nll_1`, `nll_2`, ... of each digit, which sum to the loss; `accuracy`, the mean
            share of hidden codes that the likeliest digits hit; `hidden`, the share of codes that were.
        """
        codes, seeds = batch["codes"], batch["seeds"]
        more = self.prior.conditioning(batch, self.config.label_dropout if self.training else 0.0)
        hidden = hide(seeds, codes[0].numel())  # b n
        features = self.prior.features(codes.masked_fill(hidden.view_as(codes), HIDDEN), **more)
        nll, hits = self.prior.head.score(features, codes.flatten(1))  # b n k, b n
        weight = hidden / hidden.sum(1, keepdim=True) / len(codes)  # b n, in all 1
        digits = (nll * weight[..., None]).sum((0, 1))
        metrics = {f"nll_{i + 1}": value for i, value in enumerate(digits.detach())}
        return digits.sum(), {**metrics, "accuracy": (hits * weight).sum(), "hidden": hidden.float().mean()}


def hide(seeds: Int64[Tensor, " b"], positions: int) -> Bool[Tensor, "b n"]:
    """Which positions are hidden in training; at least one in each row."""
    count = (torch.cos(uniform(derive(seeds, Stream.MASKED_RATE), 1) * math.pi / 2) * positions).ceil()  # b 1
    return ranks(uniform(derive(seeds, Stream.MASKED_POSITIONS), positions)) < count


@dataclass(frozen=True)
class MaskedSampling(Sampling):
    """How hidden codes are shown. Temperature goes linearly from the first round's value to the last's.

    Raises:
        UserError: for values outside their ranges.
    """

    steps: int = 16
    """Rounds; each shows more codes than the one before (MaskGIT's cosine schedule)."""
    order: Order = "halton"
    """Which codes are shown first: those spread evenly over the grid (arXiv 2503.17076), those the prior is surest of
    (MaskGIT), or any."""
    temperature: tuple[float, float] = (1.0, 1.0)
    """Divides the logits, from first round to last; below 1 draws likelier codes, with less variety."""
    choice_temperature: float = 4.5
    """Noise in the order by confidence, falling to none at the end; without it the surest places all look alike."""
    guidance: float = 1.5
    """How far to go from what is likely in any class (0) past what is likely in the given one (1), at the cost of
    variety; other values than 1 take twice the time. Without classes it is nothing."""

    compile: bool = False
    """Make one program of all that a round does, on a GPU a CUDA graph: a minute to start with, then faster rounds."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.steps < 1:
            raise UserError(f"steps must be at least 1, got {self.steps}")
        if min(self.temperature) <= 0:
            raise UserError(f"temperature must be above 0, got {self.temperature}; use 0.01 for the likeliest codes")
        if self.choice_temperature < 0 or self.guidance < 0:
            raise UserError(
                f"choice_temperature and guidance must not be negative, got {self.choice_temperature} and "
                f"{self.guidance}"
            )

    def calls(self, _h: int, _w: int) -> int:
        """How often a callback hears of progress."""
        return self.steps


@dataclass(frozen=True)
class MaskedFilling(MaskedSampling):
    """The same for the missing part of given codes: cooler, as it is to agree with what surrounds it before it is to be
    one of many."""

    temperature: tuple[float, float] = (0.7, 0.3)


@torch.no_grad()
def sample_masked(
    prior: CodePrior,
    *,
    known: Int64[Tensor, "b h w"],
    known_mask: Bool[Tensor, "b h w"],
    seeds: Int64[Tensor, " b"],
    labels: Int64[Tensor, " b"] | None = None,
    upper: tuple[Int64[Tensor, "b _y _x"], ...] = (),
    sampling: MaskedSampling = MaskedSampling(),
    callback: Callable[[int, Tensor], None] | None = None,
) -> Int64[Tensor, "b h w"]:
    """Fills in the unknown codes in rounds (MaskGIT, arXiv 2202.04200, section 3.2).

    All unknown codes begin hidden. In round t of T one is drawn for each that still is, and all but
    floor(cos(pi t / 2T) times the unknown ones) of them are shown from then on: the others are hidden again and drawn
    anew. A row's result is a function of its own codes, mask and seed.

    Args:
        prior: in evaluation mode, on the device of the codes; one that knows hidden codes.
        known: codes to keep; what stands where the mask is False does not matter.
        known_mask: True = keep.
        seeds: one for each row.
        labels: the class of each row, -1 for any; None is any for all.
        upper: the codes of the levels above, where the prior has any.
        sampling: rounds, their order, temperatures and guidance.
        callback: called after each round with its number, from 0, and the codes as they are, hidden ones as drawn.

    Raises:
        UserError: for a known code outside the codebook, a label that the prior has no class for, or upper levels that
            do not go with it.
    """
    check_given(prior, known, known_mask, labels)
    b, h, w = known.shape
    hidden, codes = ~known_mask.flatten(1), known.flatten(1)  # b n
    unknown = hidden.sum(1, keepdim=True)  # b 1
    show = fused(_show, codes.device) if sampling.compile else _show
    for step in range(sampling.steps):
        done = (step + 1) / sampling.steps
        temperature = between(sampling.temperature, step, sampling.steps)
        ranked = (
            derive(seeds, Stream.MASKED_RANK) if sampling.order == "random" else derive(seeds, step, Stream.MASKED_RANK)
        )
        given = (temperature, done, math.cos(math.pi / 2 * done), labels, upper, derive(seeds, step), ranked, sampling)
        codes, hidden = show(prior, codes.view(b, h, w), hidden, unknown, *given)
        if callback is not None:
            callback(step, codes.view(b, h, w))
    return rearrange(codes, "b (h w) -> b h w", h=h)


def _show(
    prior: CodePrior,
    codes: Int64[Tensor, "b h w"],
    hidden: Bool[Tensor, "b n"],
    unknown: Int64[Tensor, "b 1"],
    temperature: float | Tensor,
    done: float | Tensor,
    left: float | Tensor,
    labels: Int64[Tensor, " b"] | None,
    upper: tuple[Int64[Tensor, "b _y _x"], ...],
    seeds: Int64[Tensor, " b"],
    ranked: Int64[Tensor, " b"],
    sampling: MaskedSampling,
) -> tuple[Int64[Tensor, "b n"], Bool[Tensor, "b n"]]:
    """One round: the codes after it, and which of them are hidden again.

    Args:
        prior: see `sample_masked`, as labels, upper and sampling.
        codes: before it; what stands where they are hidden does not matter.
        hidden: which are.
        unknown: how many are not known.
        temperature: divides the logits.
        done: the share of the rounds that is over with this one.
        left: the share of the unknown codes to hide again.
        labels: of the rows.
        upper: the levels above.
        seeds: for what is drawn.
        ranked: for the order.
        sampling: how.
    """
    head, (b, h, w) = prior.head, codes.shape
    shown = codes.masked_fill(hidden.view_as(codes), HIDDEN)
    how = guided_features(
        prior, shown, labels, upper, derive(seeds, Stream.MASKED_WINDOW), temperature, sampling.guidance
    )
    draws = uniform(derive(seeds, Stream.MASKED_DRAW), h * w, len(head.radices))
    drawn = head.sample(uniforms=draws, top_p=sampling.top_p, **how)
    flat = torch.where(hidden, drawn, codes.flatten(1))
    match sampling.order:
        case "halton":
            keys = -halton_ranks(h, w).to(codes.device, torch.float32).expand(b, -1)
        case "random":
            keys = uniform(ranked, h * w)
        case "confidence":
            noise = sampling.choice_temperature * (1 - done)
            keys = -head.nll(codes=drawn, **how) + noise * gumbel(ranked, h * w)
    # the last to be shown come first
    return flat, hidden & (ranks(keys.masked_fill(~hidden, torch.inf)) < (unknown * left).floor())


MASKED = Method(
    objective=MaskedCodes,
    objective_config=MaskedConfig,
    sampler=sample_masked,
    sampling=MaskedSampling,
    filling=MaskedFilling,
)
"""Learns to name hidden codes, and shows more of them round by round: for bodies that see the whole grid."""
