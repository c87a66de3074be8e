"""Stage two: trains a prior on a latent set.

The run's folder also holds a copy of the tokenizer, so it has everything that generation needs.
"""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from shlex import quote
from typing import Any, Generic, Literal, TypeAlias, TypeVar, cast

import torch

from smalti.commands.class_labels import draw_labels, first_names, label_counts, trained_classes
from smalti.commands.generating import generate_codes
from smalti.commands.model_paths import (
    LATENTS,
    PRIORS,
    as_typed,
    find_initial_model,
    load_prior,
    load_tokenizer,
    require_config,
)
from smalti.core import models
from smalti.core.config import added, added_values, flatten, require_choices, store_paths
from smalti.core.devices import Device, Precision, generators_kept
from smalti.core.errors import UserError
from smalti.core.files import require_no_input
from smalti.core.progress import SLOW_SECONDS, bar, counting, print_note
from smalti.core.randomness import Stream, derive, row_seeds
from smalti.images.sheets import save_grid
from smalti.images.sources import local_paths
from smalti.latentsets.dataset import LatentRows
from smalti.latentsets.reader import LatentSet, require_tokenizer
from smalti.priors.base import CodePrior, Prior
from smalti.priors.grids import continuous_grid, grids
from smalti.tokenizers.base import Tokenizer
from smalti.training.accelerator import accelerator, accelerator_kept, tracked
from smalti.training.config import FitConfig, Phase
from smalti.training.end_of_run import print_end, print_finished
from smalti.training.loop import fit
from smalti.training.run_folder import RUN_NAME, Resume, Run
from smalti.transfer.weights import changed_settings, take_classes, take_weights, weights_of_new_vectors

C = TypeVar("C")
Objective = TypeVar("Objective")
PriorPreset: TypeAlias = Literal["small", "ffhq256", "ffhq1024"]

LEARNING_RATE, LEARNING_RATES = 5e-3, {"pixelcnn": 1e-3}
"""The default, and those of kinds that diverge with it."""
STANDARDIZING_ROWS = 1 << 16
"""Most training rows, evenly spread, whose vectors give the mean and deviation that vectors are standardized by."""
OVERFITTING_REMEDIES = (
    "Remedies: --dropout 0.2, more images, --patience; docs/guide/train-a-prior.md, Small sets of images"
)
RESIZABLE = frozenset({"classes", "condition_width", "radices", "height", "width"})
"""Settings of a network that may differ from those of `--init`."""


def default_fit(kind: str) -> FitConfig:
    """Returns the training settings of a kind of prior, for two CPU cores."""
    return FitConfig(
        steps=3_000,
        batch_size=32,
        learning_rate=LEARNING_RATES.get(kind, LEARNING_RATE),
        optimizer="muon",
        decay_fraction=0.75,
        ema_decay=0.998,
    )


