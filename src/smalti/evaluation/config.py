"""What can be judged, and by what: the settings of evaluations. What they measure is in `judges.py`."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

from smalti.commands.inpainting import Filling
from smalti.commands.model_paths import RUNS
from smalti.core.devices import Device, Precision
from smalti.core.errors import UserError
from smalti.metrics.extractors import ExtractorName
from smalti.tokenizers.selfvae.hierarchical_vae import Pixels

S = TypeVar("S")

EVALUATIONS = RUNS / "evaluations"


@dataclass(frozen=True)
class EvaluationSettings:
    """What models are held against.

    Raises:
        UserError: for numbers that judge nothing.
    """

    images: str = "emoji"
    """Real images, as the model was trained on: emoji, a folder, Parquet files or a hub id. Split as in training: the
    held-out ones are judged, or stand for what a perfect model would make; the others are the reference."""
    num: int = 1000
    """Images judged; all that are held out, where they are fewer. Distances of different numbers do not compare."""
    reference: int = 5000
    """Most training images that distances are taken to."""
    extractor: ExtractorName = "lite0"
    """Network whose features distances are of: `lite0`, which comes with the extra `metrics`, or `inception`, that of
    the published FID, whose package brings torchvision and downloads the weights."""
    seed: int = 0
    """Decides which images, which holes, and all that is drawn."""
    device: Device = "auto"
    """Where to compute."""
    precision: Precision = "auto"
    """Arithmetic of the models; that of the features is always fp32."""

    def __post_init__(self) -> None:
        if self.num < 4 or self.reference < 4:
            raise UserError(f"--num and --reference must be at least 4, not {self.num} and {self.reference}")


@dataclass(frozen=True)
class TokenizerEvaluation:
    """How to judge a tokenizer: by reconstructions of held-out images."""

    of: Literal["tokenizer"] = "tokenizer"
    """What is judged: `tokenizer`, `prior`, `inpainting`, `likelihood` or `modes`."""
    tokenizer: str = "hrvq"
    """A trained tokenizer: a kind (the one in runs/tokenizers/KIND), a folder, or a hub id."""
    settings: EvaluationSettings = field(default_factory=EvaluationSettings)
    out: Path = EVALUATIONS / "tokenizer.json"
    """The result, with all that is needed to repeat it."""


@dataclass(frozen=True)
class PriorEvaluation(Generic[S]):
    """How to judge a prior: by its samples against images it never saw."""

    sampling: S
    """How codes are drawn; of priors of several kinds, by those of the last one's."""
    of: Literal["prior"] = "prior"
    """What is judged: `tokenizer`, `prior`, `inpainting`, `likelihood` or `modes`."""
    prior: tuple[str, ...] = ("hourglass",)
    """A trained prior: a kind (the one in runs/priors/KIND), a folder, or a hub id. Of a tokenizer of several levels,
    one for each."""
    tokenizer: str | None = None
    """Its tokenizer: a kind, a folder or a hub id [default: the copy in the prior's folder]."""
    settings: EvaluationSettings = field(default_factory=EvaluationSettings)
    out: Path = EVALUATIONS / "prior.json"
    """The result, with all that is needed to repeat it; beside it a sheet of samples and their nearest neighbours."""


@dataclass(frozen=True)
class InpaintingEvaluation(Generic[S]):
    """How to judge fills: held-out images under random strokes, filled, against the truth and against simpler fills."""

    sampling: S
    """How codes are drawn."""
    of: Literal["inpainting"] = "inpainting"
    """What is judged: `tokenizer`, `prior`, `inpainting`, `likelihood` or `modes`."""
    fills: int = 3
    """Fills of each image; the first alone is compared with other ways, all with each other and with the truth."""
    prior: tuple[str, ...] = ("hourglass",)
    """A trained prior: a kind (the one in runs/priors/KIND), a folder, or a hub id. Of a tokenizer of several levels,
    one for each."""
    tokenizer: str | None = None
    """Its tokenizer: a kind, a folder or a hub id [default: the copy in the prior's folder]."""
    filling: Filling = field(default_factory=Filling)
    settings: EvaluationSettings = field(default_factory=EvaluationSettings)
    out: Path = EVALUATIONS / "inpainting.json"
    """The result, with all that is needed to repeat it."""

    def __post_init__(self) -> None:
        if self.fills < 1:
            raise UserError(f"--fills must be at least 1, not {self.fills}")


@dataclass(frozen=True)
class ModesEvaluation:
    """How to judge selfVAE's ways to make images: by what comes back of held-out ones, and by what must be sent."""

    of: Literal["modes"] = "modes"
    """What is judged: `tokenizer`, `prior`, `inpainting`, `likelihood` or `modes`."""
    tokenizer: str = "selfvae"
    """A trained selfvae or vae: a kind (the one in runs/tokenizers/KIND), a folder, or a hub id."""
    pixels: Pixels = "mean"
    """What is taken of the pixels' likelihoods: the `mean`, or a `sample`."""
    settings: EvaluationSettings = field(default_factory=EvaluationSettings)
    out: Path = EVALUATIONS / "modes.json"
    """The result, with all that is needed to repeat it."""


@dataclass(frozen=True)
class LikelihoodEvaluation:
    """How to judge a likelihood of images: by the bits for each number of held-out ones.

    Raises:
        UserError: for a number below 1.
    """

    of: Literal["likelihood"] = "likelihood"
    """What is judged: `tokenizer`, `prior`, `inpainting`, `likelihood` or `modes`."""
    tokenizer: str = "selfvae"
    """A trained selfvae or vae: a kind (the one in runs/tokenizers/KIND), a folder, or a hub id."""
    images: str | None = None
    """Images, of which held-out ones are judged: emoji, a folder, Parquet files or a hub id [default: what the
    tokenizer was trained on]."""
    num: int = 100
    """Images judged; all that are held out, where they are fewer."""
    samples: int = 512
    """Importance samples of each image's latents."""
    seed: int = 0
    """Decides which images, and all that is drawn."""
    device: Device = "auto"
    """Where to compute, in fp32."""
    out: Path = EVALUATIONS / "likelihood.json"
    """The result, with all that is needed to repeat it."""

    def __post_init__(self) -> None:
        if self.num < 1 or self.samples < 1:
            raise UserError(f"--num and --samples must be at least 1, not {self.num} and {self.samples}")


Evaluation = (
    TokenizerEvaluation | PriorEvaluation[Any] | InpaintingEvaluation[Any] | ModesEvaluation | LikelihoodEvaluation
)
