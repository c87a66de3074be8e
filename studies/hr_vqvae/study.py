"""The study of HR-VQVAE's paper: the tokenizers that it trains, and what is measured of them.

Each tokenizer is trained by `train_tokenizer` and measured once; a study that was stopped resumes. Priors and samples
are in `samples.py`, tables and pictures in `report.py`, `size.py`, `depth.py`, `curve.py` and `samples_report.py`.
"""

import dataclasses
import json
import time
from dataclasses import asdict, dataclass, replace
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from smalti.benchmarks.comparison import synchronize
from smalti.commands.codebook_usage import code_counts
from smalti.commands.train_tokenizer import TrainTokenizer, train_tokenizer
from smalti.core.codes import perplexity
from smalti.core.files import write_json
from smalti.images.decoding import to_float
from smalti.images.image_set import ImageRows, ImageSet, open_images
from smalti.studies.experiment import Trial, count_parameters, logged_hours
from smalti.studies.hr_vqvae.settings import PAPER_START, Part, ReproduceHRVQVAE, Start
from smalti.tokenizers.base import Tokenizer
from smalti.tokenizers.quantizers.linked import LinkedQuantizer
from smalti.tokenizers.vq.hrvq import HRVQConfig
from smalti.tokenizers.vq.vqvae import VQConfig, VQVAEConfig
from smalti.tokenizers.vq.vqvae2 import VQVAE2Config
from smalti.training.config import FitConfig

KINDS = ("vqvae", "vqvae2", "hrvq")
NAMES = {"vqvae": "VQ-VAE", "vqvae2": "VQ-VAE-2", "hrvq": "HR-VQVAE"}
LEAVES, DEPTH, SIZES = 512, 3, (512, 4_096, 32_768)
DEPTHS, LEVELS, DEPTH_LEAVES = (1, 2, 3, 4, 5, 6), (2, 3, 4, 5), 64
"""Fig. 5: layers of HR-VQVAE, levels of VQ-VAE-2, whose coarsest grid of five is a single code, and leaves."""
PLAIN = {"codebook_learning": "gradient", "revive_below": 0.0}
"""Codebook settings of the HR-VQVAE paper, for all kinds: learning by the losses alone. All other settings are smalti's
defaults, but the start of codewords, which the paper does not name."""
CODES_OF_IMAGES = 10_000
"""Images whose codes are searched in Table 2."""
SEARCH_BLOCK, SEARCH_REPETITIONS, REPORT_STEPS = 500, 3, 2_500
RESULT_NAME = "result.json"
PAPER_GRID = 16
CURVE_DECAY = 0.99  # of the codewords' running means, as the help of --codebook-decay advises for long trainings


@dataclass(frozen=True)
class TokenizerSpec:
    """The description of one tokenizer that the study trains.

    Attributes:
        kind: The registered kind.
        plain: Whether its codebooks are trained as in the paper; otherwise with smalti's defaults.
        steps: Training steps.
        leaves: The number of codes (at each level of VQ-VAE-2).
        depth: Layers of linked codebooks.
        seed: The seed of training.
        grid: Rows and columns of the codes (of VQ-VAE-2's finest level).
        curve: Whether it is on the curve: trained by Muon, the default of `train_tokenizer`, and with slower means.
        levels: Levels of VQ-VAE-2.
        start: How codewords start where they learn as in the paper; at its best, by k-means.
    """

    kind: str
    plain: bool
    steps: int
    leaves: int
    depth: int = 1
    seed: int = 0
    grid: int = PAPER_GRID
    curve: bool = False
    levels: int = 3
    start: Start = PAPER_START

    @property
    def name(self) -> str:
        """The name of its folder, without the settings that all tokenizers of a study share."""
        codebooks = "plain" if self.plain else "best"
        tree = f"{self.kind}-{self.leaves}-depth{self.depth}-{codebooks}"
        changed = {
            f"grid{self.grid}": self.grid != PAPER_GRID,
            "curve": self.curve,
            f"levels{self.levels}": self.levels != TokenizerSpec.levels,
            self.start: self.start != PAPER_START,
        }
        suffixes = (f"-{name}" for name, is_changed in changed.items() if is_changed)
        return f"{tree}-{self.steps}steps-seed{self.seed}{''.join(suffixes)}"


