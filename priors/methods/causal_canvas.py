"""Causal priors on canvases larger than the grids in training, through overlapping windows of the trained size.

For networks that cannot read grids larger than those in training, such as the transformer.

Legend: b batch, h w canvas, y x window, n positions (n = h w), d width.
"""

from collections.abc import Generator
from itertools import groupby, product

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from smalti.priors.base import CausalPrior
from smalti.priors.conditioning import Condition
from smalti.priors.methods.canvas import Windows, window_shares
from smalti.priors.row_caches import RowCaches


def exceeds_training(prior: CausalPrior, h: int, w: int) -> bool:
    """Returns whether a grid is larger than those in training, in one direction at least."""
    return h > prior.level.height or w > prior.level.width


def window_features(
    prior: CausalPrior,
    codes: Int64[Tensor, "b h w"],
    condition: Condition | None,
    upper: tuple[Int64[Tensor, "b _y _x"], ...],
) -> Float[Tensor, "b n d"]:
    """Computes `prior.features` on a canvas: each position's features come from its own window (see `chosen_windows`).

    The codes before a position in its window are before it on the canvas too. So the features are causal, and the
    product of the head's probabilities is an exact likelihood of the canvas.
    """
    b, h, w = codes.shape
    windows = Windows.over(prior, h, w, upper)
    row, column = (each.to(codes.device) for each in chosen_windows(windows, h, w))
    return windows.features(prior, codes, condition, upper, row[:, None].expand(b, h, w), column.expand(b, h, w))


def decode_windows(
    prior: CausalPrior,
    b: int,
    h: int,
    w: int,
    condition: Condition | None,
    upper: tuple[Int64[Tensor, "b _y _x"], ...],
    caches: RowCaches,
) -> Generator[Float[Tensor, "b 1 d"], Int64[Tensor, "b 1"], None]:
    """Computes `window_features` one position at a time; see `CausalPrior.decode_stepwise`.

    Each window is decoded stepwise by itself. It falls behind while the positions of other windows are decoded, and
    then reads their codes one after the other, so every position is computed once for each window that reads it.
    """
    windows = Windows.over(prior, h, w, upper)
    y, x = windows.size
    rows, columns = (each.tolist() for each in chosen_windows(windows, h, w))
    codes = torch.zeros(b, h, w, dtype=torch.int64, device=prior.device)
    for row, canvas_rows in groupby(range(h), rows.__getitem__):
        caches.clear()  # of the windows above
        caches.keep(codes)
        decoders = [
            prior.decode_stepwise(
                b, y, x, condition, tuple(windows.crop(each, row, column, h // each.shape[1]) for each in upper), caches
            )
            for column in range(len(windows.lefts))
        ]
        decoded = [0] * len(decoders)  # positions of each window
        for r, c in product(canvas_rows, range(w)):
            column = columns[c]
            steps, before = decoders[column], windows.crop(codes, row, column).flatten(1)
            end = (r - int(windows.tops[row])) * x + c - int(windows.lefts[column]) + 1
            *_, features = (
                steps.send(before[:, position - 1 : position]) if position else next(steps)
                for position in range(decoded[column], end)
            )
            decoded[column] = end
            codes[:, r, c] = (yield features)[:, 0]


def chosen_windows(windows: Windows, h: int, w: int) -> tuple[Int64[Tensor, " h"], Int64[Tensor, " w"]]:
    """Returns the row of windows of each row of a canvas, and the column of windows of each column.

    Among the windows that cover a position it is the one with most context before it: the highest, and of these the one
    whose middle column is nearest.
    """
    row, _ = window_shares(windows.tops, h, windows.size[0])
    first, shares = window_shares(windows.lefts, w, windows.size[1])
    return row, first + shares.argmax(1)