@dataclass(frozen=True)
class TrainPrior(Generic[C, Objective]):
    """Settings of `train_prior`.

    From Python, `prior` must be the kind of `model`. The defaults of `fit` are those of `hourglass`;
    `default_fit(kind)` has those of another kind.

    Raises:
        UserError: for a negative number of samples.
    """

    model: C
    """The network. The latent set decides its grid and its codes."""
    objective: Objective
    """The training objective."""
    fit: FitConfig = field(default_factory=lambda: default_fit("hourglass"))
    prior: str = "hourglass"
    """Kind of prior. Each kind has its own options: see `--prior KIND --help`."""
    preset: PriorPreset = added(off="small")
    """Default settings: `small`, for two CPU cores, or those of SUNDAE on VQ-GAN codes for FFHQ (hourglass only), for
    GPUs. Other flags override them."""
    init: str | None = None
    """Start from the weights of this trained prior: the name of one in the package, a kind, a folder, or a hub id.
    Network settings that are not given are its own. The classes and the number of codes may be others: classes are
    matched by name, and what does not fit starts untrained [default: start untrained]."""
    latents: Path = LATENTS / "hrvq.h5"
    """The latent set to train on: a file or folder from build_latents.py, a pattern such as 'folder/*.h5', or the hub
    id of a data set."""
    condition: Literal["class", "vector"] = added(off="class")
    """Learn images given their class, if the latent set has labels, or given its vectors (`smalti build-latents
    --conditions`)."""
    level: int = 0
    """Level of the latent set to learn, 0 being the coarsest. The prior is conditioned on the coarser levels' codes."""
    tokenizer: str | None = None
    """The tokenizer that made the latent set: a kind, a folder or a hub id [default: the path recorded in the set]."""
    device: Device = "auto"
    """Device to train on; `auto` is the best one."""
    precision: Precision = "auto"
    """Precision of the network (mixed precision); `auto` is bf16 where the hardware is fast in it, fp16 on older CUDA
    GPUs, else fp32."""
    sheet_samples: int = 32
    """Samples in `samples.png`, drawn after a minute and at every report. Use 0 to draw none if sampling is slow."""
    out: Path | None = None
    """Folder of the run [default: runs/priors/KIND, or KIND-LEVEL if the latent set has several levels]."""
    resume: Resume = "auto"
    """`auto` resumes from the newest snapshot, if there is one; `never` deletes an existing run and starts over; a step
    number rolls back to the snapshot of that step and discards everything after it."""

    def __post_init__(self) -> None:
        store_paths(self, names=("init", "tokenizer"), paths=("latents", "out"))
        require_choices(self)
        if self.sheet_samples < 0:
            raise UserError(f"--sheet-samples must not be negative, not {self.sheet_samples}; 0 draws none")


@generators_kept()
@accelerator_kept()
def train_prior(config: TrainPrior[Any, Any], latents: LatentSet | None = None) -> Path:
    """Trains a prior, or resumes a stopped run; returns its folder.

    The folder holds `model.safetensors` and `config.json`, `tokenizer/`, `run.json`, `metrics.jsonl`
    and, for the finest level, `samples.png`.

    Args:
        config: the settings.
        latents: the latent set that the config names, if the caller has opened it already.

    Raises:
        UserError: for an unsuitable latent set, tokenizer, setting or folder, or if they do not match.
        Interrupted: if a signal stopped the run.
    """
    require_config(models.class_of_kind("prior", config.prior), config.model)
    if not isinstance(latents, LatentSet | None):
        raise UserError(f"latents is given as {type(latents).__name__}; give a LatentSet")
    latents = LatentSet(config.latents) if latents is None else latents
    levels = latents.layout.levels
    folder = config.out or PRIORS / (f"{config.prior}-{config.level}" if len(levels) > 1 else config.prior)
    require_no_input([folder], [config.latents, *local_paths(latents.provenance.image_source)])
    process = accelerator(config.precision, config.fit.trackers, folder, config.device)
    tokenizer = load_tokenizer(config.tokenizer or latents.provenance.tokenizer_source)
    require_tokenizer(latents, tokenizer.digests_of_codes())
    torch.manual_seed(config.fit.seed)
    config, prior = _new_prior(config, latents)
    origins = {"latents": latents.content_digest, "tokenizer": latents.provenance.tokenizer_digest}
    settings = {**flatten(config), **origins, "precision": process.mixed_precision}
    other = load_prior(find_initial_model(config.init, "prior", folder)) if config.init else None
    settings["init_digest"] = other.digest() if other else None
    with process.main_process_first():  # it may delete an earlier run
        off = added_values(config)
        run = Run(folder, settings, main=process.is_main_process, resume=config.resume, off=off)
    if ending := run.end(config.fit.steps, config.fit.patience):
        print_finished(folder, ending, more=run.advice(config.fit.steps, config.fit.patience, "--steps"))
        return folder
    if config.init is not None and other is not None:
        prior.provenance |= {"init": config.init, "init_digest": settings["init_digest"]}
        if not run.step:
            _take_weights(config.init, prior, other, quiet=not process.is_main_process)
    if process.is_main_process:
        _warn_of_untrained_classes(prior)
        if isinstance(prior, CodePrior) and prior.conditional and not config.objective.label_dropout:
            print_note(
                "note: with --label-dropout 0 the prior is never trained without a class or vector, so sample with "
                "--guidance 1"
            )
        _save_tokenizer(tokenizer, folder)
    tokenizer.to(process.device)
    objective = prior.method.objective(prior, config.objective)
    reading = {"level": config.level, "conditions": bool(prior.condition_width)}
    held_out = _held_out(latents, reading)
    rows = LatentRows(latents, split="train", **reading)
    train, workers = rows.for_training(process.device, config.fit.workers)

    def draw(trained: Prior) -> Path | None:
        if not config.sheet_samples or config.level < len(levels) - 1:  # only the finest level completes an image
            return None
        with process.autocast():
            shown, path = held_out or rows, folder / "samples.png"
            save_samples(trained, tokenizer, shown, path, config.sheet_samples, config.fit.seed)
        return path

    with tracked(process, settings):
        fit(
            process,
            [Phase("prior", objective, config.fit.optimizer_of(objective), cuda_graph=True)],
            train,
            dataclasses.replace(config.fit, workers=workers),
            model=prior,
            run=run,
            held_out=held_out,
            draw=draw,
            what=f"training {config.prior}",
        )
    return folder


