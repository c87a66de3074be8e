"""Real images that models are evaluated against: held-out ones, and training images as the reference."""

from functools import cached_property

import torch
from jaxtyping import Float, Int64, UInt8
from torch import Tensor

from smalti.core.errors import UserError
from smalti.core.progress import SLOW_SECONDS, bar
from smalti.core.randomness import Stream, choose
from smalti.evaluation.config import EvaluationSettings
from smalti.images.image_set import ImageRows, open_images
from smalti.metrics.extractors import Extractor, moments
from smalti.metrics.frechet import Moments, frechet_distance
from smalti.tokenizers.base import Tokenizer

ROWS_AT_ONCE = 64


Scores = dict[str, dict[str, float]]
"""By what was measured, then by whose images: `model`, `real` for other real images in their place, or another way."""


SPEEDS = ("images_per_second", "seconds_per_image")
"""Scores that hang on the machine."""


class Real:
    """Real images to judge by: held-out ones, and training images as the reference of distances.

    Args:
        judging: which, and how many.
        extractor: of the features that distances are taken of.
        height: of the images, pixels.
        width: likewise.
        channels: 3 for colour, 1 for grey.

    Attributes:
        judged: uint8 `(n, c, h, w)`, held out.
        features: of these.
        conditions: of a result, as JSON.

    Raises:
        UserError: for images that will not do, or too few of them.
    """

    def __init__(
        self, settings: EvaluationSettings, extractor: Extractor, *, height: int, width: int, channels: int
    ) -> None:
        images = open_images(settings.images, height=height, width=width, channels=channels)
        held_out, training = (ImageRows(images, split=side, flips=False) for side in ("held_out", "train"))
        if len(held_out) < 4:
            raise UserError(f"only {len(held_out)} image(s) of {settings.images} are held out; judge by more images")
        self._extractor, self._training = extractor, training
        self._chosen = choose(len(training), settings.reference, settings.seed, Stream.EVALUATION_REFERENCE)
        self.judged: UInt8[Tensor, "n c h w"] = held_out.__getitems__(
            choose(len(held_out), settings.num, settings.seed, Stream.EVALUATION_HELD_OUT)
        )["images"]
        self.features = extractor(self.judged)
        self.conditions = {
            "images": len(self.judged),
            "reference_images": len(self._chosen),
            "images_fingerprint": images.fingerprint,
            "preprocessing": images.preprocessing,
            **extractor.describe(),
        }

    def training(self, indices: Int64[Tensor, " b"]) -> UInt8[Tensor, "b c h w"]:
        """Images of the reference, by their places in it."""
        return self._training.__getitems__([self._chosen[index] for index in indices.tolist()])["images"]

    def reference(self) -> Float[Tensor, "m d"]:
        """Features of the reference, with a progress bar."""
        blocks = [self._chosen[at : at + ROWS_AT_ONCE] for at in range(0, len(self._chosen), ROWS_AT_ONCE)]
        shown = bar(blocks, what="features of the reference", unit="batch", delay_seconds=SLOW_SECONDS)
        return torch.cat([self._extractor(self._training.__getitems__(block)["images"]) for block in shown])

    def distance(self, pixels: UInt8[Tensor, "n c h w"]) -> float:
        """The Fréchet distance of images to the reference."""
        return frechet_distance(moments(self._extractor, pixels.split(ROWS_AT_ONCE)), self.reference_moments)

    @cached_property
    def reference_moments(self) -> Moments:
        """Of the features of the reference, which are computed once."""
        return Moments.of(self.reference())


def real_for(settings: EvaluationSettings, tokenizer: Tokenizer, extractor: Extractor) -> Real:
    """Of the size a tokenizer makes images in; the conditions say which tokenizer that is."""
    size = {"height": tokenizer.config.height, "width": tokenizer.config.width}
    real = Real(settings, extractor, **size, channels=tokenizer.image_channels)
    real.conditions["tokenizer_digest"] = tokenizer.digest()
    return real
