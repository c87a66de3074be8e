"""Stage two: a latent set to a trained prior, in a folder with its tokenizer: all that generating needs."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar, cast

import torch

from smalti.commands.class_labels import draw_labels
from smalti.commands.model_paths import LATENTS, PRIORS, load_tokenizer, prior_class
from smalti.commands.sample import generate_codes
from smalti.core import models
from smalti.core.codes import Level
from smalti.core.config import flatten
from smalti.core.devices import Precision
from smalti.core.errors import UserError
from smalti.core.randomness import Stream, derive, row_seeds
from smalti.images.sheets import save_grid
from smalti.latentsets.dataset import LatentRows
from smalti.latentsets.reader import LatentSet, require_tokenizer
from smalti.priors.base import CodePrior, Prior
from smalti.tokenizers.base import Tokenizer
from smalti.training.accelerator import accelerator, tracked
from smalti.training.config import FitConfig, Phase
from smalti.training.loop import fit
from smalti.training.run_folder import Resume, Run

C = TypeVar("C")
Objective = TypeVar("Objective")


@dataclass(frozen=True)
class TrainPrior(Generic[C, Objective]):
    """How to train a prior.

    Raises:
        UserError: for a negative number of samples.
    """

    model: C
    """The network; its grid and what is at each position are those of the latent set."""
    objective: Objective
    """What it learns by."""
    fit: FitConfig = field(
        default_factory=lambda: FitConfig(
            steps=3_000, batch_size=32, learning_rate=3e-3, optimizer="muon", decay_fraction=0.75, ema_decay=0.998
        )
    )
    prior: str = "hourglass"
    """Kind of prior; its own settings are listed with it (`--prior KIND --help`)."""
    latents: Path = LATENTS / "hrvq.h5"
    """The latent set, from build_latents.py."""
    level: int = 0
    """Which of the latent set's levels to learn, 0 being the coarsest; the prior is told the codes of those above."""
    tokenizer: str | None = None
    """The tokenizer that made it: a kind, a folder or a hub id [default: where the latent set says]."""
    precision: Precision = "auto"
    """Arithmetic of the network; auto is bf16 where the hardware is fast in it."""
    sheet_samples: int = 32
    """Samples in `samples.png`, drawn at every report; 0 draws none, where drawing is slow."""
    out: Path | None = None
    """Folder of the run [default: runs/priors/KIND, and of a latent set of several levels runs/priors/KIND-LEVEL]."""
    resume: Resume = "auto"
    """`auto` goes on from the newest whole state, if there is one; `never` throws a run that is there away; a number
    goes back to the state of that step and forgets what came after."""

    def __post_init__(self) -> None:
        if self.sheet_samples < 0:
            raise UserError(f"--sheet-samples must not be negative, not {self.sheet_samples}; 0 draws none")


def train_prior(config: TrainPrior[Any, Any]) -> Path:
    """Trains a prior, or goes on with a run that was stopped; returns its folder.

    Leaves `model.safetensors` and `config.json`, `tokenizer/`, `run.json`, `metrics.jsonl` and, of the finest level,
    `samples.png`.

    Raises:
        UserError: for a latent set, tokenizer, settings or folder that will not do or do not belong together.
        Interrupted: if a signal stopped it.
    """
    latents = LatentSet(config.latents)
    levels = latents.layout.levels
    folder = config.out or PRIORS / (f"{config.prior}-{config.level}" if len(levels) > 1 else config.prior)
    process = accelerator(config.precision, config.fit.trackers, folder)
    tokenizer = load_tokenizer(config.tokenizer or latents.provenance.tokenizer_source)
    require_tokenizer(latents, tokenizer.digest())
    torch.manual_seed(config.fit.seed)
    cls = cast(type[Prior], models.class_of_kind("prior", config.prior))
    of_codes = issubclass(cls, CodePrior)
    names, labels = latents.provenance.label_names, latents.labels
    if not of_codes or config.objective.label_dropout == 1:
        names, labels = (), torch.full_like(labels, -1)
    classes = max(len(names), int(labels.max()) + 1)
    known = {**grids(levels, config.level), "classes": classes} if of_codes else grid_of_numbers(levels, config.level)
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, **known))
    prior = cls(config.model)
    origins = {"latents": latents.content_digest, "tokenizer": latents.provenance.tokenizer_digest}
    settings = {**flatten(config), **origins, "precision": process.mixed_precision}
    with process.main_process_first():  # which may throw an earlier run away
        run = Run(folder, settings, main=process.is_main_process, resume=config.resume)
    if run.step >= config.fit.steps:
        process.print(f"{folder} is finished: {run.step} steps. Give --steps to train on, or --resume never.")
        return folder
    prior.provenance = {
        "tokenizer_digest": latents.provenance.tokenizer_digest,
        "latents_digest": latents.content_digest,
        "level": config.level,
        "image_source": latents.provenance.image_source,
        "preprocessing": latents.provenance.preprocessing,
        "label_names": names,
        "label_counts": torch.bincount(labels + 1, minlength=classes + 1).tolist(),  # of none, then of each class
    }
    if process.is_main_process:
        tokenizer.save(folder / "tokenizer")
    tokenizer.to(process.device)
    objective = prior.method.objective(prior, config.objective)
    held_out = _held_out(latents, config.level)
    rows = LatentRows(latents, split="train", level=config.level)
    train, workers = rows.for_training(process.device, config.fit.workers)

    def report(_step: int, trained: Prior) -> None:
        if config.sheet_samples and config.level == len(levels) - 1:  # of the others there is nothing to decode
            with process.autocast():
                shown, path = held_out or rows, folder / "samples.png"
                save_samples(trained, tokenizer, shown, path, config.sheet_samples, config.fit.seed)

    with tracked(process, settings):
        fit(
            process,
            [Phase("prior", objective, config.fit.optimizer_of(objective))],
            train,
            dataclasses.replace(config.fit, workers=workers),
            model=prior,
            run=run,
            held_out=held_out,
            on_report=report,
            what=f"training {config.prior}",
        )
    return folder


