"""The study of 64x64 pixels: HR-VQVAE and VQ-GAN with 8x8 and 16x16 codes, each with a prior, on sets of images.

The tokenizers are those of the preset `small64`. Models and scores are kept, so a study that was stopped resumes.
"""

import shutil
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from tyro.conf import Positional

from smalti.commands.build_latents import BuildLatents, build_latents
from smalti.commands.generating import generate_images
from smalti.commands.inpainting import save_example_fills
from smalti.commands.model_paths import RUNS, load_prior_with_tokenizer
from smalti.commands.presets import small64
from smalti.commands.train_prior import TrainPrior, train_prior
from smalti.commands.train_tokenizer import save_reconstructions, train_tokenizer
from smalti.core.codes import perplexity
from smalti.core.config import read_json
from smalti.core.devices import Precision, best_device
from smalti.core.errors import require_at_least_one
from smalti.core.models import CONFIG_NAME
from smalti.core.provenance import last_metrics
from smalti.images.image_set import open_images
from smalti.images.sheets import save_grid
from smalti.latentsets.reader import LatentSet
from smalti.metrics.extractors import find_extractor
from smalti.priors.base import Prior
from smalti.priors.methods.sundae import SundaeConfig
from smalti.priors.networks.hourglass import HourglassConfig
from smalti.studies.against_real import AgainstReal
from smalti.studies.experiment import (
    count_parameters,
    logged_hours,
    measure_once,
    picture_path,
    table_row,
    write_section,
)
from smalti.tokenizers.base import Tokenizer

KindName: TypeAlias = Literal["hrvq", "vqgan"]

SIZE = 64
"""Side of the images, in pixels."""
SHOWN_SAMPLES = 48
COLUMNS = (
    *("tokenizer", "codes", "parameters", "steps", "hours", "held-out MSE", "Fréchet, reconstructions"),
    *("prior's steps", "hours", "held-out nats a code", "Fréchet, samples", "precision, recall", "too near"),
)
SAMPLES_NAME, FILLS_NAME, RECONSTRUCTIONS_NAME = "samples.png", "fills.png", "reconstructions.png"


class Cell(NamedTuple):
    """A tokenizer of the study, with its prior.

    Attributes:
        kind: the tokenizer's kind.
        side: the side of its grid of codes.
        widths: the channels of its stages.
        prior_batch: the batch size of its prior.
    """

    kind: KindName
    side: int
    widths: tuple[int, ...]
    prior_batch: int

    @property
    def name(self) -> str:
        """Returns the name of the cell's files."""
        return f"{self.kind}-{self.side}x{self.side}"


CELLS = (
    Cell("hrvq", 8, (48, 96, 128), prior_batch=64),
    Cell("vqgan", 8, (32, 64, 96, 128), prior_batch=64),
    Cell("hrvq", 16, (48, 96), prior_batch=32),
    Cell("vqgan", 16, (32, 64, 96), prior_batch=32),
)
PRIOR = HourglassConfig()


@dataclass(frozen=True)
class ReproduceSize64:
    """Settings of the study.

    Raises:
        UserError: for a number below 1.
    """

    study: Positional[Literal["size64"]]
    """The study: smalti's own study of images of 64x64 pixels."""
    images: tuple[str, ...]
    """Sets of images to train on, each as `--images` of train_tokenizer takes them, with at least 64 pixels a side."""
    kinds: tuple[KindName, ...] = ("hrvq", "vqgan")
    """Kinds of tokenizer."""
    sides: tuple[Literal[8, 16], ...] = (8, 16)
    """Sides of the grid of codes."""
    tokenizer_steps: int | None = None
    """Training steps of each tokenizer, of 16 images [default: those of the preset small64]."""
    prior_steps: int = 2_000
    """Training steps of each prior, of 64 images with 8x8 codes, of 32 with 16x16."""
    samples: int = 1_000
    """Samples of each prior that are measured, if the training images are at least twice as many."""
    precision: Precision = "auto"
    """Precision of the networks in training."""
    work: Path = RUNS / "size64"
    """Folder of the runs."""
    out: Path = Path("docs/reproductions/size64.md")
    """The Markdown report. Its measured sections are replaced; pictures are written beside it."""

    def __post_init__(self) -> None:
        require_at_least_one(self, "prior_steps", "samples")


