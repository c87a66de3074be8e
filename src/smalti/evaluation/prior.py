"""Evaluates a prior: Fréchet distance, precision and recall of its samples, and their nearest training images.

The nearest neighbours show whether the prior memorizes its training images.
"""

import math
import time
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Int64, Integer
from torch import Tensor

from smalti.commands.class_labels import numbers_of
from smalti.commands.generating import generate_images
from smalti.core.randomness import Stream, choose
from smalti.evaluation.code_likelihood import nats_per_code
from smalti.evaluation.config import PriorEvaluation
from smalti.evaluation.image_sets import write_samples
from smalti.evaluation.real_images import BATCH_SIZE, open_priors
from smalti.evaluation.result_files import result_path, sheet_path, sheet_settings
from smalti.evaluation.scores import Conditions, Scores, level_score
from smalti.images.decoding import to_float
from smalti.images.sheets import save_sheet
from smalti.metrics.frechet import Moments, frechet_distance, nearest, precision_recall
from smalti.priors.base import CausalPrior, Prior
from smalti.tokenizers.base import Tokenizer

NEIGHBOURS_SHOWN = 12

COPY_QUANTILE = 0.05
"""Quantile of the distances from held-out images to their nearest training image. `share_too_near` is the share of
samples below it; a prior that memorizes nothing has about the same share."""


def evaluate_prior(config: PriorEvaluation[Any], *, sheet: bool = True) -> tuple[Scores, Conditions]:
    """Scores as many samples as there are held-out images, and with `sheet` writes one of the nearest neighbours.

    Raises:
        UserError: if the priors, the tokenizer, the images or the extractor cannot be loaded.
    """
    protocol = config.protocol
    torch_device, extractor, priors, tokenizer, real = open_priors(config)
    start = time.perf_counter()
    samples = generate_images(
        priors,
        tokenizer,
        num=len(real.judged),
        seed=protocol.seed,
        sampling=config.sampling,
        precision=protocol.precision,
    )
    seconds = time.perf_counter() - start
    if config.samples_npz:
        write_samples(config.samples_npz, samples)
    reference = real.reference()
    moments = Moments.of(reference)
    features = {"model": extractor(samples), "real": real.features}
    # as many as there are samples, drawn at random because training images may be sorted by class
    equal = reference[choose(len(reference), len(samples), protocol.seed, Stream.EVALUATION_MANIFOLD)]
    manifolds = {who: precision_recall(equal, each) for who, each in features.items()}
    neighbours = {who: nearest(each, reference) for who, each in features.items()}
    copy_distance = neighbours["real"][0].quantile(COPY_QUANTILE)
    too_near = {who: (distances < copy_distance).double() for who, (distances, _) in neighbours.items()}
    scores: Scores = {
        "frechet": {who: frechet_distance(Moments.of(each), moments) for who, each in features.items()},
        "precision": {who: each.precision for who, each in manifolds.items()},
        "recall": {who: each.recall for who, each in manifolds.items()},
        "nearest_training_image": {who: float(distances.median()) for who, (distances, _) in neighbours.items()},
        "share_too_near": {who: float(each.mean()) for who, each in too_near.items()},
        "seconds_per_image": {"model": seconds / len(samples)},
    }
    labels = [
        numbers_of(prior, real.labels, real.label_names).to(torch_device) if prior.classes else None for prior in priors
    ]
    scores |= _bits_per_code(priors, tokenizer, real.judged, labels)
    distances, indices = neighbours["model"]
    nearest_first = distances.argsort()[:NEIGHBOURS_SHOWN]
    rows = {
        "samples nearest to a training image": to_float(samples[nearest_first]),
        "their nearest training images": to_float(real.training(indices[nearest_first])),
    }
    conditions = {**real.conditions, "prior_digests": [prior.digest() for prior in priors]}
    if sheet:
        path = sheet_path(result_path(config, conditions))
        save_sheet(path, rows, settings=sheet_settings(config, conditions))
    return scores, conditions


@torch.no_grad()
def _bits_per_code(
    priors: Sequence[Prior],
    tokenizer: Tokenizer,
    pixels: Integer[Tensor, "n c h w"],
    labels: Sequence[Int64[Tensor, " n"] | None],
) -> Scores:
    """Returns bits per code of held-out images, for priors with an exact likelihood.

    Args:
        priors: one for each level, coarsest first.
        tokenizer: encodes the images.
        pixels: the images.
        labels: for each prior the class of each image, -1 for none; None for a prior without classes. Priors of vectors
            get none.
    """
    scores: Scores = {}
    batches = [tokenizer.encode(to_float(batch).to(tokenizer.device)) for batch in pixels.split(BATCH_SIZE)]
    for level, (prior, classes) in enumerate(zip(priors, labels, strict=True)):
        if isinstance(prior, CausalPrior):
            conditions = [None] * len(batches) if classes is None else classes.split(BATCH_SIZE)
            nats = [
                nats_per_code(prior, codes[level], condition=condition, upper=codes[:level])
                for codes, condition in zip(batches, conditions, strict=True)
            ]
            bits = float(torch.cat(nats).mean()) / math.log(2)
            scores[level_score("bits_per_code", level, len(priors))] = {"model": bits}
    return scores
