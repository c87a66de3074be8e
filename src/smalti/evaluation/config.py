"""Settings of the evaluations, one class per kind, and the protocol that most of them share.

Each evaluation is in the file named for it; `report.py` runs one and writes its result.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, Literal, TypeAlias, TypeVar

from smalti.commands.inpainting import Filling
from smalti.core.config import added
from smalti.core.devices import Device, Precision
from smalti.core.errors import UserError, require_at_least_one
from smalti.images.reading import Reading
from smalti.metrics.extractors import ExtractorName
from smalti.tokenizers.selfvae.hierarchical_vae import Pixels
from smalti.tokenizers.vqgan.perceptual import PerceptualName

S = TypeVar("S")

EvaluationKind: TypeAlias = Literal["tokenizer", "prior", "inpainting", "likelihood", "modes", "images"]
"""Names of the classes below, one each; the type of `of` in all of them, so that `--help` lists the other kinds."""


@dataclass(frozen=True)
class EvaluationSettings:
    """The evaluation protocol: which real images the model is compared with, how many, and by which features.

    Raises:
        UserError: if there are too few images for a Fréchet distance.
    """

    images: str | None = None
    """Real images: `portraits`, `emoji`, a folder, or any other source that `train-tokenizer` reads [default: those
    that the model was trained on]. The split is that of training: the model is compared with held-out images, and
    training images are the reference set."""
    reading: Reading = added(Reading())
    num: int = 1000
    """Number of held-out images; all of them if there are fewer. Fréchet distances depend on it, so compare only
    results with the same number."""
    reference: int = 5000
    """Largest number of training images in the reference set of Fréchet distances and nearest neighbours."""
    extractor: ExtractorName = "lite0"
    """Network whose features distances are computed on: `lite0`, included in the extra `metrics`, or `inception`, the
    network of the published FID, which needs torch-fidelity and downloads its weights."""
    seed: int = 0
    """Seed of the choice of images, of the masks and of all sampling."""
    device: Device = "auto"
    """Device to compute on."""
    precision: Precision = "auto"
    """Precision of the models. Features are always computed in fp32."""

    def __post_init__(self) -> None:
        if self.num < 4 or self.reference < 4:
            raise UserError(f"--num and --reference must be at least 4, not {self.num} and {self.reference}")


@dataclass(frozen=True)
class ImagesEvaluation:
    """Settings to compare a set of images with another one, or with its published statistics, without any model."""

    images: str
    """Images to score: a folder, a `.npz` file of samples (`arr_0`), or any other source that `train-tokenizer` reads.
    All of them are scored; the flags of reading apply to both sets."""
    reference: str
    """Real images to compare with, of the same size: a source as --images; or a `.npz` file with the statistics `mu`
    and `sigma` of the extractor's features, and perhaps with images (`arr_0`) for the scores that need them."""
    of: EvaluationKind = "images"
    """Kind of evaluation: `tokenizer`, `prior`, `inpainting`, `likelihood`, `modes` or `images`."""
    reading: Reading = field(default_factory=Reading)
    height: int | None = None
    """Height that all images are fitted to, in pixels [default: theirs, if all have the same size]."""
    width: int | None = None
    """Width that all images are fitted to, in pixels [default: theirs]."""
    extractor: ExtractorName = "lite0"
    """Network whose features are compared: `lite0`, included in the extra `metrics`, or `inception`, the network of the
    published FID, which needs torch-fidelity and downloads its weights."""
    seed: int = 0
    """Seed of the order of the images, on which the Inception score depends."""
    device: Device = "auto"
    """Device to compute on, in fp32."""
    out: Path | None = None
    """JSON file for the scores and all settings needed to repeat the evaluation [default:
    runs/evaluations/images-NAME.json, with the name of --images; numbered if another result is there]."""

    def __post_init__(self) -> None:
        if (self.height is None) != (self.width is None):
            raise UserError("give both --height and --width, or neither")
        if self.reading.held_out is not None:
            raise UserError("all images are scored; leave --held-out out")


@dataclass(frozen=True)
class TokenizerEvaluation:
    """Settings to evaluate a tokenizer by its reconstructions of held-out images."""

    of: EvaluationKind = "tokenizer"
    """Kind of evaluation: `tokenizer`, `prior`, `inpainting`, `likelihood`, `modes` or `images`."""
    tokenizer: str = "hrvq"
    """A trained tokenizer: a kind (the one in runs/tokenizers/KIND), a folder, or a hub id."""
    protocol: EvaluationSettings = field(default_factory=EvaluationSettings)
    perceptual: PerceptualName | None = added(None)
    """Also score the mean perceptual distance of the reconstructions: `lpips-vgg`, the published LPIPS on VGG-16, which
    needs the extra `lpips` and downloads VGG's weights, or `lite0`, which compares with no published number."""
    samples_npz: Path | None = added(None)
    """Also write the reconstructions to this `.npz` file, uint8 (n, height, width, 3) in `arr_0`, which published
    evaluators and --of images read."""
    out: Path | None = None
    """JSON file for the scores and all settings needed to repeat the evaluation [default:
    runs/evaluations/tokenizer-NAME.json, with the name of the tokenizer's folder; numbered if another result is
    there]."""


