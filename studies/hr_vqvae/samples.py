"""The HR-VQVAE paper's study of generation, trained anew: priors over each tokenizer's codes, and what they draw.

The tokenizers are runs of `reproduce.py`. A prior is trained by `train_prior`; it, and each thing measured of it, are
kept, so a study that is stopped goes on. What is written of it is in `reproduce_samples_report.py`.
"""

import dataclasses
import json
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, Literal, TypeAlias, cast

import torch
from jaxtyping import UInt8
from torch import Tensor

from smalti.benchmarks.comparison import synchronize
from smalti.commands.build_latents import BuildLatents, build_latents
from smalti.commands.model_paths import load_priors, load_tokenizer
from smalti.commands.sample import generate_images
from smalti.commands.train_prior import TrainPrior, train_prior
from smalti.core import models
from smalti.core.devices import Precision, best_device
from smalti.core.files import whole_file, write_json
from smalti.evaluation.code_likelihood import count_bits
from smalti.evaluation.config import EvaluationSettings
from smalti.evaluation.real_images import Real
from smalti.images.decoding import to_float, to_uint8
from smalti.images.image_set import ImageSet
from smalti.latentsets.reader import LatentSet
from smalti.metrics.extractors import find_extractor
from smalti.priors.base import Prior
from smalti.studies.flat_codes import flatten_codes
from smalti.studies.hr_vqvae.study import Cell, Reproduce, folder_of, trained
from smalti.tokenizers.base import Tokenizer

PriorName: TypeAlias = Literal["pixelcnn", "hourglass"]

PRIORS: tuple[PriorName, ...] = ("pixelcnn", "hourglass")
KEPT_SAMPLES = 12  # of each prior, for pictures
AT_ONCE = 100  # samples, or images whose codes are decoded
ROWS_PER_WRITE = 4_096
HEAD_WIDTH = 32  # of the hourglass's attention, as by default
SAVE_STEPS = 100  # the most that a killed run loses


@dataclass(frozen=True)
class Drawn:
    """Priors of one kind over all levels of a tokenizer's codes.

    Attributes:
        of: the run of the tokenizer.
        prior: their kind.
        flat: taught codes as numbers without digits.
    """

    of: Cell
    prior: PriorName
    flat: bool = False


