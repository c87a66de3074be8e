"""Bits per dimension of held-out images under a selfVAE or VAE, by the importance-weighted bound of IWAE.

The bound (arXiv 1509.00519) averages importance weights over samples of the latents. With one sample it is the ELBO;
with more it is tighter. The likelihood of codes under a prior is in `code_likelihood.py`.

Legend: n images, s samples of the latents of each, c channels, h w pixels.
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float64, UInt8
from torch import Tensor

from smalti.commands.model_paths import images_for
from smalti.commands.selfvae_modes import load_hierarchy
from smalti.core.devices import device
from smalti.core.progress import bar
from smalti.core.randomness import choose, derive, row_seeds
from smalti.evaluation.config import LikelihoodEvaluation
from smalti.evaluation.real_images import show_images
from smalti.evaluation.scores import Conditions, Scores
from smalti.images.decoding import to_float
from smalti.images.reading import held_out_rows
from smalti.tokenizers.selfvae.hierarchical_vae import Hierarchy
from smalti.tokenizers.selfvae.logistic import bits_per_number
from smalti.tokenizers.selfvae.networks import Gaussian

ROWS_AT_ONCE = 64  # importance samples that the networks receive at once


@dataclass(frozen=True)
class ImageBits:
    """An upper bound on -log2 p(image); it falls as the number of importance samples grows.

    Attributes:
        per_dimension: mean bits per pixel and channel.
        standard_error: the standard error of that mean, from the spread over images.
        sampling_error: the part of the standard error that is due to the importance samples alone, by the delta method;
            it is too small if few samples have most of the weight.
    """

    per_dimension: float
    standard_error: float
    sampling_error: float


@torch.no_grad()
def log_weights(
    model: Hierarchy, images: UInt8[Tensor, "n c h w"], *, samples: int, seed: int = 0, rows_at_once: int = ROWS_AT_ONCE
) -> Float64[Tensor, "n s"]:
    """Returns the log importance weights ln p(x, y, z, u) - ln q(z, u | x, y) of samples from q, on the CPU.

    Networks compute in float32, sums are float64. Sample j of image i depends on the seed, i and j alone. Memory
    depends on `rows_at_once`, not on `samples`.
    """
    weights = []
    for index in bar(range(len(images)), what="importance sampling", unit="image"):
        y = model.representations(to_float(images[index : index + 1]).to(model.device))
        q = [model.posterior(level, image) for level, image in enumerate(y)]
        image_seed = row_seeds(seed, torch.tensor([index], device=model.device))
        batches = []
        for numbers in torch.arange(samples, device=model.device).split(rows_at_once):
            count = len(numbers)
            q_repeated = [
                Gaussian(*(part.expand(count, -1, -1, -1) for part in (each.mean, each.log_deviation))) for each in q
            ]
            y_repeated = [image.expand(count, -1, -1, -1) for image in y]
            terms = model.terms(y_repeated, q_repeated, derive(image_seed, numbers))
            batches.append(-torch.stack(list(terms.values())).cpu().double().sum(0))
        weights.append(torch.cat(batches))
    return torch.stack(weights)


def bits(weights: Float64[Tensor, "n s"], images: UInt8[Tensor, "n c h w"], samples: int | None = None) -> ImageBits:
    """Computes the importance-weighted bound of `samples` samples from log weights [default: of all s].

    With fewer than s samples it is the mean bound of disjoint groups, so `samples` must divide s. One sample gives the
    ELBO (Eq. 23 of selfVAE); all of them give the tightest bound.
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
    variances = errors.square().mean(1) / grouped.shape[1]  # of the mean over each image's groups
    spread = ln_p.mean(1).std() / n**0.5 if n > 1 else torch.zeros(())
    return ImageBits(
        per_dimension=float(-ln_p.mean()) * unit,
        standard_error=float(spread) * unit,
        sampling_error=float(variances.sum().sqrt()) / n * unit,
    )


def evaluate_likelihood(config: LikelihoodEvaluation) -> tuple[Scores, Conditions]:
    """Scores held-out images in bits per dimension: the ELBO (`bound_bits_per_dim`) and the importance-weighted bound.

    Raises:
        UserError: if the tokenizer has no likelihood of images, its training images are not recorded or have changed,
            or no images are held out.
    """
    model = load_hierarchy(config.tokenizer).to(device(config.device))
    source = images_for(model, config.tokenizer, config.images, None, None, config.reading)
    rows = held_out_rows(source)
    images = rows.__getitems__(choose(len(rows), config.num, config.seed))["images"]
    show_images(source.source, held_out=len(images))
    weights = log_weights(model, images, samples=config.samples, seed=config.seed)
    scores: Scores = {}
    for name, bound in (("bits_per_dim", bits(weights, images)), ("bound_bits_per_dim", bits(weights, images, 1))):
        scores[name] = {"model": bound.per_dimension}
        scores[f"{name}_standard_error"] = {"model": bound.standard_error}
        scores[f"{name}_sampling_error"] = {"model": bound.sampling_error}
    return scores, {
        "image_source": source.source,
        "images": len(images),
        "samples": config.samples,
        "images_fingerprint": source.fingerprint,
        "preprocessing": source.preprocessing,
        "tokenizer_digest": model.digest(),
    }
