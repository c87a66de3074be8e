"""`smalti COMMAND ...`, also `python -m smalti COMMAND ...`: one entry point for all commands.

Every command is a file in `scripts/`; `smalti train-prior ...` is the same as `python scripts/train_prior.py ...`.
"""

import difflib
import sys
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec

from smalti.core.errors import PROGRAM

COMMANDS = {
    "demo": "Train on the embedded images, sample and inpaint, in minutes",
    "train-tokenizer": "Train a tokenizer: images to grids of discrete codes and back",
    "build-latents": "Encode every image with a tokenizer into a latent set (HDF5)",
    "inspect-latents": "Show what a latent set holds, verify it, plot codebook usage",
    "convert-latents": "Convert a latent set to Parquet, or back",
    "train-prior": "Train a prior on a latent set",
    "sample": "Generate images with a trained prior",
    "inpaint": "Fill the masked part of an image, or of a folder of images",
    "app": "Inpaint and sample in the browser",
    "evaluate": "Measure a tokenizer, a prior or its fills against held-out images",
    "compress": "Compress images to files of codes, and decompress them",
    "convert": "Convert a published VQ-GAN to a tokenizer, or one of yours to diffusers",
    "push": "Share a model or a latent set on the Hugging Face hub, with a card",
    "benchmark": "Measure the speed of the hot paths (from a checkout)",
    "reproduce": "Repeat a paper's experiments and compare (from a checkout)",
}
"""Maps each command to a line of help, in the order in which a user meets them.

A new command is one line here and one file, `scripts/NAME.py`, with a function `main`.
"""

CHECKOUT_ONLY = {"benchmark": "smalti.benchmarks", "reproduce": "smalti.studies"}
"""Commands whose code is not part of an installed wheel, and the package that they need."""


def available() -> dict[str, str]:
    """Returns the commands that can run here with their descriptions."""
    return {
        name: about
        for name, about in COMMANDS.items()
        if name not in CHECKOUT_ONLY or find_spec(CHECKOUT_ONLY[name]) is not None
    }


def overview() -> str:
    """Returns the text of `smalti --help`."""
    commands = available()
    width = max(map(len, commands))
    lines = [f"  {name:{width}}  {about}" for name, about in commands.items()]
    return "\n".join(
        [
            "usage: smalti COMMAND [OPTIONS]",
            "",
            "Trains image tokenizers and discrete priors; generates and inpaints images with them.",
            "",
            *lines,
            "",
            "`smalti COMMAND --help` explains a command's options. On several GPUs:",
            "`accelerate launch -m smalti train-prior ...`.",
        ]
    )


def main() -> None:
    """Runs the command that the first argument names."""
    name, *rest = sys.argv[1:] or ["--help"]
    if name in ("-h", "--help", "help"):
        print(overview())
    elif name == "--version":
        print(f"smalti {version('smalti')}")
    elif name in available():
        sys.argv = [f"{PROGRAM} {name}", *rest]
        import_module(f"smalti.scripts.{name.replace('-', '_')}").main()
    else:
        nearest = difflib.get_close_matches(name.replace("_", "-"), available(), n=1)
        hint = f"did you mean `smalti {nearest[0]}`?" if nearest else "`smalti --help` lists the commands"
        print(f"error: there is no command {name!r}; {hint}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
