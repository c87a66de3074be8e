"""HQA's studies, trained anew: the four modes of Fig. 1, and MNIST's ablation and rate curves (Table 3, Fig. 3).

A run is trained by `train_tokenizer` and measured once; both are kept, so a study that is stopped goes on. What is
written of it is in `reproduce_hqa_report.py`; the four modes are in `four_modes.py`.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor, nn
from tyro.conf import Positional

from smalti.commands.model_paths import RUNS, layer_name, load_tokenizer
from smalti.commands.train_tokenizer import TrainTokenizer, train_tokenizer
from smalti.core.devices import Precision, best_device
from smalti.core.errors import UserError, require_at_least_one
from smalti.core.files import write_json
from smalti.core.randomness import Stream, derive, generator_for, row_seeds
from smalti.images.decoding import to_float
from smalti.images.image_set import ImageRows, ImageSet, open_images
from smalti.latentsets.packed_file import bits_per_image
from smalti.metrics.frechet import Moments, frechet_distance
from smalti.metrics.image_errors import mse
from smalti.tokenizers.base import Tokenizer
from smalti.tokenizers.hqa.hams import HAMsConfig
from smalti.tokenizers.hqa.hqa import HQA, HQAConfig
from smalti.tokenizers.vq.vqvae import VQVAEConfig
from smalti.training.config import FitConfig

Part: TypeAlias = Literal["modes", "table", "curves"]

GUMBEL: dict[str, Any] = {"posterior": "stochastic", "reset_below": 0.03}
HAMS: dict[str, dict[str, Any]] = {"hams": {}, "hams-gs": GUMBEL, "hams-mse": {"target": "features"}}
HAMS["hams-gs-mse"] = GUMBEL | HAMS["hams-mse"]
PRINCIPAL: dict[str, Any] = {"principal_encoders": True}  # in rows that the paper has not
HAMS["hams-gs-mse-principal"] = HAMS["hams-gs-mse"] | PRINCIPAL
HQAS: dict[str, dict[str, Any]] = {"hqa": {}, "hqa-principal": PRINCIPAL}
Model: TypeAlias = Literal[
    "vqvae", "hams", "hams-gs", "hams-mse", "hams-gs-mse", "hqa", "hams-gs-mse-principal", "hqa-principal"
]
MODELS: tuple[Model, ...] = get_args(Model)
"""Table 3's rows, from the top, and two with principal encoders."""
CURVES = ("hqa", "hams", "vqvae")
LAYERS = 5
VQVAE_WIDTHS = (32, 48, 64, 64, 64)  # with which it has a million parameters, as the default stack
HAMS_WIDTHS = (32, 16, 24, 32, 64)  # likewise, where decoders predict codes, each with 256 numbers
PRINCIPAL_WIDTHS = (32, 32, 48, 112, 192)  # likewise, where encoders have no weights
CLASSIFIER_FEATURES = 128
_AT_ONCE = 250


@dataclass(frozen=True)
class ReproduceHQA:
    """What to reproduce of HQA's paper, and at which budget.

    Raises:
        UserError: for a number below 1, or steps of more or fewer layers than there are.
    """

    study: Positional[Literal["hqa"]]
    """Whose numbers: the study of HQA, HAMs and VQ-VAE."""
    images: str = "mnist-train.parquet"
    """MNIST's training images, with their labels: a Parquet file, say."""
    test_images: str = "mnist-test.parquet"
    """Its test images, which are compressed."""
    parts: tuple[Part, ...] = ("modes", "table", "curves")
    """Fig. 1; Table 3, with Table 4's interpolations; Fig. 3."""
    models: tuple[Model, ...] = MODELS
    """The rows of Table 3 that are run."""
    seeds: int = 1
    """Runs of each model in Table 3."""
    steps: int = 1_000
    """Optimiser steps of every layer."""
    layer_steps: tuple[int, ...] = ()
    """Steps of each of the five layers, from the image upwards, in place of `--steps`: the upper ones are cheap, and
    what a layer loses none above it brings back."""
    layer_batch_sizes: tuple[int, ...] = ()
    """Images a step of each of the five layers, in place of `--batch-size`."""
    vqvae_steps: int = 0
    """Steps of VQ-VAE, each of which is of a whole network; 0 is as many as the layers have together."""
    normalize: bool = True
    """Bring the features that a layer reconstructs to mean 0 and variance 1, as the authors' code does something like;
    the paper is silent."""
    upper_latent_weight: float = 0.05
    """Weight of Eq. 4's other terms in the layers above the first, whose reconstructions are that much less exact; the
    first has HQA's default, 0.001, which the authors' code has in all."""
    batch_size: int = 32
    """Images a step."""
    learning_rate: float = 1e-3
    """AdamW's."""
    vqvae_learning_rate: float | None = None
    """That of VQ-VAE; the same unless given."""
    test_num: int = 10_000
    """How many test images are compressed, at most."""
    classifier_steps: int = 2_000
    """Steps of the classifier that judges the reconstructions."""
    precision: Precision = "auto"
    """Arithmetic of the networks in training; what is measured is in fp32."""
    work: Path = RUNS / "reproductions" / "hqa"
    """Where runs are kept."""
    out: Path = Path("docs/reproductions/hqa.md")
    """The Markdown file whose measured parts are replaced, with its pictures beside it."""

    def __post_init__(self) -> None:
        require_at_least_one(self, "seeds", "steps", "batch_size", "test_num", "classifier_steps")
        for name in ("layer_steps", "layer_batch_sizes"):
            numbers: tuple[int, ...] = getattr(self, name)
            if numbers and (len(numbers) != LAYERS or min(numbers) < 1):
                flag = "--" + name.replace("_", "-")
                raise UserError(f"{flag} must have {LAYERS} numbers of at least 1, not {numbers}")

    @property
    def steps_of_layers(self) -> tuple[int, ...]:
        """Of all layers, from the image upwards."""
        return self.layer_steps or (self.steps,) * LAYERS


