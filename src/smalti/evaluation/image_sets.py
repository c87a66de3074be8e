"""Compares two sets of images without any model, as published evaluators do; and writes samples for them.

One set may be published statistics instead, if only a Fréchet distance is needed.
"""

import re
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Integer
from torch import Tensor

from smalti.core.devices import device
from smalti.core.errors import UserError
from smalti.core.files import input_digest, whole_file
from smalti.core.progress import SLOW_SECONDS, bar
from smalti.core.randomness import Stream, generator_for
from smalti.evaluation.config import ImagesEvaluation
from smalti.evaluation.scores import Conditions, Scores
from smalti.images.decoding import to_8_bits, visible
from smalti.images.image_set import ImageSet, open_images
from smalti.images.reading import read_images
from smalti.metrics.extractors import Extractor, find_extractor
from smalti.metrics.frechet import (
    Moments,
    frechet_distance,
    inception_score,
    kernel_distance,
    precision_recall,
    read_moments,
)

_BATCH_SIZE = 64
_CHANNELS = 3


def evaluate_images(config: ImagesEvaluation) -> tuple[Scores, Conditions]:
    """Scores all images of a set against all of another one, or against stored statistics.

    Raises:
        UserError: if the images, the statistics or the extractor cannot be loaded, or the images are of several sizes.
    """
    is_name = re.fullmatch(r"[^*?\[{:]+\.npz", config.reference, re.IGNORECASE)  # no glob, range or URL
    if is_name and not Path(config.reference).expanduser().exists():
        raise UserError(
            f"there is nothing at {config.reference}; give a .npz file with statistics (mu and sigma) or images "
            "(arr_0), or another source of images"
        )
    extractor = find_extractor(config.extractor, device(config.device))
    stored = read_moments(Path(config.reference), extractor.width) if _is_npz(config.reference) else None
    only_statistics = stored is not None and not _has_images(Path(config.reference))
    sources = [config.images] if only_statistics else [config.images, config.reference]
    height, width = _size(config, sources)
    sets = [read_images(each, config.reading, height=height, width=width, channels=_CHANNELS) for each in sources]
    features, *others = [_features(extractor, each) for each in sets]
    real = others[0] if others else None
    moments = stored or Moments.of(others[0])
    values = {"frechet": frechet_distance(Moments.of(features), moments)}
    if real is not None:
        values["kernel_distance"] = kernel_distance(features, real)
        values["precision"], values["recall"] = precision_recall(real, features)
    order = torch.randperm(len(features), generator=generator_for(config.seed, Stream.EVALUATION_HELD_OUT))
    if (logits := extractor.logits(features[order])) is not None:
        values["inception_score"] = inception_score(logits)
    conditions: Conditions = {
        "image_source": config.images,
        "reference": config.reference + (" (its statistics)" if stored else ""),
        "images": len(features),
        **({} if stored or real is None else {"reference_images": len(real)}),
        "images_fingerprint": sets[0].fingerprint,
        "reference_fingerprint": input_digest(Path(config.reference)) if stored else sets[1].fingerprint,
        "preprocessing": sets[0].preprocessing,
        **extractor.describe(),
        "feature_dimensions": extractor.width,
    }
    return {name: {"images": value} for name, value in values.items()}, conditions


def write_samples(path: Path, images: Integer[Tensor, "n c h w"]) -> None:
    """Writes images as published evaluators read them: an `.npz` file with uint8 `(n, h, w, 3)` in `arr_0`."""
    colour = to_8_bits(visible(images)).cpu().expand(-1, _CHANNELS, -1, -1)
    with whole_file(path) as partial, partial.open("wb") as file:
        np.savez(file, arr_0=colour.permute(0, 2, 3, 1).contiguous().numpy())


def _is_npz(source: str) -> bool:
    return source.lower().endswith(".npz") and Path(source).is_file()


def _has_images(path: Path) -> bool:
    with np.load(path, allow_pickle=False) as file:
        return "arr_0" in file.files


def _size(config: ImagesEvaluation, sources: list[str]) -> tuple[int, int]:
    """Returns height and width of all images.

    Raises:
        UserError: if they are of several sizes and none is given.
    """
    if config.height is not None and config.width is not None:
        return config.height, config.width
    names = ("image_column", "label_column", "split", "limit", "most_pixels")
    selection = {name: getattr(config.reading, name) for name in names}
    sizes = Counter[tuple[int, int]]()
    for source in sources:
        sizes += open_images(source, height=1, width=1, **selection).check().sizes
    if len(sizes) != 1:
        found = ", ".join(f"{count} of {w}x{h}" for (h, w), count in sizes.most_common(3))
        raise UserError(
            f"the images differ in size ({found}{', ...' if len(sizes) > 3 else ''}), and resizing changes the scores; "
            "give images of one size, or --height and --width to fit them"
        )
    return next(iter(sizes))


def _features(extractor: Extractor, images: ImageSet) -> Float[Tensor, "n d"]:
    """Computes the features of all images that are not left out."""
    rows = (~images.left_out).nonzero().squeeze(1)
    progress = bar(rows.split(_BATCH_SIZE), what="features", unit="batch", delay_seconds=SLOW_SECONDS)
    return torch.cat([extractor(images.pixels(batch)) for batch in progress])