def specs_by_part(config: ReproduceHRVQVAE) -> dict[Part, list[TokenizerSpec]]:
    """Returns the tokenizers of each part. Parts that need the same tokenizer share it."""
    depths = {"vqvae": 1, "vqvae2": 1, "hrvq": DEPTH}

    def all_methods(plain_values: tuple[bool, ...], grid: int) -> list[TokenizerSpec]:
        return [
            TokenizerSpec(kind, plain, config.steps, LEAVES, depths[kind], seed, grid)
            for seed in range(config.seeds)
            for kind in reversed(KINDS)
            for plain in plain_values
        ]

    methods, generating = all_methods((False, True), PAPER_GRID), all_methods((False,), config.generating.grid)
    by_depth = [
        *(TokenizerSpec("hrvq", True, config.steps, DEPTH_LEAVES, depth) for depth in DEPTHS),
        *(TokenizerSpec("vqvae2", True, config.steps, DEPTH_LEAVES, levels=levels) for levels in LEVELS),
    ]
    depth = [
        replace(spec, plain=plain, seed=seed)
        for seed in range(config.seeds)
        for plain in (True, False)
        for spec in by_depth
    ]
    by_size = [
        TokenizerSpec(kind, True, config.size_steps, leaves, depths[kind])
        for leaves in SIZES
        for kind in reversed(KINDS)
    ]
    size = [replace(spec, plain=False) for spec in by_size]
    size += [replace(spec, start=start) for start in config.starts for spec in by_size]
    specs: dict[Part, list[TokenizerSpec]] = {
        "methods": methods,
        "distances": methods,
        "depth": depth,
        "size": size,
        "samples": generating,
        "heads": [spec for spec in generating if spec.kind == "hrvq"],
        "curve": [TokenizerSpec("hrvq", False, n, LEAVES, DEPTH, curve=True) for n in config.curve_steps],
    }
    return {part: specs.get(part, []) for part in config.parts}


def model_of(spec: TokenizerSpec, config: ReproduceHRVQVAE) -> VQConfig:
    """Returns the config of a tokenizer. All have networks of one shape.

    Images of 32x32 have 16x16 codes, and VQ-VAE-2 has 8x8 and 4x4 codes at its coarser levels; with a grid of 8, half
    of each.
    """
    shared: dict[str, Any] = {
        "image_channels": 1 if config.data == "mnist" else 3,
        "widths": (config.channels,) * (1 if spec.grid == PAPER_GRID else 2),
        "code_width": config.code_width,
        **(PLAIN | {"codebook_init": spec.start} if spec.plain else {}),
        **({"codebook_decay": CURVE_DECAY} if spec.curve else {}),
    }
    if spec.kind == "hrvq":
        tree = branching_of(spec.leaves, spec.depth)
        return HRVQConfig(**shared, depth=spec.depth, branching=tree[0] if len(set(tree)) == 1 else tree)
    if spec.kind == "vqvae2":
        return VQVAE2Config(**shared, codebook_size=spec.leaves, levels=spec.levels)
    return VQVAEConfig(**shared, codebook_size=spec.leaves)


