"""Scores of samples and reconstructions against the real images of a data set, as the studies of priors report them.

The features of the real images are computed once. The reference set is the training images but as many as there are
samples; those that are left out give the floor, the distance that a perfect model would have.
"""

from functools import cached_property
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int64, UInt8
from torch import Tensor

from smalti.core.randomness import Stream, choose
from smalti.evaluation.prior import COPY_QUANTILE
from smalti.images.decoding import to_float
from smalti.images.image_set import ImageRows, ImageSet
from smalti.metrics.extractors import Extractor
from smalti.metrics.frechet import Moments, frechet_distance, nearest, precision_recall
from smalti.studies.experiment import reconstruct
from smalti.tokenizers.base import Tokenizer

IMAGES_AT_ONCE = 256


class SampleScores(NamedTuple):
    """The scores of samples.

    Attributes:
        numbers: `frechet`, `precision`, `recall`, and `share_too_near` to a training image.
        neighbours: the index of each sample's nearest training image.
    """

    numbers: dict[str, float]
    neighbours: Int64[Tensor, " n"]


class AgainstReal:
    """Scores samples and reconstructions against the images of a set, by an extractor's features.

    Args:
        images: the set.
        extractor: computes the features of all scores.
        samples: the number of samples to score, and of real images that are scored as if they were samples; at most
            half of the training images are.
        seed: of the choice of these.

    Attributes:
        training: the training images.
        held_out: the held-out images.
    """

    def __init__(self, images: ImageSet, extractor: Extractor, *, samples: int, seed: int = 0) -> None:
        self.training, self.held_out = (ImageRows(images, split=split, flips=False) for split in ("train", "held_out"))
        self.samples, self._extractor, self._seed = samples, extractor, seed

    @cached_property
    def _known(self) -> Float[Tensor, "n d"]:
        rows = torch.arange(len(self.training)).split(IMAGES_AT_ONCE)
        return torch.cat([self._extractor(self.training.__getitems__(batch.tolist())["images"]) for batch in rows])

    @cached_property
    def _as_samples(self) -> Bool[Tensor, " n"]:
        count = min(self.samples, len(self.training) // 2)
        chosen = torch.zeros(len(self.training), dtype=torch.bool)
        chosen[choose(len(self.training), count, self._seed, Stream.EVALUATION_REFERENCE)] = True
        return chosen

    @cached_property
    def _reference(self) -> Moments:
        return Moments.of(self._known[~self._as_samples])

    @cached_property
    def _held_out_pixels(self) -> UInt8[Tensor, "n c h w"]:
        return self.held_out.__getitems__(range(len(self.held_out)))["images"]

    @cached_property
    def _copy_distance(self) -> Tensor:
        return nearest(self._extractor(self._held_out_pixels), self._known)[0].quantile(COPY_QUANTILE)

    def floor(self) -> float:
        """Returns the Fréchet distance of real images that are not in the reference set."""
        return frechet_distance(Moments.of(self._known[self._as_samples]), self._reference)

    def score(self, samples: UInt8[Tensor, "n c h w"]) -> SampleScores:
        """Scores samples.

        A sample is too near to a training image if it is nearer than all but `COPY_QUANTILE` of the held-out images
        are to theirs. Precision and recall are against as many real images as there are samples.
        """
        features = self._extractor(samples)
        distances, neighbours = nearest(features, self._known)
        manifolds = precision_recall(self._known[self._as_samples], features)
        numbers = {
            "frechet": frechet_distance(Moments.of(features), self._reference),
            "precision": manifolds.precision,
            "recall": manifolds.recall,
            "share_too_near": float((distances < self._copy_distance).double().mean()),
        }
        return SampleScores(numbers, neighbours)

    @torch.no_grad()
    def score_reconstructions(self, tokenizer: Tokenizer) -> dict[str, Any]:
        """Returns `mse`, in units of [0, 1], and `frechet` of the reconstructions of all held-out images."""
        pixels = self._held_out_pixels
        rebuilt = reconstruct(tokenizer, pixels)
        return {
            "mse": float((to_float(rebuilt) - to_float(pixels)).div(2).square().mean()),
            "frechet": frechet_distance(Moments.of(self._extractor(rebuilt)), self._reference),
        }
