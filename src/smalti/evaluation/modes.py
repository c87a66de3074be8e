"""Evaluates the generation modes of a selfVAE: the reconstruction error and Fréchet distance for the bytes transmitted.

A mode transmits some of the latents and representations of an image; the decoder samples the rest (Section 3.3).
"""

import torch

from smalti.commands.selfvae_modes import load_hierarchy
from smalti.core.devices import autocast, device
from smalti.core.randomness import row_seeds
from smalti.evaluation.config import ModesEvaluation
from smalti.evaluation.real_images import BATCH_SIZE, real_for
from smalti.evaluation.scores import Conditions, Scores
from smalti.images.decoding import to_8_bits, to_float, to_uint8
from smalti.metrics.baselines import ssim
from smalti.metrics.extractors import find_extractor
from smalti.metrics.frechet import Moments, frechet_distance
from smalti.metrics.image_errors import mse_of_pixels, psnr
from smalti.tokenizers.selfvae.hierarchical_vae import Transmitted


@torch.no_grad()
def evaluate_modes(config: ModesEvaluation) -> tuple[Scores, Conditions]:
    """Transmits held-out images in every mode and scores what is decoded, one column per mode.

    Raises:
        UserError: if the tokenizer has no modes, or the images or the extractor cannot be loaded.
    """
    protocol = config.protocol
    torch_device = device(protocol.device)
    extractor = find_extractor(protocol.extractor, torch_device)
    model = load_hierarchy(config.tokenizer).to(torch_device)
    real = real_for(protocol, model, extractor)
    reference = real.reference_moments
    seeds = row_seeds(protocol.seed, torch.arange(len(real.judged))).to(torch_device)
    scores: Scores = {name: {} for name in ("bytes_sent", "compression_ratio", "mse", "psnr_db", "ssim", "frechet")}
    for mode in model.modes:
        batches, transmitted = [], Transmitted()
        for images, image_seeds in zip(real.judged.split(BATCH_SIZE), seeds.split(BATCH_SIZE), strict=True):
            with autocast(torch_device, protocol.precision):
                transmitted = model.transmit(to_float(images).to(torch_device), mode, image_seeds)
                batches.append(to_uint8(model.decode_from(transmitted, image_seeds, config.pixels)).cpu())
        decoded = torch.cat(batches)
        scores["bytes_sent"][mode] = model.bits_sent(transmitted) / 8
        scores["frechet"][mode] = frechet_distance(Moments.of(extractor(decoded)), reference)
        if mode != "generation":
            errors = mse_of_pixels(decoded, real.judged)
            scores["compression_ratio"][mode] = model.compression_ratio(transmitted, to_float(real.judged[:1]))
            scores["mse"][mode], scores["psnr_db"][mode] = float(errors.mean()), float(psnr(errors).mean())
            scores["ssim"][mode] = ssim(decoded, to_8_bits(real.judged))
    scores["frechet"]["real"] = frechet_distance(Moments.of(real.features), reference)
    return scores, real.conditions
