"""Evaluates selfVAE's generation modes: what is restored of held-out images, and how many bytes are sent."""

from typing import Any

import torch

from smalti.commands.selfvae_modes import load_hierarchy
from smalti.core.devices import autocast, device
from smalti.core.randomness import row_seeds
from smalti.evaluation.config import JudgeWays
from smalti.evaluation.real_images import ROWS_AT_ONCE, Scores, real_for
from smalti.images.decoding import to_float, to_uint8
from smalti.metrics.baselines import ssim
from smalti.metrics.extractors import find_extractor
from smalti.metrics.frechet import Moments, frechet_distance
from smalti.metrics.image_errors import mse, psnr
from smalti.tokenizers.selfvae.hierarchical_vae import Sent


@torch.no_grad()
def judge_ways(config: JudgeWays) -> tuple[Scores, dict[str, Any]]:
    """What comes back of held-out images by each way of selfVAE's, a column each, and what is sent of one."""
    where = device(config.judging.device)
    extractor, model = find_extractor(config.judging.extractor, where), load_hierarchy(config.tokenizer).to(where)
    real = real_for(config.judging, model, extractor)
    reference, truth = real.reference_moments, to_float(real.judged)
    seeds = row_seeds(config.judging.seed, torch.arange(len(truth)))
    scores: Scores = {name: {} for name in ("bytes_sent", "compression_ratio", "mse", "psnr_db", "ssim", "frechet")}
    for way in model.ways:
        made, sent = [], Sent()
        for images, of_images in zip(truth.split(ROWS_AT_ONCE), seeds.to(where).split(ROWS_AT_ONCE), strict=True):
            with autocast(where, config.judging.precision):
                sent = model.sent(images.to(where), way, of_images)
                made.append(to_uint8(model.received(sent, of_images, config.pixels)).cpu())
        received = torch.cat(made)
        scores["bytes_sent"][way] = model.bits_sent(sent) / 8
        scores["frechet"][way] = frechet_distance(Moments.of(extractor(received)), reference)
        if way != "generation":
            errors = mse(to_float(received), truth)
            scores["compression_ratio"][way] = model.compression_ratio(sent, truth)
            scores["mse"][way], scores["psnr_db"][way] = float(errors.mean()), float(psnr(errors).mean())
            scores["ssim"][way] = ssim(received, real.judged)
    scores["frechet"]["real"] = frechet_distance(Moments.of(real.features), reference)
    return scores, real.conditions
