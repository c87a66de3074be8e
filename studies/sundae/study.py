"""The study of SUNDAE on codes: unrolled steps, and the other kinds of prior, each trained for the same time.

The tokenizer, its latent set and all priors are kept, and so is what is measured of them: a study that was stopped
resumes. The samplers and the tables are in `report.py`.
"""

import time
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor
from tyro.conf import Positional

from smalti.commands.build_latents import BuildLatents, build_latents
from smalti.commands.generating import generate_images
from smalti.commands.model_paths import RUNS, load_prior, load_prior_with_tokenizer, prior_class
from smalti.commands.train_prior import TrainPrior, default_fit, grids, train_prior
from smalti.commands.train_tokenizer import TrainTokenizer, train_tokenizer
from smalti.core.devices import Precision, best_device
from smalti.core.errors import UserError, require_at_least_one
from smalti.core.provenance import last_metrics
from smalti.images.image_set import open_images
from smalti.latentsets.reader import LatentSet
from smalti.metrics.extractors import find_extractor
from smalti.studies.against_real import AgainstReal
from smalti.studies.experiment import count_parameters, measure_once
from smalti.studies.priors.training import cpu_seconds, keyed, training_step
from smalti.tokenizers.vq.hrvq import HRVQConfig

PriorKind: TypeAlias = Literal["hourglass", "maskgit", "pixelcnn", "transformer"]

SIZE = 32
"""Height and width of the images in pixels."""
TOKENIZER = HRVQConfig(branching=16)
SMALLER: dict[str, Any] = {}
"""Settings of every prior's network that differ from the defaults; tests make the networks small."""
TIMED_STEPS = 3
"""Training steps of each prior that are timed, after one that is not."""


class Trained(NamedTuple):
    """A prior of the study: its kind, and for SUNDAE the unrolled steps of its training."""

    kind: PriorKind
    unrolled: int | None = None

    @property
    def label(self) -> str:
        """Returns its row in the table."""
        return f"SUNDAE, {self.unrolled} unrolled" if self.unrolled else f"`{self.kind}`"

    @property
    def objective(self) -> Any:
        """Returns the settings of its objective."""
        changes = {"unrolled_steps": self.unrolled} if self.unrolled else {}
        return prior_class(self.kind).method.objective_config(**changes)


@dataclass(frozen=True)
class ReproduceSundae:
    """Settings of the study.

    Raises:
        UserError: for a number below 1, or if the steps of training are not compared with anything.
    """

    study: Positional[Literal["sundae"]]
    """The study of SUNDAE on codes: unrolled steps, samplers, and the other kinds of prior in equal time."""
    images: str = "portraits"
    """Images to train on; any source that `--images` of train_tokenizer takes."""
    image_channels: int = 3
    """3 for colour images, 1 for grey ones."""
    unrolled: tuple[int, ...] = (2, 1, 3)
    """Unrolled steps of the priors that SUNDAE trains; the samplers are compared on the first."""
    others: tuple[Literal["maskgit", "pixelcnn", "transformer"], ...] = ("maskgit", "pixelcnn", "transformer")
    """Other kinds of prior."""
    step_counts: tuple[int, ...] = (4, 8, 16, 25, 50, 100)
    """Denoising steps of each sampler."""
    seeds: int = 3
    """Seeds, and so trainings, of each prior."""
    tokenizer_steps: int = 2_000
    """Training steps of the tokenizer, of 16 images."""
    prior_steps: int = 2_000
    """Training steps of the first prior, of 32 images; the others train for as many as take the same time."""
    samples: int = 500
    """Samples of each sampler that are measured."""
    precision: Precision = "auto"
    """Precision of the networks in training."""
    work: Path = RUNS / "sundae"
    """Folder of the runs."""
    out: Path = Path("docs/reproductions/sundae.md")
    """The Markdown report. Its measured sections are replaced; pictures are written beside it."""

    def __post_init__(self) -> None:
        require_at_least_one(self, "seeds", "tokenizer_steps", "prior_steps", "samples", "image_channels")
        if not (self.unrolled and self.step_counts and min(*self.unrolled, *self.step_counts) >= 1):
            raise UserError("--unrolled and --step-counts need at least one number each, of at least 1")

    @property
    def priors(self) -> tuple[Trained, ...]:
        """Returns the priors of a seed, the one that the samplers are compared on first."""
        return (*(Trained("hourglass", steps) for steps in self.unrolled), *(Trained(kind) for kind in self.others))


