"""Settings of the study of HR-VQVAE's paper."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, TypeAlias, get_args

from tyro.conf import Positional

from smalti.commands.model_paths import RUNS
from smalti.core.devices import Precision
from smalti.core.errors import UserError, require_at_least_one
from smalti.metrics.extractors import ExtractorName
from smalti.studies.experiment import picture_path
from smalti.tokenizers.quantizers.tree import RandomStart

Part: TypeAlias = Literal["methods", "distances", "depth", "search", "size", "samples", "heads", "curve"]
DataName: TypeAlias = Literal["mnist", "cifar10"]
Start: TypeAlias = Literal["kmeans", RandomStart]

PAPER_START: Start = "uniform"
"""The start of codewords that learn by the paper's losses, which the paper does not name."""


@dataclass(frozen=True)
class Generating:
    """Budgets of priors and samples.

    Raises:
        UserError: if a number is too small.
    """

    grid: Literal[8, 16] = 8
    """Rows and columns of the codes that priors learn (of VQ-VAE-2's finest level). The paper has 16."""
    prior_steps: int = 300
    """Training steps of the prior of each level."""
    prior_batch_size: int = 32
    """Batch size of the priors' training."""
    pixelcnn_width: int = 64
    """Width of the PixelCNN."""
    hourglass_width: int = 96
    """Width of the hourglass: a multiple of 32, or of 4 if it is below 32."""
    num: int = 400
    """Most samples of each prior, and most held-out images, that Fréchet distances are measured of."""
    reference: int = 2_000
    """Most training images that Fréchet distances are measured to."""
    extractor: ExtractorName = "lite0"
    """Network of the features for Fréchet distances: `lite0` needs the extra `metrics`; `inception`, which the paper
    used, downloads its weights."""

    def __post_init__(self) -> None:
        require_at_least_one(self, "prior_steps", "prior_batch_size", "pixelcnn_width", "hourglass_width")
        if self.num < 4 or self.reference < 4:
            raise UserError(f"--num and --reference must be at least 4, not {self.num} and {self.reference}")


@dataclass(frozen=True)
class ReproduceHRVQVAE:
    """Settings of the study of HR-VQVAE.

    Raises:
        UserError: if a number is below 1.
    """

    study: Positional[Literal["hr-vqvae"]]
    """The study of VQ-VAE, VQ-VAE-2 and HR-VQVAE."""
    images: str
    """The data set's training images, such as a Parquet file; any form that `--images` of train_tokenizer accepts."""
    data: DataName = "mnist"
    """The name of the data set, which selects the paper's numbers."""
    parts: tuple[Part, ...] = get_args(Part)
    """The parts to run: Table 1 with Figs. 1 and 8 (`methods`), the Fréchet distances of Table 1 (`distances`), Figs. 4
    and 5 (`depth`), Table 2 (`search`), Figs. 6 and 7 (`size`), Table 3 (`samples`), a head that predicts HR-VQVAE's
    codes digit by digit against one softmax over all codes (`heads`), and HR-VQVAE's error by training steps
    (`curve`)."""
    seeds: int = 3
    """Seeds of each model in Tables 1 and 3 and in Fig. 5, and of each head. The other parts use one seed."""
    steps: int = 1_000
    """Training steps of every tokenizer except those of Fig. 6 and of the curve."""
    starts: tuple[Start, ...] = (PAPER_START,)
    """Starts of the codewords that learn by the paper's losses, in Fig. 6; a column each. The paper does not name its
    start. The other parts have `uniform`."""
    size_steps: int = 300
    """Training steps of the tokenizers of Fig. 6, which are slow with 32768 leaves in one codebook."""
    curve_steps: tuple[int, ...] = (600, 2_000, 6_000, 20_000, 100_000)
    """Training steps of each tokenizer of the curve, which takes hours on a CPU."""
    batch_size: int = 16
    """Batch size of the tokenizers' training."""
    precision: Precision = "auto"
    """Precision of the networks in training. Measurements use fp32."""
    channels: int = 32
    """Width of the networks."""
    code_width: int = 16
    """Length of a codeword."""
    usage_images: int = 60_000
    """Most training images over which leaves in use and perplexity are counted; an eighth of them for one codebook of
    32768 leaves."""
    generating: Generating = field(default_factory=Generating)
    work: Path = RUNS / "reproductions"
    """The folder for trained models and results."""
    out: Path = Path("docs/reproductions/hr-vqvae.md")
    """The Markdown report. Its measured sections are replaced; pictures are written beside it."""

    def __post_init__(self) -> None:
        require_at_least_one(
            self, "seeds", "steps", "size_steps", "batch_size", "channels", "code_width", "usage_images"
        )
        if not self.starts:
            raise UserError("--starts needs at least one start of codewords")
        if min(self.curve_steps, default=0) < 1:
            raise UserError("--curve-steps needs numbers of at least 1")

    def picture(self, name: str) -> Path:
        """Returns the path of a picture beside the report."""
        return picture_path(self.out, self.data, name)
