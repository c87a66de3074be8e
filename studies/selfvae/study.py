"""selfVAE's study, trained anew: a VAE, a selfVAE and a 3-level selfVAE of one budget, and what is measured of each.

A run is trained by `train_tokenizer` and measured once; both are kept, so a study that is stopped goes on. What is
written of it is in `reproduce_selfvae_report.py`.
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
    """What to reproduce of selfVAE's paper, and at which budget.

    Raises:
        UserError: for a number below 1.
    """

    study: Positional[Literal["selfvae"]]
    """Whose numbers: the study of VAE and selfVAE."""
    data: DataName = "cifar10"
    """Which data set the images are, for the paper's numbers beside ours."""
    images: str = "emoji"
    """The data set's training images, whatever `--images` of train_tokenizer takes: a Parquet file, say."""
    models: tuple[ModelName, ...] = ("vae", "selfvae-downscale", "selfvae-downscale-3lvl")
    """Rows of Table 1."""
    channels: int = 48
    """Channels of the networks."""
    growth: int = 16
    """Channels that each layer of a dense block adds."""
    dense_layers: int = 2
    """Layers of a dense block."""
    warm_up: float = 0.0
    """Share of the training over which what latents cost comes into the loss; the paper has none."""
    steps: int = 1_200
    """Optimiser steps of every model."""
    batch_size: int = 16
    """Images a step."""
    precision: Precision = "auto"
    """Arithmetic of the networks in training; what is measured is in fp32."""
    num: int = 1_000
    """Held-out images sent and made again, and images generated, at most."""
    reference: int = 5_000
    """Most training images that distances are taken to."""
    likelihood_num: int = 64
    """Held-out images whose bits are counted."""
    samples: int = 512
    """Importance samples of each of them."""
    work: Path = RUNS / "reproductions" / "selfvae"
    """Where runs are kept."""
    out: Path = Path("docs/reproductions/selfvae.md")
    """The Markdown file whose measured parts are replaced, with its pictures beside it."""

    def __post_init__(self) -> None:
        require_at_least_one(
            self, "channels", "growth", "dense_layers", "steps", "batch_size", "likelihood_num", "samples"
        )


def open_data(config: ReproduceSelfVAE) -> ImageSet:
    """The images, at 32x32 pixels in colour."""
    return open_images(config.images, height=32, width=32, channels=3)


def trained(name: ModelName, config: ReproduceSelfVAE, images: ImageSet) -> Path:
    """The folder of a run, trained as far as it was not yet."""
    size = {"channels": config.channels, "growth": config.growth, "dense_layers": config.dense_layers}
    named = "-".join(map(str, size.values()))
    warmed = f"-warm{config.warm_up}" if config.warm_up else ""
    folder = config.work / config.data / f"{name}-{named}-{config.steps}steps{warmed}"
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
    return train_tokenizer(settings, images)
