"""Priors in the study of HR-VQVAE: priors over each tokenizer's codes, their samples, and what is measured of both.

The tokenizers are those of `study.py`. Each prior is trained by `train_prior`, and each result is kept, so a study that
was stopped resumes. Tables and pictures are in `samples_report.py`.
"""

import dataclasses
import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, TypeAlias, cast

import torch
from jaxtyping import UInt8
from torch import Tensor

from smalti.benchmarks.comparison import synchronize
from smalti.commands.build_latents import BuildLatents, build_latents
from smalti.commands.generating import generate_images
from smalti.commands.model_paths import load_priors
from smalti.commands.train_prior import TrainPrior, default_fit, train_prior
from smalti.core import models
from smalti.core.devices import Precision, best_device
from smalti.core.files import whole_file
from smalti.evaluation.code_likelihood import count_bits
from smalti.evaluation.config import EvaluationSettings
from smalti.evaluation.real_images import RealImages
from smalti.images.image_set import ImageSet
from smalti.latentsets.reader import LatentSet
from smalti.metrics.extractors import find_extractor
from smalti.priors.base import Prior
from smalti.studies.experiment import FrechetEvaluator, Trial, count_parameters, measure_once
from smalti.studies.flat_codes import flat_latents
from smalti.studies.hr_vqvae.settings import ReproduceHRVQVAE
from smalti.studies.hr_vqvae.study import TokenizerSpec, open_data, trained, trial_of
from smalti.tokenizers.base import Tokenizer

PriorName: TypeAlias = Literal["pixelcnn", "hourglass"]

PRIORS: tuple[PriorName, ...] = ("pixelcnn", "hourglass")
KEPT_SAMPLES = 12
"""Samples of each prior that are kept for pictures."""
SAMPLES_AT_ONCE = 100
HEAD_WIDTH = 32
"""Width of each attention head of the hourglass, as by default."""
SAVE_STEPS = 100
"""Steps between snapshots: the most that a killed run loses."""


@dataclass(frozen=True)
class PriorSpec:
    """The description of the priors of one kind over all levels of a tokenizer's codes.

    Attributes:
        tokenizer: The tokenizer.
        kind: The registered kind of the priors.
        flat: Whether they learn each code as one digit, with one softmax over all codes.
    """

    tokenizer: TokenizerSpec
    kind: PriorName
    flat: bool = False


def prior_trial(spec: PriorSpec, config: ReproduceHRVQVAE) -> Trial:
    """Returns the trial of the priors of all levels, in a folder within that of their tokenizer."""
    budget = config.generating
    width = budget.pixelcnn_width if spec.kind == "pixelcnn" else budget.hourglass_width
    flat = "-flat" if spec.flat else ""
    name = f"{spec.kind}{flat}-{width}wide-{budget.prior_steps}steps-batch{budget.prior_batch_size}"
    return Trial(trial_of(spec.tokenizer, config).folder / name)


def latents_of(spec: PriorSpec, config: ReproduceHRVQVAE, images: ImageSet) -> Path:
    """Returns the latent set of a tokenizer, without mirror images; builds it if it does not exist."""
    folder = trained(spec.tokenizer, config, images).folder
    path = folder / "latents.h5"
    if not path.exists():
        build_latents(BuildLatents(tokenizer=str(folder), images=config.images, flips=False, workers=0, out=path))
    return flat_latents(path) if spec.flat else path


