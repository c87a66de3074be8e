"""Presets of `train_tokenizer` and `train_prior`: default settings by name; flags override them.

`small` is for every kind, `small64` for hrvq, vqvae and vqgan, both on two CPU cores. `paperN` is
for the VQ-VAE family and images of N pixels: the code grids of the HR-VQVAE paper, which has no
images of 64 pixels, and the 512 codes of its Fig. 7b; the rest is VQ-VAE-2's (arXiv 1906.00446),
since that paper leaves it open: networks 128 channels wide, 2 residual blocks, codewords of 64,
batches of 128. The learning rate of 3e-4 is that of the example in Sonnet, its authors' library.
Unlike there, residual branches are as wide as their stage, SiLU replaces ReLU, pixel shuffles
replace the decoders' transposed convolutions, and k-means initializes the codebooks. The others are
for `vqgan`: the networks of the published checkpoints, and one for a megapixel. Their learning rate
is 4.5e-6 times the batch size (5e-6 for the megapixel), and their codebooks are not initialized by
k-means, which is slow for so many codes.

The presets of priors are at the end: `small`, and the recipe of SUNDAE on VQ-GAN codes (arXiv
2206.12351) from its authors' published settings.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, TypeVar

from smalti.commands.model_paths import prior_class, trained_config
from smalti.commands.train_prior import PriorPreset, TrainPrior, default_fit
from smalti.commands.train_tokenizer import Preset, TrainTokenizer
from smalti.core import models
from smalti.core.errors import UserError
from smalti.priors.methods.sundae import SundaeConfig
from smalti.priors.networks.hourglass import HourglassConfig
from smalti.tokenizers.vqgan.vqgan import VQGANConfig
from smalti.training.config import FitConfig

C = TypeVar("C", TrainTokenizer[Any], TrainPrior[Any, Any])

VQVAE2_LEVELS = 3  # in the HR-VQVAE paper
LONG: dict[str, Any] = {"codebook_decay": 0.99, "revive_below": 0.01}
"""Codebook learning for hundreds of thousands of steps: the decay of VQ-VAE-2, slower than the defaults."""
DEFAULT_KIND = "hrvq"
DEFAULT_PRIOR = "hourglass"
LIKELIHOOD_FIT = FitConfig(
    steps=4_000, batch_size=32, learning_rate=2e-3, optimizer="adamax", clip_norm=100.0, ema_decay=0.995
)
"""For `vae` and `selfvae`: AdaMax at 2e-3, as for selfVAE's predecessor (arXiv 2006.05218)."""
F16: dict[str, Any] = {
    "widths": (128, 128, 256, 256, 512),
    "residual_blocks": 2,
    "attention_stages": (4,),
    "latent_width": 256,
    "code_width": 256,
}


def small(kind: str) -> TrainTokenizer[Any]:
    """Defaults: 8x8 codes of 32x32 images, for two CPU cores; also the tokenizer of the demonstration.

    `python scripts/train_tokenizer.py` trains it on the embedded portraits. The discriminator of `vqgan` starts
    halfway; it trains by AdamW at the same rate, which is low because a discriminator collapsed at 0.001.
    """
    model = models.class_of_kind("tokenizer", kind).config_class()
    by_layers = FitConfig(steps=2_000, batch_size=32)
    fits = {
        "vqgan": FitConfig(steps=2_000, batch_size=16, learning_rate=3e-4, optimizer="muon", ema_decay=0.99),
        "hqa": by_layers,
        "hams": by_layers,
        "vae": LIKELIHOOD_FIT,
        "selfvae": LIKELIHOOD_FIT,
    }
    config = TrainTokenizer(model=model, tokenizer=kind)
    return replace(config, fit=fits.get(kind, config.fit))


