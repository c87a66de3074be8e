"""Scores of sets of images by features: Fréchet and kernel distance, Inception score, precision, recall, neighbours.

The networks that compute features are in `extractors.py`; errors between two images are in `image_errors.py`.

Legend: n images, d features.
"""

import zipfile
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor

from smalti.core.errors import UserError, one_line

NEIGHBOURS = 3
"""The k of the k-th nearest neighbour in precision and recall, as in the paper."""
_ROWS_AT_ONCE = 1024  # rows in float64, or of a distance matrix, in memory at once


class Moments:
    """Running mean and covariance of features, updated batch by batch in float64.

    Updates follow Chan, Golub and LeVeque (1979), which avoids the cancellation of sums of squares. The order and size
    of the batches affect the rounding only.

    Attributes:
        count: number of rows so far.
        mean: mean of the rows, `(d,)`.
    """

    def __init__(self, width: int) -> None:
        self.count = 0
        self.mean: Float64[Tensor, " d"] = torch.zeros(width, dtype=torch.float64)
        self._scatter = torch.zeros(width, width, dtype=torch.float64)

    @classmethod
    def of(cls, features: Float[Tensor, "b d"]) -> "Moments":
        """Computes the moments of one set of features."""
        return cls(features.shape[1]).update(features)

    def update(self, features: Float[Tensor, "b d"]) -> "Moments":
        """Adds rows and returns itself. Rows are converted to float64 in blocks, not in a copy of all.

        Raises:
            UserError: if features are not finite.
        """
        _require_finite(features, first=self.count)
        for block in features.detach().split(_ROWS_AT_ONCE) if len(features) else ():
            rows = block.cpu().double()  # moved first: Apple's GPUs have no float64
            mean = rows.mean(0)
            total, shift = self.count + len(rows), mean - self.mean
            centred = rows - mean
            self._scatter += centred.T @ centred + torch.outer(shift, shift) * (self.count * len(rows) / total)
            self.mean += shift * (len(rows) / total)
            self.count = total
        return self

    @property
    def covariance(self) -> Float64[Tensor, "d d"]:
        """The unbiased covariance, `(d, d)`.

        Raises:
            UserError: if there are fewer than two rows.
        """
        if self.count < 2:
            raise UserError(f"{self.count} image(s) have no covariance; give at least 2")
        return self._scatter / (self.count - 1)


def _require_finite(*sets: Float[Tensor, "_n _d"], first: int = 0) -> None:
    """Refuses features that are infinite or NaN: NaN is in no neighbourhood, so that precision would just be lower.

    Args:
        sets: the features of each set of images.
        first: the number of the first image.

    Raises:
        UserError: if one is not finite.
    """
    for features in sets:
        if len(rows := (~features.isfinite()).any(1).nonzero()):
            raise UserError(
                f"features of {len(rows)} of {len(features)} image(s) are not finite, first those of image "
                f"{first + int(rows[0])} (counted from 0); leave these out, or check the network that computed them"
            )


class StoredMoments(NamedTuple):
    """The mean and covariance of features whose images are elsewhere.

    Attributes:
        mean: `(d,)`.
        covariance: `(d, d)`.
    """

    mean: Float64[Tensor, " d"]
    covariance: Float64[Tensor, "d d"]


