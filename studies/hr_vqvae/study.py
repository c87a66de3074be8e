"""The HR-VQVAE paper's studies, trained anew: the settings of all; of reconstruction, which runs, and what is measured.

A run is trained by `train_tokenizer` and measured once; both are kept, so a study that is stopped goes on. Priors and
samples are in `reproduce_samples.py`; what is written of it all is in `reproduce_report.py`.
"""

import dataclasses
import json
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeAlias, cast, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn
from tyro.conf import Positional

from smalti.benchmarks.comparison import synchronize
from smalti.commands.codebook_usage import code_counts
from smalti.commands.model_paths import RUNS, load_tokenizer
from smalti.commands.train_tokenizer import TrainTokenizer, train_tokenizer
from smalti.core.devices import Precision, best_device
from smalti.core.errors import UserError, require_at_least_one
from smalti.core.files import write_json
from smalti.images.decoding import to_float
from smalti.images.image_set import ImageRows, ImageSet, open_images
from smalti.latentsets.reader import perplexity
from smalti.metrics.extractors import ExtractorName
from smalti.tokenizers.base import Tokenizer
from smalti.tokenizers.quantizers.linked import LinkedQuantizer
from smalti.tokenizers.vq.hrvq import HRVQConfig
from smalti.tokenizers.vq.vqvae import VQConfig, VQVAEConfig
from smalti.tokenizers.vq.vqvae2 import VQVAE2Config
from smalti.training.config import FitConfig

Part: TypeAlias = Literal["methods", "distances", "depth", "search", "size", "samples", "heads"]
DataName: TypeAlias = Literal["mnist", "cifar10"]

KINDS = ("vqvae", "vqvae2", "hrvq")
NAMES = {"vqvae": "VQ-VAE", "vqvae2": "VQ-VAE-2", "hrvq": "HR-VQVAE"}
LEAVES, DEPTH, DEPTHS, DEPTH_LEAVES, SIZES = 512, 3, (1, 2, 3, 6), 64, (512, 4_096, 32_768)
PLAIN = {"codebook_learning": "gradient", "revive_below": 0.0, "kmeans_start": False}
"""As the papers train: the losses alone. The other settings are the defaults."""
CODES_OF_IMAGES = 10_000
"""How many images' codes are searched for, in Table 2."""
SEARCH_BLOCK, SEARCH_REPETITIONS = 500, 3
RESULT_NAME = "result.json"
PAPER_GRID = 16


@dataclass(frozen=True)
class Generating:
    """Budgets of priors and samples.

    Raises:
        UserError: for a number that is too small.
    """

    grid: Literal[8, 16] = 8
    """Rows and columns of the codes that priors learn, of VQ-VAE-2 the finest; the paper has 16."""
    prior_steps: int = 300
    """Optimiser steps of the prior of each level."""
    prior_batch_size: int = 32
    """Images a step of a prior."""
    pixelcnn_width: int = 64
    """Width of the PixelCNN."""
    hourglass_width: int = 96
    """Width of the hourglass; a multiple of 32, or of 4 below that."""
    num: int = 400
    """Samples of each prior, held against as many held-out images, at most."""
    reference: int = 2_000
    """Most training images that Fréchet distances are taken to."""
    extractor: ExtractorName = "lite0"
    """Network whose features they are of: `lite0`, with the extra `metrics`; or `inception`, as the paper, which
    downloads weights."""

    def __post_init__(self) -> None:
        require_at_least_one(self, "prior_steps", "prior_batch_size", "pixelcnn_width", "hourglass_width")
        if self.num < 4 or self.reference < 4:
            raise UserError(f"--num and --reference must be at least 4, not {self.num} and {self.reference}")


