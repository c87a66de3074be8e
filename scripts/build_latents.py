"""Builds a latent set; see `smalti.commands.build_latents`."""

from smalti import cli
from smalti.commands.build_latents import BuildLatents, build_latents

ABOUT = """Encodes every image with a trained tokenizer and stores the codes as a latent set, one HDF5 file.

$ python scripts/build_latents.py --tokenizer hrvq                      # the images it was trained on
$ python scripts/build_latents.py --tokenizer hrvq --images my/photos   # others
$ python scripts/build_latents.py --tokenizer hqa --layer 3             # of a stack of layers, the third one's
$ python scripts/build_latents.py --on-bad-image skip                   # leave out what cannot be decoded
$ accelerate launch --num_processes 8 scripts/build_latents.py          # the same file from eight processes

Stopped or killed, it goes on from its finished blocks when the same command is given, with any number of processes.

Next: accelerate launch scripts/train_prior.py."""


def main() -> None:
    """The command."""
    cli.run(build_latents, BuildLatents, about=ABOUT)


if __name__ == "__main__":
    main()
