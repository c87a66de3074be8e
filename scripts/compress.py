"""Compresses images to codes, and back; see `smalti.commands.compress`."""

from smalti import cli
from smalti.commands.compress import Compress, Decompress, compress, decompress

ABOUT = """Images to a small file of a trained tokenizer's codes, at a fixed rate, and back.

$ python scripts/compress.py --images my/photos --out photos.smalti           # prints rate and distortion
$ python scripts/compress.py --images one.png --layer 3 --out one.smalti      # more bits, less error
$ python scripts/compress.py --codes photos.smalti --out back --decodes 4     # and four samples of each
$ python scripts/compress.py --tokenizer hrvq --images my/photos              # any kind of tokenizer

Who decompresses needs the same tokenizer; a file of another one is refused. Add --help after --codes FILE for the flags
of the way back."""


def main() -> None:
    """The command."""
    if cli.chosen("--codes", ""):
        cli.run(decompress, Decompress, about=ABOUT)
    else:
        cli.run(compress, Compress, about=ABOUT)


if __name__ == "__main__":
    main()