@dataclass(frozen=True)
class Reproduce:
    """What to reproduce, and at which budget.

    Raises:
        UserError: for a number below 1.
    """

    study: Positional[Literal["hr-vqvae"]]
    """Whose numbers: the study of VQ-VAE, VQ-VAE-2 and HR-VQVAE."""
    images: str
    """The data set's training images, whatever `--images` of train_tokenizer takes: a Parquet file, say."""
    data: DataName = "mnist"
    """Which data set that is, for the paper's numbers beside ours."""
    parts: tuple[Part, ...] = get_args(Part)
    """Table 1 and Figs. 1 and 8; the Fréchet distances of Table 1; Fig. 5; Table 2; Fig. 6; Table 3; and HR-VQVAE's
    codes predicted digit by digit beside one softmax over all of them."""
    seeds: int = 3
    """Runs of each model in Tables 1 and 3 and in Fig. 5, and of each head; the rest has one."""
    steps: int = 1_000
    """Optimiser steps of every tokenizer."""
    size_steps: int = 300
    """Those of the runs of Fig. 6, which at 32768 leaves of one codebook are slow."""
    batch_size: int = 16
    """Images a step."""
    precision: Precision = "auto"
    """Arithmetic of the networks in training; what is measured is in fp32."""
    channels: int = 32
    """Width of the networks."""
    code_width: int = 16
    """Length of a codeword."""
    usage_images: int = 60_000
    """Over how many training images, at most, leaves in use and perplexity are counted; of one codebook of 32768, over
    an eighth of them."""
    generating: Generating = field(default_factory=Generating)
    work: Path = RUNS / "reproductions"
    """Where runs are kept."""
    out: Path = Path("docs/reproductions/hr-vqvae.md")
    """The Markdown file whose measured parts are replaced, with its pictures beside it."""

    def __post_init__(self) -> None:
        require_at_least_one(
            self, "seeds", "steps", "size_steps", "batch_size", "channels", "code_width", "usage_images"
        )

    def picture(self, what: str) -> Path:
        """Beside the report."""
        return self.out.with_name(f"{self.out.stem}-{self.data}-{what}.png")


@dataclass(frozen=True)
class Cell:
    """One run of the study.

    Attributes:
        leaves: codes of a position; of VQ-VAE-2, of each level's.
        depth: layers of linked codebooks.
        plain: trained as the paper had it.
        grid: rows and columns of codes, of VQ-VAE-2 of the finest.
    """

    kind: str
    plain: bool
    steps: int
    leaves: int
    depth: int = 1
    seed: int = 0
    grid: int = PAPER_GRID

    @property
    def name(self) -> str:
        """Of its folder, but for the settings that all cells share."""
        how = "plain" if self.plain else "best"
        of_grid = "" if self.grid == PAPER_GRID else f"-grid{self.grid}"
        return f"{self.kind}-{self.leaves}-depth{self.depth}-{how}-{self.steps}steps-seed{self.seed}{of_grid}"


def cells(config: Reproduce) -> dict[Part, list[Cell]]:
    """The runs of each part; one that two parts share has one name."""
    depths = {"vqvae": 1, "vqvae2": 1, "hrvq": DEPTH}

    def of_methods(plain: tuple[bool, ...], grid: int) -> list[Cell]:
        return [
            Cell(kind, how, config.steps, LEAVES, depths[kind], seed, grid)
            for seed in range(config.seeds)
            for kind in reversed(KINDS)
            for how in plain
        ]

    methods, drawn = of_methods((False, True), PAPER_GRID), of_methods((False,), config.generating.grid)
    depth = [
        Cell("hrvq", plain, config.steps, DEPTH_LEAVES, n, seed)
        for seed in range(config.seeds)
        for plain in (True, False)
        for n in DEPTHS
    ]
    size = [
        Cell(kind, plain, config.size_steps, leaves, depths[kind])
        for leaves in SIZES
        for kind, plain in (("hrvq", False), ("vqvae", False), ("vqvae", True))
    ]
    found: dict[Part, list[Cell]] = {
        "methods": methods,
        "distances": methods,
        "depth": depth,
        "size": size,
        "samples": drawn,
        "heads": [cell for cell in drawn if cell.kind == "hrvq"],
    }
    return {part: found.get(part, []) for part in config.parts}


def model_of(cell: Cell, config: Reproduce) -> VQConfig:
    """Networks of one shape: 16x16 codes of 32x32 images, and 8x8 and 4x4 above them in VQ-VAE-2; or half of these."""
    shared: dict[str, Any] = {
        "image_channels": 1 if config.data == "mnist" else 3,
        "widths": (config.channels,) * (1 if cell.grid == PAPER_GRID else 2),
        "code_width": config.code_width,
        **(PLAIN if cell.plain else {}),
    }
    if cell.kind == "hrvq":
        return HRVQConfig(**shared, depth=cell.depth, branching=round(cell.leaves ** (1 / cell.depth)))
    if cell.kind == "vqvae2":
        return VQVAE2Config(**shared, codebook_size=cell.leaves, levels=3)
    return VQVAEConfig(**shared, codebook_size=cell.leaves)


def open_data(config: Reproduce) -> ImageSet:
    """The images, at 32x32 pixels: MNIST's 28x28 are enlarged, for 16x16 codes at half the size."""
    return open_images(config.images, height=32, width=32, channels=1 if config.data == "mnist" else 3)


def folder_of(cell: Cell, config: Reproduce) -> Path:
    """Where a run is kept: named by all that decides it, but for what is as by default."""
    shared = [one for one in dataclasses.fields(Reproduce) if one.name in ("batch_size", "channels", "code_width")]
    given = ((one, getattr(config, one.name)) for one in shared)
    return config.work / config.data / "-".join([cell.name, *(f"{o.name}{v}" for o, v in given if v != o.default)])


