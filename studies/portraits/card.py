"""The model card of the portraits: what is measured of the models in the package, and the sheets beside it."""

from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int64
from torch import Tensor

from smalti.commands.generating import generate_images
from smalti.commands.model_paths import load_prior_with_tokenizer
from smalti.commands.train_tokenizer import save_reconstructions
from smalti.core.codes import perplexity
from smalti.core.devices import best_device
from smalti.core.files import whole_file, write_json
from smalti.core.provenance import last_metrics, machine
from smalti.evaluation.prior import COPY_QUANTILE
from smalti.images.decoding import to_float
from smalti.images.image_set import ImageRows, open_images
from smalti.images.sheets import save_sheet
from smalti.latentsets.reader import LatentSet
from smalti.metrics.extractors import find_extractor
from smalti.priors.base import Prior
from smalti.studies.against_real import AgainstReal
from smalti.studies.experiment import count_parameters, logged_hours, measure_once, table_row
from smalti.studies.portraits.recipe import ReproducePortraits, train
from smalti.tokenizers.base import Tokenizer

SAMPLES = 2_000
"""Number of samples that are measured, and of real images that are measured as if they were samples."""
SHOWN, SHOWN_IN_A_ROW = 64, 16
CARD_NAME, NUMBERS_NAME = "README.md", "card.json"
NEIGHBOURS_NAME, RECONSTRUCTIONS_NAME = "neighbours.png", "reconstructions.png"


def reproduce_portraits(config: ReproducePortraits) -> None:
    """Trains the models of the package, exports them, and writes their card."""
    train(config)
    prior, tokenizer = load_prior_with_tokenizer(str(config.package), None)
    digests = f"{tokenizer.digest()[:12]}-{prior.digest()[:12]}"
    numbers = measure_once(config.out / f"card-{digests}.json", lambda: measure(config, prior, tokenizer))
    write_json(config.package / NUMBERS_NAME, numbers)
    with whole_file(config.package / CARD_NAME) as partial:
        partial.write_text(card(numbers))
    print(f"The models and their card are in {config.package}.")


@torch.no_grad()
def measure(config: ReproducePortraits, prior: Prior, tokenizer: Tokenizer) -> dict[str, Any]:
    """Measures the models and writes the sheets; returns the card's numbers."""
    device = best_device()
    prior, tokenizer = prior.to(device), tokenizer.to(device)
    size = {"height": tokenizer.config.height, "width": tokenizer.config.width}
    images = open_images(tokenizer.provenance["image_source"], **size)
    real = AgainstReal(images, find_extractor("lite0", device), samples=SAMPLES, seed=config.seed)
    samples = generate_images([prior], tokenizer, num=SAMPLES, seed=config.seed, sampling=prior.method.sampling())
    scores, rebuilt = real.score(samples), real.score_reconstructions(tokenizer)
    usage = LatentSet(config.latents).usage()
    _save_neighbours(config.package / NEIGHBOURS_NAME, samples[:SHOWN], real.training, scores.neighbours[:SHOWN])
    save_reconstructions(tokenizer, real.held_out, config.package / RECONSTRUCTIONS_NAME)
    return {
        "images": {"training": len(real.training), "held_out": len(real.held_out), "fingerprint": images.fingerprint},
        "tokenizer": {
            "digest": tokenizer.digest(),
            "parameters": count_parameters(tokenizer),
            "mse": rebuilt["mse"],
            "codes": len(usage),
            "codes_used": int((usage > 0).sum()),
            "perplexity": perplexity(usage),
            "frechet_of_reconstructions": rebuilt["frechet"],
            "hours": logged_hours(config.tokenizer_run),
        },
        "prior": {
            "digest": prior.digest(),
            "parameters": count_parameters(prior),
            "loss": last_metrics(config.prior_run)["loss"],
            "held_out_loss": last_metrics(config.prior_run)["held_out_loss"],
            **scores.numbers,
            "frechet_of_real_images": real.floor(),
            "hours": logged_hours(config.prior_run),
        },
        "machine": machine(),
    }