def train_prior_with_ending(config: TrainPrior[Any, Any]) -> None:
    """Trains a prior and prints the last lines of the command, also if its latent set has been removed meanwhile.

    Raises:
        UserError, Interrupted: as `train_prior` does.
    """
    latents = LatentSet(config.latents)
    print_end_of_prior(train_prior(config, latents), config, len(latents.layout.levels))


def print_end_of_prior(folder: Path, config: TrainPrior[Any, Any], levels: int) -> None:
    """Prints the last lines of the command, on the main process; the next level is trained before sampling."""
    if config.level < levels - 1:
        latents = quote(str(config.latents))
        command = f"python scripts/train_prior.py --latents {latents} --level {config.level + 1}"
    else:
        others = f", with the priors of the other {levels - 1} level(s) beside it" if levels > 1 else ""
        command = f"python scripts/sample.py --prior {quote(as_typed(folder, 'prior'))}{others}"
    print_end(folder, pictures="samples.png", following=command, remedies=OVERFITTING_REMEDIES)


def _new_prior(config: TrainPrior[Any, Any], latents: LatentSet) -> tuple[TrainPrior[Any, Any], Prior]:
    """Creates an untrained prior for a level of the latent set; returns it with the completed config."""
    cls = cast(type[Prior], models.class_of_kind("prior", config.prior))
    levels, names, counts = latents.layout.levels, latents.provenance.label_names, latents.overview.label_counts
    learns_codes, by_vector = issubclass(cls, CodePrior), config.condition == "vector"
    if by_vector and not learns_codes:
        raise UserError(f"--prior {config.prior} is conditioned on nothing; leave --condition out")
    if by_vector and not latents.condition_width:
        raise UserError(
            f"{latents.path} has no vectors for --condition vector; build it with --conditions (build_latents.py)"
        )
    if not learns_codes or by_vector or config.objective.label_dropout == 1:
        names, counts = (), {split: rows.sum(keepdims=True) for split, rows in counts.items()}
    classes = max(len(names), *(len(rows) - 1 for rows in counts.values()))
    if learns_codes:
        width = latents.condition_width if by_vector else 0
        shape = {**grids(levels, config.level), "classes": classes, "condition_width": width}
    else:
        shape = continuous_grid(levels, config.level)
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, **shape))
    prior = cls(config.model)
    if isinstance(prior, CodePrior) and prior.of_vector:
        trained = torch.nonzero(~latents.held_out)[:, 0]
        if not len(trained):
            raise UserError(f"{latents.path} has no train rows among {len(latents)}; build it from more images")
        prior.of_vector.init_from_data(latents.vectors(trained[:: -(-len(trained) // STANDARDIZING_ROWS)]))
    prior.provenance = {
        "tokenizer_digest": latents.provenance.tokenizer_digest,
        "latents_digest": latents.content_digest,
        "level": config.level,
        "image_source": latents.provenance.image_source,
        "image_fingerprint": latents.provenance.image_fingerprint,
        "images": latents.count_images(),
        "preprocessing": latents.provenance.preprocessing,
        **({"held_out": latents.provenance.held_out_source} if latents.provenance.held_out_source else {}),
        "label_names": names,
        **({"condition_source": latents.provenance.condition_source} if by_vector else {}),
        "label_counts": label_counts(**counts, classes=classes).tolist(),  # unlabelled rows first
    }
    return config, prior


def _take_weights(init: str, prior: Prior, other: Prior, *, quiet: bool) -> None:
    """Takes the weights of `--init`, and reports what is new on standard error, unless `quiet`.

    Raises:
        UserError: if the two networks do not fit.
    """
    kept = weights_of_new_vectors(prior, other)
    taken = take_weights(prior, other, init, resizable=RESIZABLE, kept=kept)
    matched, new = take_classes(prior, other)
    if quiet:
        return
    changed = changed_settings(prior, other, but=RESIZABLE | {"dropout"})
    for line in taken.lines(init, other.digest(), complete=not (new or kept), changed=changed):
        print_note(line)
    if matched:
        print_note(f"classes that {init} was trained on: {first_names(matched)}")
    if new:
        print_note(f"new classes, which start without influence: {first_names(new)}")
    if kept:
        print_note(f"new vectors, which start without influence: {prior.provenance['condition_source']}")
    codes = [each.provenance.get("tokenizer_digest") for each in (prior, other)]
    if codes[0] != codes[1]:
        print_note(f"note: {init} was trained on the codes of another tokenizer, {str(codes[1])[:12]}")


def _save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Saves the tokenizer beside its prior, unless that would replace another model than an earlier run's copy.

    Raises:
        UserError: if it would.
    """
    copy = folder / models.TOKENIZER_FOLDER
    own = (folder / RUN_NAME).exists() and not (copy / RUN_NAME).exists()
    if (copy / models.CONFIG_NAME).exists() and not own and models.read_config(copy)["digest"] != tokenizer.digest():
        raise UserError(f"{copy} holds another tokenizer than that of the latent set; give another --out")
    tokenizer.save(copy)


def _warn_of_untrained_classes(prior: Prior) -> None:
    """Names the classes without training images on standard error."""
    trained, names = trained_classes(prior), prior.provenance["label_names"]
    untrained = [names[number] if names else str(number) for number in range(prior.classes) if number not in trained]
    if untrained:
        print_note(
            f"warning: {len(untrained)} of {prior.classes} classes have no training images, since all of theirs are "
            f"held out or there are none; they cannot be sampled: {first_names(untrained)}"
        )


def save_samples(prior: Prior, tokenizer: Tokenizer, shown: LatentRows, path: Path, number: int, seed: int) -> None:
    """Saves a sheet of `number` samples of the prior, of each class in turn.

    The seeds are the same every time, so that sheets can be compared. A prior of a finer level is
    conditioned on the coarser levels' codes and the classes of the first rows in `shown`, and a prior with vectors on
    the vectors of these.
    """
    rows, upper = torch.arange(number), ()
    if prior.upper_levels or prior.condition_width:
        rows = rows[: len(shown)]
        batch = shown.__getitems__(rows.tolist())
        upper = tuple(batch[f"upper_{level}"].to(prior.device) for level in range(prior.upper_levels))
        condition = batch["conditions" if prior.condition_width else "labels"]
    else:
        condition = draw_labels(prior, trained_classes(prior), rows, seed)
    sampling = prior.method.sampling()
    steps = sampling.calls(prior.level.height, prior.level.width)
    with bar(what="drawing samples", total=steps, unit="step", delay_seconds=SLOW_SECONDS) as progress:
        codes = generate_codes(
            prior, rows, condition, seed=seed, sampling=sampling, upper=upper, callback=counting(progress)
        )
    seeds = derive(row_seeds(seed, rows), Stream.IMAGE_DETAILS).to(codes.device)
    save_grid(path, tokenizer.draw((*upper, codes), seeds).cpu())


def _held_out(latents: LatentSet, reading: dict[str, Any]) -> LatentRows | None:
    """Returns the held-out rows, or None if a small set has none."""
    try:
        return LatentRows(latents, split="held_out", **reading)
    except UserError:
        return None