def trained(cell: Cell, config: Reproduce, images: ImageSet) -> Path:
    """The folder of a run, trained as far as it was not yet, and measured."""
    folder = folder_of(cell, config)
    if result(cell, config):
        return folder
    path, start = folder / RESULT_NAME, time.perf_counter()
    fit = FitConfig(steps=cell.steps, batch_size=config.batch_size, seed=cell.seed, report_steps=cell.steps)
    model = model_of(cell, config)
    flips = config.data != "mnist"  # mirrored digits are no digits
    settings = TrainTokenizer(
        model=model,
        fit=fit,
        tokenizer=cell.kind,
        images=config.images,
        flips=flips,
        precision=config.precision,
        out=folder,
    )
    train_tokenizer(settings, images)
    seconds = time.perf_counter() - start
    before = json.loads(path.read_text()) if path.exists() else {"train_seconds": seconds}
    of_images = counted(cell, config)
    found = measured(load_tokenizer(str(folder)).to(best_device()), images, of_images)
    write_json(path, {**before, "cell": asdict(cell), "usage_images": of_images, **found})
    return folder


@torch.no_grad()
def measured(tokenizer: Tokenizer, images: ImageSet, usage_images: int) -> dict[str, Any]:
    """Held-out MSE, in [0, 1] units; and, of each level over training images, the share of codes in use, perplexity."""
    rows = ImageRows(images, split="held_out", flips=False)
    device = next(tokenizer.parameters()).device
    error, values = 0.0, 0
    for block in torch.arange(len(rows)).split(64):
        batch = to_float(rows.__getitems__(block.tolist())["images"]).to(device)
        error += float((tokenizer.decode(tokenizer.encode(batch)) - batch).double().square().sum()) / 4
        values += batch.numel()
    counts = code_counts(tokenizer, ImageRows(images, split="train", flips=False), usage_images)
    return {
        "mse": error / values,
        "held_out_images": len(rows),
        "used": [float((level > 0).double().mean()) for level in counts],
        "perplexity": [perplexity(level) for level in counts],
        "parameters": sum(parameter.numel() for parameter in tokenizer.parameters()),
    }


def result(cell: Cell, config: Reproduce) -> dict[str, Any] | None:
    """What was measured of a run, of so many images; None if it was not yet."""
    path = folder_of(cell, config) / RESULT_NAME
    if not path.exists():
        return None
    found = json.loads(path.read_text())
    of_images = found.get("usage_images", Reproduce.usage_images)  # results had no such number at first
    return found if of_images == counted(cell, config) else None


def counted(cell: Cell, config: Reproduce) -> int:
    """Over how many training images, at most, its leaves in use are counted: a large flat codebook's search is slow."""
    flat = cell.leaves if cell.depth == 1 else 0
    return config.usage_images * SIZES[1] // max(flat, SIZES[1])


@torch.no_grad()
def features(tokenizer: Tokenizer, batch: Float[Tensor, "b c h w"]) -> list[tuple[LinkedQuantizer, Tensor]]:
    """Each quantizer of a tokenizer, and what of these images reaches it."""
    found: list[tuple[LinkedQuantizer, Tensor]] = []

    def note(quantizer: nn.Module, given: tuple[Tensor]) -> None:
        found.append((cast(LinkedQuantizer, quantizer), given[0]))

    quantizers = [module for module in tokenizer.modules() if isinstance(module, LinkedQuantizer)]
    hooks = [quantizer.register_forward_pre_hook(note) for quantizer in quantizers]
    tokenizer(batch)
    for hook in hooks:
        hook.remove()
    return found


def search_seconds(tokenizer: Tokenizer, images: ImageSet) -> float:
    """Seconds to find the codes of `CODES_OF_IMAGES` images in what the encoder makes of them; the best of some.

    Of the images there are, as many as needed, over and over, in blocks.
    """
    rows = ImageRows(images, split="train", flips=False)
    batch = to_float(rows.__getitems__([i % len(rows) for i in range(SEARCH_BLOCK)])["images"])
    reached, taken = features(tokenizer, batch.to(next(tokenizer.parameters()).device)), []
    for turn in range(SEARCH_REPETITIONS + 1):
        synchronize()
        start = time.perf_counter()
        for _ in range(CODES_OF_IMAGES // SEARCH_BLOCK):
            for quantizer, z_e in reached:
                quantizer.encode(z_e)
        synchronize()
        if turn:  # the first compiles
            taken.append(time.perf_counter() - start)
    return min(taken)
