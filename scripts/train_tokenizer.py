"""Trains a tokenizer; see `smalti.commands.train_tokenizer`."""

from smalti import cli
from smalti.commands.presets import default_config
from smalti.commands.train_tokenizer import train_tokenizer

ABOUT = """Trains a tokenizer: images to a model that turns them into grids of codes, and back.

$ python scripts/train_tokenizer.py                          # the embedded emoji, on two CPU cores in minutes
$ python scripts/train_tokenizer.py --images my/photos       # your own: height and width divide by 4
$ python scripts/train_tokenizer.py --tokenizer hqa          # one code of 8 bits an image, at the top of five layers
$ python scripts/train_tokenizer.py --tokenizer selfvae      # real numbers, and a likelihood of images
$ accelerate launch scripts/train_tokenizer.py --tokenizer vqvae2 --preset paper64 --images my/photos
$ accelerate launch scripts/train_tokenizer.py --tokenizer vqgan --preset f16-1024 --images my/photos

Kinds: hrvq (linked codebooks), vqvae (one codebook), vqvae2 (codes at two or three resolutions), vqgan (one grid,
trained for looks too; convert.py brings those that others trained), hqa and hams (a few bits an image: a stack of
layers, trained in turn, --steps each), selfvae and vae (likelihoods of images, through a hierarchy of VAEs).
Stopped (Ctrl-C) or killed, the same command goes on where it was: see --resume.
More in docs/training.md. Next: build_latents.py."""


def main() -> None:
    """The command."""
    cli.run(
        train_tokenizer,
        lambda: default_config(cli.chosen("--preset", "small"), cli.chosen("--tokenizer", "hrvq")),
        about=ABOUT,
    )


if __name__ == "__main__":
    main()
