"""Numbers that judge images: against the truth, pixel by pixel; and as a set, by the features of a network.

Which network, and what it sees, is in `extractors.py`; whose images are judged, in `pipeline/evaluate.py`.

Legend: n images, d features, c channels, h w pixels, k fills.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor

from smalti.core.errors import UserError

NEIGHBOURS = 3
"""Of precision and recall, as in the paper."""
_ROWS_AT_ONCE = 1024  # of a matrix of distances


class Moments:
    """Mean and covariance of features that come a batch at a time, in float64 and without the sums that cancel.

    Batches are joined pairwise (Chan, Golub and LeVeque 1979), so the order and size of the batches change nothing but
    the rounding.

    Attributes:
        count: rows so far.
        mean: `(d,)`.
    """

    def __init__(self, width: int) -> None:
        self.count = 0
        self.mean: Float64[Tensor, " d"] = torch.zeros(width, dtype=torch.float64)
        self._scatter = torch.zeros(width, width, dtype=torch.float64)

    @classmethod
    def of(cls, features: Float[Tensor, "b d"]) -> "Moments":
        """Those of so many rows."""
        return cls(features.shape[1]).update(features)

    def update(self, features: Float[Tensor, "b d"]) -> "Moments":
        """Adds rows, and gives itself back."""
        rows = features.detach().cpu().double()  # moved first: Apple's GPUs have no float64
        if not len(rows):
            return self
        mean = rows.mean(0)
        total, apart = self.count + len(rows), mean - self.mean
        centred = rows - mean
        self._scatter += centred.T @ centred + torch.outer(apart, apart) * (self.count * len(rows) / total)
        self.mean += apart * (len(rows) / total)
        self.count = total
        return self

    @property
    def covariance(self) -> Float64[Tensor, "d d"]:
        """Unbiased, `(d, d)`.

        Raises:
            UserError: of fewer than two rows.
        """
        if self.count < 2:
            raise UserError(f"{self.count} image(s) have no covariance; give at least 2")
        return self._scatter / (self.count - 1)


def frechet_distance(a: Moments, b: Moments) -> float:
    """The squared Fréchet (2-Wasserstein) distance of the two Gaussians with these moments (arXiv 1706.08500).

    |mean_a - mean_b|^2 + tr(A + B - 2 (A B)^(1/2)). The trace of the root is taken from the eigenvalues of the
    symmetric A^(1/2) B A^(1/2), which are those of A B, and real: so fewer images than features do no harm to the
    arithmetic. They do bias the distance upwards: compare only distances of equally many images.
    """
    cov_a, cov_b = a.covariance, b.covariance
    values, vectors = torch.linalg.eigh(cov_a)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    trace_of_root = torch.linalg.eigvalsh(root @ cov_b @ root).clamp(min=0).sqrt().sum()
    return float((a.mean - b.mean).square().sum() + cov_a.trace() + cov_b.trace() - 2 * trace_of_root)


def nearest(
    queries: Float[Tensor, "q d"], references: Float[Tensor, "n d"]
) -> tuple[Float[Tensor, " q"], Int64[Tensor, " q"]]:
    """For each query, the Euclidean distance to its nearest reference, and which that is."""
    found = [_distances(block, references).min(1) for block in queries.split(_ROWS_AT_ONCE)]
    return torch.cat([each.values for each in found]), torch.cat([each.indices for each in found])


class PrecisionRecall(NamedTuple):
    """Shares in [0, 1]: of generated images that are like real ones, and of real ones that the generated are like."""

    precision: float
    recall: float


def precision_recall(
    real: Float[Tensor, "n d"], generated: Float[Tensor, "m d"], neighbours: int = NEIGHBOURS
) -> PrecisionRecall:
    """Improved precision and recall (arXiv 1904.06991, Eqs. 1 and 2).

    An image is like a set if it is no farther from one of the set than that one's own `neighbours`-th nearest in it.

    Raises:
        UserError: if a set has no more images than `neighbours`.
    """
    if min(len(real), len(generated)) <= neighbours:
        raise UserError(
            f"precision and recall need more than {neighbours} images, not {len(generated)} and {len(real)}"
        )
    return PrecisionRecall(
        precision=float(_inside(generated, real, neighbours).double().mean()),
        recall=float(_inside(real, generated, neighbours).double().mean()),
    )


def _distances(a: Tensor, b: Tensor) -> Tensor:
    """Of every row of a to every row of b; in float64, as the products that make it fast cancel in float32."""
    return torch.cdist(a.double(), b.double())


def _inside(points: Tensor, members: Tensor, neighbours: int) -> Tensor:
    """Which points lie within the ball of any member that reaches to its `neighbours`-th nearest other member."""
    blocks = members.split(_ROWS_AT_ONCE)
    # each member's nearest is itself, at distance 0
    radii = torch.cat([_distances(block, members).kthvalue(neighbours + 1, dim=1).values for block in blocks])
    return torch.cat([(_distances(block, members) <= radii).any(1) for block in points.split(_ROWS_AT_ONCE)])
