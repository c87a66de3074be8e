"""The demonstration of `make demo`: trains a tokenizer and a prior on the embedded portraits, samples and inpaints.

Every stage is a command of its own, called here with small settings. A stage that is finished is not run again.
"""

import json
import shlex
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from smalti.commands.build_latents import BuildLatents, build_latents
from smalti.commands.generating import generate_images
from smalti.commands.inpainting import save_example_fills
from smalti.commands.model_paths import RUNS, load_prior_with_tokenizer, shipped_models, trained_config
from smalti.commands.sample import Sample, sample
from smalti.commands.train_prior import TrainPrior, train_prior
from smalti.commands.train_tokenizer import TrainTokenizer, save_reconstructions, train_tokenizer
from smalti.core import locks
from smalti.core.codes import Codes, perplexity
from smalti.core.config import flatten, read_json
from smalti.core.devices import Precision, best_device, resolve
from smalti.core.errors import UserError, as_invoked, require_at_least_one
from smalti.core.files import whole_file, write_json
from smalti.core.progress import print_note
from smalti.core.provenance import last_metrics, versions
from smalti.core.randomness import require_seed
from smalti.images.decoding import to_float
from smalti.images.image_set import ImageRows, open_images
from smalti.images.sheets import embedded_settings, save_animation
from smalti.images.sources import local_paths
from smalti.latentsets.reader import LatentSet
from smalti.metrics.image_errors import mse
from smalti.priors.base import Prior
from smalti.priors.methods.sundae import SundaeConfig, SundaeSampling
from smalti.priors.networks.hourglass import HourglassConfig
from smalti.tokenizers.base import Tokenizer
from smalti.tokenizers.vq.hrvq import HRVQConfig
from smalti.training.run_folder import RUN_NAME, OtherSettingsError

RECONSTRUCTIONS, SAMPLES, INPAINTING = "reconstructions.png", "samples.png", "inpainting.png"
DENOISING = "denoising.gif"
SHIPPED_SAMPLES, SHIPPED_FILLS = "samples-of-the-shipped-model.png", "inpainting-of-the-shipped-model.png"
REPORT_NAME, DONE_NAME = "report.md", "demo.json"

SHIPPED_MODEL = "portraits"
TOKENIZER, PRIOR = HRVQConfig(branching=16, reconstruction_loss="l1"), HourglassConfig()
ANIMATED_SAMPLES = 32


@dataclass(frozen=True)
class Demo:
    """Settings of the demonstration. The defaults take minutes on two CPU cores.

    Raises:
        UserError: if a number is below 1, or the seed does not fit.
    """

    images: str = "portraits"
    """Images to train on, at 32x32 pixels: `portraits` or `emoji` (embedded), a folder, Parquet files or a hub id."""
    tokenizer_steps: int = 780
    """Training steps of the tokenizer."""
    prior_steps: int = 570
    """Training steps of the prior. More steps are the surest way to better samples."""
    sampling: SundaeSampling = field(default_factory=SundaeSampling)
    """Sampler settings for the new images; fills use the default settings."""
    samples: int = 48
    """Number of new images."""
    seed: int = 0
    """Seed of training and sampling."""
    precision: Precision = "auto"
    """Precision of the networks; `auto` is bf16 where the hardware is fast in it, fp16 on older GPUs, else fp32."""
    out: Path = RUNS / "demo"
    """Output folder."""

    def __post_init__(self) -> None:
        require_at_least_one(self, "tokenizer_steps", "prior_steps", "samples")
        require_seed(self.seed)


def demo(config: Demo) -> Path:
    """Runs every stage that is not finished yet, and returns the path of the report.

    Raises:
        UserError: if the folder holds a demonstration with other settings, or files of something else.
        Interrupted: if a signal stops it; the next call resumes from there.
    """
    results = [config.out / name for name in (REPORT_NAME, DONE_NAME, RECONSTRUCTIONS, SAMPLES, INPAINTING, DENOISING)]
    begun = (config.out / "tokenizer" / RUN_NAME).exists()  # only a demonstration that runs again replaces its files

    def is_own(path: Path) -> bool:
        return begun or embedded_settings(path).get("command") in ("sample", "demo")

    shipped = [config.out / name for name in (SHIPPED_SAMPLES, SHIPPED_FILLS)]
    outputs, inputs = [*results, *shipped], local_paths(config.images)
    with locks.claim(outputs, folder=config.out, inputs=inputs, is_own=is_own):
        settings, done = json.loads(json.dumps(flatten(config), default=str)), config.out / DONE_NAME
        if all(each.exists() for each in results) and read_json(done)["settings"] == settings:
            print(
                f"The demonstration is finished: see {results[0]} and the pictures beside it. Remove {config.out} to "
                "redo it."
            )
        else:
            try:
                _demo(config, settings)
            except OtherSettingsError as error:  # its advice names flags that the demonstration does not have
                raise UserError(
                    f"{config.out} holds a demonstration with other settings, or one that another version of smalti "
                    "began; remove the folder, or give another --out"
                ) from error
    return results[0]


