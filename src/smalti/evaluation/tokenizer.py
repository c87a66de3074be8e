"""Evaluates a tokenizer: reconstruction errors (MSE, PSNR, SSIM, LPIPS), Fréchet distance, usage of the codebook."""

import time

import torch
from jaxtyping import Integer, UInt8
from torch import Tensor

from smalti.commands.model_paths import load_tokenizer
from smalti.core.codes import Codes, perplexity
from smalti.core.devices import Precision, autocast, device
from smalti.evaluation.config import TokenizerEvaluation
from smalti.evaluation.image_sets import write_samples
from smalti.evaluation.real_images import BATCH_SIZE, real_for
from smalti.evaluation.scores import Conditions, Scores, level_score
from smalti.images.decoding import to_8_bits, to_float, to_uint8
from smalti.metrics.baselines import ssim
from smalti.metrics.extractors import find_extractor
from smalti.metrics.frechet import Moments, frechet_distance
from smalti.metrics.image_errors import mse_of_pixels, psnr
from smalti.tokenizers.base import Tokenizer
from smalti.tokenizers.vqgan.perceptual import PerceptualDistance, check_size, find_perceptual


def evaluate_tokenizer(config: TokenizerEvaluation) -> tuple[Scores, Conditions]:
    """Scores the reconstructions of held-out images and the usage of the codebook.

    Raises:
        UserError: if the tokenizer, the images or the extractor cannot be loaded.
    """
    protocol = config.protocol
    torch_device = device(protocol.device)
    extractor = find_extractor(protocol.extractor, torch_device)
    tokenizer = load_tokenizer(config.tokenizer).to(torch_device)
    real = real_for(protocol, tokenizer, extractor)
    if config.perceptual:
        check_size(*real.judged.shape[2:], remedy="leave --perceptual out")
    perceptual = find_perceptual(config.perceptual) if config.perceptual else None
    images, codes, seconds = _reconstruct(tokenizer, real.judged, torch_device, protocol.precision)
    errors = mse_of_pixels(images, real.judged)
    features, reference = Moments.of(extractor(images)), real.reference_moments
    originals = Moments.of(real.features)
    scores: Scores = {
        "mse": {"model": float(errors.mean())},
        "psnr_db": {"model": float(psnr(errors).mean())},
        "ssim": {"model": ssim(images, to_8_bits(real.judged))},
        "frechet_to_originals": {"model": frechet_distance(features, originals)},
        "frechet": {
            "model": frechet_distance(features, reference),
            "real": frechet_distance(originals, reference),
        },
    }
    if config.samples_npz:
        write_samples(config.samples_npz, images)
    if perceptual is not None:
        mean = _mean_distance(perceptual, images, real.judged, torch_device)
        scores[f"perceptual_{perceptual.name}"] = {"model": mean}
    for index, (level, grid) in enumerate(zip(tokenizer.layout.levels, codes, strict=True)):
        if level.radices:
            counts = torch.bincount(grid.flatten(), minlength=level.codebook_size)
            used = float((counts > 0).double().mean())
            scores[level_score("codes_used", index, len(codes))] = {"model": used}
            scores[level_score("perplexity", index, len(codes))] = {"model": perplexity(counts)}
    scores["images_per_second"] = {"model": len(images) / seconds}
    return scores, real.conditions


@torch.no_grad()
def _mean_distance(
    perceptual: PerceptualDistance, images: Tensor, originals: Tensor, torch_device: torch.device
) -> float:
    """Returns the mean perceptual distance of images to their originals, in batches."""
    pairs = zip(images.split(BATCH_SIZE), originals.split(BATCH_SIZE), strict=True)
    total = sum(
        len(a) * float(perceptual(to_float(a).to(torch_device), to_float(b).to(torch_device))) for a, b in pairs
    )
    return total / len(images)


@torch.no_grad()
def _reconstruct(
    tokenizer: Tokenizer, pixels: Integer[Tensor, "n c h w"], torch_device: torch.device, precision: Precision
) -> tuple[UInt8[Tensor, "n c h w"], Codes, float]:
    """Returns reconstructions, their codes, and the seconds taken."""
    reconstructions, codes, start = [], [], time.perf_counter()
    with autocast(torch_device, precision):
        for batch in pixels.split(BATCH_SIZE):
            codes.append(tokenizer.encode(to_float(batch).to(torch_device)))
            reconstructions.append(to_uint8(tokenizer.decode(codes[-1])).cpu())
    seconds = time.perf_counter() - start
    return torch.cat(reconstructions), tuple(torch.cat(level).cpu() for level in zip(*codes, strict=True)), seconds
