"""The study of HQA's paper on MNIST: its settings, the tokenizers of Table 3 and Fig. 3, and what is measured of them.

Each tokenizer is trained by `train_tokenizer` and measured once; a study that was stopped resumes. The classifier that
scores reconstructions is in `classifier.py`, the four modes of Fig. 1 in `four_modes.py`, the report in `report.py`.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from tyro.conf import Positional

from smalti.commands.model_paths import RUNS, layer_name
from smalti.commands.train_tokenizer import TrainTokenizer, train_tokenizer
from smalti.core.devices import Precision
from smalti.core.errors import UserError, require_at_least_one
from smalti.core.randomness import Stream, derive, row_seeds
from smalti.images.decoding import to_float
from smalti.images.image_set import ImageSet, open_images
from smalti.latentsets.packed_file import bits_per_image
from smalti.studies.experiment import Trial, count_parameters
from smalti.studies.hqa.classifier import IMAGES_AT_ONCE, ClassifierEvaluator
from smalti.tokenizers.base import Tokenizer
from smalti.tokenizers.hqa.hams import HAMsConfig
from smalti.tokenizers.hqa.hqa import HQA, HQAConfig
from smalti.tokenizers.vq.vqvae import VQVAEConfig
from smalti.training.config import FitConfig

Part: TypeAlias = Literal["modes", "table", "curves"]

GUMBEL: dict[str, Any] = {"posterior": "stochastic", "reset_below": 0.03}
HAMS: dict[str, dict[str, Any]] = {"hams": {}, "hams-gs": GUMBEL, "hams-mse": {"target": "features"}}
HAMS["hams-gs-mse"] = GUMBEL | HAMS["hams-mse"]
PRINCIPAL: dict[str, Any] = {"principal_encoders": True}  # in rows that the paper does not have
HAMS["hams-gs-mse-principal"] = HAMS["hams-gs-mse"] | PRINCIPAL
HQAS: dict[str, dict[str, Any]] = {"hqa": {}, "hqa-principal": PRINCIPAL}
Model: TypeAlias = Literal[
    "vqvae", "hams", "hams-gs", "hams-mse", "hams-gs-mse", "hqa", "hams-gs-mse-principal", "hqa-principal"
]
MODELS: tuple[Model, ...] = get_args(Model)
"""The rows of Table 3, from the top, and two more with PCA encoders."""
CURVES = ("hqa", "hams", "vqvae")
LAYERS = 5
VQVAE_WIDTHS = (32, 48, 64, 64, 64)
"""Widths with which VQ-VAE has a million parameters, as many as the default stack of HQA."""
HAMS_WIDTHS = (32, 16, 24, 32, 64)
"""Widths for a million parameters if decoders predict codes (256 logits each)."""
PRINCIPAL_WIDTHS = (32, 32, 48, 112, 192)
"""Widths for a million parameters if encoders have no weights."""


@dataclass(frozen=True)
class ReproduceHQA:
    """Settings of the study of HQA.

    Raises:
        UserError: if a number is below 1, or there are settings for more or fewer layers than there are.
    """

    study: Positional[Literal["hqa"]]
    """The study of HQA, HAMs and VQ-VAE."""
    images: str = "mnist-train.parquet"
    """MNIST's training images with labels, such as a Parquet file."""
    test_images: str = "mnist-test.parquet"
    """MNIST's test images, which are compressed."""
    parts: tuple[Part, ...] = ("modes", "table", "curves")
    """The parts to run: Fig. 1 (`modes`), Table 3 with Table 4's interpolations (`table`), Fig. 3 (`curves`)."""
    models: tuple[Model, ...] = MODELS
    """The rows of Table 3 to run."""
    seeds: int = 1
    """Seeds of each model in Table 3."""
    steps: int = 1_000
    """Training steps of every layer."""
    layer_steps: tuple[int, ...] = ()
    """Training steps of each of the five layers, from the image upwards, instead of `--steps`. The upper layers are
    cheap, and none can restore what a lower layer has lost."""
    layer_batch_sizes: tuple[int, ...] = ()
    """Batch size of each of the five layers, instead of `--batch-size`."""
    vqvae_steps: int = 0
    """Training steps of VQ-VAE, which trains its whole network in each step. 0 means the sum of all layers' steps."""
    normalize: bool = True
    """Normalize the features that each layer reconstructs to mean 0 and variance 1. The paper does not mention it; the
    authors' code does something similar."""
    upper_latent_weight: float = 0.05
    """Weight of Eq. 4's entropy and commitment terms in the layers above the first, which has HQA's default, 0.001. The
    authors' code has 0.001 in all layers; in the first, whose images it has in [0, 1], that is 0.004 here."""
    batch_size: int = 32
    """Batch size."""
    learning_rate: float = 1e-3
    """Learning rate of AdamW."""
    vqvae_learning_rate: float | None = None
    """Learning rate of VQ-VAE; by default `--learning-rate`."""
    test_num: int = 10_000
    """Most test images to compress."""
    classifier_steps: int = 2_000
    """Training steps of the classifier that evaluates the reconstructions."""
    precision: Precision = "auto"
    """Precision of the networks in training. Measurements use fp32."""
    work: Path = RUNS / "reproductions" / "hqa"
    """The folder for trained models and results."""
    out: Path = Path("docs/reproductions/hqa.md")
    """The Markdown report. Its measured sections are replaced; pictures are written beside it."""

    def __post_init__(self) -> None:
        require_at_least_one(self, "seeds", "steps", "batch_size", "test_num", "classifier_steps")
        for name in ("layer_steps", "layer_batch_sizes"):
            numbers: tuple[int, ...] = getattr(self, name)
            if numbers and (len(numbers) != LAYERS or min(numbers) < 1):
                flag = "--" + name.replace("_", "-")
                raise UserError(f"{flag} must have {LAYERS} numbers of at least 1, not {numbers}")

    @property
    def steps_of_layers(self) -> tuple[int, ...]:
        """The training steps of all layers, from the image upwards."""
        return self.layer_steps or (self.steps,) * LAYERS