def train_priors(spec: PriorSpec, config: ReproduceHRVQVAE, images: ImageSet) -> list[Path]:
    """Trains (or resumes) the prior of each level; returns their folders, coarsest first.

    They are not class-conditional; the paper's are fitted to all training images, without mention of classes.
    """
    latents, budget = latents_of(spec, config, images), config.generating
    cls = cast(type[Prior], models.class_of_kind("prior", spec.kind))
    sizes: dict[str, int] = {"model_width": budget.pixelcnn_width}
    if spec.kind == "hourglass":
        width = budget.hourglass_width
        sizes = {"model_width": width, "heads": max(1, width // HEAD_WIDTH)}
    default = TrainPrior(model=cls.config_class(**sizes), objective=cls.method.objective_config(label_dropout=1.0))
    fit = replace(
        default_fit(spec.kind),
        steps=budget.prior_steps,
        batch_size=budget.prior_batch_size,
        seed=spec.tokenizer.seed,
        report_steps=budget.prior_steps,
        save_steps=SAVE_STEPS,
    )
    settings = replace(
        default,
        fit=fit,
        prior=spec.kind,
        latents=latents,
        tokenizer=str(trial_of(spec.tokenizer, config).folder),
        precision=config.precision,
    )
    folder = prior_trial(spec, config).folder
    levels = range(len(LatentSet(latents).layout.levels))
    return [train_prior(replace(settings, level=level, out=folder / f"level-{level}")) for level in levels]


@lru_cache(maxsize=1)  # every measurement of a spec needs them
def load_trained(spec: PriorSpec, config: ReproduceHRVQVAE, images: ImageSet) -> tuple[list[Prior], Tokenizer]:
    """Loads the priors of all levels and their tokenizer onto the best device; trains them if they were not."""
    folders = train_priors(spec, config, images)
    priors, tokenizer = load_priors([str(folder) for folder in folders], None)
    return [prior.to(best_device()) for prior in priors], tokenizer.to(best_device())


def evaluator_of(config: ReproduceHRVQVAE) -> FrechetEvaluator:
    """Returns the evaluator of samples and reconstructions."""
    budget = config.generating
    extractor = find_extractor(budget.extractor, best_device())  # before any training: it may not be installed

    def open_real() -> RealImages:
        settings = EvaluationSettings(images=config.images, num=budget.num, reference=budget.reference)
        return RealImages(settings, open_data(config), extractor)

    return FrechetEvaluator(f"{budget.extractor}-{budget.num}-of-{budget.reference}", open_real)


def real_scores(config: ReproduceHRVQVAE, images: ImageSet, evaluator: FrechetEvaluator) -> dict[str, Any]:
    """Measures the held-out images themselves once: `frechet`, and their number `num`."""
    path = config.work / config.data / f"real-{evaluator.key}-{images.fingerprint[:12]}.json"
    return measure_once(path, lambda: {**evaluator.held_out_scores(), "num": len(evaluator.real.judged)})


def reconstruction_scores(
    spec: TokenizerSpec, config: ReproduceHRVQVAE, images: ImageSet, evaluator: FrechetEvaluator
) -> dict[str, Any]:
    """Measures the reconstructions of the held-out images once, as `frechet`. Samples are not expected to be better."""
    trial = trained(spec, config, images)
    return evaluator.result(trial, "reconstructed", lambda: evaluator.reconstruction_scores(trial.tokenizer()))


def sample_scores(
    spec: PriorSpec, config: ReproduceHRVQVAE, images: ImageSet, evaluator: FrechetEvaluator
) -> dict[str, Any]:
    """Measures the samples of a tokenizer's priors once: `frechet`, `seconds` per image, and `parameters`.

    The seconds are the median over batches of `SAMPLES_AT_ONCE`.
    """
    trained(spec.tokenizer, config, images)
    trial = prior_trial(spec, config)

    def measure() -> dict[str, Any]:
        priors, tokenizer = load_trained(spec, config, images)
        number = real_scores(config, images, evaluator)["num"]
        seeds = range(math.ceil(number / SAMPLES_AT_ONCE))
        batches = [timed_samples(priors, tokenizer, seed, config.precision) for seed in seeds]
        samples = torch.cat([images for images, _ in batches])[:number]
        with whole_file(trial.folder / "samples.pt") as partial:
            torch.save(samples[:KEPT_SAMPLES].clone(), partial)
        scores = evaluator.scores(samples)
        seconds = statistics.median(taken for _, taken in batches)
        return {**scores, "seconds": seconds, "parameters": count_parameters(*priors)}

    return evaluator.result(trial, "sampled", measure)


def timed_samples(
    priors: Sequence[Prior], tokenizer: Tokenizer, seed: int, precision: Precision
) -> tuple[UInt8[Tensor, "n c h w"], float]:
    """Draws `SAMPLES_AT_ONCE` samples with each sampler's defaults; returns them and the seconds per sample."""
    synchronize()
    start = time.perf_counter()
    images = generate_images(
        priors,
        tokenizer,
        num=SAMPLES_AT_ONCE,
        seed=seed,
        sampling=priors[-1].method.sampling(),
        batch_size=SAMPLES_AT_ONCE,
        precision=precision,
    )
    return images, (time.perf_counter() - start) / SAMPLES_AT_ONCE


def code_bits(spec: PriorSpec, config: ReproduceHRVQVAE, images: ImageSet) -> dict[str, Any]:
    """Measures the exact negative log-likelihood of held-out codes once, in bits, for priors that can compute it.

    Returns:
        Bits `per_image`; `per_code` and `standard_errors` of each level; the number of `rows`.
    """
    trained(spec.tokenizer, config, images)

    def measure() -> dict[str, Any]:
        priors, _ = load_trained(spec, config, images)
        bits = count_bits(priors, LatentSet(latents_of(spec, config, images)))
        sizes = [prior.level.positions for prior in priors]
        per_image = sum(cost * positions for cost, positions in zip(bits.per_code, sizes, strict=True))
        return {"per_image": per_image, **dataclasses.asdict(bits)}

    return prior_trial(spec, config).result("bits", measure)
