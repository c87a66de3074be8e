"""Evaluates inpainting: fills of random strokes against the truth, each other, and simpler fills."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Bool, Int64, UInt8
from torch import Tensor

from smalti.commands.inpainting import fill
from smalti.commands.model_paths import load_priors
from smalti.core.devices import autocast, device
from smalti.core.progress import bar
from smalti.core.randomness import Stream, derive, row_seeds
from smalti.evaluation.config import InpaintingEvaluation
from smalti.evaluation.real_images import ROWS_AT_ONCE, Scores, real_for
from smalti.images.decoding import to_float, to_uint8
from smalti.images.masks import blank, strokes
from smalti.metrics.baselines import biharmonic
from smalti.metrics.extractors import find_extractor, moments
from smalti.metrics.frechet import frechet_distance
from smalti.metrics.image_errors import diversity, masked_mse, seam_steps
from smalti.priors.base import Prior
from smalti.tokenizers.base import Tokenizer

_CANDIDATES_AT_ONCE = 384


def evaluate_inpainting(config: InpaintingEvaluation[Any]) -> tuple[Scores, dict[str, Any]]:
    """Fills of random strokes against the truth beneath, each other, and the mean colour and biharmonic fills."""
    where = device(config.settings.device)
    extractor = find_extractor(config.settings.extractor, where)
    priors, tokenizer = load_priors(config.prior, config.tokenizer)
    priors, tokenizer = [prior.to(where) for prior in priors], tokenizer.to(where)
    real = real_for(config.settings, tokenizer, extractor)
    truth, seeds = to_float(real.judged), row_seeds(config.settings.seed, torch.arange(len(real.judged)))
    mask = strokes(derive(seeds, Stream.EVALUATION_HOLES), *truth.shape[2:])
    filled = _fill(config, priors, tokenizer, real.judged, mask, derive(seeds, Stream.EVALUATION_FILLS), where)
    fills = to_float(filled)
    completed = {
        "model": filled[:, 0],
        "real": real.judged,
        "mean_colour": to_uint8(blank(truth, mask)),
        "biharmonic": biharmonic(real.judged, mask),
    }
    reference = real.reference_moments
    errors = torch.stack([masked_mse(each, truth, mask) for each in fills.unbind(1)])
    steps = {who: float(seam_steps(to_float(each), mask).mean()) for who, each in completed.items()}
    scores: Scores = {
        "frechet": {
            who: frechet_distance(moments(extractor, each.split(ROWS_AT_ONCE)), reference)
            for who, each in completed.items()
        },
        "seam_steps": steps,
        "seam_steps_to_real": {who: value / steps["real"] for who, value in steps.items()},
        "mse_in_mask": {who: float(masked_mse(to_float(each), truth, mask).mean()) for who, each in completed.items()},
    }
    if config.fills > 1:
        scores[f"mse_in_mask_best_of_{config.fills}"] = {"model": float(errors.min(0).values.mean())}
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
    where: torch.device,
) -> UInt8[Tensor, "n k c h w"]:
    """Every image filled `config.fills` times, no more candidates at once than a batch of samples has rows."""
    k, filled = config.fills, []
    at_once = max(1, _CANDIDATES_AT_ONCE // (k * config.filling.candidates))
    parts = list(zip(pixels.split(at_once), mask.split(at_once), seeds.split(at_once), strict=True))
    for some, masks, of_some in bar(parts, what="filling", unit="batch"):
        of_fills = derive(of_some.repeat_interleave(k), torch.arange(k).repeat(len(some)))
        with autocast(where, config.settings.precision):
            done = fill(
                priors,
                tokenizer,
                some.repeat_interleave(k, 0),
                masks.repeat_interleave(k, 0),
                seeds=of_fills,
                sampling=config.sampling,
                filling=config.filling,
            )
        filled.append(done.unflatten(0, (len(some), k)))
    return torch.cat(filled)
