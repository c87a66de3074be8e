"""Trains a tokenizer; see `smalti.commands.train_tokenizer`."""

from typing import Any, cast

from smalti import cli
from smalti.commands.presets import default_config
from smalti.commands.train_tokenizer import TrainTokenizer, print_end_of_tokenizer, train_tokenizer
from smalti.core import models
from smalti.tokenizers.base import Tokenizer

ABOUT = """Trains a tokenizer: a model that turns images into grids of codes, and back.

$ python scripts/train_tokenizer.py                          # on the embedded portraits, in minutes on two CPU cores
$ python scripts/train_tokenizer.py --images my/photos       # on a folder of images
$ python scripts/train_tokenizer.py --tokenizer hqa          # another kind
$ python scripts/train_tokenizer.py --init portraits --images my/faces --out runs/tokenizers/faces   # fine-tune
$ accelerate launch scripts/train_tokenizer.py --tokenizer vqvae2 --preset paper64 --images my/photos
$ accelerate launch scripts/train_tokenizer.py --tokenizer vqgan --preset f16-1024 --images my/photos

Kinds of tokenizer (for the options of one: --tokenizer KIND --help):
  hrvq           linked codebooks, refined layer by layer (HR-VQVAE)
  vqvae          one codebook (VQ-VAE)
  vqvae2         grids of codes at two or more resolutions (VQ-VAE-2)
  vqgan          one grid, with perceptual and adversarial losses; convert.py imports published ones
  hqa, hams      a stack of layers trained one after the other, for a few bits an image
  vae, selfvae   hierarchical VAEs over real-valued latents, with image likelihoods

If it is stopped (Ctrl-C) or killed, run the same command to resume; see --resume.

More: docs/guide/train-a-tokenizer.md; several processes: docs/guide/many-gpus-and-resuming.md

Next step: python scripts/build_latents.py"""


def defaults() -> tuple[Any, TrainTokenizer[Any]]:
    """Returns the config class and the defaults for the kind, the preset and the --init of the command line."""
    kind, init = (cli.chosen(flag, "") or None for flag in ("--tokenizer", "--init"))
    return default_config(cli.chosen("--preset", "small"), kind, init)


def train(config: TrainTokenizer[Any]) -> None:
    """Trains a tokenizer, unless a flag was given that its quantizer does not use."""
    kind = cast(type[Tokenizer], models.class_of_kind("tokenizer", config.tokenizer))
    kind.require_used(config.model, defaults()[1].model)
    print_end_of_tokenizer(train_tokenizer(config))


def main() -> None:
    """Runs the command line."""
    cli.run(train, defaults, about=ABOUT)


if __name__ == "__main__":
    main()
