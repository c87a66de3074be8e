"""Converts VQ-GAN checkpoints; see `smalti.tokenizers.vqgan.convert`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from smalti import cli
from smalti.commands.model_paths import TOKENIZERS
from smalti.core import locks
from smalti.tokenizers.vqgan.convert import from_diffusers, from_taming, to_diffusers
from smalti.tokenizers.vqgan.vqgan import VQGAN

ABOUT = """Converts VQ-GAN checkpoints from taming-transformers and diffusers, and to diffusers.

$ python scripts/convert.py --source last.ckpt --description model.yaml       # taming-transformers: VQModel, GumbelVQ
$ python scripts/convert.py --source my/vqmodel --out runs/tokenizers/vqgan   # diffusers: a saved VQModel
$ python scripts/convert.py --source runs/tokenizers/vqgan --to diffusers --out my/vqmodel

Every weight must match, or the conversion fails. Pickles are read without running code.

Next step: python scripts/build_latents.py --tokenizer runs/tokenizers/vqgan"""


@dataclass(frozen=True)
class Convert:
    """Settings of `convert`."""

    source: Path
    """A taming-transformers `.ckpt`, or a folder with a diffusers VQModel. With `--to diffusers`, a smalti VQ-GAN."""
    description: Path | None = None
    """The `.yaml` config of the `.ckpt` [default: the same name with the suffix .yaml]."""
    to: Literal["smalti", "diffusers"] = "smalti"
    """Format to write."""
    out: Path = TOKENIZERS / "vqgan"
    """Folder to write; it must not exist yet."""

    @property
    def description_file(self) -> Path:
        """The `.yaml` config, given or by the name of the `.ckpt`."""
        return self.description or self.source.with_suffix(".yaml")


def convert(config: Convert) -> None:
    """Converts a checkpoint and prints a summary.

    Raises:
        UserError: if `out` exists or cannot be written, or the source cannot be converted.
    """
    with locks.claim([config.out], inputs=[config.source, config.description_file]):
        model = _convert(config)
    size = f"{model.config.height}x{model.config.width}"
    print(f"{config.out}: {size} images to {str(model.layout).replace('×', 'x')}, digest {model.digest()[:12]}")


def _convert(config: Convert) -> VQGAN:
    """Writes the converted model and returns it."""
    if config.to == "diffusers":
        model = VQGAN.load(config.source)
        to_diffusers(model, config.out)
    elif config.source.is_dir():
        model = from_diffusers(config.source)
        model.save(config.out)
    else:
        model = from_taming(config.source, config.description_file)
        model.save(config.out)
    return model


def main() -> None:
    """Runs the command line."""
    cli.run(convert, Convert, about=ABOUT)


if __name__ == "__main__":
    main()