@dataclass(frozen=True)
class Data:
    """MNIST at 32x32.

    Attributes:
        train: what models and classifier train on.
        test: `(n, 1, 32, 32)` in [-1, 1].
        labels: of the test images.
    """

    train: ImageSet
    test: Float[Tensor, "n 1 h w"]
    labels: Int64[Tensor, " n"]


def open_data(config: ReproduceHQA) -> Data:
    """Opens both sets.

    Raises:
        UserError: if they are not there, or have no labels.
    """
    train, test = (open_images(source, channels=1) for source in (config.images, config.test_images))
    if not train.label_names or not test.label_names:
        raise UserError("the images have no labels, which the classifier needs; give MNIST with its labels")
    rows = torch.arange(min(config.test_num, len(test)))
    return Data(train, to_float(test.pixels(rows)), test.labels[rows])


def model_of(kind: str, layers: int, config: ReproduceHQA) -> HQAConfig | VQVAEConfig:
    """Of a row of Table 3: 256 codes of width 64, at 1 / 2**layers of the image's size."""
    if kind == "vqvae":
        widths = VQVAE_WIDTHS[:layers]
        plain = {"residual_blocks": 1, "revive_below": 0.0, "codebook_decay": 0.99}
        return VQVAEConfig(image_channels=1, widths=widths, codebook_size=256, **plain)
    made = (HQAConfig if kind in HQAS else HAMsConfig)(image_channels=1, **(HQAS | HAMS)[kind])
    widths = PRINCIPAL_WIDTHS if made.principal_encoders else HAMS_WIDTHS if made.target == "codes" else made.widths
    upper = config.upper_latent_weight
    return replace(made, widths=widths[:layers], normalize=config.normalize, upper_latent_weight=upper)


def registered(kind: str) -> str:
    """The kind of tokenizer of a row of Table 3."""
    return "hqa" if kind in HQAS else "hams" if kind in HAMS else kind


def trained(kind: str, config: ReproduceHQA, data: Data, *, seed: int = 0, layers: int | None = None) -> Path:
    """The folder of a run, trained as far as it was not yet; of as many layers as the paper's unless said."""
    layers = layers or LAYERS
    steps = config.steps_of_layers[:layers]
    of_layers = "" if layers == LAYERS else f"-{layers}-layers"
    if kind == "vqvae":
        steps = (config.vqvae_steps,) if config.vqvae_steps else steps
    else:
        of_layers += ("-normalized" if config.normalize else "") + f"-weight{config.upper_latent_weight}"
    counts = "-".join(str(count) for count in (steps if config.layer_steps or len(steps) == 1 else (config.steps,)))
    rate = config.vqvae_learning_rate if kind == "vqvae" else None
    folder = config.work / f"{kind}{of_layers}-{counts}steps-seed{seed}"
    in_all = sum(steps)
    fit = FitConfig(
        steps=in_all,
        batch_size=config.batch_size,
        learning_rate=config.learning_rate if rate is None else rate,
        seed=seed,
        report_steps=in_all,
    )
    settings = TrainTokenizer(
        model=model_of(kind, layers, config),
        fit=fit,
        tokenizer=registered(kind),
        images=config.images,
        flips=False,  # mirrored digits are no digits
        layer_steps=() if kind == "vqvae" else steps,
        layer_batch_sizes=() if kind == "vqvae" else config.layer_batch_sizes[:layers],
        precision=config.precision,
        out=folder,
    )
    return train_tokenizer(settings, data.train)


