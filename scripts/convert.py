"""Converts VQ-GAN checkpoints; see `smalti.tokenizers.vqgan.convert`."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from smalti import cli
from smalti.commands.model_paths import TOKENIZERS
from smalti.core import locks
from smalti.core.errors import UserError
from smalti.core.files import whole_folder
from smalti.core.progress import print_note
from smalti.tokenizers.vqgan.convert import import_checkpoint
from smalti.tokenizers.vqgan.readers.diffusers import to_diffusers
from smalti.tokenizers.vqgan.vqgan import VQGAN

ABOUT = """Converts VQ-GAN checkpoints of other projects to smalti tokenizers, and smalti's to diffusers.

$ python scripts/convert.py --source last.ckpt --description model.yaml       # taming-transformers, LDM, IBQ
$ python scripts/convert.py --source vq_ds16_c2i.pt                           # LlamaGen, Janus, MaskGIT-VQGAN
$ python scripts/convert.py --source my/vqmodel --out runs/tokenizers/vqgan   # diffusers, Chameleon, LlamaGen
$ python scripts/convert.py --source runs/tokenizers/vqgan --to diffusers --out my/vqmodel

The format is recognised by the names of the weights. It may be a VQModel, GumbelVQ or VQSegmentationModel of
taming-transformers; a first stage of latent diffusion (LDM), alone or in the file of the whole model; IBQ; VQ-8 or
VQ-16 of LlamaGen, alone or in Janus; a VQModel of diffusers, such as aMUSEd's; Chameleon or Anole; MaskGIT-VQGAN of
open-muse, RAR, TiTok or MAGE.

Files are .ckpt, .pt, .pth, .bin or .safetensors, with a training's state or bare weights. Averaged weights are taken if
there are any.

Every weight must match, or the conversion fails. Losses, discriminators and the rest of a larger model are left out.
Pickles are read without running code.

Next step: python scripts/build_latents.py --tokenizer runs/tokenizers/vqgan"""


@dataclass(frozen=True)
class Convert:
    """Settings of `convert`."""

    source: Path
    """File of the weights, or a folder with weights and config.json. With `--to diffusers`, a smalti VQ-GAN."""
    description: Path | None = None
    """The `.yaml` or `.json` file that describes the network, if the format has one [default: config.json in the
    folder, or the weights' file with the suffix .yaml]."""
    to: Literal["smalti", "diffusers"] = "smalti"
    """Format to write."""
    out: Path = TOKENIZERS / "vqgan"
    """Folder to write; it must not exist yet."""


def convert(config: Convert) -> None:
    """Converts a checkpoint and prints a summary.

    Raises:
        UserError: if `out` exists or cannot be written, the source cannot be converted, or `description` is not read.
    """
    inputs = [config.source, *([config.description] if config.description else [])]
    if os.path.isfile(config.source):
        inputs.append(config.source.with_suffix(".yaml"))
    with locks.claim([config.out], inputs=inputs):
        model = _convert(config)
    size = f"{model.config.height}x{model.config.width}"
    print(f"{config.out}: {size} images to {str(model.layout).replace('×', 'x')}, digest {model.digest()[:12]}")


def _convert(config: Convert) -> VQGAN:
    """Writes the converted model and returns it."""
    if config.to == "diffusers":
        if config.description is not None:
            raise UserError(f"--to diffusers reads no description; leave --description {config.description} out")
        model = VQGAN.load(config.source)
        to_diffusers(model, config.out)
        height, width = model.config.height, model.config.width
        if height != width:
            print_note(
                f"note: diffusers stores one size, so {config.out} keeps the height and not the width: converted back, "
                f"it is a tokenizer of {height}x{height} images, with another digest"
            )
    else:
        model = import_checkpoint(config.source, config.description)
        print(f"{config.source}: recognised as {model.provenance['format']}")
        with whole_folder(config.out) as partial:  # a kill leaves no folder, which the next run would refuse
            model.save(partial)
    return model


def main() -> None:
    """Runs the command line."""
    cli.run(convert, Convert, about=ABOUT)


if __name__ == "__main__":
    main()