@dataclass(frozen=True)
class Data:
    """MNIST at 32x32.

    Attributes:
        train: The images that models and classifier train on.
        test: The test images, `(n, 1, 32, 32)` in [-1, 1].
        labels: The labels of the test images.
    """

    train: ImageSet
    test: Float[Tensor, "n 1 h w"]
    labels: Int64[Tensor, " n"]


def open_data(config: ReproduceHQA) -> Data:
    """Opens the training and the test images.

    Raises:
        UserError: if they do not exist, or have no labels.
    """
    train, test = (open_images(source, channels=1) for source in (config.images, config.test_images))
    if not train.label_names or not test.label_names:
        raise UserError("the images have no labels, which the classifier needs; give MNIST with its labels")
    rows = torch.arange(min(config.test_num, len(test)))
    return Data(train, to_float(test.pixels(rows)), test.labels[rows])


def model_of(kind: str, layers: int, config: ReproduceHQA) -> HQAConfig | VQVAEConfig:
    """Returns the config of a row of Table 3: 256 codes of width 64, at 1 / 2**layers of the image's size."""
    if kind == "vqvae":
        widths = VQVAE_WIDTHS[:layers]
        plain = {"residual_blocks": 1, "revive_below": 0.0, "codebook_decay": 0.99}
        return VQVAEConfig(image_channels=1, widths=widths, codebook_size=256, **plain)
    model = (HQAConfig if kind in HQAS else HAMsConfig)(image_channels=1, **(HQAS | HAMS)[kind])
    widths = PRINCIPAL_WIDTHS if model.principal_encoders else HAMS_WIDTHS if model.target == "codes" else model.widths
    upper = config.upper_latent_weight
    return replace(model, widths=widths[:layers], normalize=config.normalize, upper_latent_weight=upper)


def registered_kind(kind: str) -> str:
    """Returns the registered kind of the tokenizer in a row of Table 3."""
    return "hqa" if kind in HQAS else "hams" if kind in HAMS else kind