def small64(kind: str) -> TrainTokenizer[Any]:
    """Returns settings for 8x8 codes of 64x64 images, for two CPU cores.

    There are 4096 codes, in `hrvq` and `vqgan` as three digits of 16.

    `python scripts/train_tokenizer.py --preset small64 --images my/photos`. For 16x16 codes leave out the last of the
    widths: `--widths 48 96`, and for `vqgan` `--widths 32 64 96`. docs/reproductions/size64.md has the results.
    """
    tree: dict[str, Any] = {"depth": 3, "branching": 16}
    networks: dict[str, dict[str, Any]] = {
        "hrvq": {"widths": (48, 96, 128), **tree},
        "vqvae": {"widths": (48, 96, 128), "codebook_size": 4096},
        "vqgan": {"widths": (32, 64, 96, 128), "discriminator_width": 32, **tree},
    }
    if kind not in networks:
        raise UserError(f"the preset small64 is for hrvq, vqvae and vqgan, not for {kind}; leave --preset out")
    model = models.class_of_kind("tokenizer", kind).config_class(height=64, width=64, **networks[kind])
    fit = replace(small(kind).fit, steps=2_000 if kind == "vqgan" else 2_500, batch_size=16)
    return TrainTokenizer(model=model, fit=fit, tokenizer=kind, preset="small64")


def paper32(kind: str) -> TrainTokenizer[Any]:
    """Returns settings for 16x16 codes of 32x32 images, as for CIFAR10.

    They also fit MNIST (there 28x28, here enlarged; add `--image-channels 1`).

    For a GPU: `python scripts/train_tokenizer.py --preset paper32 --images cifar10.parquet`. The
    paper's MSE of `hrvq` is 0.00041 on CIFAR10 and 0.00011 on MNIST;
    docs/reproductions/hr-vqvae.md has a study of a smaller network.
    """
    return _paper(kind, size=32, stages=1)


def paper64(kind: str) -> TrainTokenizer[Any]:
    """Returns settings for 16x16 codes of 64x64 images.

    The paper has this grid for 32x32, and no images of 64x64.

    For a GPU: `python scripts/train_tokenizer.py --preset paper64 --images my/photos`.
    """
    return _paper(kind, size=64, stages=2)


def paper128(kind: str) -> TrainTokenizer[Any]:
    """Returns settings for 32x32 codes of 128x128 images, as for ImageNet.

    For a GPU: `python scripts/train_tokenizer.py --preset paper128 --images imagenet --workers 8`.
    The paper's MSE of `hrvq` is 0.00027.
    """
    return _paper(kind, size=128, stages=2)


def paper256(kind: str) -> TrainTokenizer[Any]:
    """Returns settings for 32x32 codes of 256x256 images, as for FFHQ.

    For a GPU: `python scripts/train_tokenizer.py --preset paper256 --images ffhq --workers 8`. The
    paper's MSE of `hrvq` is 0.00163.
    """
    return _paper(kind, size=256, stages=3)


def f16_1024(kind: str) -> TrainTokenizer[Any]:
    """Returns settings for 16x16 codes of 256x256 images from a codebook of 1024, as in VQ-GAN (arXiv 2012.09841).

    Several days on GPUs: `accelerate launch scripts/train_tokenizer.py --tokenizer vqgan
    --preset f16-1024 --images ffhq --workers 8`.
    """
    return _vqgan(kind, "f16-1024", size=256, **F16, branching=1024)


def f16_16384(kind: str) -> TrainTokenizer[Any]:
    """Returns settings for 16x16 codes of 256x256 images from a codebook of 16384, as in VQ-GAN.

    Several days on GPUs: `accelerate launch scripts/train_tokenizer.py --tokenizer vqgan
    --preset f16-16384 --images imagenet --workers 8 --discriminator-start 250001`.
    """
    return _vqgan(kind, "f16-16384", size=256, **F16, branching=16384)


def f8_gumbel_8192(kind: str) -> TrainTokenizer[Any]:
    """Returns settings for 32x32 codes of 256x256 images from a codebook of 8192, by Gumbel-softmax, as in VQ-GAN.

    Several days on GPUs: `accelerate launch scripts/train_tokenizer.py --tokenizer vqgan
    --preset f8-gumbel-8192 --images imagenet --workers 8`.
    """
    return _vqgan(
        kind,
        "f8-gumbel-8192",
        size=256,
        **{**F16, "widths": (128, 128, 256, 512), "attention_stages": (3,)},
        branching=8192,
        quantizer="gumbel",
    )


