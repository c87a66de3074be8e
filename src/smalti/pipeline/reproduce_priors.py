"""The study of what the priors' parts are worth: which runs there are, on equal budgets, and how each is trained.

A tokenizer and a latent set are made for each kind of grid; a run is trained by `train_prior` and kept under a name
with a digest of all that decides it, so that a study that is stopped goes on. Samples are measured in
`reproduce_priors_samples.py`; what is written is in `reproduce_priors_report.py`.
"""

import hashlib
import json
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from tyro.conf import Positional

from smalti.checkpoint import load
from smalti.codes import Layout
from smalti.devices import Precision, autocast, best_device, resolve
from smalti.errors import require_at_least_one
from smalti.files import write_json
from smalti.fit_config import FitConfig
from smalti.latentsets.reader import LatentSet
from smalti.latentsets.writer import LatentSetWriter
from smalti.pipeline.benchmark import medians
from smalti.pipeline.build_latents import BuildLatents, build_latents
from smalti.pipeline.comparison import Comparison, Way
from smalti.pipeline.places import RUNS, prior_class
from smalti.pipeline.train_prior import TrainPrior, grids, train_prior
from smalti.pipeline.train_tokenizer import TrainTokenizer, train_tokenizer
from smalti.priors.prior import CodePrior
from smalti.randomness import generator_for, row_seeds
from smalti.runs import flatten, last_metrics
from smalti.tokenizers.hrvq import HRVQConfig

Part: TypeAlias = Literal["resampling", "samplers", "head", "depth", "canvas", "resampling-outer"]
DataName: TypeAlias = Literal["mnist", "cifar10", "emoji"]

RESULT_NAME = "result.json"
DIGEST_LETTERS = 10
WRITTEN_ROWS = 4_096
"""Of a latent set whose codes are written as flat ones, at once."""
REPETITIONS = 5
"""Steps of each model that are timed."""


@dataclass(frozen=True)
class Grid:
    """Codes of a kind.

    Attributes:
        pixels: side of the images, which are resized to it.
        stages: of the tokenizer; each halves the size.
        branching: codewords of each of three linked codebooks.
    """

    pixels: int
    stages: int
    branching: int = 8


@dataclass(frozen=True)
class Model:
    """A prior in a comparison.

    Attributes:
        kind: of prior.
        changes: of its kind's defaults.
        flat: learns the codes as numbers of one digit.
    """

    kind: str
    changes: dict[str, Any]
    flat: bool = False


GRIDS: dict[Part, Grid] = {
    "resampling": Grid(32, 2),
    "resampling-outer": Grid(32, 2),
    "samplers": Grid(32, 2),
    "head": Grid(32, 2, branching=32),
    "depth": Grid(64, 1),
}
_SMALL, _MEDIUM = {"model_width": 96, "heads": 3}, {"model_width": 128, "heads": 4}
MODELS: dict[Part, dict[str, Model]] = {
    "resampling": {
        "patches": Model("hourglass", {**_MEDIUM, "depth": (0, 4, 0)}),
        "runs": Model("hourglass", {**_MEDIUM, "depth": (0, 4, 0), "buckets": "runs"}),
    },
    "resampling-outer": {
        "patches": Model("hourglass", {**_MEDIUM, "depth": (1, 2, 1)}),
        "runs": Model("hourglass", {**_MEDIUM, "depth": (1, 2, 1), "buckets": "runs"}),
    },
    "samplers": {
        "SUNDAE": Model("hourglass", {}),
        "masked codes": Model("maskgit", {}),
        "PixelCNN": Model("pixelcnn", {}),
    },
    "head": {
        "one softmax": Model("hourglass", _MEDIUM, flat=True),
        "digit by digit": Model("hourglass", _MEDIUM),
    },
    "depth": {
        "flat, 6 blocks": Model("hourglass", {**_SMALL, "depth": (6,), "shorten": ()}),
        "hourglass 1-3-1": Model("hourglass", {**_SMALL, "depth": (1, 3, 1)}),
        "hourglass 0-5-0": Model("hourglass", {**_SMALL, "depth": (0, 5, 0)}),
    },
}
"""By part. The first of a part has its steps given; the others have as many, or as many as take the same time."""
BATCHES: dict[Part, int] = {"resampling": 16, "resampling-outer": 16, "samplers": 32, "head": 8, "depth": 2}


