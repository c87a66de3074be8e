"""Drawing grids of codes from a prior. Generation is inpainting with nothing known: there is one path.

Legend: b batch, h w grid, n positions, k digits.
"""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from smalti.core.errors import UserError
from smalti.core.randomness import gumbel
from smalti.priors.base import CodePrior
from smalti.priors.methods.canvas import canvas_features
from smalti.priors.methods.orders import halton_ranks, ranks


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


def select_positions(
    unknown: Bool[Tensor, "b h w"],
    proportion: float | Tensor,
    had_turn: Int64[Tensor, "b 1"],
    nll: Float[Tensor, "b n"] | None,
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
    if nll is None:
        keys = halton_ranks(h, w).to(unknown.device, torch.float32).expand(b, -1)
    else:
        keys = -nll - gumbel(seeds, h * w)
    place = ranks(keys.masked_fill(~unknown.flatten(1), torch.inf))  # b n
    if nll is None:
        place = (place - had_turn) % number.clamp_min(1)
    return (place < count).view(b, h, w) & unknown, had_turn + count


def guided_features(
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
