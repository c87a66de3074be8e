"""The study of selfVAE's paper: its settings, and a VAE, a selfVAE and a 3-level selfVAE trained on one budget.

Each model is trained by `train_tokenizer`; a study that was stopped resumes. Measurements and the report are in
`report.py`.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, TypeAlias

from tyro.conf import Positional

from smalti.commands.model_paths import RUNS
from smalti.commands.presets import LIKELIHOOD_FIT
from smalti.commands.train_tokenizer import TrainTokenizer, train_tokenizer
from smalti.core.devices import Precision
from smalti.core.errors import require_at_least_one
from smalti.images.image_set import ImageSet, open_images
from smalti.studies.experiment import Trial
from smalti.tokenizers.selfvae.hierarchical_vae import VAEConfig
from smalti.tokenizers.selfvae.selfvae import SelfVAEConfig

ModelName: TypeAlias = Literal["vae", "selfvae-downscale", "selfvae-downscale-3lvl", "selfvae-sketch"]
DataName: TypeAlias = Literal["cifar10", "emoji"]

MODELS: dict[ModelName, VAEConfig] = {
    "vae": VAEConfig(),
    "selfvae-downscale": SelfVAEConfig(),
    "selfvae-downscale-3lvl": SelfVAEConfig(levels=3),
    "selfvae-sketch": SelfVAEConfig(transformation="sketch"),
}


@dataclass(frozen=True)
class ReproduceSelfVAE:
    """Settings of the study of selfVAE.

    Raises:
        UserError: if a number is below 1.
    """

    study: Positional[Literal["selfvae"]]
    """The study of VAE and selfVAE."""
    data: DataName = "cifar10"
    """The name of the data set, which selects the paper's numbers."""
    images: str = "emoji"
    """The data set's training images, such as a Parquet file; any form that `--images` of train_tokenizer accepts."""
    models: tuple[ModelName, ...] = ("vae", "selfvae-downscale", "selfvae-downscale-3lvl")
    """The rows of Table 1 to run."""
    channels: int = 48
    """Channels of the networks."""
    growth: int = 16
    """Channels that each layer of a dense block adds."""
    dense_layers: int = 2
    """Layers of each dense block."""
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
    work: Path = RUNS / "reproductions" / "selfvae"
    """The folder for trained models and results."""
    out: Path = Path("docs/reproductions/selfvae.md")
    """The Markdown report. Its measured sections are replaced; pictures are written beside it."""

    def __post_init__(self) -> None:
        require_at_least_one(
            self, "channels", "growth", "dense_layers", "steps", "batch_size", "likelihood_num", "samples"
        )


def open_data(config: ReproduceSelfVAE) -> ImageSet:
    """Opens the images at 32x32 pixels in colour."""
    return open_images(config.images, height=32, width=32, channels=3)


def trained(name: ModelName, config: ReproduceSelfVAE, images: ImageSet) -> Trial:
    """Returns the trial of a model, trained (or resumed) if it was not."""
    size = {"channels": config.channels, "growth": config.growth, "dense_layers": config.dense_layers}
    sizes = "-".join(map(str, size.values()))
    warm_up = f"-warm{config.warm_up}" if config.warm_up else ""
    folder = config.work / config.data / f"{name}-{sizes}-{config.steps}steps{warm_up}"
    fit = replace(
        LIKELIHOOD_FIT, steps=config.steps, batch_size=config.batch_size, report_steps=config.steps, save_steps=250
    )
    settings = TrainTokenizer(
        model=replace(MODELS[name], **size, warm_up=config.warm_up),
        fit=fit,
        tokenizer="vae" if name == "vae" else "selfvae",
        images=config.images,
        precision=config.precision,
        out=folder,
    )
    return Trial(train_tokenizer(settings, images))