def trained(kind: str, config: ReproduceHQA, data: Data, *, seed: int = 0, layers: int | None = None) -> Trial:
    """Returns the trial of a tokenizer, trained (or resumed) if it was not; by default with all layers of the paper."""
    layers = layers or LAYERS
    steps = config.steps_of_layers[:layers]
    variant = "" if layers == LAYERS else f"-{layers}-layers"
    if kind == "vqvae":
        steps = (config.vqvae_steps,) if config.vqvae_steps else steps
    else:
        variant += ("-normalized" if config.normalize else "") + f"-weight{config.upper_latent_weight}"
    counts = "-".join(str(count) for count in (steps if config.layer_steps else (config.steps,)))
    budget = f"{sum(steps)}steps-in-all" if kind == "vqvae" else f"{counts}steps"
    rate = config.vqvae_learning_rate if kind == "vqvae" else None
    folder = config.work / f"{kind}{variant}-{budget}-seed{seed}"
    fit = FitConfig(
        steps=sum(steps),
        batch_size=config.batch_size,
        learning_rate=config.learning_rate if rate is None else rate,
        seed=seed,
        report_steps=sum(steps),
    )
    settings = TrainTokenizer(
        model=model_of(kind, layers, config),
        fit=fit,
        tokenizer=registered_kind(kind),
        images=config.images,
        flips=False,  # mirrored digits are not digits
        layer_steps=() if kind == "vqvae" else steps,
        layer_batch_sizes=() if kind == "vqvae" else config.layer_batch_sizes[:layers],
        precision=config.precision,
        out=folder,
    )
    return Trial(train_tokenizer(settings, data.train))


def evaluator_of(config: ReproduceHQA, data: Data) -> ClassifierEvaluator:
    """Returns the evaluator of reconstructions of the test images."""
    steps = config.classifier_steps
    return ClassifierEvaluator(data.train, data.test, data.labels, steps=steps, folder=config.work)


@torch.no_grad()
def compressed(tokenizer: Tokenizer, images: Float[Tensor, "n 1 h w"], *, sampled: bool) -> Float[Tensor, "n 1 h w"]:
    """Reconstructs images from their codes: sampled at every layer (Algorithm 1), or the most probable."""
    device, decoded = tokenizer.device, []
    for rows in torch.arange(len(images)).split(IMAGES_AT_ONCE):
        batch = images[rows].to(device)
        if isinstance(tokenizer, HQA) and sampled:
            seeds = row_seeds(0, rows).to(device)
            decoded.append(
                tokenizer.decode(
                    tokenizer.encode(batch, seeds=seeds), seeds=derive(seeds, Stream.HQA_STUDY_DECODE)
                ).cpu()
            )
        else:
            decoded.append(tokenizer.decode(tokenizer.encode(batch)).cpu())
    return torch.cat(decoded)


def measured(trial: Trial, evaluator: ClassifierEvaluator, data: Data, *, sampled: bool) -> dict[str, Any]:
    """Measures a tokenizer, or one of its layers, once: rate, parameters, and the scores of its reconstructions."""

    def measure() -> dict[str, Any]:
        tokenizer = trial.tokenizer()
        scores = evaluator.scores(compressed(tokenizer, data.test, sampled=sampled))
        return {"bits": bits_per_image(tokenizer.layout), "parameters": count_parameters(tokenizer), **scores}

    return evaluator.result(trial, f"result-{'sampled' if sampled else 'probable'}", measure)


def is_sampled(kind: str) -> bool:
    """Returns whether the codes of a row of Table 3 are sampled: whether it has a stochastic posterior."""
    return kind in HQAS or HAMS.get(kind, {}).get("posterior") == "stochastic"


def rate_curve(kind: str, config: ReproduceHQA, evaluator: ClassifierEvaluator, data: Data) -> list[dict[str, Any]]:
    """Measures Fig. 3: the codes of each layer of one model; for VQ-VAE, a model for each number of layers."""
    if kind == "vqvae":
        trials = [trained(kind, config, data, layers=layers) for layers in range(1, LAYERS + 1)]
    else:
        top = trained(kind, config, data)
        trials = [*(Trial(top.folder / layer_name(number)) for number in range(1, LAYERS)), top]
    return [measured(trial, evaluator, data, sampled=is_sampled(kind)) for trial in trials]


@torch.no_grad()
def interpolations(
    tokenizer: HQA, a: Float[Tensor, "b 1 h w"], b: Float[Tensor, "b 1 h w"], steps: int
) -> list[Float[Tensor, "b 1 h w"]]:
    """Interpolates between the top layer's z_e of two images, quantizes the points and decodes them (Tables 1, 4)."""
    z_a, z_b = tokenizer.features(a), tokenizer.features(b)
    weights = torch.linspace(0, 1, steps)
    return [tokenizer.decode((tokenizer.quantize(torch.lerp(z_a, z_b, float(weight))),)) for weight in weights]