class Classifier(nn.Module):
    """A small convolutional network for digits; its features are what Fréchet distances are taken of.

    Args:
        classes: what it tells apart.
        steps: it is trained for, which say whose verdict a kept result is.
    """

    def __init__(self, classes: int, steps: int) -> None:
        super().__init__()
        self.steps = steps
        stages = [
            layer
            for before, after in ((1, 16), (16, 32), (32, 64))
            for layer in (nn.Conv2d(before, after, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2))
        ]
        self.body = nn.Sequential(*stages, nn.Flatten(), nn.Linear(64 * 16, CLASSIFIER_FEATURES), nn.ReLU())
        self.head = nn.Linear(CLASSIFIER_FEATURES, classes)

    def forward(self, images: Float[Tensor, "b 1 32 32"]) -> Float[Tensor, "b k"]:
        """Logits."""
        return self.head(self.body(images))


def classifier(config: ReproduceHQA, data: Data) -> Classifier:
    """Trained on real digits, once."""
    path = config.work / f"classifier-{config.classifier_steps}steps.pt"
    torch.manual_seed(0)
    made = Classifier(len(data.train.label_names), config.classifier_steps).to(best_device())
    if path.exists():
        made.load_state_dict(torch.load(path, map_location=best_device(), weights_only=True))
        return made.eval()
    rows = ImageRows(data.train, split="all", flips=False)
    order = torch.randint(len(rows), (config.classifier_steps, 64), generator=generator_for(0))
    optimizer = torch.optim.AdamW(made.parameters(), lr=1e-3)
    for chosen in order:
        batch = rows.__getitems__(chosen.tolist())
        loss = F.cross_entropy(made(to_float(batch["images"]).to(best_device())), batch["labels"].to(best_device()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    config.work.mkdir(parents=True, exist_ok=True)
    torch.save(made.state_dict(), path)
    return made.eval()


@torch.no_grad()
def compressed(tokenizer: Tokenizer, images: Float[Tensor, "n 1 h w"], *, sampled: bool) -> Float[Tensor, "n 1 h w"]:
    """What images come back as; sampled through and through (Algorithm 1), or the most probable."""
    device, decoded = next(tokenizer.parameters()).device, []
    for rows in torch.arange(len(images)).split(_AT_ONCE):
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


def measured(folder: Path, judge: Classifier, data: Data, *, sampled: bool) -> dict[str, Any]:
    """Rate, distortion, Fréchet distance and classification error of a run, or of one of its layers; kept there."""
    of = f"{'sampled' if sampled else 'probable'}-{len(data.test)}images-{judge.steps}steps"
    path = folder / f"result-{of}.json"
    if path.exists():
        return json.loads(path.read_text())
    tokenizer = load_tokenizer(str(folder)).to(best_device())
    found = {
        "bits": bits_per_image(tokenizer.layout),
        "parameters": sum(parameter.numel() for parameter in tokenizer.parameters()),
        **judged(compressed(tokenizer, data.test, sampled=sampled), judge, data),
    }
    write_json(path, found)
    return found


@torch.no_grad()
def judged(images: Float[Tensor, "n 1 h w"], judge: Classifier, data: Data) -> dict[str, float]:
    """Of what the test images came back as: MSE in [0, 1] units, Fréchet distance of the classifier's features, and its
    errors as a share."""
    of_real, of_made, wrong = Moments(CLASSIFIER_FEATURES), Moments(CLASSIFIER_FEATURES), 0
    for rows in torch.arange(len(images)).split(_AT_ONCE):
        made = judge.body(images[rows].to(best_device()))
        of_made.update(made)
        of_real.update(judge.body(data.test[rows].to(best_device())))
        wrong += int((judge.head(made).argmax(1).cpu() != data.labels[rows]).sum())
    return {
        "mse": float(mse(images, data.test).mean()),
        "frechet": frechet_distance(of_real, of_made),
        "error": wrong / len(images),
    }


def sampled_in(kind: str) -> bool:
    """Whether a model of Table 3 has a posterior to sample from."""
    return kind in HQAS or HAMS.get(kind, {}).get("posterior") == "stochastic"


def rate_curve(kind: str, config: ReproduceHQA, judge: Classifier, data: Data) -> list[dict[str, Any]]:
    """Fig. 3: what is measured of the codes of each layer; of VQ-VAE, of a model trained for each."""
    if kind == "vqvae":
        folders: Sequence[Path] = [trained(kind, config, data, layers=layers) for layers in range(1, LAYERS + 1)]
    else:
        top = trained(kind, config, data)
        folders = [*(top / layer_name(number) for number in range(1, LAYERS)), top]
    return [measured(folder, judge, data, sampled=sampled_in(kind)) for folder in folders]


@torch.no_grad()
def interpolations(
    tokenizer: HQA, a: Float[Tensor, "b 1 h w"], b: Float[Tensor, "b 1 h w"], steps: int
) -> list[Float[Tensor, "b 1 h w"]]:
    """Decodes of points evenly between the top layer's z_e of two images, quantized (Tables 1 and 4)."""
    of_a, of_b = tokenizer.features(a), tokenizer.features(b)
    places = torch.linspace(0, 1, steps)
    return [tokenizer.decode((tokenizer.quantize(torch.lerp(of_a, of_b, float(place))),)) for place in places]
