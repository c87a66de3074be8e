"""Features on canvases larger than the grids in training, through overlapping windows of the trained size.

Samplers of non-causal priors read every grid through `canvas_features`. Which codes change at a step,
and when, is up to the samplers.

Legend: b batch, h w canvas, y x window, n positions (n = h w), d width.
"""

import math
from bisect import bisect_right

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from smalti.core.randomness import uniform
from smalti.priors.base import CodePrior
from smalti.priors.head import inverse_cdf

POSITIONS_AT_ONCE = 2**18
"""The most positions of windows whose features are computed in one call of the network."""


def canvas_features(
    prior: CodePrior,
    codes: Int64[Tensor, "b h w"],
    labels: Int64[Tensor, " b"] | None,
    upper: tuple[Int64[Tensor, "b _y _x"], ...],
    seeds: Int64[Tensor, " b"],
) -> Float[Tensor, "b n d"]:
    """Computes `prior.features` on a canvas of any size: each position's features come from one window that covers it.

    Windows start at most half a window apart. At each call every position draws one of its windows at
    random. A code sampled from the features therefore follows the average of the windows' distributions,
    at the cost of sampling from one. A window's weight falls with the distance of the position from the
    window's centre, where its context is largest, so no seams appear. A canvas of at most the trained
    size is a single window.

    Args:
        prior: trained on grids of `prior.level`.
        codes: the codes on the canvas.
        labels: as for `CodePrior.features`.
        upper: as for `CodePrior.features`. Windows start where a code of every coarser level starts.
        seeds: one per row and step; they decide the choice of windows.
    """
    b, h, w = codes.shape
    y, x = min(h, prior.level.height), min(w, prior.level.width)
    if (h, w) == (y, x):
        return prior.features(codes, labels, upper)
    factors = [h // coarser.shape[1] for coarser in upper]
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

    window_labels = None if labels is None else labels.repeat_interleave(windows)
    window_upper = tuple(crops(coarser, factor) for coarser, factor in zip(upper, factors, strict=True))
    features = _in_batches(prior, crops(codes, 1), window_labels, window_upper)  # (b windows) (y x) d
    draws = uniform(seeds, h, w, 2)
    (first_row, row_shares), (first_column, column_shares) = (
        [each.to(codes.device) for each in window_shares(starts, size, window)]
        for starts, size, window in ((tops, h, y), (lefts, w, x))
    )
    row = first_row[:, None] + inverse_cdf(row_shares[:, None].expand(b, h, w, -1), draws[..., 0])  # b h w
    column = first_column + inverse_cdf(column_shares.expand(b, h, w, -1), draws[..., 1])
    down = torch.arange(h, device=codes.device)[:, None] - tops[row]
    right = torch.arange(w, device=codes.device) - lefts[column]
    index = ((row * len(lefts) + column) * y + down) * x + right
    flat = features.view(b, windows * y * x, -1)
    return flat.gather(1, index.view(b, -1, 1).expand(-1, -1, flat.shape[-1]))


def window_starts(size: int, window: int) -> Int64[Tensor, " windows"]:
    """Returns the first positions of windows along an axis: evenly spaced, at most half a window apart.

    The last window ends at the end of the axis.
    """
    gaps = -(-(size - window) // max(1, window // 2))
    return torch.arange(gaps + 1) * (size - window) // max(1, gaps)


def window_shares(
    starts: Int64[Tensor, " windows"], size: int, window: int
) -> tuple[Int64[Tensor, " size"], Float[Tensor, "size k"]]:
    """Returns the probabilities of the windows at each position: proportional to the distance to their nearer end.

    Only the few windows that cover a position are listed, so that memory grows with the canvas and not with its square.

    Returns:
        The number of the first window that covers each position, and the probabilities of that window and the next
        k - 1, where k is the most windows that cover one position.
    """
    listed = starts.tolist()
    firsts = [bisect_right(listed, position - window) for position in range(size)]
    lasts = [bisect_right(listed, position) - 1 for position in range(size)]
    most = max(last - first for first, last in zip(firsts, lasts, strict=True)) + 1
    first = torch.tensor(firsts)
    number = first[:, None] + torch.arange(most)  # size k
    offset = torch.arange(size)[:, None] - torch.tensor(listed)[number.clamp(max=len(listed) - 1)]
    weights = torch.minimum(offset + 1, window - offset).clamp(min=0).float()
    weights = weights.masked_fill(number >= len(listed), 0)
    return first, weights / weights.sum(1, keepdim=True)


def _in_batches(
    prior: CodePrior,
    windows: Int64[Tensor, "m y x"],
    labels: Int64[Tensor, " m"] | None,
    upper: tuple[Int64[Tensor, "m _y _x"], ...],
) -> Float[Tensor, "m n d"]:
    """Computes the features of all windows, at most `POSITIONS_AT_ONCE` positions at a time."""
    size = max(1, POSITIONS_AT_ONCE // windows[0].numel())
    batches = [slice(start, start + size) for start in range(0, len(windows), size)]
    features = [
        prior.features(windows[rows], None if labels is None else labels[rows], tuple(each[rows] for each in upper))
        for rows in batches
    ]
    return features[0] if len(features) == 1 else torch.cat(features)