@dataclass(frozen=True)
class ReproducePriors:
    """What to measure of priors, and at which budget.

    Raises:
        UserError: for a number below 1.
    """

    study: Positional[Literal["priors"]]
    """Whose numbers: smalti's own study of its priors."""
    images: str = "emoji"
    """Images to learn the codes of, whatever `--images` of train_tokenizer takes."""
    data: DataName = "emoji"
    """Which data set these are."""
    parts: tuple[Part, ...] = ("resampling", "samplers", "head", "depth", "canvas", "resampling-outer")
    """Patches against runs of codes, in an hourglass all of whose blocks are in its valley; SUNDAE, masked codes and
    PixelCNN by steps of sampling; the factorised head against one softmax; the hourglass against a flat transformer; a
    wide canvas; patches against runs where there are blocks outside the valley too."""
    seeds: int = 3
    """Runs of each model of `resampling` and `resampling-outer`; the rest has one."""
    steps: int = 400
    """Optimiser steps of each of these runs."""
    sampler_steps: int = 1_000
    """Of SUNDAE's, whose time masked codes and PixelCNN are given."""
    head_steps: int = 120
    """Of the run with one softmax; digit by digit has as many, and as many as take its time."""
    depth_steps: int = 200
    """Of the flat transformer's; the hourglass has as many, and as many as take its time."""
    tokenizer_steps: int = 400
    """Of every tokenizer."""
    channels: int = 32
    """Width of the tokenizers' first stage; the second has twice as many."""
    factor: int = 1
    """Times the priors' widths and batches, for a GPU."""
    precision: Precision = "auto"
    """Arithmetic of the networks."""
    step_counts: tuple[int, ...] = (4, 8, 16, 32, 64, 100)
    """Steps of sampling, of `samplers`."""
    num: int = 300
    """Samples that are judged, and held-out images beside them."""
    reference: int = 2_000
    """Most training images that distances are taken to."""
    guidance: float = 1.0
    """Of all samplers; at 1 each draws from what it has learned."""
    canvases: int = 4
    """How many, of `canvas`."""
    canvas_codes: int = 256
    """Codes from left to right of a canvas."""
    canvas_steps: int = 100
    """Steps of sampling, of `canvas`."""
    work: Path = RUNS / "reproductions" / "priors"
    """Where runs are kept."""
    out: Path = Path("docs/reproductions/priors.md")
    """The Markdown file whose measured parts are replaced, with its pictures beside it."""

    def __post_init__(self) -> None:
        counted = ("seeds", "steps", "sampler_steps", "head_steps", "depth_steps", "tokenizer_steps", "channels")
        require_at_least_one(self, *counted, "factor", "canvases", "canvas_codes", "canvas_steps")


@dataclass(frozen=True)
class Cell:
    """One run.

    Attributes:
        model: its name in the part.
    """

    part: Part
    model: str
    steps: int
    seed: int = 0


def keyed(name: str, decides: dict[str, Any]) -> str:
    """A name for what is kept, with a digest of all that decides it."""
    text = json.dumps(decides, sort_keys=True, default=str)
    return f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:DIGEST_LETTERS]}"


def tokenizer_of(grid: Grid, config: ReproducePriors) -> TrainTokenizer[HRVQConfig]:
    """How the HR-VQVAE with codes of this kind is trained, into which folder."""
    settings = TrainTokenizer(
        model=HRVQConfig(
            height=grid.pixels,
            width=grid.pixels,
            image_channels=1 if config.data == "mnist" else 3,
            widths=tuple(config.channels * 2**stage for stage in range(grid.stages)),
            branching=grid.branching,
        ),
        fit=FitConfig(steps=config.tokenizer_steps, batch_size=32, report_steps=config.tokenizer_steps, save_steps=100),
        images=config.images,
        flips=config.data != "mnist",  # mirrored digits are no digits
        precision=config.precision,
    )
    side = grid.pixels >> grid.stages
    name = keyed(f"tokenizer-{config.data}-{side}x{side}-{grid.branching}cubed", decided_by(settings))
    return replace(settings, out=config.work / name)


def decided_by(settings: Any) -> dict[str, Any]:
    """The settings of a training, flat, with the arithmetic as it will be."""
    return {**flatten(settings), "precision": resolve(settings.precision)}


def latents_of(grid: Grid, config: ReproducePriors, *, flat: bool = False) -> Path:
    """The latent set of such codes, its tokenizer trained and it built if they were not yet; `flat`, each code as a
    number of one digit."""
    tokenizer = tokenizer_of(grid, config)
    assert tokenizer.out is not None
    path = config.work / f"{tokenizer.out.name.replace('tokenizer', 'latents')}.h5"
    if not path.exists():
        build_latents(BuildLatents(tokenizer=str(train_tokenizer(tokenizer)), flips=False, out=path))
    if not flat:
        return path
    of_one_digit = path.with_stem(f"{path.stem}-flat")
    if not of_one_digit.exists():
        flatten_codes(LatentSet(path), of_one_digit)
    return of_one_digit


