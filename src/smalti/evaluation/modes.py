"""Evaluates selfVAE's generation modes: what is restored of held-out images, and how many bytes are sent."""

from typing import Any

import torch

from smalti.commands.selfvae_modes import load_hierarchy
from smalti.core.devices import autocast, device
from smalti.core.randomness import row_seeds
from smalti.evaluation.config import ModesEvaluation
from smalti.evaluation.real_images import ROWS_AT_ONCE, Scores, real_for
from smalti.images.decoding import to_float, to_uint8
from smalti.metrics.baselines import ssim
from smalti.metrics.extractors import find_extractor
from smalti.metrics.frechet import Moments, frechet_distance
from smalti.metrics.image_errors import mse, psnr
from smalti.tokenizers.selfvae.hierarchical_vae import Transmitted


@torch.no_grad()
def evaluate_modes(config: ModesEvaluation) -> tuple[Scores, dict[str, Any]]:
    """What comes back of held-out images by each way of selfVAE's, a column each, and what is sent of one."""
    where = device(config.settings.device)
    extractor, model = find_extractor(config.settings.extractor, where), load_hierarchy(config.tokenizer).to(where)
    real = real_for(config.settings, model, extractor)
    reference, truth = real.reference_moments, to_float(real.judged)
    seeds = row_seeds(config.settings.seed, torch.arange(len(truth)))
    scores: Scores = {name: {} for name in ("bytes_sent", "compression_ratio", "mse", "psnr_db", "ssim", "frechet")}
    for mode in model.modes:
        made, sent = [], Transmitted()
        for images, of_images in zip(truth.split(ROWS_AT_ONCE), seeds.to(where).split(ROWS_AT_ONCE), strict=True):
            with autocast(where, config.settings.precision):
                sent = model.transmit(images.to(where), mode, of_images)
                made.append(to_uint8(model.decode_from(sent, of_images, config.pixels)).cpu())
        received = torch.cat(made)
        scores["bytes_sent"][mode] = model.bits_sent(sent) / 8
        scores["frechet"][mode] = frechet_distance(Moments.of(extractor(received)), reference)
        if mode != "generation":
            errors = mse(to_float(received), truth)
            scores["compression_ratio"][mode] = model.compression_ratio(sent, truth)
            scores["mse"][mode], scores["psnr_db"][mode] = float(errors.mean()), float(psnr(errors).mean())
            scores["ssim"][mode] = ssim(received, real.judged)
    scores["frechet"]["real"] = frechet_distance(Moments.of(real.features), reference)
    return scores, real.conditions
