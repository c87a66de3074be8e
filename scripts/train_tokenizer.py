"""Trains a tokenizer; see `smalti.pipeline.train_tokenizer`."""

from smalti import cli
from smalti.pipeline.train_tokenizer import default_config, train_tokenizer

ABOUT = """Trains a tokenizer: images to a model that turns them into grids of codes, and back.

$ python scripts/train_tokenizer.py                          # the embedded emoji, on two CPU cores in minutes
$ python scripts/train_tokenizer.py --images my/photos       # your own: height and width divide by 4
$ accelerate launch scripts/train_tokenizer.py --tokenizer hrvq --images my/photos --height 64 --width 64

Stopped (Ctrl-C) or killed, the same command goes on where it was: see --resume.
More in docs/training.md. Next: build_latents.py."""


def main() -> None:
    """The command."""
    cli.run(train_tokenizer, lambda: default_config(cli.chosen("--tokenizer", "hrvq")), about=ABOUT)


if __name__ == "__main__":
    main()
