"""Bits that a selfVAE or VAE needs for each number of images it never saw, by importance sampling (arXiv 1509.00519).

Bits of codes, which leave out what decoding gets wrong, are in `likelihood.py`.

Legend: n images, s samples of the latents of each, c channels, h w pixels.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float64, UInt8
from torch import Tensor

from smalti.commands.build_latents import images_for
from smalti.commands.selfvae_modes import load_hierarchy
from smalti.core.devices import device
from smalti.core.errors import UserError
from smalti.core.progress import bar
from smalti.core.randomness import choose, derive, row_seeds
from smalti.evaluation.config import LikelihoodEvaluation
from smalti.images.decoding import to_float
from smalti.images.image_set import ImageRows
from smalti.tokenizers.selfvae.hierarchical_vae import Hierarchy
from smalti.tokenizers.selfvae.logistic import bits_per_number
from smalti.tokenizers.selfvae.networks import Gaussian

ROWS_AT_ONCE = 64  # images times samples that networks see together


@dataclass(frozen=True)
class ImageBits:
    """An upper bound on -log2 p, the lower the more samples.

    Attributes:
        per_dimension: for each pixel and channel.
        standard_error: of that, from the spread over images.
        sampling_error: the part of it that other samples of the latents would change: a standard error too, by the
            delta method, too small where few samples have most of the weight.
    """

    per_dimension: float
    standard_error: float
    sampling_error: float


@torch.no_grad()
def log_weights(
    model: Hierarchy, images: UInt8[Tensor, "n c h w"], *, samples: int, seed: int = 0, rows_at_once: int = ROWS_AT_ONCE
) -> Float64[Tensor, "n s"]:
    """ln p(x, y, z, u) - ln q(z, u | x, y) of draws from q; on the CPU, in float32 networks and float64 sums.

    Sample j of image i hangs on the seed, i and j alone; memory hangs on `rows_at_once`.
    """
    where, found = next(model.parameters()).device, []
    for start in bar(range(len(images)), what="importance sampling", unit="image"):
        y = model.representations(to_float(images[start : start + 1]).to(where))
        q = [model.posterior(level, image) for level, image in enumerate(y)]
        of_image = row_seeds(seed, torch.tensor([start], device=where))
        parts = []
        for numbers in torch.arange(samples, device=where).split(rows_at_once):
            count = len(numbers)
            many_q = [Gaussian(*(part.expand(count, -1, -1, -1) for part in (of.mean, of.log_deviation))) for of in q]
            many_y = [image.expand(count, -1, -1, -1) for image in y]
            terms = model.terms(many_y, many_q, derive(of_image, numbers))
            parts.append(-torch.stack(list(terms.values())).cpu().double().sum(0))
        found.append(torch.cat(parts))
    return torch.stack(found)


def bits(weights: Float64[Tensor, "n s"], images: UInt8[Tensor, "n c h w"], samples: int | None = None) -> ImageBits:
    """The bound of so many samples; with fewer than there are, the mean over disjoint groups of them.

    One sample gives the bound of Eq. 23 itself, all of them the tightest.
    """
    n, s = weights.shape
    grouped = weights.view(n, -1, samples or s)  # n g s
    ln_p = grouped.logsumexp(2) - math.log(grouped.shape[2])
    unit = bits_per_number(images[0].numel())
    relative = (grouped - grouped.amax(2, keepdim=True)).exp()
    if grouped.shape[2] > 1:
        errors = relative.std(2) / relative.mean(2) / grouped.shape[2] ** 0.5
    else:
        errors = weights.std(1, keepdim=True) if s > 1 else torch.zeros_like(ln_p)
    of_image = errors.square().mean(1) / grouped.shape[1]  # variance of the mean over an image's groups
    spread = ln_p.mean(1).std() / n**0.5 if n > 1 else torch.zeros(())
    return ImageBits(
        per_dimension=float(-ln_p.mean()) * unit,
        standard_error=float(spread) * unit,
        sampling_error=float(of_image.sum().sqrt()) / n * unit,
    )


def evaluate_likelihood(config: LikelihoodEvaluation) -> tuple[dict[str, dict[str, float]], dict[str, Any]]:
    """Bits of held-out images: the bound of one sample, and of all.

    Raises:
        UserError: for a tokenizer that has no likelihood of images, or images of which none are held out.
    """
    model = load_hierarchy(config.tokenizer).to(device(config.device))
    source = images_for(model, config.tokenizer, config.images, None, None)
    rows = ImageRows(source, split="held_out", flips=False)
    if not len(rows):
        raise UserError(f"{source.source} has no held-out images; judge by more images")
    images = rows.__getitems__(choose(len(rows), config.num, config.seed))["images"]
    weights = log_weights(model, images, samples=config.samples, seed=config.seed)
    scores: dict[str, dict[str, float]] = {}
    for name, found in (("bits_per_dim", bits(weights, images)), ("bound_bits_per_dim", bits(weights, images, 1))):
        scores[name] = {"model": found.per_dimension}
        scores[f"{name}_standard_error"] = {"model": found.standard_error}
        scores[f"{name}_sampling_error"] = {"model": found.sampling_error}
    return scores, {
        "images": len(images),
        "samples": config.samples,
        "images_fingerprint": source.fingerprint,
        "preprocessing": source.preprocessing,
        "tokenizer_digest": model.digest(),
    }
