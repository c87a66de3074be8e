"""Fills masked parts of images; see `smalti.commands.inpaint`."""

from smalti import cli
from smalti.commands.inpaint import default_config, inpaint

ABOUT = """Fills the masked part of an image, several times; all other pixels stay exact, in 8 bits.

$ python scripts/inpaint.py --image in.png --mask mask.png               # fills the white part of the mask
$ python scripts/inpaint.py --image erased.png                           # fills the image's transparent part
$ python scripts/inpaint.py --image in.png --mask mask.png --num 8 --seed 3 --out fills/out.png
$ python scripts/inpaint.py --image in.png --mask mask.png --invert      # fills the black part instead
$ python scripts/inpaint.py --image in.png --expand 0 0 16 0             # adds 16 pixels on the right
$ python scripts/inpaint.py --image photos --mask masks --out fills      # a folder of images with their masks
$ python scripts/inpaint.py --prior my/top my/bottom --image erased.png  # one prior for each level of the tokenizer

It also writes a sheet with the image, the masked image and all fills.

More: docs/guide/inpaint.md"""


def main() -> None:
    """Runs the command line."""
    cli.run(
        lambda config: print(inpaint(config)), lambda: default_config(cli.chosen("--prior", "hourglass")), about=ABOUT
    )


if __name__ == "__main__":
    main()
