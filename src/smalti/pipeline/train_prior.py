"""Stage two: a latent set to a trained prior, in a folder with its tokenizer: all that generating needs."""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar, cast

import torch

from smalti import registry
from smalti.devices import Precision, accelerator, tracked
from smalti.errors import UserError
from smalti.fit import fit
from smalti.fit_config import FitConfig, Phase
from smalti.interfaces import Tokenizer
from smalti.latentsets.reader import LatentSet, require_tokenizer
from smalti.latentsets.rows import LatentRows
from smalti.pictures import save_grid
from smalti.pipeline.classes import draw_labels
from smalti.pipeline.generate import generate_codes
from smalti.pipeline.places import LATENTS, PRIORS, load_tokenizer
from smalti.priors.prior import Prior
from smalti.priors.samplers import SundaeSampling
from smalti.priors.sundae import Sundae, SundaeConfig
from smalti.runs import Resume, Run, flatten

C = TypeVar("C")

SHEET_SAMPLES = 32


@dataclass(frozen=True)
class TrainPrior(Generic[C]):
    """How to train a prior."""

    model: C
    """The network; its height, width and radices are those of the latent set."""
    sundae: SundaeConfig = field(default_factory=SundaeConfig)
    fit: FitConfig = field(
        default_factory=lambda: FitConfig(
            steps=3_000, batch_size=32, learning_rate=3e-3, optimizer="muon", decay_fraction=0.75, ema_decay=0.998
        )
    )
    prior: str = "hourglass"
    """Kind of prior; its own settings are listed with it (`--prior KIND --help`)."""
    latents: Path = LATENTS / "hrvq.h5"
    """The latent set, from build_latents.py."""
    tokenizer: str | None = None
    """The tokenizer that made it: a kind, a folder or a hub id [default: where the latent set says]."""
    precision: Precision = "auto"
    """Arithmetic of the network; auto is bf16 where the hardware is fast in it."""
    out: Path | None = None
    """Folder of the run [default: runs/priors/KIND]."""
    resume: Resume = "auto"
    """`auto` goes on from the newest whole state, if there is one; `never` throws a run that is there away; a number
    goes back to the state of that step and forgets what came after."""


def train_prior(config: TrainPrior[Any]) -> Path:
    """Trains a prior, or goes on with a run that was stopped; returns its folder.

    Leaves `model.safetensors` and `config.json`, `tokenizer/`, `run.json`, `metrics.jsonl` and `samples.png`.

    Raises:
        UserError: for a latent set, tokenizer, settings or folder that will not do or do not belong together.
        Interrupted: if a signal stopped it.
    """
    folder = config.out or PRIORS / config.prior
    process = accelerator(config.precision, config.fit.trackers, folder)
    latents = LatentSet(config.latents)
    tokenizer = load_tokenizer(config.tokenizer or latents.provenance.tokenizer_source)
    require_tokenizer(latents, tokenizer.digest())
    (level,) = latents.layout.levels
    torch.manual_seed(config.fit.seed)
    names, labels = latents.provenance.label_names, latents.labels
    if config.sundae.label_dropout == 1:
        names, labels = (), torch.full_like(labels, -1)
    classes = max(len(names), int(labels.max()) + 1)
    known = {"height": level.height, "width": level.width, "radices": level.radices, "classes": classes}
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, **known))
    prior = cast(Prior, registry.find("prior", config.prior)(config.model))
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
        "image_source": latents.provenance.image_source,
        "preprocessing": latents.provenance.preprocessing,
        "label_names": names,
        "label_counts": torch.bincount(labels + 1, minlength=classes + 1).tolist(),  # of none, then of each class
    }
    if process.is_main_process:
        tokenizer.save(folder / "tokenizer")
    tokenizer.to(process.device)
    objective = Sundae(prior, config.sundae)
    train, workers = LatentRows(latents, split="train").for_training(process.device, config.fit.workers)

    def report(_step: int, trained: Prior) -> None:
        with process.autocast():
            save_samples(trained, tokenizer, folder / "samples.png", config)

    with tracked(process, settings):
        fit(
            process,
            [Phase("prior", objective, config.fit.optimizer_of(objective))],
            train,
            dataclasses.replace(config.fit, workers=workers),
            model=prior,
            run=run,
            held_out=_held_out(latents),
            on_report=report,
            what=f"training {config.prior}",
        )
    return folder


def save_samples(prior: Prior, tokenizer: Tokenizer, path: Path, config: TrainPrior[Any]) -> None:
    """A sheet of samples as the prior is now, of each class in turn; the same seeds every time, to be compared."""
    rows = torch.arange(SHEET_SAMPLES)
    labels = draw_labels(prior, range(prior.classes), rows, config.fit.seed)
    codes = generate_codes(prior, rows, labels, seed=config.fit.seed, sampling=SundaeSampling())
    save_grid(path, tokenizer.decode((codes,)).cpu())


def _held_out(latents: LatentSet) -> LatentRows | None:
    """The held-out rows; None if a small set has none."""
    try:
        return LatentRows(latents, split="held_out")
    except UserError:
        return None


def default_config(kind: str) -> Any:
    """The config class of a kind, for the command line: `TrainPrior` of its network's, an alias and no `type`."""
    return TrainPrior[registry.find("prior", kind).config_class]