class Study:
    """The trainings of the study on one set of images, and what is measured of them."""

    def __init__(self, config: ReproduceSundae) -> None:
        self.config = config
        self.name = Path(config.images).stem
        """Name of the images, in names of files and sections."""
        self.folder = config.work / f"{self.name}-{config.tokenizer_steps}steps"

    @cached_property
    def latents(self) -> Path:
        """The latent set, built by the tokenizer, trained. It has no mirror images."""
        defaults = TrainTokenizer(model=replace(TOKENIZER, image_channels=self.config.image_channels))
        fit = replace(defaults.fit, steps=self.config.tokenizer_steps)
        settings = replace(defaults, images=self.config.images, fit=fit, precision=self.config.precision)
        tokenizer = train_tokenizer(replace(settings, out=self.folder / "tokenizer"))
        return build_latents(BuildLatents(tokenizer=str(tokenizer), flips=False, out=self.folder / "latents.h5"))

    @cached_property
    def real(self) -> AgainstReal:
        """The real images."""
        images = open_images(self.config.images, height=SIZE, width=SIZE, channels=self.config.image_channels)
        return AgainstReal(images, find_extractor("lite0", best_device()), samples=self.config.samples)

    @cached_property
    def steps(self) -> dict[Trained, int]:
        """The training steps of each prior, which take the same time."""
        levels = LatentSet(self.latents).layout.levels
        shape = {**grids(levels, 0), **SMALLER}
        batch = TrainPrior(model=None, objective=None).fit.batch_size

        def measure() -> dict[str, float]:
            return {
                prior.label: cpu_seconds(
                    training_step(
                        prior.kind,
                        prior_class(prior.kind).config_class(**shape),
                        batch,
                        self.config.precision,
                        prior.objective,
                    ),
                    TIMED_STEPS,
                )
                for prior in self.config.priors
            }

        names = [prior.label for prior in self.config.priors]
        seconds = measure_once(self.folder / f"{keyed('seconds', {'priors': names})}.json", measure)
        first = seconds[names[0]]
        return {
            prior: max(1, round(self.config.prior_steps * first / seconds[prior.label])) for prior in self.config.priors
        }

    def trained(self, prior: Trained, seed: int) -> Path:
        """Returns the folder of a prior, trained."""
        steps = self.steps[prior]
        model = prior_class(prior.kind).config_class(**SMALLER)
        defaults = TrainPrior(model=model, objective=prior.objective, prior=prior.kind)
        fit = replace(default_fit(prior.kind), steps=steps, seed=seed)
        settings = replace(defaults, fit=fit, latents=self.latents, precision=self.config.precision, sheet_samples=0)
        unrolled = f"{prior.unrolled}" if prior.unrolled else ""
        return train_prior(replace(settings, out=self.folder / f"{prior.kind}{unrolled}-{steps}steps-seed{seed}"))

    def result(self, prior: Trained, seed: int, sampling: Any) -> dict[str, Any]:
        """Returns the scores of samples and the seconds that one takes, and what the training logged last."""
        folder = self.trained(prior, seed)
        name = keyed("scores", {"sampling": repr(sampling), "samples": self.config.samples})

        def measure() -> dict[str, Any]:
            start = time.process_time()
            images = self.draw(folder, sampling, self.config.samples)
            seconds = (time.process_time() - start) / self.config.samples
            logged = last_metrics(folder)
            return {
                **self.real.score(images).numbers,
                "seconds": seconds,
                "held_out_loss": logged["held_out_loss"],
                "bits": logged.get("held_out_bits_per_code"),
                "steps": self.steps[prior],
                "parameters": count_parameters(load_prior(str(folder))),
            }

        return measure_once(folder / f"{name}.json", measure)

    @torch.no_grad()
    def draw(self, folder: Path, sampling: Any, count: int) -> Tensor:
        """Returns the first samples of seed 0, uint8 `(n, c, h, w)`."""
        prior, tokenizer = load_prior_with_tokenizer(str(folder), None)
        device = best_device()
        return generate_images([prior.to(device)], tokenizer.to(device), num=count, seed=0, sampling=sampling)

    def floors(self) -> dict[str, float]:
        """Returns the Fréchet distances of real images, and of reconstructions of the held-out ones."""
        latents, count = self.latents, self.config.samples

        def measure() -> dict[str, float]:
            _, tokenizer = load_prior_with_tokenizer(str(self.trained(self.config.priors[0], 0)), None)
            of_reconstructions = self.real.score_reconstructions(tokenizer.to(best_device()))
            return {"real": self.real.floor(), **{f"reconstructions_{k}": v for k, v in of_reconstructions.items()}}

        return measure_once(latents.with_name(f"floors-of-{count}.json"), measure)