def _save_neighbours(path: Path, samples: Tensor, training: ImageRows, indices: Int64[Tensor, " n"]) -> None:
    """Writes samples, none selected, and below each its nearest training image."""
    nearest_images = training.__getitems__(indices.tolist())["images"]
    rows = {}
    for number, (new, old) in enumerate(
        zip(*(each.split(SHOWN_IN_A_ROW) for each in (samples, nearest_images)), strict=True)
    ):
        numbers = f"samples {number * SHOWN_IN_A_ROW} to {number * SHOWN_IN_A_ROW + len(new) - 1}"
        rows |= {numbers: to_float(new), f"the training images nearest to {numbers}": to_float(old)}
    save_sheet(path, rows)


def card(numbers: dict[str, Any]) -> str:
    """Returns the card's Markdown."""
    tokenizer, prior, images = numbers["tokenizer"], numbers["prior"], numbers["images"]
    floor, copies = prior["frechet_of_real_images"], f"{1 - COPY_QUANTILE:.0%}"
    table = [
        ("", "tokenizer (`hrvq`)", "prior (`hourglass`, SUNDAE)"),
        ("---", "---", "---"),
        ("codes", "8×8 of 16·16·16", f"{tokenizer['codes_used']} used, perplexity {tokenizer['perplexity']:.0f}"),
        ("parameters", *(f"{each['parameters'] / 1e6:.2f} million" for each in (tokenizer, prior))),
        ("training", *(f"{each['hours']:.1f} hours" for each in (tokenizer, prior))),
        ("training loss", "", f"{prior['loss']:.3f} nats a code"),
        ("held-out images", f"MSE {tokenizer['mse']:.5f}", f"{prior['held_out_loss']:.3f} nats a code"),
        ("Fréchet distance", f"{tokenizer['frechet_of_reconstructions']:.0f}", f"{prior['frechet']:.0f}"),
        ("precision, recall", "", f"{prior['precision']:.2f}, {prior['recall']:.2f}"),
        ("share too near", "", f"{prior['share_too_near']:.3f}"),
    ]
    return f"""---
license: apache-2.0
tags: [image-generation, vector-quantization, smalti]
---

# Portraits: a tokenizer and a prior of drawn faces at 32×32 pixels

This folder is in the package, so `smalti sample`, `smalti inpaint`, `smalti app` and `smalti evaluate` work without
training. From Python: `load_prior("portraits")`, `load_tokenizer("portraits")`.

![Samples and their nearest training images]({NEIGHBOURS_NAME})

*The first {SHOWN} samples of seed 0, none selected, and below each the training image with the nearest features. They
show whether samples are new combinations.*

{chr(10).join(map(table_row, table))}

MSE is in units of [0, 1]. Fréchet distances (`--extractor lite0`) are those of the reconstructions of held-out images
and of {SAMPLES} samples to {images["training"] - SAMPLES} training images. For comparison, {SAMPLES} other training
images have {floor:.0f}: the samples' is {prior["frechet"] / floor:.1f} times as much, and that of reconstructions
{tokenizer["frechet_of_reconstructions"] / floor:.1f} times. A sample is too near if it is nearer to a training image
than {copies} of the held-out images are.

- **Data**: {images["training"]} of the 9,000 embedded portraits; {images["held_out"]} are held out. Sources and
  licences are in `smalti/images/data/NOTICE.md`.
- **Recipe**: `python scripts/reproduce.py portraits`, at the commit named here, trains, measures and exports both
  models. Trained on
  {numbers["machine"]}.
- **Weights**: half precision. The tokenizer was rounded before the prior was trained, so its codes are those that the
  prior learned.
- **Licence**: Apache-2.0 for the weights. The toon-head drawings are adapted from *ToonHead* by Johan Melin, CC BY 4.0.
"""