def kept(path: Path, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What was measured before and kept at `path`; else it is measured now, and kept there."""
    if not path.exists():
        write_json(path, measure())
    return json.loads(path.read_text())


def prior_folder(drawn: Drawn, config: Reproduce) -> Path:
    """Of the priors of all levels, named by all that decides them; within that of their tokenizer."""
    budget = config.generating
    width = budget.pixelcnn_width if drawn.prior == "pixelcnn" else budget.hourglass_width
    flat = "-flat" if drawn.flat else ""
    name = f"{drawn.prior}{flat}-{width}wide-{budget.prior_steps}steps-batch{budget.prior_batch_size}"
    return folder_of(drawn.of, config) / name


def latents_of(drawn: Drawn, config: Reproduce, images: ImageSet) -> Path:
    """The codes of a run's tokenizer, encoded if they were not yet, and not those of mirror images."""
    folder = trained(drawn.of, config, images)
    path = folder / "latents.h5"
    if not path.exists():
        build_latents(BuildLatents(tokenizer=str(folder), images=config.images, flips=False, workers=0, out=path))
    if not drawn.flat:
        return path
    flat = path.with_stem(f"{path.stem}-flat")
    if not flat.exists():
        flatten_codes(LatentSet(path), flat)
    return flat


def trained_priors(drawn: Drawn, config: Reproduce, images: ImageSet) -> list[Path]:
    """The folder of the prior of each level, coarsest first, each trained as far as it was not yet.

    They know no classes, as those of the paper.
    """
    latents, budget = latents_of(drawn, config, images), config.generating
    cls = cast(type[Prior], models.class_of_kind("prior", drawn.prior))
    sizes: dict[str, int] = {"model_width": budget.pixelcnn_width}
    if drawn.prior == "hourglass":
        width = budget.hourglass_width
        sizes = {"model_width": width, "heads": max(1, width // HEAD_WIDTH)}
    plain = TrainPrior(model=cls.config_class(**sizes), objective=cls.method.objective_config(label_dropout=1.0))
    fit = replace(
        plain.fit,
        steps=budget.prior_steps,
        batch_size=budget.prior_batch_size,
        seed=drawn.of.seed,
        report_steps=budget.prior_steps,
        save_steps=SAVE_STEPS,
    )
    return [
        train_prior(
            replace(
                plain,
                fit=fit,
                prior=drawn.prior,
                latents=latents,
                level=level,
                tokenizer=str(folder_of(drawn.of, config)),
                precision=config.precision,
                out=prior_folder(drawn, config) / f"level-{level}",
            )
        )
        for level in range(len(LatentSet(latents).layout.levels))
    ]


@lru_cache(maxsize=1)  # each thing that is measured asks for them
def loaded(drawn: Drawn, config: Reproduce, images: ImageSet) -> tuple[list[Prior], Tokenizer]:
    """Priors and tokenizer, on the device, trained if they were not."""
    folders = trained_priors(drawn, config, images)
    priors, tokenizer = load_priors([str(folder) for folder in folders], None)
    return [prior.to(best_device()) for prior in priors], tokenizer.to(best_device())


class Judge:
    """Real images that samples are held against; opened when something is to be measured.

    Args:
        config: which, how many, and by which features.
    """

    def __init__(self, config: Reproduce) -> None:
        self._config, self._extractor = config, find_extractor(config.generating.extractor, best_device())

    @cached_property
    def real(self) -> Real:
        """Held-out images, and others as the reference."""
        budget, channels = self._config.generating, 1 if self._config.data == "mnist" else 3
        settings = EvaluationSettings(images=self._config.images, num=budget.num, reference=budget.reference)
        return Real(settings, self._extractor, height=32, width=32, channels=channels)


def judged_by(config: Reproduce) -> str:
    """What decides a Fréchet distance beside the images: for names of results."""
    budget = config.generating
    return f"{budget.extractor}-{budget.num}-of-{budget.reference}"


def floor(config: Reproduce, judge: Judge) -> dict[str, Any]:
    """The `frechet` of real images in the place of samples, and how many (`num`) there were to judge by."""

    def measure() -> dict[str, Any]:
        return {"frechet": judge.real.distance(judge.real.judged), "num": len(judge.real.judged)}

    return kept(config.work / config.data / f"real-{judged_by(config)}.json", measure)


def reconstructed(of: Cell, config: Reproduce, images: ImageSet, judge: Judge) -> dict[str, Any]:
    """The `frechet` of what a tokenizer makes of the real images judged: no prior's samples are meant to be better."""

    def measure() -> dict[str, Any]:
        tokenizer = load_tokenizer(str(trained(of, config, images))).to(best_device())
        batches = [to_float(batch).to(best_device()) for batch in judge.real.judged.split(AT_ONCE)]
        with torch.no_grad():
            made = [to_uint8(tokenizer.decode(tokenizer.encode(batch))).cpu() for batch in batches]
        return {"frechet": judge.real.distance(torch.cat(made))}

    return kept(folder_of(of, config) / f"reconstructed-{judged_by(config)}.json", measure)


def sampled(drawn: Drawn, config: Reproduce, images: ImageSet, judge: Judge) -> dict[str, Any]:
    """Of the samples of a tokenizer's priors: `frechet`, `seconds` an image, `parameters` of the priors.

    Seconds are the median over batches of `AT_ONCE`.
    """

    def measure() -> dict[str, Any]:
        priors, tokenizer = loaded(drawn, config, images)
        number = floor(config, judge)["num"]
        seeds = range(math.ceil(number / AT_ONCE))
        blocks, seconds = zip(*(timed(priors, tokenizer, seed, config.precision) for seed in seeds), strict=True)
        made = torch.cat(blocks)[:number]
        with whole_file(prior_folder(drawn, config) / "samples.pt") as partial:
            torch.save(made[:KEPT_SAMPLES].clone(), partial)
        return {
            "frechet": judge.real.distance(made),
            "seconds": statistics.median(seconds),
            "parameters": sum(parameter.numel() for prior in priors for parameter in prior.parameters()),
        }

    return kept(prior_folder(drawn, config) / f"sampled-{judged_by(config)}.json", measure)


def timed(
    priors: Sequence[Prior], tokenizer: Tokenizer, seed: int, precision: Precision
) -> tuple[UInt8[Tensor, "n c h w"], float]:
    """The first `AT_ONCE` samples of a seed, as each kind draws them by default, and the seconds one took."""
    synchronize()
    start = time.perf_counter()
    how: dict[str, Any] = {"sampling": priors[-1].method.sampling(), "batch_size": AT_ONCE, "precision": precision}
    made = to_uint8(generate_images(priors, tokenizer, num=AT_ONCE, seed=seed, **how))
    return made, (time.perf_counter() - start) / AT_ONCE


def bits(drawn: Drawn, config: Reproduce, images: ImageSet) -> dict[str, Any]:
    """What held-out codes cost, exactly, of priors that know: bits `per_image`; of each level `per_code`, with
    `standard_errors`; over how many `rows`."""

    def measure() -> dict[str, Any]:
        priors, _ = loaded(drawn, config, images)
        found = count_bits(priors, LatentSet(latents_of(drawn, config, images)))
        sizes = [prior.level.positions for prior in priors]
        per_image = sum(cost * positions for cost, positions in zip(found.per_code, sizes, strict=True))
        return {"per_image": per_image, **dataclasses.asdict(found)}

    return kept(prior_folder(drawn, config) / "bits.json", measure)
