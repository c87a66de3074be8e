"""Evaluates a prior: samples against real images as sets, and against their nearest training images."""

import math
import time
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import UInt8
from torch import Tensor

from smalti.commands.model_paths import load_priors
from smalti.commands.sample import generate_images
from smalti.core.devices import device
from smalti.evaluation.config import PriorEvaluation
from smalti.evaluation.real_images import ROWS_AT_ONCE, Scores, real_for
from smalti.images.decoding import to_float, to_uint8
from smalti.images.sheets import save_sheet
from smalti.metrics.extractors import find_extractor
from smalti.metrics.frechet import Moments, frechet_distance, nearest, precision_recall
from smalti.priors.base import CausalPrior, Prior
from smalti.tokenizers.base import Tokenizer

NEIGHBOURS_SHOWN = 12


COPY_QUANTILE = 0.05
"""Of held-out images' distances to the nearest training image; of samples, too, no more should be nearer than that."""


def evaluate_prior(config: PriorEvaluation[Any]) -> tuple[Scores, dict[str, Any]]:
    """Samples against real images as sets, and against the nearest of the training images, which they may repeat."""
    where = device(config.settings.device)
    extractor = find_extractor(config.settings.extractor, where)
    priors, tokenizer = load_priors(config.prior, config.tokenizer)
    priors, tokenizer = [prior.to(where) for prior in priors], tokenizer.to(where)
    real = real_for(config.settings, tokenizer, extractor)
    start = time.perf_counter()
    samples = to_uint8(
        generate_images(
            priors,
            tokenizer,
            num=len(real.judged),
            seed=config.settings.seed,
            sampling=config.sampling,
            precision=config.settings.precision,
        )
    )
    seconds = time.perf_counter() - start
    reference = real.reference()
    of = {"model": extractor(samples), "real": real.features}
    alike = {who: precision_recall(reference[: len(each)], each) for who, each in of.items()}
    near = {who: nearest(each, reference) for who, each in of.items()}
    close = near["real"][0].quantile(COPY_QUANTILE)
    scores: Scores = {
        "frechet": {who: frechet_distance(Moments.of(each), Moments.of(reference)) for who, each in of.items()},
        "precision": {who: each.precision for who, each in alike.items()},
        "recall": {who: each.recall for who, each in alike.items()},
        "nearest_training_image": {who: float(distances.median()) for who, (distances, _) in near.items()},
        "share_too_near": {who: float((distances < close).double().mean()) for who, (distances, _) in near.items()},
        "seconds_per_image": {"model": seconds / len(samples)},
    }
    scores |= _bits(priors, tokenizer, real.judged, where)
    nearest_first = near["model"][0].argsort()[:NEIGHBOURS_SHOWN]
    rows = {
        "samples nearest to a training image": to_float(samples[nearest_first]),
        "these training images": to_float(real.training(near["model"][1][nearest_first])),
    }
    save_sheet(config.out.with_name(f"{config.out.stem}-neighbours.png"), rows)
    return scores, {**real.conditions, "prior_digests": [prior.digest() for prior in priors]}


@torch.no_grad()
def _bits(
    priors: Sequence[Prior], tokenizer: Tokenizer, pixels: UInt8[Tensor, "n c h w"], where: torch.device
) -> Scores:
    """Bits for each code of held-out images, whose class is not told, of the priors whose likelihood is exact."""
    scores: Scores = {}
    batches = [tokenizer.encode(to_float(batch).to(where)) for batch in pixels.split(ROWS_AT_ONCE)]
    for level, prior in enumerate(priors):
        if isinstance(prior, CausalPrior):
            nats = [
                prior.head.nll(prior.features(codes[level], upper=codes[:level]), codes[level].flatten(1)).double()
                for codes in batches
            ]
            name = f"_level_{level}" if len(priors) > 1 else ""
            scores[f"bits_per_code{name}"] = {"model": float(torch.cat(nats).mean()) / math.log(2)}
    return scores