def trained(cell: Cell, images: str, config: ReproduceSize64) -> Path:
    """Returns the folder of a cell, whose `tokenizer`, `latents.h5` and `prior` are finished.

    Raises:
        Interrupted: if a signal stopped a training; the same call resumes it.
    """
    folder = folder_of(cell, images, config)
    defaults = small64(cell.kind)
    fit = replace(defaults.fit, steps=config.tokenizer_steps or defaults.fit.steps)
    settings = replace(defaults, model=replace(defaults.model, widths=cell.widths), images=images, fit=fit)
    train_tokenizer(replace(settings, precision=config.precision, out=folder / "tokenizer"))
    build = BuildLatents(tokenizer=str(folder / "tokenizer"), flips=False, out=folder / "latents.h5")
    latents = build_latents(build)
    prior = TrainPrior(model=PRIOR, objective=SundaeConfig())
    fit = replace(prior.fit, steps=config.prior_steps, batch_size=cell.prior_batch)
    train_prior(replace(prior, fit=fit, latents=latents, precision=config.precision, out=folder / "prior"))
    return folder


def folder_of(cell: Cell, images: str, config: ReproduceSize64) -> Path:
    """Returns the folder of a cell."""
    return config.work / f"{data_name(images)}-{cell.name}"


def scores_of(folder: Path, tokenizer: Tokenizer, prior: Prior, config: ReproduceSize64) -> Path:
    """Returns the file for the scores of a cell's models."""
    return folder / f"scores-{tokenizer.digest()[:12]}-{prior.digest()[:12]}-{config.samples}.json"


def finished(cell: Cell, images: str, config: ReproduceSize64) -> dict[str, Any] | None:
    """Returns what an earlier call measured of a cell; None if it is not finished."""
    folder = folder_of(cell, images, config)
    if not (folder / "prior" / CONFIG_NAME).exists():
        return None
    prior, tokenizer = load_prior_with_tokenizer(str(folder / "prior"), None)
    scores = scores_of(folder, tokenizer, prior, config)
    return read_json(scores) if scores.exists() else None


def data_name(images: str) -> str:
    """Returns the name of a set of images: of its file or folder without suffix, or the name of embedded images."""
    return Path(images).stem


class RealImagesOnce:
    """The real images of a set, opened when the first score is measured."""

    def __init__(self, images: str, config: ReproduceSize64) -> None:
        self._images, self._config = images, config

    @cached_property
    def scores(self) -> AgainstReal:
        """Scores against the images."""
        images = open_images(self._images, height=SIZE, width=SIZE)
        return AgainstReal(images, find_extractor("lite0", best_device()), samples=self._config.samples)


@torch.no_grad()
def measured(folder: Path, real: RealImagesOnce, config: ReproduceSize64) -> dict[str, Any]:
    """Returns what is measured of a finished cell, and writes its sheets into its folder."""
    prior, tokenizer = load_prior_with_tokenizer(str(folder / "prior"), None)
    prior, tokenizer = prior.to(best_device()), tokenizer.to(best_device())

    def measure() -> dict[str, Any]:
        against = real.scores
        samples = generate_images([prior], tokenizer, num=config.samples, seed=0, sampling=prior.method.sampling())
        usage = LatentSet(folder / "latents.h5").usage()
        save_grid(folder / SAMPLES_NAME, samples[:SHOWN_SAMPLES])
        save_reconstructions(tokenizer, against.held_out, folder / RECONSTRUCTIONS_NAME)
        save_example_fills(prior, tokenizer, against.held_out, folder / FILLS_NAME, sampling=prior.method.filling())
        return {
            "tokenizer": against.score_reconstructions(tokenizer)
            | {"perplexity": perplexity(usage), "codes": len(usage), "hours": logged_hours(folder / "tokenizer")}
            | {"parameters": count_parameters(tokenizer), "steps": last_metrics(folder / "tokenizer")["step"]},
            "prior": against.score(samples).numbers
            | {"held_out_loss": last_metrics(folder / "prior")["held_out_loss"]}
            | {"hours": logged_hours(folder / "prior"), "steps": last_metrics(folder / "prior")["step"]},
            "floor": against.floor(),
            "images": [len(against.training), len(against.held_out)],
        }

    return measure_once(scores_of(folder, tokenizer, prior, config), measure)


