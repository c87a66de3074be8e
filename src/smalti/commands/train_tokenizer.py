"""Stage one: images to a trained tokenizer."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Generic, Literal, TypeAlias, TypeVar, cast

import torch

from smalti.commands.codebook_usage import CodebookAlarm
from smalti.commands.feature_cache import with_given
from smalti.commands.model_paths import TOKENIZERS, layer_name, load_tokenizer
from smalti.core import models
from smalti.core.config import flatten
from smalti.core.devices import Precision
from smalti.core.errors import UserError
from smalti.images.decoding import to_float
from smalti.images.image_set import ImageRows, ImageSet, open_images
from smalti.images.sheets import save_sheet
from smalti.tokenizers.base import Tokenizer
from smalti.tokenizers.hqa.hqa import HQA
from smalti.tokenizers.reconstruction import Reconstruction
from smalti.training.accelerator import accelerator, tracked
from smalti.training.config import FitConfig, Phase
from smalti.training.loop import fit
from smalti.training.run_folder import Resume, Run

C = TypeVar("C")
Preset: TypeAlias = Literal[
    "small",
    "paper32",
    "paper64",
    "paper128",
    "paper256",
    "f16-1024",
    "f16-16384",
    "f8-gumbel-8192",
    "f32-megapixel",
]

START_IMAGES, MOST_START_IMAGES = 512, 2**14  # whose features the codebooks start from: more if they are coarse,
START_VECTORS = 2**15  # for so many vectors,
START_PIXELS = 2**25  # but no more than these
SHEET_IMAGES = 12


@dataclass(frozen=True)
class TrainTokenizer(Generic[C]):
    """How to train a tokenizer."""

    model: C
    """The network."""
    fit: FitConfig = field(default_factory=lambda: FitConfig(steps=2_000, batch_size=32))
    tokenizer: str = "hrvq"
    """Kind of tokenizer; its own settings are listed with it (`--tokenizer KIND --help`)."""
    preset: Preset = "small"
    """What the other settings are unless given: `small` for 32x32 images on two CPU cores; the others have the papers'
    networks and grids of codes on a GPU, `paperN` of the VQ-VAE family for images of that size, `fN-...` of `vqgan`."""
    images: str = "emoji"
    """`emoji` (embedded), a folder of images, Parquet files, or a data set's hub id."""
    flips: bool = True
    """Train on the mirror images too."""
    layer_steps: tuple[int, ...] = ()
    """Optimiser steps of each layer, from the image upwards, where not all have `--steps`: of a kind that is trained
    layer by layer, whose upper layers are the cheap ones."""
    layer_batch_sizes: tuple[int, ...] = ()
    """Images a step of each of these layers, likewise, in place of `--batch-size`."""
    precision: Precision = "auto"
    """Arithmetic of the networks; auto is bf16 where the hardware is fast in it."""
    out: Path | None = None
    """Folder of the run [default: runs/tokenizers/KIND]."""
    resume: Resume = "auto"
    """`auto` goes on from the newest whole state, if there is one; `never` throws a run that is there away; a number
    goes back to the state of that step and forgets what came after."""

    def __post_init__(self) -> None:
        for name in ("layer_steps", "layer_batch_sizes"):
            if min(getattr(self, name), default=1) < 1:
                raise UserError(f"{name} must be at least 1 each, not {getattr(self, name)}")


def train_tokenizer(config: TrainTokenizer[Any], images: ImageSet | None = None) -> Path:
    """Trains a tokenizer, or goes on with a run that was stopped; returns its folder.

    Leaves `model.safetensors` and `config.json`, `run.json`, `metrics.jsonl` and `reconstructions.png`. A kind that is
    trained layer by layer is trained in runs of so many steps each; all but the top layer's are in folders `layer-1`,
    `layer-2`, ... within, each a whole tokenizer of the layers so far.

    Args:
        config: how to train.
        images: those that the config names, opened already by who trains several on them.

    Raises:
        UserError: for images, settings or a folder that will not do.
        Interrupted: if a signal stopped it.
    """
    folder = config.out or TOKENIZERS / config.tokenizer
    kind = cast(type[Tokenizer], models.class_of_kind("tokenizer", config.tokenizer))
    *lower, top = kind.stages(config.model)
    *lower_fits, top_fit = _fits(config, len(lower) + 1)
    below = None
    for number, (model, fit_layer) in enumerate(zip(lower, lower_fits, strict=True), 1):
        resume = config.resume if config.resume == "never" else "auto"  # a step to go back to is the top layer's
        stage = replace(config, model=model, fit=fit_layer, out=folder / layer_name(number), resume=resume)
        below, images = _train(stage, images, below)
    return _train(replace(config, model=top, fit=top_fit, out=folder), images, below)[0]


