"""The study of overfitting: a prior of a small set of images with and without dropout, random crops and early stopping.

Every run trains for the same steps, whose cost dropout and crops hardly change. The best snapshot of a run is what
early stopping would have kept, so a run is measured twice: after its last step, and at its best held-out loss.
"""

import statistics
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from tyro.conf import Positional

from smalti.benchmarks.comparison import in_spread
from smalti.commands.build_latents import BuildLatents, build_latents
from smalti.commands.generating import generate_images
from smalti.commands.model_paths import RUNS, load_prior, load_tokenizer
from smalti.commands.train_prior import TrainPrior, train_prior
from smalti.commands.train_tokenizer import TrainTokenizer, train_tokenizer
from smalti.core.devices import Precision, best_device
from smalti.core.errors import require_at_least_one
from smalti.core.provenance import logged_values
from smalti.images.image_set import open_images
from smalti.metrics.extractors import find_extractor
from smalti.priors.methods.sundae import SundaeConfig
from smalti.priors.networks.hourglass import HourglassConfig
from smalti.studies.against_real import AgainstReal
from smalti.studies.experiment import logged_hours, measure_once, table_row, write_section
from smalti.tokenizers.vq.hrvq import HRVQConfig
from smalti.training.config import FitConfig
from smalti.training.snapshots import Snapshots

TOKENIZER = HRVQConfig(branching=16)
PRIOR = HourglassConfig()
REPORT_STEPS = 100
"""Steps between the held-out losses of a run, among which the best is found."""

STATES = ("last", "best")
COLUMNS = (
    *("dropout", "crops", "seeds", "training loss", "held-out loss", "Fréchet distance"),
    *("best after", "its held-out loss", "its Fréchet distance"),
)


@dataclass(frozen=True)
class ReproduceOverfitting:
    """Settings of the study.

    Raises:
        UserError: for a number below 1.
    """

    study: Positional[Literal["overfitting"]]
    """The study: smalti's own study of overfitting."""
    images: str = "emoji"
    """Images to train on; any source that `--images` of train_tokenizer takes."""
    dropout: tuple[float, ...] = (0.0, 0.1)
    """Dropout rates of the prior."""
    crops: tuple[int, ...] = (0, 4)
    """Numbers of random crops of each training image in the latent set."""
    seeds: int = 3
    """Seeds, and so runs, of each prior."""
    tokenizer_steps: int = 700
    """Training steps of the tokenizer, of 32 images."""
    prior_steps: int = 1_000
    """Training steps of each prior, of 32 images."""
    samples: int = 400
    """Samples of each prior that are measured."""
    precision: Precision = "auto"
    """Precision of the networks in training."""
    work: Path = RUNS / "overfitting"
    """Folder of the runs."""
    out: Path = Path("docs/reproductions/priors.md")
    """The Markdown report. Its measured section is replaced."""

    def __post_init__(self) -> None:
        require_at_least_one(self, "seeds", "tokenizer_steps", "prior_steps", "samples")


