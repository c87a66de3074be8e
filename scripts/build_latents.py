"""Builds a latent set; see `smalti.commands.build_latents`."""

from shlex import quote

from smalti import cli
from smalti.commands.build_latents import BuildLatents, build_latents
from smalti.training.end_of_run import print_next

ABOUT = """Encodes images with a trained tokenizer and stores their codes as a latent set: one HDF5 file, or several.

$ python scripts/build_latents.py --tokenizer hrvq                      # the images it was trained on
$ python scripts/build_latents.py --tokenizer hrvq --images my/photos   # other images
$ python scripts/build_latents.py --tokenizer hqa --layer 3             # the codes of the third layer
$ python scripts/build_latents.py --conditions encoders:features        # a vector for each image, by your function
$ python scripts/build_latents.py --on-bad-image skip                   # leave out images that cannot be decoded
$ python scripts/build_latents.py --shard-rows 1000000                  # a folder of files, which reads as one set
$ accelerate launch --num_processes 8 scripts/build_latents.py          # eight processes write one set

If it is stopped or killed, run the same command to resume; the number of processes may change.

Next step: python scripts/train_prior.py"""


def main() -> None:
    """Runs the command line."""
    cli.run(_build, BuildLatents, about=ABOUT)


def _build(config: BuildLatents) -> None:
    path = build_latents(config)
    print_next(f"python scripts/train_prior.py --latents {quote(str(path))}")


if __name__ == "__main__":
    main()
