"""Evaluates inpainting: fills of masked held-out images against the originals, each other, and simple baselines.

The masks are random strokes. The baselines are the mean colour of the image, scikit-image's biharmonic fill and, where
OpenCV is installed, Telea's.
"""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Bool, Int64, UInt8
from torch import Tensor

from smalti.commands.inpainting import fill
from smalti.core.devices import autocast
from smalti.core.progress import bar
from smalti.core.randomness import Stream, derive, row_seeds
from smalti.evaluation.config import InpaintingEvaluation
from smalti.evaluation.real_images import open_priors
from smalti.evaluation.scores import Conditions, Scores
from smalti.images.decoding import to_8_bits, to_float, to_uint8
from smalti.images.masks import blank, strokes
from smalti.metrics.baselines import biharmonic, telea, telea_is_installed
from smalti.metrics.image_errors import diversity, masked_mse, seam_steps
from smalti.priors.base import Prior
from smalti.tokenizers.base import Tokenizer

_CANDIDATES_PER_BATCH = 384


def evaluate_inpainting(config: InpaintingEvaluation[Any]) -> tuple[Scores, Conditions]:
    """Fills held-out images under random strokes and scores the fills beside the originals and the baselines.

    Raises:
        UserError: if the priors, the tokenizer, the images or the extractor cannot be loaded.
    """
    torch_device, _, priors, tokenizer, real = open_priors(config)
    judged = to_8_bits(real.judged)
    originals, seeds = to_float(judged), row_seeds(config.protocol.seed, torch.arange(len(judged)))
    mask = strokes(derive(seeds, Stream.EVALUATION_MASKS), *originals.shape[2:])
    filled = _fill(config, priors, tokenizer, judged, mask, derive(seeds, Stream.EVALUATION_FILLS), torch_device)
    fills = to_float(filled)
    completed = {
        "model": filled[:, 0],
        "real": judged,
        "mean_colour": to_uint8(blank(originals, mask)),
        "biharmonic": biharmonic(judged, mask),
        **({"telea": telea(judged, mask)} if telea_is_installed() else {}),
    }
    errors = {who: masked_mse(to_float(each), originals, mask) for who, each in completed.items()}
    steps = {who: float(seam_steps(to_float(each), mask).mean()) for who, each in completed.items()}
    scores: Scores = {
        "frechet": {who: real.distance(each) for who, each in completed.items()},
        "seam_steps": steps,
        **(
            {"seam_steps_to_real": {who: value / steps["real"] for who, value in steps.items()}}
            if steps["real"]
            else {}
        ),
        "mse_in_mask": {who: float(each.mean()) for who, each in errors.items()},
    }
    if config.fills > 1:
        every_error = torch.stack([masked_mse(each, originals, mask) for each in fills.unbind(1)])  # k n
        scores[f"mse_in_mask_best_of_{config.fills}"] = {"model": float(every_error.min(0).values.mean())}
        scores["diversity"] = {"model": float(diversity(fills, mask).mean())}
    return scores, {
        **real.conditions,
        "prior_digests": [prior.digest() for prior in priors],
        "share_masked": float(mask.float().mean()),
    }


def _fill(
    config: InpaintingEvaluation[Any],
    priors: Sequence[Prior],
    tokenizer: Tokenizer,
    pixels: UInt8[Tensor, "n c h w"],
    mask: Bool[Tensor, "n h w"],
    seeds: Int64[Tensor, " n"],
    torch_device: torch.device,
) -> UInt8[Tensor, "n k c h w"]:
    """Fills every image `config.fills` times, in batches of at most `_CANDIDATES_PER_BATCH` candidates."""
    k, filled = config.fills, []
    batch_size = max(1, _CANDIDATES_PER_BATCH // (k * config.filling.candidates))
    batches = list(zip(pixels.split(batch_size), mask.split(batch_size), seeds.split(batch_size), strict=True))
    for images, masks, image_seeds in bar(batches, what="filling", unit="batch"):
        fill_seeds = derive(image_seeds.repeat_interleave(k), torch.arange(k).repeat(len(images)))
        with autocast(torch_device, config.protocol.precision):
            fills = fill(
                priors,
                tokenizer,
                images.repeat_interleave(k, 0),
                masks.repeat_interleave(k, 0),
                seeds=fill_seeds,
                sampling=config.sampling,
                filling=config.filling,
            )
        filled.append(fills.unflatten(0, (len(images), k)))
    return torch.cat(filled)
