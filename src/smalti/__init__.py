"""smalti: image tokenizers, stored latent sets and discrete priors.

    from smalti import load_prior, sample

    images = sample(load_prior("portraits"), num=16)  # the prior in the package: uint8, (16, 3, 32, 32)

Everything exported here is imported on first use: `import smalti` itself loads nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from smalti.api import inpaint, load_prior, load_tokenizer, sample
    from smalti.commands.inpainting import Filling
    from smalti.core.codes import Codes, Layout, Level
    from smalti.core.errors import UserError
    from smalti.images.image_set import open_images
    from smalti.latentsets.reader import LatentSet
    from smalti.priors.base import Prior
    from smalti.priors.methods.autoregressive import AncestralFilling, AncestralSampling, sample_ancestral
    from smalti.priors.methods.masked import MaskedFilling, MaskedSampling, sample_masked
    from smalti.priors.methods.sundae import SundaeSampling, sample_sundae
    from smalti.priors.networks.hourglass import Hourglass, HourglassConfig
    from smalti.priors.networks.maskgit import MaskGIT
    from smalti.priors.networks.pixelcnn import PixelCNN, PixelCNNConfig
    from smalti.priors.networks.transformer import Transformer, TransformerConfig
    from smalti.tokenizers.base import Tokenizer, TokenizerOutput
    from smalti.tokenizers.quantizers.linked import LinkedQuantizer
    from smalti.tokenizers.vq.hrvq import HRVQ, HRVQConfig
    from smalti.tokenizers.vq.vqvae import VQVAE, VQVAEConfig
    from smalti.tokenizers.vq.vqvae2 import VQVAE2, VQVAE2Config
    from smalti.tokenizers.vqgan.vqgan import VQGAN, VQGANConfig

__all__ = [
    "HRVQ",
    "VQGAN",
    "VQVAE",
    "VQVAE2",
    "AncestralFilling",
    "AncestralSampling",
    "Codes",
    "Filling",
    "HRVQConfig",
    "Hourglass",
    "HourglassConfig",
    "LatentSet",
    "Layout",
    "Level",
    "LinkedQuantizer",
    "MaskGIT",
    "MaskedFilling",
    "MaskedSampling",
    "PixelCNN",
    "PixelCNNConfig",
    "Prior",
    "SundaeSampling",
    "Tokenizer",
    "TokenizerOutput",
    "Transformer",
    "TransformerConfig",
    "UserError",
    "VQGANConfig",
    "VQVAE2Config",
    "VQVAEConfig",
    "inpaint",
    "load_prior",
    "load_tokenizer",
    "open_images",
    "sample",
    "sample_ancestral",
    "sample_masked",
    "sample_sundae",
]

_MODULES = {
    "api": ("inpaint", "load_prior", "load_tokenizer", "sample"),
    "commands.inpainting": ("Filling",),
    "core.codes": ("Codes", "Layout", "Level"),
    "core.errors": ("UserError",),
    "images.image_set": ("open_images",),
    "latentsets.reader": ("LatentSet",),
    "priors.base": ("Prior",),
    "priors.methods.autoregressive": ("AncestralFilling", "AncestralSampling", "sample_ancestral"),
    "priors.methods.masked": ("MaskedFilling", "MaskedSampling", "sample_masked"),
    "priors.methods.sundae": ("SundaeSampling", "sample_sundae"),
    "priors.networks.hourglass": ("Hourglass", "HourglassConfig"),
    "priors.networks.maskgit": ("MaskGIT",),
    "priors.networks.pixelcnn": ("PixelCNN", "PixelCNNConfig"),
    "priors.networks.transformer": ("Transformer", "TransformerConfig"),
    "tokenizers.base": ("Tokenizer", "TokenizerOutput"),
    "tokenizers.quantizers.linked": ("LinkedQuantizer",),
    "tokenizers.vq.hrvq": ("HRVQ", "HRVQConfig"),
    "tokenizers.vq.vqvae": ("VQVAE", "VQVAEConfig"),
    "tokenizers.vq.vqvae2": ("VQVAE2", "VQVAE2Config"),
    "tokenizers.vqgan.vqgan": ("VQGAN", "VQGANConfig"),
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version  # not at the top: `import smalti` loads nothing

        return version("smalti")
    for module, names in _MODULES.items():
        if name in names:
            value = globals()[name] = getattr(import_module(f"smalti.{module}"), name)
            return value
    raise AttributeError(f"module 'smalti' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
