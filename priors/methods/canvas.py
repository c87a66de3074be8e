"""Grids larger than those a prior was trained on, through overlapping windows of the trained size. Which codes change,
and when, is the samplers'.

Legend: b batch, h w canvas, y x window, n positions (n = h w), d width.
"""

import math

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from smalti.core.randomness import uniform
from smalti.priors.base import CodePrior
from smalti.priors.head import inverse_cdf


def canvas_features(
    prior: CodePrior,
    codes: Int64[Tensor, "b h w"],
    labels: Int64[Tensor, " b"] | None,
    upper: tuple[Int64[Tensor, "b _y _x"], ...],
    seeds: Int64[Tensor, " b"],
) -> Float[Tensor, "b n d"]:
    """`prior.features` on a canvas of any size: for each position, those of one window that covers it.

    Windows begin at most half a window apart. Which one of a position's is taken is drawn anew at each call, so that a
    code drawn from the features follows the average of the windows' probabilities: the same distribution as if they
    were computed and averaged, at the cost of one. A window weighs the less in it, the nearer the position is to the
    window's edge, where the window knows least; so no seam is left. A canvas that one window covers is read as it is.

    Args:
        prior: trained on grids of `prior.level`.
        codes: the canvas.
        labels: see `CodePrior.features`.
        upper: likewise; windows begin where the codes there do.
        seeds: of each row, others at each step; they decide the choice of windows.
    """
    b, h, w = codes.shape
    y, x = min(h, prior.level.height), min(w, prior.level.width)
    if (h, w) == (y, x):
        return prior.features(codes, labels, upper)
    factors = [h // of_level.shape[1] for of_level in upper]
    step = math.lcm(*factors)
    tops, lefts = (
        window_starts(size // step, window // step).to(codes.device) * step for size, window in ((h, y), (w, x))
    )
    windows = len(tops) * len(lefts)

    def crops(grids: Tensor, factor: int) -> Tensor:
        size_y, size_x = y // factor, x // factor
        starts = [(top // factor, left // factor) for top in tops.tolist() for left in lefts.tolist()]
        cropped = [grids[:, top : top + size_y, left : left + size_x] for top, left in starts]
        return torch.stack(cropped, 1).flatten(0, 1)  # (b windows) y x

    told = None if labels is None else labels.repeat_interleave(windows)
    above = tuple(crops(of_level, factor) for of_level, factor in zip(upper, factors, strict=True))
    features = prior.features(crops(codes, 1), told, above)  # (b windows) (y x) d
    draws = uniform(seeds, h, w, 2)
    row = inverse_cdf(window_shares(tops, h, y)[:, None].expand(b, h, w, -1), draws[..., 0])  # b h w
    column = inverse_cdf(window_shares(lefts, w, x).expand(b, h, w, -1), draws[..., 1])
    down = torch.arange(h, device=codes.device)[:, None] - tops[row]
    right = torch.arange(w, device=codes.device) - lefts[column]
    index = ((row * len(lefts) + column) * y + down) * x + right
    flat = features.view(b, windows * y * x, -1)
    return flat.gather(1, index.view(b, -1, 1).expand(-1, -1, flat.shape[-1]))


def window_starts(size: int, window: int) -> Int64[Tensor, " windows"]:
    """Where windows begin along an axis: evenly, at most half a window apart, the last one flush with the end."""
    gaps = -(-(size - window) // max(1, window // 2))
    return torch.arange(gaps + 1) * (size - window) // max(1, gaps)


def window_shares(starts: Int64[Tensor, " windows"], size: int, window: int) -> Float[Tensor, "size windows"]:
    """How often each window is taken at each position: in proportion to the distance to its nearer end."""
    into = torch.arange(size, device=starts.device)[:, None] - starts  # positions before this one in the window
    weights = torch.minimum(into + 1, window - into).clamp(min=0).float()
    return weights / weights.sum(1, keepdim=True)