@dataclass(frozen=True)
class PriorEvaluation(Generic[S]):
    """Settings to evaluate a prior by its samples."""

    sampling: S
    """Sampler settings, for the kind of the last prior; priors of another kind keep their defaults."""
    of: EvaluationKind = "prior"
    """Kind of evaluation: `tokenizer`, `prior`, `inpainting`, `likelihood`, `modes` or `images`."""
    prior: tuple[str, ...] = ("hourglass",)
    """A trained prior: a kind (the one in runs/priors/KIND), a folder, or a hub id. Give one for each level if the
    tokenizer has several levels."""
    tokenizer: str | None = None
    """Its tokenizer: a kind, a folder or a hub id [default: the copy in the prior's folder]."""
    protocol: EvaluationSettings = field(default_factory=EvaluationSettings)
    samples_npz: Path | None = added(None)
    """Also write the samples to this `.npz` file, uint8 (n, height, width, 3) in `arr_0`, which published evaluators
    and --of images read."""
    out: Path | None = None
    """JSON file for the scores and all settings needed to repeat the evaluation [default:
    runs/evaluations/prior-NAME.json, with the name of the prior's folder; numbered if another result is there]. A
    sheet of samples and their nearest neighbours among the training images is written beside it."""


@dataclass(frozen=True)
class InpaintingEvaluation(Generic[S]):
    """Settings to evaluate inpainting on held-out images under random strokes.

    Raises:
        UserError: if `fills` is below 1.
    """

    sampling: S
    """Sampler settings, for the kind of the last prior; priors of another kind keep their defaults."""
    of: EvaluationKind = "inpainting"
    """Kind of evaluation: `tokenizer`, `prior`, `inpainting`, `likelihood`, `modes` or `images`."""
    fills: int = 3
    """Fills of each image. Distances use the first one only; diversity and the best error use all."""
    prior: tuple[str, ...] = ("hourglass",)
    """A trained prior: a kind (the one in runs/priors/KIND), a folder, or a hub id. Give one for each level if the
    tokenizer has several levels."""
    tokenizer: str | None = None
    """Its tokenizer: a kind, a folder or a hub id [default: the copy in the prior's folder]."""
    filling: Filling = field(default_factory=Filling)
    protocol: EvaluationSettings = field(default_factory=EvaluationSettings)
    out: Path | None = None
    """JSON file for the scores and all settings needed to repeat the evaluation [default:
    runs/evaluations/inpainting-NAME.json, with the name of the prior's folder; numbered if another result is there]."""

    def __post_init__(self) -> None:
        require_at_least_one(self, "fills")


@dataclass(frozen=True)
class ModesEvaluation:
    """Settings to evaluate the generation modes of a selfVAE: the error and the bytes transmitted in each mode."""

    of: EvaluationKind = "modes"
    """Kind of evaluation: `tokenizer`, `prior`, `inpainting`, `likelihood`, `modes` or `images`."""
    tokenizer: str = "selfvae"
    """A trained selfvae or vae: a kind (the one in runs/tokenizers/KIND), a folder, or a hub id."""
    pixels: Pixels = "mean"
    """Pixels of the decoded images: the `mean` of the decoder's likelihood, or a `sample` from it."""
    protocol: EvaluationSettings = field(default_factory=EvaluationSettings)
    out: Path | None = None
    """JSON file for the scores and all settings needed to repeat the evaluation [default:
    runs/evaluations/modes-NAME.json, with the name of the tokenizer's folder; numbered if another result is there]."""


@dataclass(frozen=True)
class LikelihoodEvaluation:
    """Settings to evaluate the likelihood of held-out images, in bits per dimension.

    Raises:
        UserError: if `num` or `samples` is below 1.
    """

    of: EvaluationKind = "likelihood"
    """Kind of evaluation: `tokenizer`, `prior`, `inpainting`, `likelihood`, `modes` or `images`."""
    tokenizer: str = "selfvae"
    """A trained selfvae or vae: a kind (the one in runs/tokenizers/KIND), a folder, or a hub id."""
    images: str | None = None
    """Images, of which the held-out ones are used: `portraits`, `emoji`, a folder, or any other source that
    `train-tokenizer` reads [default: those that the tokenizer was trained on]."""
    reading: Reading = added(Reading())
    num: int = 100
    """Number of held-out images; all of them if there are fewer."""
    samples: int = 512
    """Importance samples per image. More samples tighten the bound and take proportionally longer."""
    seed: int = 0
    """Seed of the choice of images and of the importance samples."""
    device: Device = "auto"
    """Device to compute on, in fp32."""
    out: Path | None = None
    """JSON file for the scores and all settings needed to repeat the evaluation [default:
    runs/evaluations/likelihood-NAME.json, with the name of the tokenizer's folder; numbered if another result is
    there]."""

    def __post_init__(self) -> None:
        require_at_least_one(self, "num", "samples")


Evaluation = (
    ImagesEvaluation
    | TokenizerEvaluation
    | PriorEvaluation[Any]
    | InpaintingEvaluation[Any]
    | ModesEvaluation
    | LikelihoodEvaluation
)
