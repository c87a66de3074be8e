"""The study of what the priors' parts are worth: what is compared with what, and at which budget.

How it is trained is in `reproduce_priors_training.py`, what is measured of samples in `reproduce_priors_samples.py`,
and what is written in `reproduce_priors_report.py`.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

from tyro.conf import Positional

from smalti.commands.model_paths import RUNS
from smalti.core.devices import Precision
from smalti.core.errors import require_at_least_one
from smalti.evaluation.config import EvaluationSettings
from smalti.priors.methods.sundae import SundaeSampling

ResamplingPart: TypeAlias = Literal["resampling", "resampling-outer", "resampling-16", "resampling-outer-16"]
Part: TypeAlias = ResamplingPart | Literal["samplers", "head", "depth", "canvas"]
DataName: TypeAlias = Literal["mnist", "cifar10", "emoji"]


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

    @property
    def side(self) -> int:
        """Of the grid of codes."""
        return self.pixels >> self.stages

    def __str__(self) -> str:
        return f"{self.side}×{self.side} codes of {self.branching}³"


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


@dataclass(frozen=True)
class Setup:
    """What a part trains.

    Attributes:
        grid: the codes.
        batch: grids a step.
        steps: which field of the config has those of the first model; the others have as many, or as many as take the
            same time.
        models: by name.
    """

    grid: Grid
    batch: int
    steps: str
    models: dict[str, Model]


_SMALL, _MEDIUM = {"model_width": 96, "heads": 3}, {"model_width": 128, "heads": 4}


def _resampling(grid: Grid, depth: tuple[int, ...]) -> Setup:
    shape = {**_MEDIUM, "depth": depth}
    models = {"patches": Model("hourglass", shape), "runs": Model("hourglass", {**shape, "buckets": "runs"})}
    return Setup(grid, 16, "steps", models)


_INNER, _OUTER, _16 = (0, 4, 0), (1, 2, 1), Grid(32, 1)
RESAMPLING: dict[ResamplingPart, Setup] = {
    "resampling": _resampling(Grid(32, 2), _INNER),
    "resampling-outer": _resampling(Grid(32, 2), _OUTER),
    "resampling-16": _resampling(_16, _INNER),
    "resampling-outer-16": _resampling(_16, _OUTER),
}
SETUPS: dict[Part, Setup] = {
    **RESAMPLING,
    "samplers": Setup(
        Grid(32, 2),
        32,
        "sampler_steps",
        {"SUNDAE": Model("hourglass", {}), "masked codes": Model("maskgit", {}), "PixelCNN": Model("pixelcnn", {})},
    ),
    "head": Setup(
        Grid(32, 2, branching=32),
        8,
        "head_steps",
        {"one softmax": Model("hourglass", _MEDIUM, flat=True), "digit by digit": Model("hourglass", _MEDIUM)},
    ),
    "depth": Setup(
        Grid(64, 1),
        2,
        "depth_steps",
        {
            "flat, 6 blocks": Model("hourglass", {**_SMALL, "depth": (6,), "shorten": ()}),
            "hourglass 1-3-1": Model("hourglass", {**_SMALL, "depth": (1, 3, 1)}),
            "hourglass 0-5-0": Model("hourglass", {**_SMALL, "depth": (0, 5, 0)}),
        },
    ),
}
"""Of every part but `canvas`, which draws from the first of `samplers`."""


@dataclass(frozen=True)
class ReproducePriors:
    """What to measure of priors, and at which budget.

    Raises:
        UserError: for a number below 1, fewer than 4 images to judge by, or a negative guidance.
    """

    study: Positional[Literal["priors"]]
    """Whose numbers: smalti's own study of its priors."""
    images: str = "emoji"
    """Images to learn the codes of, whatever `--images` of train_tokenizer takes."""
    data: DataName = "emoji"
    """Which data set these are."""
    parts: tuple[Part, ...] = ("resampling", "samplers", "head", "depth", "canvas", *tuple(RESAMPLING)[1:])
    """Patches against runs of codes, in an hourglass all of whose blocks are in its valley; SUNDAE, masked codes and
    PixelCNN by steps of sampling; the factorised head against one softmax; the hourglass against a flat transformer; a
    wide canvas; patches against runs where there are blocks outside the valley too; both on 16x16 codes."""
    seeds: int = 3
    """Runs of each model of the parts called `resampling`; the rest has one."""
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
        EvaluationSettings(num=self.num, reference=self.reference)  # refused now, not after hours of training
        for steps in self.step_counts:
            SundaeSampling(steps=steps, guidance=self.guidance)


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
