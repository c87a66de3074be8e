"""Real images that models are evaluated against: held-out images, and training images as the reference set.

The distance of held-out images to the reference set is the floor: a perfect model would score about the same.
"""

from functools import cached_property
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int64, Integer
from torch import Tensor

from smalti.commands.model_paths import load_priors
from smalti.core.devices import device
from smalti.core.errors import UserError
from smalti.core.progress import SLOW_SECONDS, bar, print_note
from smalti.core.randomness import Stream, choose
from smalti.evaluation.config import EvaluationSettings, InpaintingEvaluation, PriorEvaluation
from smalti.evaluation.scores import Conditions
from smalti.images.image_set import ImageRows, ImageSet
from smalti.images.reading import describe_pictures, read_images_for
from smalti.metrics.extractors import Extractor, find_extractor, moments
from smalti.metrics.frechet import Moments, frechet_distance
from smalti.priors.base import Prior
from smalti.tokenizers.base import Tokenizer

BATCH_SIZE = 64
"""Images that a network or an extractor receives at once during an evaluation."""


class RealImages:
    """Held-out images to compare a model with, and training images as the reference set of distances.

    Args:
        settings: the numbers of images and the seed of their choice.
        images: the set that they are chosen from.
        extractor: computes the features of all distances.

    Attributes:
        judged: the held-out images, uint8 or int32 `(n, c, h, w)`.
        labels: their labels, int64 `(n,)`, -1 for none.
        label_names: the names of the labels 0, 1, ...; their numbers if the images have no names.
        features: the features of the held-out images, `(n, d)`.
        conditions: the part of a result that describes the images and the extractor, as JSON.

    Raises:
        UserError: if fewer than 4 images are held out.
    """

    def __init__(self, settings: EvaluationSettings, images: ImageSet, extractor: Extractor) -> None:
        held_out, training = (ImageRows(images, split=split, flips=False) for split in ("held_out", "train"))
        if len(held_out) < 4:
            raise UserError(
                f"only {len(held_out)} image(s) of {images.source} are held out, and an evaluation needs 4; "
                "give more --images, or another --held-out"
            )
        self._extractor, self._training = extractor, training
        self._chosen = choose(len(training), settings.reference, settings.seed, Stream.EVALUATION_REFERENCE)
        batch = held_out.__getitems__(choose(len(held_out), settings.num, settings.seed, Stream.EVALUATION_HELD_OUT))
        self.judged: Integer[Tensor, "n c h w"] = batch["images"]
        self.labels: Int64[Tensor, " n"] = batch["labels"]
        self.label_names = images.label_names or tuple(map(str, range(int(images.labels.max()) + 1)))
        self.features = extractor(self.judged)
        self.conditions: Conditions = {
            "image_source": images.source,
            "images": len(self.judged),
            "reference_images": len(self._chosen),
            "images_fingerprint": images.fingerprint,
            "preprocessing": images.preprocessing,
            **({"images_left_out": int(images.left_out.sum())} if images.left_out.any() else {}),
            **({"note": note} if (note := describe_pictures(images.preprocessing)) else {}),
            **extractor.describe(),
            "feature_dimensions": extractor.width,
        }

    def training(self, indices: Int64[Tensor, " b"]) -> Integer[Tensor, "b c h w"]:
        """Returns images of the reference set by their indices in it."""
        return self._training.__getitems__([self._chosen[index] for index in indices.tolist()])["images"]

    def reference(self) -> Float[Tensor, "m d"]:
        """Computes the features of the reference set, with a progress bar."""
        batches = [self._chosen[start : start + BATCH_SIZE] for start in range(0, len(self._chosen), BATCH_SIZE)]
        progress = bar(batches, what="features of the reference", unit="batch", delay_seconds=SLOW_SECONDS)
        return torch.cat([self._extractor(self._training.__getitems__(batch)["images"]) for batch in progress])

    def distance(self, pixels: Integer[Tensor, "n c h w"]) -> float:
        """Returns the Fréchet distance of images to the reference set."""
        return frechet_distance(moments(self._extractor, pixels.split(BATCH_SIZE)), self.reference_moments)

    @cached_property
    def reference_moments(self) -> Moments:
        """Returns mean and covariance of the reference set's features, computed once."""
        return Moments.of(self.reference())


def real_for(
    settings: EvaluationSettings, tokenizer: Tokenizer, extractor: Extractor, prior: Prior | None = None
) -> RealImages:
    """Reads real images in the size of a tokenizer's images, and adds the tokenizer's digest to the conditions.

    Without `settings.images` they are those that the prior was trained on, or the tokenizer if there is no prior.

    Raises:
        UserError: as `RealImages` and `read_images_for` do, also for images that have changed since the training.
    """
    provenance = (
        prior.provenance if prior is not None and prior.provenance.get("image_source") else tokenizer.provenance
    )
    images = read_images_for(
        provenance,
        "the model",
        settings.images,
        settings.reading,
        height=tokenizer.config.height,
        width=tokenizer.config.width,
        channels=tokenizer.image_channels,
    )
    real = RealImages(settings, images, extractor)
    conditions = real.conditions
    show_images(images.source, held_out=conditions["images"], reference=conditions["reference_images"])
    conditions["tokenizer_digest"] = tokenizer.digest()
    return real


def show_images(source: str, *, held_out: int, reference: int | None = None) -> None:
    """Prints which images an evaluation uses, on standard error."""
    references = "" if reference is None else f" and {reference} training images"
    print_note(f"evaluating on {held_out} held-out images{references} of {source}")


class Opened(NamedTuple):
    """The inputs of an evaluation of a prior or its fills: the models and the extractor on their device, real images.

    Attributes:
        device: of the models and the extractor.
        extractor: computes the features of all distances.
        priors: one for each level, coarsest first.
        tokenizer: decodes the priors' codes.
        real: the images to compare with.
    """

    device: torch.device
    extractor: Extractor
    priors: list[Prior]
    tokenizer: Tokenizer
    real: RealImages


def open_priors(config: PriorEvaluation[Any] | InpaintingEvaluation[Any]) -> Opened:
    """Loads the extractor, the priors, their tokenizer and the real images of an evaluation.

    Raises:
        UserError: if one of them cannot be loaded.
    """
    own_device = device(config.protocol.device)
    extractor = find_extractor(config.protocol.extractor, own_device)
    priors, tokenizer = load_priors(config.prior, config.tokenizer)
    priors, tokenizer = [prior.to(own_device) for prior in priors], tokenizer.to(own_device)
    return Opened(own_device, extractor, priors, tokenizer, real_for(config.protocol, tokenizer, extractor, priors[-1]))
