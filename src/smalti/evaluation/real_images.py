"""Real images that models are evaluated against: held-out images, and training images as the reference set.

The distance of held-out images to the reference set is the floor: a perfect model would score about the same.
"""

from functools import cached_property

import torch
from jaxtyping import Float, Int64, UInt8
from torch import Tensor

from smalti.core.errors import UserError
from smalti.core.progress import SLOW_SECONDS, bar
from smalti.core.randomness import Stream, choose
from smalti.evaluation.config import EvaluationSettings
from smalti.evaluation.scores import Conditions
from smalti.images.image_set import ImageRows, open_images
from smalti.metrics.extractors import Extractor, moments
from smalti.metrics.frechet import Moments, frechet_distance
from smalti.tokenizers.base import Tokenizer

BATCH_SIZE = 64
"""Images that a network or an extractor receives at once during an evaluation."""


class Real:
    """Held-out images to compare a model with, and training images as the reference set of distances.

    Args:
        settings: the source of the images, their numbers and the seed of their choice.
        extractor: computes the features of all distances.
        height: of the images, pixels.
        width: of the images, pixels.
        channels: 3 for colour, 1 for grey.

    Attributes:
        judged: the held-out images, uint8 `(n, c, h, w)`.
        features: the features of the held-out images, `(n, d)`.
        conditions: the part of a result that describes the images and the extractor, as JSON.

    Raises:
        UserError: if the images cannot be opened or fewer than 4 are held out.
    """

    def __init__(
        self, settings: EvaluationSettings, extractor: Extractor, *, height: int, width: int, channels: int
    ) -> None:
        images = open_images(settings.images, height=height, width=width, channels=channels)
        held_out, training = (ImageRows(images, split=split, flips=False) for split in ("held_out", "train"))
        if len(held_out) < 4:
            raise UserError(
                f"only {len(held_out)} image(s) of {settings.images} are held out, and an evaluation needs 4; "
                "give more --images"
            )
        self._extractor, self._training = extractor, training
        self._chosen = choose(len(training), settings.reference, settings.seed, Stream.EVALUATION_REFERENCE)
        self.judged: UInt8[Tensor, "n c h w"] = held_out.__getitems__(
            choose(len(held_out), settings.num, settings.seed, Stream.EVALUATION_HELD_OUT)
        )["images"]
        self.features = extractor(self.judged)
        self.conditions: Conditions = {
            "images": len(self.judged),
            "reference_images": len(self._chosen),
            "images_fingerprint": images.fingerprint,
            "preprocessing": images.preprocessing,
            **extractor.describe(),
        }

    def training(self, indices: Int64[Tensor, " b"]) -> UInt8[Tensor, "b c h w"]:
        """Returns images of the reference set by their indices in it."""
        return self._training.__getitems__([self._chosen[index] for index in indices.tolist()])["images"]

    def reference(self) -> Float[Tensor, "m d"]:
        """Computes the features of the reference set, with a progress bar."""
        batches = [self._chosen[start : start + BATCH_SIZE] for start in range(0, len(self._chosen), BATCH_SIZE)]
        progress = bar(batches, what="features of the reference", unit="batch", delay_seconds=SLOW_SECONDS)
        return torch.cat([self._extractor(self._training.__getitems__(batch)["images"]) for batch in progress])

    def distance(self, pixels: UInt8[Tensor, "n c h w"]) -> float:
        """Returns the Fréchet distance of images to the reference set."""
        return frechet_distance(moments(self._extractor, pixels.split(BATCH_SIZE)), self.reference_moments)

    @cached_property
    def reference_moments(self) -> Moments:
        """Mean and covariance of the reference set's features, computed once."""
        return Moments.of(self.reference())


def real_for(settings: EvaluationSettings, tokenizer: Tokenizer, extractor: Extractor) -> Real:
    """Opens real images in the size of a tokenizer's images, and adds the tokenizer's digest to the conditions."""
    size = {"height": tokenizer.config.height, "width": tokenizer.config.width}
    real = Real(settings, extractor, **size, channels=tokenizer.image_channels)
    real.conditions["tokenizer_digest"] = tokenizer.digest()
    return real