class Overfitting:
    """The runs of the study and what is measured of them; what is on the disk is neither trained nor measured again."""

    def __init__(self, config: ReproduceOverfitting) -> None:
        self.config = config
        self.folder = config.work / f"{Path(config.images).stem}-{config.tokenizer_steps}steps"
        """Folder of one tokenizer and all that is trained and measured on its codes."""

    @cached_property
    def tokenizer_folder(self) -> Path:
        """The folder of the tokenizer, trained."""
        defaults = TrainTokenizer(model=TOKENIZER)
        fit = FitConfig(steps=self.config.tokenizer_steps, batch_size=32)
        settings = replace(defaults, images=self.config.images, fit=fit, precision=self.config.precision)
        return train_tokenizer(replace(settings, out=self.folder / "tokenizer"))

    def latents(self, crops: int) -> Path:
        """Returns the latent set with a number of crops, built. It has no mirror images."""
        path = self.folder / f"latents-{crops}crops.h5"
        return build_latents(BuildLatents(tokenizer=str(self.tokenizer_folder), flips=False, crops=crops, out=path))

    def trained(self, dropout: float, crops: int, seed: int) -> Path:
        """Returns the folder of a prior, trained."""
        defaults = TrainPrior(model=replace(PRIOR, dropout=dropout), objective=SundaeConfig())
        fit = replace(
            defaults.fit,
            steps=self.config.prior_steps,
            report_steps=REPORT_STEPS,
            save_steps=REPORT_STEPS,
            seed=seed,
        )
        settings = replace(defaults, fit=fit, latents=self.latents(crops), precision=self.config.precision)
        folder = self.folder / f"prior-dropout{dropout}-{crops}crops-{self.config.prior_steps}steps-seed{seed}"
        return train_prior(replace(settings, sheet_samples=0, out=folder))

    @cached_property
    def real(self) -> AgainstReal:
        """The real images."""
        images = open_images(self.config.images, height=TOKENIZER.height, width=TOKENIZER.width)
        return AgainstReal(images, find_extractor("lite0", best_device()), samples=self.config.samples)

    def result(self, dropout: float, crops: int, seed: int) -> dict[str, Any]:
        """Returns what is measured of a run: `last` and `best`, each with its step and scores, and `hours`."""
        folder = self.trained(dropout, crops, seed)
        held_out, losses = logged_values(folder, "held_out_loss"), logged_values(folder, "loss")
        snapshots = Snapshots(folder)
        best = min(held_out, key=lambda step: held_out[step])

        def measure() -> dict[str, Any]:
            last = {"step": max(held_out), **self._scores(folder)}
            result = {"last": last, "best": last, "hours": logged_hours(folder)}
            if best != last["step"]:
                result["best"] = {"step": best, **self._scores(snapshots.path(best))}
            for each in (result["last"], result["best"]):
                each |= {"held_out_loss": held_out[each["step"]], "loss": losses[each["step"]]}
            return result

        return measure_once(folder / f"scores-of-{self.config.samples}.json", measure)

    @torch.no_grad()
    def _scores(self, prior_folder: Path) -> dict[str, float]:
        device = best_device()
        prior = load_prior(str(prior_folder)).to(device)
        tokenizer = load_tokenizer(str(self.tokenizer_folder)).to(device)
        images = generate_images([prior], tokenizer, num=self.config.samples, seed=0, sampling=prior.method.sampling())
        return self.real.score(images).numbers

    def floors(self) -> dict[str, float]:
        """Returns the Fréchet distances of real images, and of reconstructions of the held-out ones."""
        tokenizer = load_tokenizer(str(self.tokenizer_folder)).to(best_device())

        def measure() -> dict[str, float]:
            return {"real": self.real.floor(), "reconstructions": self.real.score_reconstructions(tokenizer)["frechet"]}

        return measure_once(self.folder / f"floors-of-{self.config.samples}.json", measure)


def reproduce_overfitting(config: ReproduceOverfitting) -> None:
    """Trains and measures what is missing, seed by seed, and writes the report after each run.

    Raises:
        UserError: for images that cannot be used.
        Interrupted: if a signal stopped a run; the same command resumes it.
    """
    study = Overfitting(config)
    results: dict[tuple[float, int], list[dict[str, Any]]] = {
        (dropout, crops): [] for crops in config.crops for dropout in config.dropout
    }
    for seed in range(config.seeds):
        for (dropout, crops), of_run in results.items():
            of_run.append(study.result(dropout, crops, seed))
            write_section(config.out, "overfitting", table(config, results, study.floors()), _budget(config))


def table(
    config: ReproduceOverfitting,
    results: dict[tuple[float, int], list[dict[str, Any]]],
    floors: dict[str, float],
) -> str:
    """Returns the table: a row for each dropout and number of crops, with means and spreads over the seeds."""
    rows = [
        f"`{config.images}`: held-out loss of SUNDAE's objective, nats a code, and Fréchet distance of "
        f"{config.samples} samples; the mean over seeds, from the least to the most. The same of the snapshot with the "
        "least held-out loss, which early stopping keeps.",
        "",
        table_row(COLUMNS),
        table_row(["---:"] * len(COLUMNS)),
    ]
    for (dropout, crops), of_run in results.items():
        if not of_run:
            continue
        cells = [f"{dropout:g}", str(crops), str(len(of_run))]
        cells.append(in_spread([each["last"]["loss"] for each in of_run], ".3f"))
        for state in ("last", "best"):
            if state == "best":
                cells.append(f"{statistics.median(each['best']['step'] for each in of_run):.0f} steps")
            cells.append(in_spread([each[state]["held_out_loss"] for each in of_run], ".3f"))
            cells.append(in_spread([each[state]["frechet"] for each in of_run], ".0f"))
        rows.append(table_row(cells))
    near = max(each[state]["share_too_near"] for of_run in results.values() for each in of_run for state in STATES)
    return "\n".join(
        [
            *rows,
            "",
            f"Real images have a Fréchet distance of {floors['real']:.0f}, reconstructions of held-out images "
            f"{floors['reconstructions']:.0f}. At most {near:.3f} of the samples of a run are too near to a training "
            "image.",
        ]
    )


def _budget(config: ReproduceOverfitting) -> str:
    return f"tokenizer {config.tokenizer_steps} steps, each prior {config.prior_steps} steps of 32 rows"
