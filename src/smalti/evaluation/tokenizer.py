"""Evaluates a tokenizer: reconstruction errors, Fréchet distance and codebook usage."""

import time
from typing import Any

import torch
from jaxtyping import UInt8
from torch import Tensor

from smalti.commands.model_paths import load_tokenizer
from smalti.core.codes import Codes
from smalti.core.devices import Precision, autocast, device
from smalti.evaluation.config import TokenizerEvaluation
from smalti.evaluation.real_images import ROWS_AT_ONCE, Scores, real_for
from smalti.images.decoding import to_float, to_uint8
from smalti.latentsets.reader import perplexity
from smalti.metrics.baselines import ssim
from smalti.metrics.extractors import find_extractor
from smalti.metrics.frechet import Moments, frechet_distance
from smalti.metrics.image_errors import mse, psnr
from smalti.tokenizers.base import Tokenizer


def evaluate_tokenizer(config: TokenizerEvaluation) -> tuple[Scores, dict[str, Any]]:
    """Errors of reconstructions, how far they are from real images as a set, and how the codes are used."""
    where = device(config.settings.device)
    extractor, tokenizer = find_extractor(config.settings.extractor, where), load_tokenizer(config.tokenizer).to(where)
    real = real_for(config.settings, tokenizer, extractor)
    images, codes, seconds = _reconstruct(tokenizer, real.judged, where, config.settings.precision)
    errors = mse(to_float(images), to_float(real.judged))
    features, reference = extractor(images), real.reference_moments
    scores: Scores = {
        "mse": {"model": float(errors.mean())},
        "psnr_db": {"model": float(psnr(errors).mean())},
        "ssim": {"model": ssim(images, real.judged)},
        "frechet_to_originals": {"model": frechet_distance(Moments.of(features), Moments.of(real.features))},
        "frechet": {
            "model": frechet_distance(Moments.of(features), reference),
            "real": frechet_distance(Moments.of(real.features), reference),
        },
    }
    for index, (level, grid) in enumerate(zip(tokenizer.layout.levels, codes, strict=True)):
        if level.radices:
            counts = torch.bincount(grid.flatten(), minlength=level.codebook_size)
            name = f"_level_{index}" if len(codes) > 1 else ""
            scores[f"codes_used{name}"] = {"model": float((counts > 0).double().mean())}
            scores[f"perplexity{name}"] = {"model": perplexity(counts)}
    scores["images_per_second"] = {"model": len(images) / seconds}
    return scores, real.conditions


@torch.no_grad()
def _reconstruct(
    tokenizer: Tokenizer, pixels: UInt8[Tensor, "n c h w"], where: torch.device, precision: Precision
) -> tuple[UInt8[Tensor, "n c h w"], Codes, float]:
    """Reconstructions, their codes, and the seconds they took."""
    made, codes, start = [], [], time.perf_counter()
    with autocast(where, precision):
        for batch in pixels.split(ROWS_AT_ONCE):
            codes.append(tokenizer.encode(to_float(batch).to(where)))
            made.append(to_uint8(tokenizer.decode(codes[-1])).cpu())
    seconds = time.perf_counter() - start
    return torch.cat(made), tuple(torch.cat(level).cpu() for level in zip(*codes, strict=True)), seconds