def read_moments(path: Path, width: int) -> StoredMoments | None:
    """Reads published statistics: a `.npz` file with the mean `mu` and the covariance `sigma` of features.

    Args:
        path: The file.
        width: The number of features they must have.

    Returns:
        The moments; None if the file has none.

    Raises:
        UserError: if the file cannot be read, or its statistics are of other features.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            if not {"mu", "sigma"} <= set(file.files):
                return None
            mean, covariance = (torch.from_numpy(file[name].astype(np.float64)) for name in ("mu", "sigma"))
    except (OSError, ValueError, EOFError, TypeError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(f"{path} cannot be read ({one_line(error)}); give a whole .npz file") from error
    if (mean.shape, covariance.shape) != ((width,), (width, width)):
        raise UserError(
            f"{path} has statistics of shapes {tuple(mean.shape)} and {tuple(covariance.shape)}, but the extractor has "
            f"{width} features; give the --extractor that made them"
        )
    if not (mean.isfinite().all() and covariance.isfinite().all()):
        raise UserError(f"{path} has statistics that are not finite; give others")
    return StoredMoments(mean, covariance)


def frechet_distance(a: Moments | StoredMoments, b: Moments | StoredMoments) -> float:
    """Computes the Fréchet distance of FID (arXiv 1706.08500): the squared 2-Wasserstein distance of two Gaussians.

    The distance is |mean_a - mean_b|^2 + tr(A + B - 2 (A B)^(1/2)). The trace of the root is computed from the
    eigenvalues of the symmetric A^(1/2) B A^(1/2), which equal those of A B and are real, so singular covariances (from
    fewer images than features) are no numerical problem. Fewer images do bias the distance upwards: compare only
    distances of equal numbers of images. With the extractor `inception` the distance is an FID.
    """
    cov_a, cov_b = a.covariance, b.covariance
    values, vectors = torch.linalg.eigh(cov_a)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    trace_of_root = torch.linalg.eigvalsh(root @ cov_b @ root).clamp(min=0).sqrt().sum()
    distance = (a.mean - b.mean).square().sum() + cov_a.trace() + cov_b.trace() - 2 * trace_of_root
    return float(distance.clamp(min=0))  # rounding makes that of equal sets slightly negative


def kernel_distance(a: Float[Tensor, "n d"], b: Float[Tensor, "m d"]) -> float:
    """Computes the squared maximum mean discrepancy of KID (arXiv 1801.01401), with the kernel (x·y / d + 1)^3.

    Deviation: the unbiased estimate over all images at once. The published code averages it over 100 random subsets
    of 1000 images; this is the mean over all subsets, so it has the same expectation and less noise.

    Raises:
        UserError: if a set has fewer than two images, or features are not finite.
    """
    if min(len(a), len(b)) < 2:
        raise UserError(f"the kernel distance needs at least 2 images in each set, not {len(a)} and {len(b)}")
    _require_finite(a, b)
    between = _kernel_sum(a, b) / (len(a) * len(b))
    within = [(_kernel_sum(x, x) - float(_kernel(x.double().square().sum(1), x).sum())) for x in (a, b)]
    return within[0] / (len(a) * (len(a) - 1)) + within[1] / (len(b) * (len(b) - 1)) - 2 * between


def _kernel(products: Tensor, features: Tensor) -> Tensor:
    return (products / features.shape[1] + 1) ** 3


def _kernel_sum(a: Tensor, b: Tensor) -> float:
    blocks = a.double().split(_ROWS_AT_ONCE)
    return sum(float(_kernel(block @ b.double().T, b).sum()) for block in blocks)


def inception_score(logits: Float[Tensor, "n classes"], splits: int = 10) -> float:
    """Computes the Inception score (arXiv 1606.03498): the mean over parts of exp of the mean KL(p(y | x) || p(y)).

    Args:
        logits: of the classes, without the bias of the last layer, as the published code has it. Their order decides
            the parts, so images sorted by class must be shuffled.
        splits: number of parts; 10 in the published code.

    Raises:
        UserError: if there are fewer images than parts, or logits are not finite.
    """
    if len(logits) < splits:
        raise UserError(f"the Inception score needs at least {splits} images, not {len(logits)}")
    _require_finite(logits)
    log_p, scores = logits.double().log_softmax(1), []
    for part in range(splits):
        each = log_p[part * len(log_p) // splits : (part + 1) * len(log_p) // splits]
        marginal = each.exp().mean(0).log()
        scores.append(float((each.exp() * (each - marginal)).sum(1).mean().exp()))
    return sum(scores) / splits


def nearest(
    queries: Float[Tensor, "q d"], references: Float[Tensor, "n d"]
) -> tuple[Float[Tensor, " q"], Int64[Tensor, " q"]]:
    """Finds the nearest neighbour of each query: its Euclidean distance, and its index among the references.

    Raises:
        UserError: if features are not finite.
    """
    _require_finite(queries, references)
    minima = [_distances(block, references).min(1) for block in queries.split(_ROWS_AT_ONCE)]
    return torch.cat([each.values for each in minima]), torch.cat([each.indices for each in minima])


class PrecisionRecall(NamedTuple):
    """Precision and recall of generated images, both in [0, 1].

    Attributes:
        precision: share of the generated images that lie in the manifold of the real ones.
        recall: share of the real images that lie in the manifold of the generated ones.
    """

    precision: float
    recall: float


def precision_recall(
    real: Float[Tensor, "n d"], generated: Float[Tensor, "m d"], neighbours: int = NEIGHBOURS
) -> PrecisionRecall:
    """Computes improved precision and recall (arXiv 1904.06991, Eqs. 1 and 2).

    The manifold of a set is the union of balls around its members. The radius of a ball is the distance from the member
    to its `neighbours`-th nearest neighbour in the set.

    Raises:
        UserError: if a set has no more than `neighbours` images, or features are not finite.
    """
    if min(len(real), len(generated)) <= neighbours:
        raise UserError(
            f"precision and recall need more than {neighbours} images, not {len(generated)} and {len(real)}"
        )
    _require_finite(real, generated)
    return PrecisionRecall(
        precision=float(_inside(generated, real, neighbours).double().mean()),
        recall=float(_inside(real, generated, neighbours).double().mean()),
    )


def _distances(a: Tensor, b: Tensor) -> Tensor:
    """Computes all pairwise distances, in float64: `cdist` uses matrix products, which cancel in float32."""
    return torch.cdist(a.double(), b.double())


def _inside(points: Tensor, members: Tensor, neighbours: int) -> Tensor:
    """Finds which points lie in the manifold of the members (see `precision_recall`)."""
    blocks = members.split(_ROWS_AT_ONCE)
    # + 1: each member's nearest neighbour is itself, at distance 0
    radii = torch.cat([_distances(block, members).kthvalue(neighbours + 1, dim=1).values for block in blocks])
    return torch.cat([(_distances(block, members) <= radii).any(1) for block in points.split(_ROWS_AT_ONCE)])