def _demo(config: Demo, settings: dict[str, Any]) -> None:
    seconds: dict[str, float] = {}
    if SHIPPED_MODEL in shipped_models("prior"):
        with _timed(seconds, "samples and fills of the shipped model"):
            print(_sample(config, SHIPPED_MODEL, SHIPPED_SAMPLES))
            _fill(config, *load_prior_with_tokenizer(SHIPPED_MODEL, None), SHIPPED_MODEL, SHIPPED_FILLS)
    latents, prior_folder = _train(config, seconds)
    with _timed(seconds, "samples"):
        _sample(config, str(prior_folder), SAMPLES)
        prior, tokenizer = load_prior_with_tokenizer(str(prior_folder), None)
        _animate(config, prior, tokenizer)
    with _timed(seconds, "fills"):
        rows = _fill(config, prior, tokenizer, config.images, INPAINTING)
    tokenizer = tokenizer.cpu()
    save_reconstructions(tokenizer, rows, config.out / RECONSTRUCTIONS)
    text = _report(config, tokenizer, rows, LatentSet(latents), last_metrics(prior_folder), seconds)
    report = config.out / REPORT_NAME
    with whole_file(report) as partial:
        partial.write_text(text)
    write_json(config.out / DONE_NAME, {"settings": settings, "versions": versions(), "seconds": seconds})
    print(f"\n{text}\nSee {report} and the pictures beside it.")


def _train(config: Demo, seconds: dict[str, float]) -> tuple[Path, Path]:
    """Trains a tokenizer, builds a latent set and trains a prior; returns the paths of the set and the prior."""
    with _timed(seconds, "tokenizer"):
        fit = replace(TrainTokenizer(model=None).fit, steps=config.tokenizer_steps, seed=config.seed)
        tokenizer_folder = train_tokenizer(
            TrainTokenizer(
                model=TOKENIZER,
                fit=fit,
                images=config.images,
                precision=config.precision,
                out=config.out / "tokenizer",
            )
        )
    with _timed(seconds, "latent set"):
        latents = build_latents(
            BuildLatents(tokenizer=str(tokenizer_folder), flips=False, out=config.out / "latents.h5")
        )
    with _timed(seconds, "prior"):
        fit = replace(TrainPrior(model=None, objective=None).fit, steps=config.prior_steps, seed=config.seed)
        prior_folder = train_prior(
            TrainPrior(
                model=PRIOR,
                objective=SundaeConfig(),
                fit=fit,
                latents=latents,
                precision=config.precision,
                out=config.out / "prior",
            )
        )
    return latents, prior_folder


def _sample(config: Demo, prior: str, name: str) -> Path:
    """Writes a sheet of new images of every class; returns its path."""
    return sample(
        Sample(
            sampling=config.sampling,
            prior=(prior,),
            num=config.samples,
            classes=("all",) if trained_config(prior, "prior").config.classes else (),
            seed=config.seed,
            precision=config.precision,
            out=config.out / name,
            overwrite=True,
        )
    )


@torch.no_grad()
def _animate(config: Demo, prior: Prior, tokenizer: Tokenizer) -> None:
    """Writes an animation of new images, one frame for each step of the sampler."""
    prior, tokenizer = prior.to(best_device()), tokenizer.to(best_device())
    steps: list[Codes] = []
    generate_images(
        [prior],
        tokenizer,
        num=ANIMATED_SAMPLES,
        seed=config.seed,
        sampling=config.sampling,
        batch_size=ANIMATED_SAMPLES,
        precision=config.precision,
        watch=lambda _first, codes: steps.append(codes),
    )
    frames = [tokenizer.decode(codes).cpu() for codes in steps]
    save_animation(config.out / DENOISING, frames, settings=flatten(config))


