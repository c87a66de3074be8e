"""Settings to start `train_tokenizer` from, by image size: the HR-VQVAE paper's grids of codes. Flags override them.

Each is for the kinds of the VQ family. What the paper does not give is VQ-VAE-2's (arXiv 1906.00446): networks 128
channels wide, 2 residual blocks, codewords of 64, 512 codes, batches of 128 at a rate of 3e-4.
"""

from typing import Any

from smalti import registry
from smalti.errors import UserError
from smalti.fit_config import FitConfig
from smalti.pipeline.train_tokenizer import Preset, TrainTokenizer
from smalti.tokenizers.vqvae import VQConfig

LEVELS = 3  # of VQ-VAE-2, in the HR-VQVAE paper


def small(kind: str) -> TrainTokenizer[Any]:
    """The defaults: 8x8 codes of 32x32 images.

    `python scripts/train_tokenizer.py`: the embedded emoji on two CPU cores, 2000 steps in some minutes. The
    demonstration's tokenizer, whose report states its held-out MSE.
    """
    return TrainTokenizer(model=registry.find("tokenizer", kind).config_class(), tokenizer=kind)


def paper32(kind: str) -> TrainTokenizer[Any]:
    """16x16 codes of 32x32 images, as for CIFAR10 and MNIST (28x28, enlarged; add `--image-channels 1`).

    `python scripts/train_tokenizer.py --preset paper32 --images cifar10.parquet`: for a GPU; a smaller network's study
    on two CPU cores is in docs/reproductions/hr-vqvae.md. The paper's held-out MSE of `hrvq`: 0.00041 on CIFAR10,
    0.00011 on MNIST.
    """
    return _paper(kind, size=32, stages=1)


def paper64(kind: str) -> TrainTokenizer[Any]:
    """16x16 codes of 64x64 images, which the paper does not have: between its grids for 32 and for 128.

    `python scripts/train_tokenizer.py --preset paper64 --images my/photos`: for a GPU. No result to compare with.
    """
    return _paper(kind, size=64, stages=2)


def paper128(kind: str) -> TrainTokenizer[Any]:
    """32x32 codes of 128x128 images, as for ImageNet.

    `python scripts/train_tokenizer.py --preset paper128 --images imagenet --workers 8`: for a GPU. The paper's held-out
    MSE of `hrvq`: 0.00027.
    """
    return _paper(kind, size=128, stages=2)


def paper256(kind: str) -> TrainTokenizer[Any]:
    """32x32 codes of 256x256 images, as for FFHQ.

    `python scripts/train_tokenizer.py --preset paper256 --images ffhq --workers 8`: for a GPU. The paper's held-out MSE
    of `hrvq`: 0.00163.
    """
    return _paper(kind, size=256, stages=3)


PRESETS = {"small": small, "paper32": paper32, "paper64": paper64, "paper128": paper128, "paper256": paper256}


def default_config(name: str, kind: str) -> tuple[Any, TrainTokenizer[Any]]:
    """For the command line: `TrainTokenizer` of a kind's network, an alias and no `type`, and its preset of that name.

    Raises:
        UserError: if there is no such kind, no preset of that name, or it is not for this kind.
    """
    if name not in PRESETS:
        raise UserError(f"there is no preset {name!r}; presets: {', '.join(PRESETS)}")
    return TrainTokenizer[registry.find("tokenizer", kind).config_class], PRESETS[name](kind)


def _paper(kind: str, *, size: int, stages: int) -> TrainTokenizer[Any]:
    config_class = registry.find("tokenizer", kind).config_class
    if not issubclass(config_class, VQConfig):
        raise UserError(f"the paper presets are for vqvae, vqvae2 and hrvq, not for {kind}; leave --preset out")
    levels: dict[str, Any] = {"levels": LEVELS} if kind == "vqvae2" else {}
    model = config_class(height=size, width=size, widths=(128,) * stages, **levels)
    fit = FitConfig(steps=250_000, batch_size=128, learning_rate=3e-4, report_steps=5_000, save_steps=2_000)
    name: Preset = f"paper{size}"  # pyright: ignore[reportAssignmentType] - one of its words
    return TrainTokenizer(model=model, fit=fit, tokenizer=kind, preset=name)
