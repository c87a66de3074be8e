"""Features on canvases larger than the grids in training, through overlapping windows of the trained size.

Samplers of non-causal priors read every grid through `canvas_features`. Which codes change at a step,
and when, is up to the samplers. Causal priors are in `causal_canvas.py`.

Legend: b batch, h w canvas, y x window, n positions (n = h w), d width.
"""

import math
from bisect import bisect_right
from dataclasses import dataclass
from itertools import product

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from smalti.core.randomness import uniform
from smalti.priors.base import CodePrior
from smalti.priors.conditioning import Condition
from smalti.priors.head import inverse_cdf

POSITIONS_AT_ONCE = 2**18
"""The most positions of windows whose features are computed in one call of the network."""


def canvas_features(
    prior: CodePrior,
    codes: Int64[Tensor, "b h w"],
    condition: Condition | None,
    upper: tuple[Int64[Tensor, "b _y _x"], ...],
    seeds: Int64[Tensor, " b"],
) -> Float[Tensor, "b n d"]:
    """Computes `prior.features` on a canvas of any size: each position's features come from one window that covers it.

    Windows start at most half a window apart. At each call every position draws one of its windows at
    random. A code sampled from the features therefore follows the average of the windows' distributions,
    at the cost of sampling from one. A window's weight falls with the distance of the position from the
    window's centre, where its context is largest, which keeps borders of windows hardly visible
    (docs/reproductions/priors.md has a measurement). A canvas of at most the trained size is a single window.

    Args:
        prior: trained on grids of `prior.level`.
        codes: the codes on the canvas.
        condition: as for `CodePrior.features`.
        upper: as for `CodePrior.features`. Windows start where a code of every coarser level starts.
        seeds: one per row and step; they decide the choice of windows.
    """
    b, h, w = codes.shape
    if (h, w) == window_size(prior, h, w):
        return prior.features(codes, condition, upper)
    windows = Windows.over(prior, h, w, upper)
    draws = uniform(seeds, h, w, 2)
    (first_row, row_shares), (first_column, column_shares) = (
        [each.to(codes.device) for each in window_shares(starts, size, window)]
        for starts, size, window in zip((windows.tops, windows.lefts), (h, w), windows.size, strict=True)
    )
    row = first_row[:, None] + inverse_cdf(row_shares[:, None].expand(b, h, w, -1), draws[..., 0])  # b h w
    column = first_column + inverse_cdf(column_shares.expand(b, h, w, -1), draws[..., 1])
    return windows.features(prior, codes, condition, upper, row, column)


def window_size(prior: CodePrior, h: int, w: int) -> tuple[int, int]:
    """Returns the rows and columns of a window on a canvas: those of training, or of the canvas if it has fewer."""
    return min(h, prior.level.height), min(w, prior.level.width)


@dataclass(frozen=True)
class Windows:
    """Overlapping windows of one size on a canvas, numbered by rows and columns of windows.

    Attributes:
        size: rows and columns of a window.
        tops: the first row of the windows in each row of windows.
        lefts: the first column of the windows in each column of windows.
    """

    size: tuple[int, int]
    tops: Int64[Tensor, " rows"]
    lefts: Int64[Tensor, " columns"]

    @classmethod
    def over(cls, prior: CodePrior, h: int, w: int, upper: tuple[Int64[Tensor, "b _y _x"], ...]) -> "Windows":
        """Returns windows of the trained size, at most half a window apart.

        They start where a code of every coarser level starts.
        """
        step = math.lcm(*(h // coarser.shape[1] for coarser in upper))
        size = window_size(prior, h, w)
        tops, lefts = (window_starts(n // step, window // step) * step for n, window in zip((h, w), size, strict=True))
        return cls(size, tops, lefts)

    def crop(self, grids: Int64[Tensor, "b _h _w"], row: int, column: int, factor: int = 1) -> Int64[Tensor, "b _y _x"]:
        """Returns a window of grids that are `factor` times coarser than the canvas."""
        top, left = int(self.tops[row]) // factor, int(self.lefts[column]) // factor
        return grids[:, top : top + self.size[0] // factor, left : left + self.size[1] // factor]

    def features(
        self,
        prior: CodePrior,
        codes: Int64[Tensor, "b h w"],
        condition: Condition | None,
        upper: tuple[Int64[Tensor, "b _y _x"], ...],
        row: Int64[Tensor, "b h w"],
        column: Int64[Tensor, "b h w"],
    ) -> Float[Tensor, "b n d"]:
        """Computes the features of each position in the window whose row and column of windows are given for it."""
        (b, h, w), (y, x), device = codes.shape, self.size, codes.device
        windows = len(self.tops) * len(self.lefts)

        def crops(grids: Tensor, factor: int = 1) -> Tensor:
            numbers = product(range(len(self.tops)), range(len(self.lefts)))
            return torch.stack([self.crop(grids, *each, factor) for each in numbers], 1).flatten(0, 1)

        window_condition = None if condition is None else condition.repeat_interleave(windows, 0)
        window_upper = tuple(crops(coarser, h // coarser.shape[1]) for coarser in upper)
        features = _in_batches(prior, crops(codes), window_condition, window_upper)  # (b windows) (y x) d
        down = torch.arange(h, device=device)[:, None] - self.tops.to(device)[row]
        right = torch.arange(w, device=device) - self.lefts.to(device)[column]
        index = ((row * len(self.lefts) + column) * y + down) * x + right
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
    condition: Condition | None,
    upper: tuple[Int64[Tensor, "m _y _x"], ...],
) -> Float[Tensor, "m n d"]:
    """Computes the features of all windows, at most `POSITIONS_AT_ONCE` positions at a time."""
    size = max(1, POSITIONS_AT_ONCE // windows[0].numel())
    batches = [slice(start, start + size) for start in range(0, len(windows), size)]
    features = [
        prior.features(
            windows[rows], None if condition is None else condition[rows], tuple(each[rows] for each in upper)
        )
        for rows in batches
    ]
    return features[0] if len(features) == 1 else torch.cat(features)
