"""smalti: image tokenizers, stored latent sets and discrete priors.

What one imports to work with them from Python; the rest is in the modules. Everything here is imported on first use:
`import smalti` itself loads nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from smalti.checkpoint import load
    from smalti.codes import Codes, Layout, Level
    from smalti.errors import UserError
    from smalti.images import open_images
    from smalti.latentsets.reader import LatentSet
    from smalti.priors.ancestral import AncestralSampling, sample_ancestral
    from smalti.priors.hourglass import Hourglass, HourglassConfig
    from smalti.priors.pixelcnn import PixelCNN, PixelCNNConfig
    from smalti.priors.samplers import SundaeSampling, sample_sundae
    from smalti.tokenizers.hrvq import HRVQ, HRVQConfig
    from smalti.tokenizers.linked import LinkedQuantizer
    from smalti.tokenizers.vqgan import VQGAN, VQGANConfig
    from smalti.tokenizers.vqvae import VQVAE, VQVAEConfig
    from smalti.tokenizers.vqvae2 import VQVAE2, VQVAE2Config

__all__ = [
    "HRVQ",
    "VQGAN",
    "VQVAE",
    "VQVAE2",
    "AncestralSampling",
    "Codes",
    "HRVQConfig",
    "Hourglass",
    "HourglassConfig",
    "LatentSet",
    "Layout",
    "Level",
    "LinkedQuantizer",
    "PixelCNN",
    "PixelCNNConfig",
    "SundaeSampling",
    "UserError",
    "VQGANConfig",
    "VQVAE2Config",
    "VQVAEConfig",
    "load",
    "open_images",
    "sample_ancestral",
    "sample_sundae",
]

_MODULES = {
    "checkpoint": ("load",),
    "codes": ("Codes", "Layout", "Level"),
    "errors": ("UserError",),
    "images": ("open_images",),
    "latentsets.reader": ("LatentSet",),
    "priors.ancestral": ("AncestralSampling", "sample_ancestral"),
    "priors.hourglass": ("Hourglass", "HourglassConfig"),
    "priors.pixelcnn": ("PixelCNN", "PixelCNNConfig"),
    "priors.samplers": ("SundaeSampling", "sample_sundae"),
    "tokenizers.hrvq": ("HRVQ", "HRVQConfig"),
    "tokenizers.linked": ("LinkedQuantizer",),
    "tokenizers.vqgan": ("VQGAN", "VQGANConfig"),
    "tokenizers.vqvae": ("VQVAE", "VQVAEConfig"),
    "tokenizers.vqvae2": ("VQVAE2", "VQVAE2Config"),
}


def __getattr__(name: str) -> Any:
    for module, names in _MODULES.items():
        if name in names:
            value = globals()[name] = getattr(import_module(f"smalti.{module}"), name)
            return value
    raise AttributeError(f"module 'smalti' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
