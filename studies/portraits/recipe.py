"""The recipe of the models in the package: a tokenizer and a prior of the embedded portraits.

What is measured of them, and the model card, are in `card.py`.
"""

import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from tyro.conf import Positional

from smalti.commands.build_latents import BuildLatents, build_latents
from smalti.commands.model_paths import RUNS, SHIPPED, load_prior, load_tokenizer
from smalti.commands.train_prior import TrainPrior, train_prior
from smalti.commands.train_tokenizer import TrainTokenizer, train_tokenizer
from smalti.core.devices import Precision
from smalti.core.models import Checkpointed
from smalti.priors.methods.sundae import SundaeConfig
from smalti.priors.networks.hourglass import HourglassConfig
from smalti.tokenizers.vq.hrvq import HRVQConfig

TOKENIZER = HRVQConfig(depth=3, branching=16, codebook_decay=0.99, revive_below=0.01, reconstruction_loss="l1")
PRIOR = HourglassConfig()


@dataclass(frozen=True)
class ReproducePortraits:
    """Settings of the recipe. The models in the package have the defaults of the commit that their card names."""

    study: Positional[Literal["portraits"]]
    """The study: the models of the portraits that the package contains."""
    images: str = "portraits"
    """Images to train on; any source that `--images` of train_tokenizer takes."""
    tokenizer_steps: int = 10_000
    """Training steps of the tokenizer, of 16 images."""
    prior_steps: int = 6_000
    """Training steps of the prior, of 32 images."""
    precision: Precision = "auto"
    """Precision of the training."""
    seed: int = 0
    """Seed of the training and of all samples."""
    out: Path = RUNS / "portraits"
    """Folder of the runs."""
    package: Path = SHIPPED / "portraits"
    """Folder that the models, in half precision, and their card are written to."""

    @property
    def tokenizer_run(self) -> Path:
        """Returns the folder of the tokenizer's run."""
        return self.out / "tokenizer"

    @property
    def rounded_tokenizer(self) -> Path:
        """Returns the folder of the tokenizer in half precision, whose codes the prior is trained on."""
        return self.out / "tokenizer-half"

    @property
    def latents(self) -> Path:
        """Returns the latent set's file."""
        return self.out / "latents.h5"

    @property
    def prior_run(self) -> Path:
        """Returns the folder of the prior's run."""
        return self.out / "prior"


def train(config: ReproducePortraits) -> None:
    """Trains both models and exports them; every stage that is finished is left as it is.

    The tokenizer is rounded to half precision first, so that the prior learns the very codes of the tokenizer in the
    package.
    """
    defaults = TrainTokenizer(model=TOKENIZER)
    fit = replace(defaults.fit, steps=config.tokenizer_steps, report_steps=1_000, save_steps=500, seed=config.seed)
    train_tokenizer(
        replace(defaults, images=config.images, fit=fit, precision=config.precision, out=config.tokenizer_run)
    )
    _save_half(load_tokenizer(str(config.tokenizer_run)), config.rounded_tokenizer)
    latents = build_latents(BuildLatents(tokenizer=str(config.rounded_tokenizer), flips=False, out=config.latents))
    defaults = TrainPrior(model=PRIOR, objective=SundaeConfig())
    fit = replace(defaults.fit, steps=config.prior_steps, report_steps=1_000, save_steps=500, seed=config.seed)
    train_prior(replace(defaults, fit=fit, latents=latents, precision=config.precision, out=config.prior_run))
    export(config)


def export(config: ReproducePortraits) -> None:
    """Writes the prior and its tokenizer in half precision, as one folder that `load_prior` reads."""
    _save_half(load_prior(str(config.prior_run)), config.package)
    shutil.copytree(config.rounded_tokenizer, config.package / "tokenizer", dirs_exist_ok=True)


def _save_half(model: Checkpointed, folder: Path) -> None:
    model.round_to_half()
    model.save(folder, half=True)