def reproduce_size64(config: ReproduceSize64) -> None:
    """Trains and measures what is missing, and writes a set's section of the report after each of its cells.

    A section shows the cells that earlier calls finished too.

    Raises:
        UserError: for images that cannot be used.
        Interrupted: if a signal stopped a training; the same command resumes it.
    """
    cells = [cell for cell in CELLS if cell.kind in config.kinds and cell.side in config.sides]
    real = {images: RealImagesOnce(images, config) for images in config.images}
    results = {
        images: {cell: result for cell in CELLS if (result := finished(cell, images, config))}
        for images in config.images
    }
    for cell in cells:
        for images in config.images:
            folder = trained(cell, images, config)
            results[images][cell] = measured(folder, real[images], config)
            name = data_name(images)
            for shown, picture in product(results[images], (SAMPLES_NAME, FILLS_NAME)):
                shutil.copy(folder_of(shown, images, config) / picture, _picture(config, name, shown, picture))
            write_section(
                config.out, name, section(name, results[images], config), "priors in batches of 64 (8×8) and 32 (16×16)"
            )


def section(name: str, results: dict[Cell, dict[str, Any]], config: ReproduceSize64) -> str:
    """Returns a set's section: a table with a row for each cell, and the pictures."""
    first = next(iter(results.values()))
    training, held_out = first["images"]
    rows = [
        f"`{name}` at {SIZE}×{SIZE}: {training} training images, {held_out} held out. Fréchet distances (lite0) of "
        f"the reconstructions of the held-out images, and of {config.samples} samples; real images have "
        f"{first['floor']:.0f}.",
        "",
        table_row(COLUMNS),
        table_row(["---", "---", *["---:"] * (len(COLUMNS) - 2)]),
    ]
    for cell, result in sorted(results.items(), key=lambda item: CELLS.index(item[0])):
        tokenizer, prior = result["tokenizer"], result["prior"]
        rows.append(
            table_row(
                [
                    cell.kind,
                    f"{cell.side}×{cell.side} of 16³",
                    f"{tokenizer['parameters'] / 1e6:.2f} M",
                    f"{tokenizer['steps']:.0f}",
                    f"{tokenizer['hours']:.1f}",
                    f"{tokenizer['mse']:.5f}",
                    f"{tokenizer['frechet']:.0f}",
                    f"{prior['steps']:.0f}",
                    f"{prior['hours']:.1f}",
                    f"{prior['held_out_loss']:.3f}",
                    f"{prior['frechet']:.0f}",
                    f"{prior['precision']:.2f}, {prior['recall']:.2f}",
                    f"{prior['share_too_near']:.3f}",
                ]
            )
        )
    return "\n".join([*rows, *_pictures(name, results, config)])


def _pictures(name: str, cells: Iterable[Cell], config: ReproduceSize64) -> list[str]:
    lines = []
    for cell in sorted(cells, key=CELLS.index):
        caption = f"{name}, {cell.kind} with {cell.side}×{cell.side} codes"
        for picture, what in ((SAMPLES_NAME, "samples, none selected"), (FILLS_NAME, "fills of held-out images")):
            lines += [
                "",
                f"![{caption}: {what}]({_picture(config, name, cell, picture).name})",
                f"*{caption}: {what}.*",
            ]
    return lines


def _picture(config: ReproduceSize64, name: str, cell: Cell, picture: str) -> Path:
    return picture_path(config.out, name, cell.name, Path(picture).stem)
