"""VQ-GANs of other systems as smalti's, and back; see `smalti.tokenizers.vqgan.convert`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from smalti import cli
from smalti.commands.model_paths import TOKENIZERS
from smalti.core.errors import UserError
from smalti.tokenizers.vqgan.convert import from_diffusers, from_taming, to_diffusers
from smalti.tokenizers.vqgan.vqgan import VQGAN

ABOUT = """Turns a VQ-GAN of another system into one of smalti's, and a smalti VQ-GAN into diffusers' VQModel.

$ python scripts/convert.py --source last.ckpt --description model.yaml   # taming-transformers: VQModel or GumbelVQ
$ python scripts/convert.py --source my/vqmodel --out runs/tokenizers/vqgan   # a folder that diffusers saved
$ python scripts/convert.py --source runs/tokenizers/vqgan --to diffusers --out my/vqmodel

What is written is used as any other tokenizer: build_latents.py --tokenizer runs/tokenizers/vqgan.
A weight without its place is an error; pickles are read without running what is in them."""


@dataclass(frozen=True)
class Convert:
    """What to convert into what."""

    source: Path
    """A taming-transformers `.ckpt`, or a folder: diffusers' VQModel, or with `--to diffusers` smalti's VQ-GAN."""
    description: Path | None = None
    """The `.yaml` that came with the `.ckpt` [default: the same name with that suffix]."""
    to: Literal["smalti", "diffusers"] = "smalti"
    """Whose folder to write."""
    out: Path = TOKENIZERS / "vqgan"
    """Where to write it: a folder that is not there yet."""


def convert(config: Convert) -> None:
    """Converts, and says what was written."""
    if config.out.exists():
        raise UserError(f"{config.out} is there already; remove it, or give another --out")
    if config.to == "diffusers":
        model = VQGAN.load(config.source)
        to_diffusers(model, config.out)
    elif config.source.is_dir():
        model = from_diffusers(config.source)
        model.save(config.out)
    else:
        model = from_taming(config.source, config.description or config.source.with_suffix(".yaml"))
        model.save(config.out)
    size = f"{model.config.height}x{model.config.width}"
    print(f"{config.out}: {size} images to {str(model.layout).replace('×', 'x')}, digest {model.digest()[:12]}")


def main() -> None:
    """The command."""
    cli.run(convert, Convert, about=ABOUT)


if __name__ == "__main__":
    main()