def grids(levels: Sequence[Level], number: int) -> dict[str, Any]:
    """What a prior's config says of the levels of its codes.

    Raises:
        UserError: if there is no such level, it or one above it has no codes, or their grids do not fit together.
    """
    if not 0 <= number < len(levels):
        raise UserError(f"the latent set has levels 0 to {len(levels) - 1}; --level {number} is not one of them")
    *upper, level = levels[: number + 1]
    if not all(one.radices for one in (*upper, level)):
        raise UserError(
            f"level {number} or one above it holds real numbers, not codes, which --prior realnvp learns alone"
        )
    for one in upper:
        if (level.height % one.height, level.width % one.width) != (0, 0) or (
            level.height * one.width != level.width * one.height
        ):
            grids = f"{one.height}x{one.width} and {level.height}x{level.width}"
            raise UserError(f"the grids of the levels, {grids}, are not one a whole multiple of the other")
    return {
        "height": level.height,
        "width": level.width,
        "radices": level.radices,
        "upper_radices": tuple(one.radices for one in upper),
        "upper_factors": tuple(level.height // one.height for one in upper),
    }


def grid_of_numbers(levels: Sequence[Level], number: int) -> dict[str, Any]:
    """What the config of a prior over real numbers says of them.

    Raises:
        UserError: if the level holds codes, or is not the only one.
    """
    if len(levels) > 1 or number or not levels[0].channels:
        raise UserError(
            "realnvp learns latent sets of one level of real numbers, such as selfvae's; this one's are codes, which "
            "--prior hourglass, maskgit and pixelcnn learn"
        )
    return {"height": levels[0].height, "width": levels[0].width, "channels": levels[0].channels}


def save_samples(prior: Prior, tokenizer: Tokenizer, shown: LatentRows, path: Path, number: int, seed: int) -> None:
    """A sheet of so many samples as the prior is now, of each class in turn; the same seeds every time, to be compared.

    Below upper levels, the codes there and the classes are those of the first rows in `shown`.
    """
    rows, upper = torch.arange(number), ()
    if prior.upper_levels:
        rows = rows[: len(shown)]
        batch = shown.__getitems__(rows.tolist())
        where = next(prior.parameters()).device
        upper = tuple(batch[f"upper_{level}"].to(where) for level in range(prior.upper_levels))
        labels = batch["labels"]
    else:
        labels = draw_labels(prior, range(prior.classes), rows, seed)
    codes = generate_codes(prior, rows, labels, seed=seed, sampling=prior.method.sampling(), upper=upper)
    seeds = derive(row_seeds(seed, rows), Stream.IMAGE_DETAILS).to(codes.device)
    save_grid(path, tokenizer.draw((*upper, codes), seeds).cpu())


def _held_out(latents: LatentSet, level: int) -> LatentRows | None:
    """The held-out rows; None if a small set has none."""
    try:
        return LatentRows(latents, split="held_out", level=level)
    except UserError:
        return None


def default_config(kind: str) -> Any:
    """The config class of a kind, for the command line: `TrainPrior` of its own, an alias and no `type`."""
    prior = prior_class(kind)
    return TrainPrior[prior.config_class, prior.method.objective_config]
