"""Fills holes in an image; see `smalti.commands.inpaint`."""

from smalti import cli
from smalti.commands.inpaint import default_config, inpaint

ABOUT = """Fills the masked part of an image, several times; everything outside the mask is returned exactly.

$ python scripts/inpaint.py --image in.png --mask mask.png               # white in the mask is filled in
$ python scripts/inpaint.py --image erased.png                           # its own transparent parts are
$ python scripts/inpaint.py --image in.png --mask mask.png --num 8 --seed 3 --out fills/out.png
$ python scripts/inpaint.py --image in.png --mask mask.png --invert      # black is filled in instead
$ python scripts/inpaint.py --image in.png --expand 0 0 16 0             # 16 pixels more on the right
$ python scripts/inpaint.py --image photos --mask masks --out fills      # a folder, each with its mask
$ python scripts/inpaint.py --prior my/top my/bottom --image erased.png  # one for each level of the tokenizer

A sheet of image, hole and fills lies beside the fills. More in docs/inpainting.md."""


def main() -> None:
    """The command."""
    cli.run(
        lambda config: print(inpaint(config)), lambda: default_config(cli.chosen("--prior", "hourglass")), about=ABOUT
    )


if __name__ == "__main__":
    main()