def _fill(config: Demo, prior: Prior, tokenizer: Tokenizer, images: str, name: str) -> ImageRows:
    """Writes a sheet of fills of held-out images, or of training images if none is held out; returns these."""
    size = {"height": tokenizer.config.height, "width": tokenizer.config.width}
    image_set = open_images(images, **size, channels=tokenizer.image_channels)
    rows = ImageRows(image_set, split="held_out", flips=False)
    if not len(rows):
        print_note(f"note: no image of {images} is held out, so the pictures and errors are of training images")
        rows = ImageRows(image_set, split="train", flips=False)
    save_example_fills(
        prior.to(best_device()),
        tokenizer.to(best_device()),
        rows,
        config.out / name,
        sampling=SundaeSampling(),
        seed=config.seed,
        precision=config.precision,
        settings={"command": "demo", **flatten(config)},
    )
    return rows


@torch.no_grad()
def _reconstruction_mse(tokenizer: Tokenizer, rows: ImageRows) -> float:
    """Computes the mean squared error of reconstructions of all rows, in units of [0, 1]."""
    images = to_float(rows.__getitems__(range(len(rows)))["images"])
    errors = [mse(tokenizer.decode(tokenizer.encode(batch)), batch) for batch in images.split(128)]
    return float(torch.cat(errors).mean())


def _report(
    config: Demo,
    tokenizer: Tokenizer,
    rows: ImageRows,
    latents: LatentSet,
    prior_metrics: dict[str, float],
    seconds: dict[str, float],
) -> str:
    """Writes the report's Markdown."""
    counts = latents.usage()
    used = int((counts > 0).sum())
    error = _reconstruction_mse(tokenizer, rows)
    held_out = int(latents.held_out.sum())
    shown = "held-out" if held_out else "training"
    loss = prior_metrics["loss"]
    held_out_loss = f"{prior_metrics['held_out_loss']:.3f}" if held_out else "no image is held out"
    prior = shlex.quote(f"{config.out}/prior")
    longer = _flags(replace(config, prior_steps=4 * config.prior_steps, out=Path(f"{config.out}-longer")))
    stages = ", ".join(f"{stage} {value:.0f}" for stage, value in seconds.items())
    text = f"""# The demonstration's results

The images are {len(latents)} of `{config.images}`, of which {held_out} are held out.

| stage | measure | value |
|---|---|---|
| tokenizer ({config.tokenizer_steps} steps) | {shown} MSE, in units of [0, 1] | {error:.4f} |
| latent set | codes per image | {latents.layout} |
| | codebook usage | {used} of {len(counts)} codes ({used / len(counts):.0%}) |
| | perplexity | {perplexity(counts):.0f} |
| prior ({config.prior_steps} steps) | training loss, nats per code, mean over corruption rates | {loss:.3f} |
| | held-out loss | {held_out_loss} |

Seconds per stage: {stages}; {sum(seconds.values()):.0f} in total,
in {resolve(config.precision)} on {best_device().type}. Stages that were resumed count from the last start.

- `reconstructions.png`: {shown} images, their reconstructions, and reconstructions from the first digits of each code.
- `samples.png`: new images of every class, not selected; `denoising.gif`: others while they form.
- `inpainting.png`: {shown} images masked by a box, a half, a stroke and a letter, with three fills each, not selected.

## What to try next

- Another seed and a lower temperature:
  `python scripts/sample.py --prior {prior} --seed {config.seed + 1} --temperature 0.8 0.4`
- Your own picture (32×32 pixels) and mask (white is filled):
  `python scripts/inpaint.py --prior {prior} --image in.png --mask mask.png`
- Longer training, the surest way to better samples:
  `python scripts/demo.py {longer}`
- Your own images: `python scripts/train_tokenizer.py --images my/photos`, then `build_latents.py` and `train_prior.py`
  (see the README).
"""
    return as_invoked(text)


def _flags(config: Demo) -> str:
    """Returns the settings that differ from the defaults as flags of a command line."""
    defaults, words = flatten(Demo()), list[str]()
    for name, value in flatten(config).items():
        if value != defaults[name]:
            values = () if value is True else value if isinstance(value, tuple) else (value,)
            words += [f"--{name.replace('_', '-')}", *map(str, values)]
    return shlex.join(words)


@contextmanager
def _timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    """Prints the name of a stage, and stores the seconds it takes under it."""
    print(f"\n== {stage}", flush=True)
    start = time.perf_counter()
    yield
    seconds[stage] = time.perf_counter() - start
