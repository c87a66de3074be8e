"""Compresses images to codes and decompresses them; see `smalti.commands.compress`."""

from smalti import cli
from smalti.commands.compress import Compress, Decompress, compress, decompress

ABOUT = """Compresses images to a small file of codes, and decompresses such a file.

$ python scripts/compress.py --images my/photos --out photos.smalti           # prints rate and distortion
$ python scripts/compress.py --images one.png --layer 3 --out one.smalti      # more bits, less error
$ python scripts/compress.py --tokenizer hrvq --images my/photos              # any kind of tokenizer
$ python scripts/compress.py --codes photos.smalti --out back                 # decompresses
$ python scripts/compress.py --codes photos.smalti --out back --decodes 4     # with four sampled decodes of each image
$ python scripts/compress.py --prior pixelcnn --images my/photos --out photos.smalti    # fewer bits, same images
$ python scripts/compress.py --prior pixelcnn --codes photos.smalti --out back

Each code takes a fixed number of bits, or with --prior as many as the probabilities of a trained transformer or
pixelcnn need. Decompressing needs the tokenizer and the prior that compressed. For its options: --codes FILE --help"""


def main() -> None:
    """Runs the command line."""
    if cli.chosen("--codes", ""):
        cli.run(decompress, Decompress, about=ABOUT)
    else:
        cli.run(compress, Compress, about=ABOUT)


if __name__ == "__main__":
    main()