def branching_of(leaves: int, depth: int) -> tuple[int, ...]:
    """Returns the branching of each layer of a tree with a power of two of leaves: equal up to a factor of 2, the
    larger ones first."""
    bits = leaves.bit_length() - 1
    return tuple(2 ** (bits // depth + (layer < bits % depth)) for layer in range(depth))


def open_data(config: ReproduceHRVQVAE) -> ImageSet:
    """Opens the images at 32x32 pixels. MNIST's 28x28 are enlarged, so that half the size gives 16x16 codes."""
    return open_images(config.images, height=32, width=32, channels=1 if config.data == "mnist" else 3)


def trial_of(spec: TokenizerSpec, config: ReproduceHRVQVAE) -> Trial:
    """Returns the trial of a tokenizer. Its folder's name leaves out shared settings with their default values."""
    shared = [field for field in dataclasses.fields(config) if field.name in ("batch_size", "channels", "code_width")]
    values = [(field, getattr(config, field.name)) for field in shared]
    changed = [f"{field.name}{value}" for field, value in values if value != field.default]
    return Trial(config.work / config.data / "-".join([spec.name, *changed]))


def trained(spec: TokenizerSpec, config: ReproduceHRVQVAE, images: ImageSet) -> Trial:
    """Returns the trial of a tokenizer, trained (or resumed) and measured if it was not.

    Call it before any result in the trial's folder is read: `train_tokenizer` returns at once for a finished run, and
    refuses one of other images or another precision, which the folder's name leaves out.
    """
    trial = trial_of(spec, config)
    fit = FitConfig(spec.steps, config.batch_size, seed=spec.seed, report_steps=min(spec.steps, REPORT_STEPS))
    settings = TrainTokenizer(
        model=model_of(spec, config),
        fit=replace(fit, optimizer="muon") if spec.curve else fit,
        tokenizer=spec.kind,
        images=config.images,
        flips=config.data != "mnist",  # mirrored digits are not digits
        precision=config.precision,
        out=trial.folder,
    )
    train_tokenizer(settings, images)
    if result(spec, config) is None:
        usage_images = usage_images_of(spec, config)
        scores = measured(trial.tokenizer(), images, usage_images)
        logged = {"train_seconds": logged_hours(trial.folder) * 3600, "cell": asdict(spec)}
        write_json(trial.folder / RESULT_NAME, {**logged, "usage_images": usage_images, **scores})
    return trial


@torch.no_grad()
def measured(tokenizer: Tokenizer, images: ImageSet, usage_images: int) -> dict[str, Any]:
    """Measures the held-out MSE in [0, 1] units and, per level, codebook usage and perplexity on training images."""
    rows = ImageRows(images, split="held_out", flips=False)
    error, values = 0.0, 0
    for block in torch.arange(len(rows)).split(64):
        batch = to_float(rows.__getitems__(block.tolist())["images"]).to(tokenizer.device)
        error += float((tokenizer.decode(tokenizer.encode(batch)) - batch).double().square().sum()) / 4
        values += batch.numel()
    counts = code_counts(tokenizer, ImageRows(images, split="train", flips=False), usage_images)
    return {
        "mse": error / values,
        "held_out_images": len(rows),
        "used": [float((level > 0).double().mean()) for level in counts],
        "perplexity": [perplexity(level) for level in counts],
        "parameters": count_parameters(tokenizer),
    }


def result(spec: TokenizerSpec, config: ReproduceHRVQVAE) -> dict[str, Any] | None:
    """Returns what was measured of a tokenizer; None if it was not measured, or over another number of images."""
    path = trial_of(spec, config).folder / RESULT_NAME
    if not path.exists():
        return None
    scores = json.loads(path.read_text())
    usage_images = scores.get("usage_images", ReproduceHRVQVAE.usage_images)  # early results lack this number
    return scores if usage_images == usage_images_of(spec, config) else None


def used(scores: dict[str, Any]) -> str:
    """Formats the leaves in use, by level from the coarsest."""
    return ", ".join(f"{share:.0%}" for share in scores["used"])


def usage_images_of(spec: TokenizerSpec, config: ReproduceHRVQVAE) -> int:
    """Returns the most training images over which codes are counted; fewer for a large flat codebook (slow search)."""
    flat_leaves = spec.leaves if spec.depth == 1 else 0
    return config.usage_images * SIZES[1] // max(flat_leaves, SIZES[1])


@torch.no_grad()
def features(tokenizer: Tokenizer, batch: Float[Tensor, "b c h w"]) -> list[tuple[LinkedQuantizer, Tensor]]:
    """Returns each quantizer of a tokenizer with its input z_e for these images."""
    inputs: list[tuple[LinkedQuantizer, Tensor]] = []

    def record(quantizer: nn.Module, arguments: tuple[Tensor]) -> None:
        inputs.append((cast(LinkedQuantizer, quantizer), arguments[0]))

    quantizers = [module for module in tokenizer.modules() if isinstance(module, LinkedQuantizer)]
    hooks = [quantizer.register_forward_pre_hook(record) for quantizer in quantizers]
    tokenizer(batch)
    for hook in hooks:
        hook.remove()
    return inputs


def search_seconds(tokenizer: Tokenizer, images: ImageSet) -> float:
    """Measures the seconds to search the codes of `CODES_OF_IMAGES` images in their z_e; the best of several timings.

    One block of images is searched repeatedly.
    """
    rows = ImageRows(images, split="train", flips=False)
    batch = to_float(rows.__getitems__([i % len(rows) for i in range(SEARCH_BLOCK)])["images"])
    inputs, seconds = features(tokenizer, batch.to(tokenizer.device)), []
    for repetition in range(SEARCH_REPETITIONS + 1):
        synchronize()
        start = time.perf_counter()
        for _ in range(CODES_OF_IMAGES // SEARCH_BLOCK):
            for quantizer, z_e in inputs:
                quantizer.encode(z_e)
        synchronize()
        if repetition:  # the first repetition compiles
            seconds.append(time.perf_counter() - start)
    return min(seconds)
