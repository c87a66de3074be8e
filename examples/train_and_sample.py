"""Trains a tokenizer and a prior from Python, as the commands do, and draws images from them.

$ python examples/train_and_sample.py
"""

import sys
from pathlib import Path

from smalti import load_prior, sample
from smalti.commands.build_latents import BuildLatents, build_latents
from smalti.commands.train_prior import TrainPrior, train_prior
from smalti.commands.train_tokenizer import TrainTokenizer, train_tokenizer
from smalti.images.sheets import to_image
from smalti.priors.methods.sundae import SundaeConfig, SundaeSampling
from smalti.priors.networks.hourglass import HourglassConfig
from smalti.tokenizers.vq.hrvq import HRVQConfig
from smalti.training.config import FitConfig


def main(out: Path = Path("runs/example"), images: str = "emoji", steps: int = 500, batch_size: int = 32) -> None:
    """Writes `0.png`, `1.png`, ... into `out`; each stage resumes if it was interrupted."""
    fit = FitConfig(steps=steps, batch_size=batch_size)
    tokenizer = train_tokenizer(TrainTokenizer(HRVQConfig(), fit=fit, images=images, out=out / "tokenizer"))
    latents = build_latents(BuildLatents(tokenizer=str(tokenizer), images=images, out=out / "latents.h5"))
    prior = train_prior(
        TrainPrior(HourglassConfig(), SundaeConfig(), fit=fit, latents=latents, out=out / "prior", sheet_samples=0)
    )
    drawn = sample(load_prior(prior), num=4, seed=1, sampling=SundaeSampling(steps=25))  # uint8 (4, 3, 32, 32)
    for number, pixels in enumerate(drawn):
        to_image(pixels).save(out / f"{number}.png")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:2]))