def flatten_codes(latents: LatentSet, path: Path) -> None:
    """Writes the same set with the same codes, as numbers of one digit: those of a flat codebook."""
    levels = tuple(replace(level, radices=(level.codebook_size,)) for level in latents.layout.levels)
    columns = {name: getattr(latents, name) for name in ("labels", "source_ids", "held_out", "flipped")}
    with LatentSetWriter(path, Layout(levels), **columns, provenance=latents.provenance) as writer:
        for rows in torch.arange(len(latents)).split(WRITTEN_ROWS):
            writer.write(int(rows[0]), latents.batch(rows))


def trained(cell: Cell, config: ReproducePriors) -> Path:
    """The folder of a run, trained as far as it was not yet; with its result: held-out loss at its end, nats per code
    by its own objective, and parameters."""
    model = MODELS[cell.part][cell.model]
    latents = latents_of(GRIDS[cell.part], config, flat=model.flat)
    settings = TrainPrior(
        model=network(model, config),
        objective=prior_class(model.kind).method.objective_config(),
        fit=fit_of(cell, config),
        prior=model.kind,
        latents=Path(latents.name),
        precision=config.precision,
        sheet_samples=0,
    )
    name = f"{cell.part}-{config.data}-{cell.model.replace(' ', '-')}-{cell.steps}steps-seed{cell.seed}"
    folder = config.work / keyed(name, decided_by(settings))
    if not (folder / RESULT_NAME).exists():
        train_prior(replace(settings, latents=latents, out=folder))
        parameters = sum(parameter.numel() for parameter in load(folder, "prior").parameters())
        found = {"held_out_loss": last_metrics(folder)["held_out_loss"], "parameters": parameters}
        write_json(folder / RESULT_NAME, found)
    return folder


def network(model: Model, config: ReproducePriors) -> Any:
    """The config of its network, but for what the latent set says."""
    made = prior_class(model.kind).config_class(**model.changes)
    more = {"model_width": made.model_width * config.factor, "heads": made.heads * config.factor}
    return replace(made, **more)


def fit_of(cell: Cell, config: ReproducePriors) -> FitConfig:
    """`train_prior`'s default training, in so many steps."""
    return replace(
        TrainPrior(model=None, objective=None).fit,
        steps=cell.steps,
        batch_size=BATCHES[cell.part] * config.factor,
        seed=cell.seed,
        report_steps=cell.steps,
        save_steps=100,
    )


def step_seconds(part: Part, config: ReproducePriors) -> dict[str, float]:
    """What a training step of each model takes, by name: measured once, in turns, with untrained networks."""
    first, *_ = MODELS[part]
    batch = fit_of(Cell(part, first, 1), config).batch_size
    networks = {}
    for name, model in MODELS[part].items():
        levels = LatentSet(latents_of(GRIDS[part], config, flat=model.flat)).layout.levels
        networks[name] = replace(network(model, config), **grids(levels, 0))
    shown = {name: [MODELS[part][name].kind, flatten(made)] for name, made in networks.items()}
    decides = {"models": shown, "batch": batch, "precision": resolve(config.precision), "device": best_device()}
    path = config.work / f"{keyed(f'seconds-{part}', decides)}.json"
    if not path.exists():
        ways = [
            Way(name, training_step(MODELS[part][name].kind, made, batch, config)) for name, made in networks.items()
        ]
        write_json(path, dict(zip(networks, medians(Comparison(part, ways), REPETITIONS), strict=True)))
    return json.loads(path.read_text())


def training_step(kind: str, made: Any, batch: int, config: ReproducePriors) -> Callable[[], None]:
    """A step on random codes: loss, gradients, optimiser."""
    where, cls = best_device(), prior_class(kind)
    prior = cls(made).to(where)
    assert isinstance(prior, CodePrior)
    objective = cls.method.objective(prior, cls.method.objective_config())
    optimizer = TrainPrior(model=None, objective=None).fit.optimizer_of(objective)
    shape, size = (batch, prior.level.height, prior.level.width), prior.level.codebook_size
    codes = torch.randint(size, shape, generator=generator_for(0)).to(where)
    rows = {"codes": codes, "seeds": row_seeds(0, torch.arange(batch, device=where))}

    def step() -> None:
        prior.zero_grad()
        with autocast(where, config.precision):
            loss, _ = objective(rows)
        loss.backward()
        optimizer.step()

    return step


def given_steps(part: Part, config: ReproducePriors) -> int:
    """Of the first model of a part."""
    given: dict[Part, int] = {
        "resampling": config.steps,
        "resampling-outer": config.steps,
        "samplers": config.sampler_steps,
        "head": config.head_steps,
        "depth": config.depth_steps,
    }
    return given[part]


def equal_time_steps(part: Part, config: ReproducePriors) -> dict[str, int]:
    """Steps that take each model of a part as long as the first one's take it."""
    seconds = step_seconds(part, config)
    first = seconds[next(iter(MODELS[part]))]
    return {name: max(1, math.floor(given_steps(part, config) * first / each)) for name, each in seconds.items()}
