"""The hourglass that downsamples runs of codes, to compare with the patches of `Hourglass`.

It is a kind of prior of its own, registered on import, which the study of priors trains.

Legend: b batch, n positions, d width, a rotated channels of a head.
"""

import math

from jaxtyping import Float
from torch import Tensor

from smalti.core.models import register
from smalti.priors.networks.hourglass import Hourglass, HourglassConfig, Stage


class RunsStage(Stage):
    """Downsamples runs of consecutive codes in raster order, as many as a patch has, as if the grid were text."""

    def __init__(self, config: HourglassConfig, depth: tuple[int, ...], shorten: tuple[int, ...]) -> None:
        super().__init__(config, depth, shorten)
        self.patch = (1, shorten[0] ** 2) if shorten else None

    def forward(
        self, x: Float[Tensor, "b n d"], grid: tuple[int, int], angles: Float[Tensor, "1 n a"]
    ) -> Float[Tensor, "b n d"]:
        """Maps features to features like `Stage.forward`; the grid is read as a single row."""
        return super().forward(x, (1, math.prod(grid)), angles)


@register
class RunsHourglass(Hourglass):
    """The hourglass of arXiv 2110.13711: it downsamples runs of consecutive codes rather than patches."""

    kind = "hourglass-runs"
    stage_class = RunsStage