def f32_megapixel(kind: str) -> TrainTokenizer[Any]:
    """Returns settings for 32x32 codes of 1024x1024 images from a codebook of 8192 (arXiv 2206.12351).

    They are for FFHQ at full size.

    Several days on GPUs: `accelerate launch scripts/train_tokenizer.py --tokenizer vqgan
    --preset f32-megapixel --images ffhq --workers 8 --gradient-checkpointing`. No reconstruction
    score is published. Attention is at 64x64.
    """
    return _vqgan(
        kind,
        "f32-megapixel",
        size=1024,
        batch_size=4,
        base_rate=5e-6,
        **{**F16, "widths": (128, 128, 256, 256, 512, 512), "residual_blocks": 1},
        branching=8192,
        discriminator_start=15_000,
        adversarial_weight=0.5,
    )


PRESETS = {
    "small": small,
    "small64": small64,
    "paper32": paper32,
    "paper64": paper64,
    "paper128": paper128,
    "paper256": paper256,
    "f16-1024": f16_1024,
    "f16-16384": f16_16384,
    "f8-gumbel-8192": f8_gumbel_8192,
    "f32-megapixel": f32_megapixel,
}


def default_config(name: str, kind: str | None, init: str | None = None) -> tuple[Any, TrainTokenizer[Any]]:
    """Returns the config class for a kind of tokenizer, and an instance with the preset's defaults.

    The class is a generic alias of `TrainTokenizer`, not a `type`, hence `Any`.

    Args:
        name: of the preset.
        kind: of the tokenizer; None for that of `init`, or else the default.
        init: a trained tokenizer to start from: the network's defaults are its settings.

    Raises:
        UserError: if there is no such kind, no such preset, no such model, or the preset is not for this kind.
    """
    config = _chosen(PRESETS, name, kind, init, family="tokenizer", default_kind=DEFAULT_KIND)
    return TrainTokenizer[models.class_of_kind("tokenizer", config.tokenizer).config_class], config


def _chosen(
    presets: Mapping[str, Callable[[str], C]],
    name: str,
    kind: str | None,
    init: str | None,
    *,
    family: models.Family,
    default_kind: str,
) -> C:
    """Returns the defaults of a preset; see `default_config`."""
    if name not in presets:
        raise UserError(f"there is no preset {name!r}; presets: {', '.join(presets)}")
    trained = None if init is None else trained_config(init, family)
    kind = kind or (trained.model_class.kind if trained else default_kind)
    config = presets[name](kind)
    return replace(config, model=trained.config) if trained and trained.model_class.kind == kind else config


def _paper(kind: str, *, size: int, stages: int) -> TrainTokenizer[Any]:
    config_class = models.class_of_kind("tokenizer", kind).config_class
    if kind not in ("vqvae", "vqvae2", "hrvq"):
        raise UserError(f"the paper presets are for vqvae, vqvae2 and hrvq, not for {kind}; leave --preset out")
    levels: dict[str, Any] = {"levels": VQVAE2_LEVELS} if kind == "vqvae2" else {}
    model = config_class(height=size, width=size, widths=(128,) * stages, **levels, **LONG)
    fit = FitConfig(steps=250_000, batch_size=128, learning_rate=3e-4, report_steps=5_000, save_steps=2_000)
    name: Preset = f"paper{size}"  # pyright: ignore[reportAssignmentType] - one of the literals
    return TrainTokenizer(model=model, fit=fit, tokenizer=kind, preset=name)