def _fits(config: TrainTokenizer[Any], layers: int) -> list[FitConfig]:
    """Of each layer.

    Raises:
        UserError: if numbers are given of more or fewer layers than there are.
    """
    for name in ("layer_steps", "layer_batch_sizes"):
        if len(getattr(config, name)) not in (0, layers):
            flag = "--" + name.replace("_", "-")
            raise UserError(f"{flag} names {len(getattr(config, name))} layers, but {config.tokenizer} has {layers}")
    steps = config.layer_steps or (config.fit.steps,) * layers
    sizes = config.layer_batch_sizes or (config.fit.batch_size,) * layers
    return [replace(config.fit, steps=count, batch_size=size) for count, size in zip(steps, sizes, strict=True)]


def _train(config: TrainTokenizer[Any], images: ImageSet | None, below: Path | None) -> tuple[Path, ImageSet]:
    """One stage, on top of that before it; its folder, and the images, opened."""
    folder = config.out
    assert folder is not None
    process = accelerator(config.precision, config.fit.trackers, folder)
    torch.manual_seed(config.fit.seed)
    tokenizer = cast(Tokenizer, models.class_of_kind("tokenizer", config.tokenizer)(config.model))
    if images is None:
        size = {"height": config.model.height, "width": config.model.width, "channels": tokenizer.image_channels}
        with process.main_process_first():  # which fills the cache of hashes that the others read
            images = open_images(config.images, **size)
    settings = {**flatten(config), "image_fingerprint": images.fingerprint, "precision": process.mixed_precision}
    lower = load_tokenizer(str(below)) if below else None
    if lower:
        tokenizer.build_on(lower)
        settings["below"] = lower.digest()  # so that what was trained on other layers does not go on upon these
    with process.main_process_first():  # which may throw an earlier run away
        run = Run(folder, settings, main=process.is_main_process, resume=config.resume)
    if run.step >= config.fit.steps:
        process.print(f"{folder} is finished: {run.step} steps. Give --steps to train on, or --resume never.")
        return folder, images
    train = ImageRows(images, split="train", flips=config.flips)
    rows_of_steps = with_given(lower, train, process) if isinstance(lower, HQA) else train
    held_out = ImageRows(images, split="held_out", flips=False)
    tokenizer.provenance = {
        "image_source": config.images,
        "image_fingerprint": images.fingerprint,
        "preprocessing": images.preprocessing,
        "flips": config.flips,
    }
    if not run.step:
        count = min(_start_images(tokenizer, config.model.height * config.model.width), len(train))
        rows = torch.arange(count) * (len(train) // count)
        tokenizer.init_from_data(to_float(train.__getitems__(rows.tolist())["images"]))
    phases = tokenizer.phases(config.fit)
    if not phases:
        objective = Reconstruction(tokenizer)
        phases = [Phase("tokenizer", objective, config.fit.optimizer_of(objective))]
    alarm = CodebookAlarm()
    shown = held_out if len(held_out) else train

    def report(_step: int, trained: Tokenizer) -> dict[str, float]:
        save_reconstructions(trained, shown, folder / "reconstructions.png")
        return alarm.measure(trained, shown)

    with tracked(process, settings):
        fit(
            process,
            phases,
            rows_of_steps,
            config.fit,
            model=tokenizer,
            run=run,
            held_out=held_out,
            on_report=report,
            what=f"training {folder.name}",
        )
    return folder, images


def _start_images(tokenizer: Tokenizer, pixels: int) -> int:
    """How many images codebooks start from: of one code an image, a codebook needs more than of many."""
    positions = max(level.height * level.width for level in tokenizer.layout.levels)
    return max(START_IMAGES, min(START_VECTORS // positions, START_PIXELS // pixels, MOST_START_IMAGES))


@torch.no_grad()
def save_reconstructions(tokenizer: Tokenizer, rows: ImageRows, path: Path) -> None:
    """A sheet: images, reconstructions, and what a part of each code alone, or another layer's, says of them."""
    device, shown = next(tokenizer.parameters()).device, to_float(rows.spread(min(SHEET_IMAGES, len(rows))))
    made = tokenizer.reconstructions(shown.to(device))
    save_sheet(path, {"original": shown, **{caption: row.cpu() for caption, row in made.items()}})
