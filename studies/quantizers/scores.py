"""Measurements of the study of quantizers: reconstructions and codes, the search, and the likelihood of the codes."""

import math
import time
from pathlib import Path

import torch

from smalti.commands.model_paths import load_prior
from smalti.core.codes import perplexity
from smalti.core.devices import best_device
from smalti.core.errors import UserError
from smalti.evaluation.code_likelihood import count_bits
from smalti.images.decoding import to_float
from smalti.images.image_set import ImageRows, ImageSet
from smalti.latentsets.reader import LatentSet
from smalti.studies.experiment import IMAGES_AT_ONCE
from smalti.tokenizers.base import Tokenizer
from smalti.tokenizers.vq.vqvae import OneGrid

SEARCH_REPETITIONS = 5
"""Searches that are timed, after one that is not; the fastest counts."""


@torch.no_grad()
def held_out_scores(tokenizer: Tokenizer, images: ImageSet) -> dict[str, float]:
    """Returns scores of the reconstructions and codes of all held-out images.

    Returns:
        `mse`, the mean squared error of pixels in [0, 1]; `codes_used`, the number of codes that occur; `perplexity` of
        their distribution; `images`, their number.

    Raises:
        UserError: if no image is held out.
    """
    rows = ImageRows(images, split="held_out", flips=False)
    if not len(rows):
        raise UserError("no image is held out, so nothing can be measured; give more images")
    tokenizer, device = tokenizer.to(best_device()), best_device()
    counts, error, values = torch.zeros(tokenizer.layout.levels[0].codebook_size).long(), 0.0, 0
    for indices in torch.arange(len(rows)).split(IMAGES_AT_ONCE):
        batch = to_float(rows.__getitems__(indices.tolist())["images"]).to(device)
        codes = tokenizer.encode(batch)
        error += float((tokenizer.decode(codes) - batch).square().sum(dtype=torch.float64)) / 4
        values += batch.numel()
        counts += torch.bincount(codes[0].flatten().cpu(), minlength=len(counts))
    used = int((counts > 0).sum())
    return {"mse": error / values, "codes_used": used, "perplexity": perplexity(counts), "images": len(rows)}


@torch.no_grad()
def search_milliseconds(tokenizer: Tokenizer, images: ImageSet) -> float:
    """Returns the CPU milliseconds in which the quantizer finds the codes of one image in the encoder's outputs."""
    assert isinstance(tokenizer, OneGrid)
    batch = to_float(ImageRows(images, split="held_out", flips=False).spread(IMAGES_AT_ONCE)).to(best_device())
    z_e = tokenizer.to(best_device()).encoder(tokenizer.prepared(batch))
    tokenizer.quantizer.encode(z_e)
    times: list[float] = []
    for _ in range(SEARCH_REPETITIONS):
        start = time.process_time()
        tokenizer.quantizer.encode(z_e)
        times.append(time.process_time() - start)
    return min(times) / len(batch) * 1000


@torch.no_grad()
def nats_of_images(prior_folder: Path, latents: LatentSet) -> float:
    """Returns -ln p of the codes of a held-out image by a causal prior, the mean over the images."""
    prior = load_prior(str(prior_folder)).to(best_device()).eval()
    (per_code,) = count_bits([prior], latents).per_code
    return per_code * latents.layout.levels[0].positions * math.log(2)
