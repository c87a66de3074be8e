"""The study of selfVAE's paper: its settings, and a VAE, a selfVAE and a 3-level selfVAE trained on one budget.

Each model is trained by `train_tokenizer`; a study that was stopped resumes. Measurements and the report are in
`report.py`.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, NamedTuple, TypeAlias

from tyro.conf import Positional

from smalti.commands.model_paths import RUNS
from smalti.commands.presets import LIKELIHOOD_FIT
from smalti.commands.train_tokenizer import TrainTokenizer, train_tokenizer
from smalti.core.devices import Precision
from smalti.core.errors import require_at_least_one
from smalti.images.image_set import ImageSet, open_images
from smalti.metrics.extractors import ExtractorName
from smalti.studies.experiment import Trial
from smalti.tokenizers.selfvae.hierarchical_vae import VAEConfig
from smalti.tokenizers.selfvae.selfvae import SelfVAEConfig

ModelName: TypeAlias = Literal["vae", "selfvae-downscale", "selfvae-downscale-3lvl", "selfvae-sketch"]
DataName: TypeAlias = Literal["cifar10", "celeba", "imagenette", "emoji"]
SizeName: TypeAlias = Literal["small", "paper"]

MODELS: dict[ModelName, VAEConfig] = {
    "vae": VAEConfig(),
    "selfvae-downscale": SelfVAEConfig(),
    "selfvae-downscale-3lvl": SelfVAEConfig(levels=3),
    "selfvae-sketch": SelfVAEConfig(transformation="sketch"),
}
HEIGHTS: dict[DataName, int] = {"cifar10": 32, "celeba": 64, "imagenette": 64, "emoji": 32}
"""Height and width of the images in pixels, for each data set."""


class NetworkSize(NamedTuple):
    """Sizes of the networks of a model: channels, channels that a layer of a dense block adds, and layers of one."""

    channels: int = 48
    growth: int = 16
    dense_layers: int = 2


PAPER_SIZES: dict[int, dict[ModelName, NetworkSize]] = {
    32: {
        "vae": NetworkSize(320, 128, 8),
        "selfvae-downscale": NetworkSize(256, 128, 6),
        "selfvae-downscale-3lvl": NetworkSize(256, 96, 6),
        "selfvae-sketch": NetworkSize(256, 88, 6),
    },
    64: {
        "vae": NetworkSize(256, 144, 6),
        "selfvae-downscale": NetworkSize(256, 80, 6),
        "selfvae-downscale-3lvl": NetworkSize(256, 64, 6),
        "selfvae-sketch": NetworkSize(256, 60, 6),
    },
}
"""Sizes for images of up to 32 pixels and above that give 35 to 39 million parameters. The paper says only that its
models have from 32 to 42 million."""


@dataclass(frozen=True)
class ReproduceSelfVAE:
    """Settings of the study of selfVAE.

    Raises:
        UserError: if a number is below 1.
    """

    study: Positional[Literal["selfvae"]]
    """The study of VAE and selfVAE."""
    data: DataName = "cifar10"
    """The name of the data set, which selects the paper's numbers and the images' size."""
    images: str = "emoji"
    """The data set's training images, such as a Parquet file; any form that `--images` of train_tokenizer accepts."""
    models: tuple[ModelName, ...] = ("vae", "selfvae-downscale", "selfvae-downscale-3lvl")
    """The rows of Table 1 to run."""
    height: int | None = None
    """Height and width of the images in pixels [default: 32 for cifar10 and emoji, 64 for celeba and imagenette]."""
    size: SizeName = "small"
    """Size of the networks: `small`, for two CPU cores, or `paper`, 35 to 39 million parameters each, for a GPU."""
    warm_up: float = 0.0
    """Share of the training during which the KL terms' weight rises from 0 to 1 (KL warm-up). The paper has none."""
    steps: int = 1_200
    """Training steps of every model."""
    batch_size: int = 16
    """Batch size."""
    precision: Precision = "auto"
    """Precision of the networks in training. Measurements use fp32."""
    num: int = 1_000
    """Most held-out images to reconstruct, and most images to generate."""
    reference: int = 5_000
    """Most training images that Fréchet distances are measured to."""
    likelihood_num: int = 64
    """Held-out images whose negative log-likelihood is measured."""
    samples: int = 512
    """Importance samples per image."""
    extractor: ExtractorName = "lite0"
    """Network whose features Fréchet distances are computed on; `inception` is that of the published FID."""
    work: Path = RUNS / "reproductions" / "selfvae"
    """The folder for trained models and results."""
    out: Path = Path("docs/reproductions/selfvae.md")
    """The Markdown report. Its measured sections are replaced; pictures are written beside it."""

    def __post_init__(self) -> None:
        require_at_least_one(self, "steps", "batch_size", "likelihood_num", "samples")
        if self.height is not None:
            require_at_least_one(self, "height")

    @property
    def side(self) -> int:
        """Returns the height and width of the images, in pixels."""
        return self.height or HEIGHTS[self.data]


def model_of(name: ModelName, config: ReproduceSelfVAE) -> VAEConfig:
    """Returns a model's settings. Its latents are 8x8 at 32 pixels and at 64, as in the paper."""
    small = config.side <= min(PAPER_SIZES)
    size = PAPER_SIZES[32 if small else 64][name] if config.size == "paper" else NetworkSize()
    pixels = {"height": config.side, "width": config.side, "stages": 2 if small else 3}
    return replace(MODELS[name], **pixels, **size._asdict(), warm_up=config.warm_up)


def open_data(config: ReproduceSelfVAE) -> ImageSet:
    """Opens the images, in colour."""
    return open_images(config.images, height=config.side, width=config.side, channels=3)


def trained(name: ModelName, config: ReproduceSelfVAE, images: ImageSet) -> Trial:
    """Returns the trial of a model, trained (or resumed) if it was not."""
    model = model_of(name, config)
    sizes = f"{model.channels}-{model.growth}-{model.dense_layers}"
    warm_up = f"-warm{config.warm_up}" if config.warm_up else ""
    pixels = f"-{config.side}px" if config.side != HEIGHTS[config.data] else ""
    folder = config.work / config.data / f"{name}-{sizes}-{config.steps}steps{warm_up}{pixels}"
    fit = replace(
        LIKELIHOOD_FIT, steps=config.steps, batch_size=config.batch_size, report_steps=config.steps, save_steps=250
    )
    settings = TrainTokenizer(
        model=model,
        fit=fit,
        tokenizer="vae" if name == "vae" else "selfvae",
        images=config.images,
        precision=config.precision,
        out=folder,
    )
    return Trial(train_tokenizer(settings, images))
