"""Stage one: images to a trained tokenizer."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar, cast

import torch

from smalti import registry
from smalti.devices import Precision, accelerator, tracked
from smalti.fit import fit
from smalti.fit_config import FitConfig, Phase
from smalti.images import ImageRows, open_images
from smalti.interfaces import Tokenizer
from smalti.latentsets.reader import perplexity
from smalti.pictures import save_sheet
from smalti.pipeline.places import TOKENIZERS
from smalti.preprocess import to_float
from smalti.runs import Resume, Run, flatten
from smalti.tokenizers.objective import Reconstruction

C = TypeVar("C")

START_IMAGES = 512  # whose features the codebooks start from
SHEET_IMAGES = 12
USAGE_IMAGES, USAGE_BATCH = 1_024, 64


@dataclass(frozen=True)
class TrainTokenizer(Generic[C]):
    """How to train a tokenizer."""

    model: C
    """The network."""
    fit: FitConfig = field(default_factory=lambda: FitConfig(steps=2_000, batch_size=32))
    tokenizer: str = "hrvq"
    """Kind of tokenizer; its own settings are listed with it (`--tokenizer KIND --help`)."""
    images: str = "emoji"
    """`emoji` (embedded), a folder of images, Parquet files, or a data set's hub id."""
    flips: bool = True
    """Train on the mirror images too."""
    precision: Precision = "auto"
    """Arithmetic of the networks; auto is bf16 where the hardware is fast in it."""
    out: Path | None = None
    """Folder of the run [default: runs/tokenizers/KIND]."""
    resume: Resume = "auto"
    """`auto` goes on from the newest whole state, if there is one; `never` throws a run that is there away; a number
    goes back to the state of that step and forgets what came after."""


def train_tokenizer(config: TrainTokenizer[Any]) -> Path:
    """Trains a tokenizer, or goes on with a run that was stopped; returns its folder.

    Leaves `model.safetensors` and `config.json`, `run.json`, `metrics.jsonl` and `reconstructions.png`.

    Raises:
        UserError: for images, settings or a folder that will not do.
        Interrupted: if a signal stopped it.
    """
    folder = config.out or TOKENIZERS / config.tokenizer
    process = accelerator(config.precision, config.fit.trackers, folder)
    torch.manual_seed(config.fit.seed)
    tokenizer = cast(Tokenizer, registry.find("tokenizer", config.tokenizer)(config.model))
    size = {"height": config.model.height, "width": config.model.width, "channels": tokenizer.image_channels}
    with process.main_process_first():  # which fills the cache of hashes that the others read
        images = open_images(config.images, **size)
    settings = {**flatten(config), "image_fingerprint": images.fingerprint, "precision": process.mixed_precision}
    with process.main_process_first():  # which may throw an earlier run away
        run = Run(folder, settings, main=process.is_main_process, resume=config.resume)
    if run.step >= config.fit.steps:
        process.print(f"{folder} is finished: {run.step} steps. Give --steps to train on, or --resume never.")
        return folder
    train = ImageRows(images, split="train", flips=config.flips)
    held_out = ImageRows(images, split="held_out", flips=False)
    tokenizer.provenance = {
        "image_source": config.images,
        "image_fingerprint": images.fingerprint,
        "preprocessing": images.preprocessing,
        "flips": config.flips,
    }
    if not run.step:
        rows = torch.arange(min(START_IMAGES, len(train))) * (len(train) // min(START_IMAGES, len(train)))
        tokenizer.start_from(to_float(train.__getitems__(rows.tolist())["images"]))
    objective = Reconstruction(tokenizer)
    shown = held_out if len(held_out) else train

    def report(_step: int, trained: Tokenizer) -> dict[str, float]:
        save_reconstructions(trained, shown, folder / "reconstructions.png")
        return codebook_usage(trained, shown)

    with tracked(process, settings):
        fit(
            process,
            [Phase("tokenizer", objective, config.fit.optimizer_of(objective))],
            train,
            config.fit,
            model=tokenizer,
            run=run,
            held_out=held_out,
            on_report=report,
            what=f"training {config.tokenizer}",
        )
    return folder


@torch.no_grad()
def codebook_usage(tokenizer: Tokenizer, rows: ImageRows) -> dict[str, float]:
    """How much of each level's codebook up to `USAGE_IMAGES` images need, evenly taken: a collapse shows here first.

    Returns:
        `codes_used`, the share of codes that occur, in (0, 1], and `code_perplexity`, from 1 to the codebook's size;
        of several levels, with their numbers. Levels without a codebook are left out.
    """
    count, device = min(USAGE_IMAGES, len(rows)), next(tokenizer.parameters()).device
    levels = tokenizer.layout.levels
    counts = [torch.zeros(level.codebook_size if level.radices else 0, dtype=torch.int64) for level in levels]
    for chosen in torch.arange(count).mul(len(rows)).div(count, rounding_mode="floor").split(USAGE_BATCH):
        images = to_float(rows.__getitems__(chosen.tolist())["images"]).to(device)
        for codes, total in zip(tokenizer.encode(images), counts, strict=True):
            if len(total):
                total += torch.bincount(codes.flatten().cpu(), minlength=len(total))
    found: dict[str, float] = {}
    for number, total in enumerate(counts):
        if len(total):
            suffix = f"_{number}" if len(levels) > 1 else ""
            found[f"codes_used{suffix}"] = float((total > 0).float().mean())
            found[f"code_perplexity{suffix}"] = perplexity(total)
    return found


@torch.no_grad()
def save_reconstructions(tokenizer: Tokenizer, rows: ImageRows, path: Path) -> None:
    """A sheet: images, reconstructions, and what the first digits alone of each code decode to (HR-VQVAE, Fig. 1)."""
    count = min(SHEET_IMAGES, len(rows))
    images = rows.__getitems__([i * len(rows) // count for i in range(count)])["images"]
    device = next(tokenizer.parameters()).device
    codes = tokenizer.encode(to_float(images).to(device))
    sheet = {
        "original": to_float(images),
        f"from {str(tokenizer.layout).replace('×', 'x')}": tokenizer.decode(codes).cpu(),
    }
    digits = max(len(level.radices) for level in tokenizer.layout.levels)
    for first in range(digits - 1, 0, -1):
        sheet[f"first digit{'s' if first > 1 else ''} ({first} of {digits})"] = tokenizer.decode(codes, first).cpu()
    save_sheet(path, sheet)


def default_config(kind: str) -> Any:
    """The config class of a kind, for the command line: `TrainTokenizer` of its network's, an alias and no `type`."""
    return TrainTokenizer[registry.find("tokenizer", kind).config_class]