def _vqgan(
    kind: str, name: Preset, *, size: int, batch_size: int = 12, base_rate: float = 4.5e-6, **model: Any
) -> TrainTokenizer[Any]:
    if kind != "vqgan":
        raise UserError(
            f"the preset {name} is for vqgan, not for {kind}; leave --preset out, or give --tokenizer vqgan"
        )
    fit = FitConfig(
        steps=500_000,
        batch_size=batch_size,
        learning_rate=base_rate * batch_size,
        decay_fraction=0.0,
        ema_decay=0.999,
        report_steps=5_000,
        save_steps=2_000,
    )
    model = {"discriminator_start": 10_000, "discriminator_ramp": 0, **model}
    network = VQGANConfig(height=size, width=size, codebook_init="uniform", **LONG, **model)
    return TrainTokenizer(model=network, fit=fit, tokenizer=kind, preset=name)


def small_prior(kind: str) -> TrainPrior[Any, Any]:
    """Defaults: minutes on two CPU cores; also the prior of the demonstration."""
    prior = prior_class(kind)
    objective = prior.method.objective_config()
    return TrainPrior(model=prior.config_class(), objective=objective, fit=default_fit(kind), prior=kind)


def ffhq256(kind: str) -> TrainPrior[Any, Any]:
    """Returns settings of an hourglass of 187 million parameters for FFHQ at 256x256, on 16x16 codes of `f16-1024`.

    For a GPU: `accelerate launch scripts/train_prior.py --preset ffhq256 --latents ffhq256.h5`.
    """
    return _sundae(kind, "ffhq256", middle=10, unrolled_steps=2, batch_size=64, learning_rate=3e-5)


def ffhq1024(kind: str) -> TrainPrior[Any, Any]:
    """Returns settings of an hourglass of 227 million parameters for FFHQ at 1024x1024, on codes of `f32-megapixel`.

    For a GPU: `accelerate launch scripts/train_prior.py --preset ffhq1024 --latents ffhq1024.h5`.
    """
    return _sundae(kind, "ffhq1024", middle=12, unrolled_steps=3, batch_size=10, learning_rate=5e-6)


PRIOR_PRESETS = {"small": small_prior, "ffhq256": ffhq256, "ffhq1024": ffhq1024}


def default_prior_config(name: str, kind: str | None, init: str | None = None) -> tuple[Any, TrainPrior[Any, Any]]:
    """Returns the config class for a kind of prior, and an instance with the preset's defaults.

    The class is a generic alias of `TrainPrior`, not a `type`, hence `Any`.

    Args:
        name: of the preset.
        kind: of the prior; None for that of `init`, or else the default.
        init: a trained prior to start from: the network's defaults are its settings.

    Raises:
        UserError: if there is no such kind, no such preset, no such model, or the preset is not for this kind.
    """
    config = _chosen(PRIOR_PRESETS, name, kind, init, family="prior", default_kind=DEFAULT_PRIOR)
    prior = prior_class(config.prior)
    return TrainPrior[prior.config_class, prior.method.objective_config], config


def _sundae(
    kind: str, name: PriorPreset, *, middle: int, unrolled_steps: int, batch_size: int, learning_rate: float
) -> TrainPrior[Any, Any]:
    """Returns the authors' settings: a constant learning rate, AdamW, and neither warm-up, EMA nor gradient clipping.

    The network is smalti's: see the deviations of `Hourglass`. A head has 128 channels here and 64 there, and AdamW's
    second beta is 0.95 here. The number of steps is open: the authors name only days.
    """
    if kind != "hourglass":
        raise UserError(f"the preset {name} is for hourglass, not for {kind}; leave --preset or --prior out")
    fit = FitConfig(
        steps=500_000,
        batch_size=batch_size,
        learning_rate=learning_rate,
        optimizer="adamw",
        weight_decay=0.01,  # the default of torch's AdamW
        warmup_steps=0,
        decay_fraction=0.0,
        clip_norm=0.0,
        report_steps=5_000,
        save_steps=2_000,
    )
    model = HourglassConfig(
        model_width=1024, heads=8, depth=(2, middle, 2), shorten=(2,), absolute_positions=False, qk_norm=False
    )
    objective = SundaeConfig(unrolled_steps=unrolled_steps)
    return TrainPrior(model=model, objective=objective, fit=fit, prior=kind, preset=name)
