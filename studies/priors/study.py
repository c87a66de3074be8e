"""The study of the priors' parts: which models are compared, on which codes and with which budget.

Training is in `training.py`, what is measured of samples in `samples.py`, the written report in `report.py`.
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
from smalti.studies.priors.hourglass_of_runs import RunsHourglass

ResamplingPart: TypeAlias = Literal["resampling", "resampling-outer", "resampling-16", "resampling-outer-16"]
PositionPart: TypeAlias = Literal["positions", "positions-16", "positions-maskgit", "positions-transformer"]
DefaultsPart: TypeAlias = Literal["defaults", "defaults-16", "defaults-maskgit"]
PairPart: TypeAlias = ResamplingPart | PositionPart | DefaultsPart
Part: TypeAlias = PairPart | Literal["samplers", "head", "depth", "canvas"]
DataName: TypeAlias = Literal["mnist", "cifar10", "emoji", "portraits"]


@dataclass(frozen=True)
class Grid:
    """A grid of codes, and the tokenizer that makes it.

    Attributes:
        pixels: side of the images, which are resized to it.
        stages: downsampling stages of the tokenizer; each halves the size.
        branching: branching of each of the tokenizer's three linked codebooks.
    """

    pixels: int
    stages: int
    branching: int = 8

    @property
    def side(self) -> int:
        """Returns the side of the grid of codes."""
        return self.pixels >> self.stages

    def __str__(self) -> str:
        return f"{self.side}×{self.side} codes of {self.branching}³"


@dataclass(frozen=True)
class Model:
    """A prior in a comparison.

    Attributes:
        kind: kind of the prior.
        changes: settings of its network that differ from the kind's defaults.
        flat: whether it learns the codes as single digits, so that its head is one softmax.
        learning_rate: that of its training, at which most parts were measured; None for the default of `train_prior`.
    """

    kind: str
    changes: dict[str, Any]
    flat: bool = False
    learning_rate: float | None = 3e-3


@dataclass(frozen=True)
class Setup:
    """The models that a part of the study trains, and their budget.

    Attributes:
        grid: the codes.
        batch: batch size.
        steps: the field of `ReproducePriors` that holds the training steps of the first model. The others train for
            as many steps, or for as many as take the same time.
        models: the models by name.
    """

    grid: Grid
    batch: int
    steps: str
    models: dict[str, Model]


_ROTARY: dict[str, Any] = {"absolute_positions": False}
_BEFORE: dict[str, Any] = {**_ROTARY, "qk_norm": False}
"""The networks of all parts but `positions` and `defaults`, as they were measured. The draft names neither setting."""
_SMALL, _MEDIUM = {"model_width": 96, "heads": 3, **_BEFORE}, {"model_width": 128, "heads": 4, **_BEFORE}


def _resampling(grid: Grid, depth: tuple[int, ...]) -> Setup:
    shape = {**_MEDIUM, "depth": depth}
    models = {"patches": Model("hourglass", shape), "runs": Model(RunsHourglass.kind, shape)}
    return Setup(grid, 16, "steps", models)


_INNER, _OUTER, _16 = (0, 4, 0), (1, 2, 1), Grid(32, 1)
RESAMPLING: dict[ResamplingPart, Setup] = {
    "resampling": _resampling(Grid(32, 2), _INNER),
    "resampling-outer": _resampling(Grid(32, 2), _OUTER),
    "resampling-16": _resampling(_16, _INNER),
    "resampling-outer-16": _resampling(_16, _OUTER),
}


def _positions(grid: Grid, kind: str) -> Setup:
    measured = {} if kind == "transformer" else {"qk_norm": False}
    models = {"with": Model(kind, measured), "without": Model(kind, {**measured, **_ROTARY})}
    return Setup(grid, 32, "steps", models)


def _defaults(grid: Grid, kind: str) -> Setup:
    return Setup(grid, 32, "steps", {"now": Model(kind, {}, learning_rate=None), "before": Model(kind, _BEFORE)})


POSITIONS: dict[PositionPart, Setup] = {
    "positions": _positions(Grid(32, 2), "hourglass"),
    "positions-16": _positions(_16, "hourglass"),
    "positions-maskgit": _positions(Grid(32, 2), "maskgit"),
    "positions-transformer": _positions(Grid(32, 2), "transformer"),
}
DEFAULTS: dict[DefaultsPart, Setup] = {
    "defaults": _defaults(Grid(32, 2), "hourglass"),
    "defaults-16": _defaults(_16, "hourglass"),
    "defaults-maskgit": _defaults(Grid(32, 2), "maskgit"),
}
PAIRS: dict[PairPart, Setup] = {**RESAMPLING, **POSITIONS, **DEFAULTS}
"""Parts that compare two models, trained for the same number of steps with several seeds."""
SETUPS: dict[Part, Setup] = {
    **PAIRS,
    "samplers": Setup(
        Grid(32, 2),
        32,
        "sampler_steps",
        {
            "SUNDAE": Model("hourglass", _BEFORE),
            "masked codes": Model("maskgit", _BEFORE),
            "PixelCNN": Model("pixelcnn", {}),
        },
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
"""The setups of all parts but `canvas`, which samples from the first model of `samplers`."""


@dataclass(frozen=True)
class ReproducePriors:
    """Settings of the study: the parts to measure and their budget.

    Raises:
        UserError: for a number below 1, fewer than 4 images to evaluate on, or a negative guidance.
    """

    study: Positional[Literal["priors"]]
    """The study: smalti's own study of its priors."""
    images: str = "emoji"
    """Images to train on; any source that `--images` of train_tokenizer takes."""
    data: DataName = "emoji"
    """Name of the data set that these images are."""
    parts: tuple[Part, ...] = ("resampling", "samplers", "head", "depth", "canvas", *tuple(PAIRS)[1:])
    """Parts to run. resampling: downsampling of patches against runs of codes, in an hourglass whose blocks are all
    at the lower resolution. samplers: SUNDAE, masked codes and PixelCNN, by sampling steps. head: the factorized head
    against one softmax. depth: the hourglass against a flat transformer. canvas: seams on a wide canvas.
    resampling-outer: patches against runs with blocks at the full resolution too; -16: both on 16x16 codes. positions:
    the hourglass with and without absolute position embeddings; also on 16x16 codes, in MaskGIT and in the transformer.
    defaults: the default hourglass against that of before, without absolute positions and QK-norm at a learning rate of
    3e-3; also on 16x16 codes and in MaskGIT."""
    seeds: int = 3
    """Seeds, and so runs, of each model in the parts resampling, positions and defaults; other parts have one."""
    steps: int = 400
    """Training steps of each run in the parts resampling, positions and defaults."""
    sampler_steps: int = 1_000
    """Training steps of SUNDAE in the part samplers; masked codes and PixelCNN train for the same time."""
    head_steps: int = 120
    """Training steps with one softmax in the part head; the factorized head trains for as many, and for the same
    time."""
    depth_steps: int = 200
    """Training steps of the flat transformer in the part depth; the hourglass trains for as many, and for the same
    time."""
    tokenizer_steps: int = 400
    """Training steps of every tokenizer."""
    channels: int = 32
    """Width of the tokenizers' first stage; the second has twice as many channels."""
    factor: int = 1
    """Multiplies the priors' widths and batch sizes; raise it on a GPU."""
    precision: Precision = "auto"
    """Precision of the networks; auto is bf16 where the hardware is fast in it."""
    step_counts: tuple[int, ...] = (4, 8, 16, 32, 64, 100)
    """Sampling steps that the part samplers compares."""
    num: int = 300
    """Samples to evaluate, and held-out images to compare with."""
    reference: int = 2_000
    """Training images at most that distances are measured to."""
    guidance: float = 1.0
    """Scale of classifier-free guidance of all samplers; at 1 each samples from what it has learned."""
    canvases: int = 4
    """Canvases of the part canvas."""
    canvas_codes: int = 256
    """Width of a canvas, in codes."""
    canvas_steps: int = 100
    """Sampling steps of the part canvas."""
    work: Path = RUNS / "reproductions" / "priors"
    """Folder of the runs."""
    out: Path = Path("docs/reproductions/priors.md")
    """Markdown file whose measured parts are replaced; its pictures are written beside it."""

    def __post_init__(self) -> None:
        counted = ("seeds", "steps", "sampler_steps", "head_steps", "depth_steps", "tokenizer_steps", "channels")
        require_at_least_one(self, *counted, "factor", "canvases", "canvas_codes", "canvas_steps")
        EvaluationSettings(num=self.num, reference=self.reference)  # refused now, not after hours of training
        for steps in self.step_counts:
            SundaeSampling(steps=steps, guidance=self.guidance)


@dataclass(frozen=True)
class Cell:
    """One training run.

    Attributes:
        part: the part of the study.
        model: the model's name in the part.
        steps: training steps.
        seed: of weights, rows and draws.
    """

    part: Part
    model: str
    steps: int
    seed: int = 0
