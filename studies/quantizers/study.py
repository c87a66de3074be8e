"""The study of quantizers: every one at equal bits, with equal networks and steps, over several seeds.

Trained tokenizers and what is measured of them are kept, so a study that was stopped resumes.
"""

import statistics
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

import torch
from tyro.conf import Positional

from smalti.benchmarks.comparison import in_spread
from smalti.commands.model_paths import RUNS, load_tokenizer
from smalti.commands.presets import small
from smalti.commands.train_tokenizer import train_tokenizer
from smalti.core.devices import Precision, best_device
from smalti.core.errors import UserError, require_at_least_one
from smalti.images.decoding import to_float
from smalti.images.image_set import ImageRows, ImageSet, open_images
from smalti.latentsets.reader import perplexity
from smalti.studies.experiment import IMAGES_AT_ONCE, logged_hours, measure_once, table_row, write_section
from smalti.tokenizers.base import Tokenizer
from smalti.tokenizers.quantizers.registry import QUANTIZERS, QuantizerName
from smalti.tokenizers.vq.hrvq import HRVQConfig
from smalti.tokenizers.vq.vqvae import VQVAEConfig

SIZE = 32
"""Side of the images, in pixels."""
WIDTHS: dict[int, tuple[int, ...]] = {8: (64, 128), 16: (128,)}
"""Channels of the network's stages by the side of the grid of codes."""
RESIDUAL_BLOCKS, BATCH_SIZE = 2, 32
BITS_OF_A_DIGIT = {9: 3, 12: 4}
"""Bits of each of the three digits of linked codebooks and residual VQ."""
FSQ_LEVELS = {9: (8, 8, 8), 12: (8, 8, 8, 8)}
"""Levels with exactly as many codes. The paper recommends none for 9 bits, and 4375 codes for 12."""
COLUMNS = ("quantizer", "codes", "seeds", "held-out MSE", "codes in use", "perplexity", "seconds a step")


class Variant(NamedTuple):
    """A quantizer of the study.

    Attributes:
        quantizer: its name.
        label: its row in the table.
        settings: what it needs besides its size.
    """

    quantizer: QuantizerName
    label: str
    settings: Mapping[str, Any] = MappingProxyType({})


VARIANTS = (
    Variant("flat", "`flat`"),
    Variant("flat", "`flat`, rotation trick", {"gradient": "rotation"}),
    Variant("linked", "`linked`"),
    Variant("residual", "`residual`"),
    Variant("residual", "`residual`, shared codebook", {"shared_codebooks": True}),
    Variant("cosine", "`cosine`, code width 8", {"code_width": 8}),
    Variant("simvq", "`simvq`"),
    Variant("dot", "`dot`"),
    Variant("gumbel", "`gumbel`"),
    Variant("fsq", "`fsq`"),
    Variant("lfq", "`lfq`"),
)


@dataclass(frozen=True)
class ReproduceQuantizers:
    """Settings of the study.

    Raises:
        UserError: for a number below 1, or no quantizer.
    """

    study: Positional[Literal["quantizers"]]
    """The study: smalti's own comparison of quantizers at equal bits."""
    images: str = "portraits"
    """Images to train on; any source that `--images` of train_tokenizer takes."""
    image_channels: int = 3
    """3 for colour images, 1 for grey ones."""
    quantizers: tuple[QuantizerName, ...] = field(default_factory=lambda: tuple(QUANTIZERS))
    """Quantizers to train."""
    bits: tuple[Literal[9, 12], ...] = (9, 12)
    """Bits of a code: 512 or 4096 codes."""
    sides: tuple[Literal[8, 16], ...] = (8,)
    """Sides of the grid of codes, of images of 32x32 pixels."""
    seeds: int = 3
    """Seeds, and so trainings, of each quantizer."""
    steps: int = 1_000
    """Training steps, of 32 images."""
    precision: Precision = "auto"
    """Precision of the networks in training."""
    work: Path = RUNS / "quantizers"
    """Folder of the runs."""
    out: Path = Path("docs/guide/quantizers.md")
    """The Markdown page. Its measured sections are replaced."""

    def __post_init__(self) -> None:
        require_at_least_one(self, "seeds", "steps", "image_channels")
        if not (self.quantizers and self.bits and self.sides):
            raise UserError("the study needs at least one of each: --quantizers, --bits and --sides")


def model_of(variant: Variant, *, side: int, bits: int, image_channels: int) -> HRVQConfig | VQVAEConfig:
    """Returns the tokenizer of a variant: an `hrvq` for codes of several stages, else a `vqvae`."""
    network = {"height": SIZE, "width": SIZE, "image_channels": image_channels, "widths": WIDTHS[side]}
    shared: dict[str, Any] = {**network, "residual_blocks": RESIDUAL_BLOCKS, **variant.settings}
    match variant.quantizer:
        case "linked" | "residual":
            digit = BITS_OF_A_DIGIT[bits]
            return HRVQConfig(quantizer=variant.quantizer, depth=bits // digit, branching=2**digit, **shared)
        case "fsq":
            return VQVAEConfig(quantizer="fsq", codebook_size=2**bits, levels=FSQ_LEVELS[bits], **shared)
        case _:
            return VQVAEConfig(quantizer=variant.quantizer, codebook_size=2**bits, **shared)


class Quantizers:
    """The trainings of the study and what is measured of them; what is on the disk is not done again.

    `train_tokenizer` runs before any result is read: it returns at once for a finished run, and refuses one of other
    images, channels or precision, which the names of folders leave out.
    """

    def __init__(self, config: ReproduceQuantizers) -> None:
        self.config = config
        self.name = Path(config.images).stem
        """Name of the images, in names of files and sections."""

    def folder(self, variant: Variant, side: int, bits: int, seed: int) -> Path:
        """Returns the folder of a training, named by all that the trainings of one set of images differ in."""
        details = "".join(f"-{value}" for value in variant.settings.values() if value is not True)
        shared = "-shared" if variant.settings.get("shared_codebooks") else ""
        name = f"{variant.quantizer}{shared}{details}-{side}x{side}-{bits}bits-{self.config.steps}steps-seed{seed}"
        return self.config.work / self.name / name

    def trained(self, variant: Variant, side: int, bits: int, seed: int) -> Path:
        """Returns the folder of a tokenizer, trained."""
        config = self.config
        model = model_of(variant, side=side, bits=bits, image_channels=config.image_channels)
        kind = "hrvq" if isinstance(model, HRVQConfig) else "vqvae"
        defaults = small(kind)
        fit = replace(defaults.fit, steps=config.steps, batch_size=BATCH_SIZE, seed=seed)
        settings = replace(defaults, model=model, fit=fit, images=config.images, precision=config.precision)
        return train_tokenizer(replace(settings, out=self.folder(variant, side, bits, seed)), self.images)

    def result(self, variant: Variant, side: int, bits: int, seed: int) -> dict[str, Any]:
        """Returns `mse`, `codes_used` and `perplexity` on the held-out images, and `seconds` a step."""
        folder = self.trained(variant, side, bits, seed)

        def measure() -> dict[str, Any]:
            seconds = logged_hours(folder) * 3600 / self.config.steps
            return {**held_out_scores(load_tokenizer(str(folder)), self.images), "seconds": seconds}

        return measure_once(folder / "scores.json", measure)

    @cached_property
    def images(self) -> ImageSet:
        """The images."""
        return open_images(self.config.images, height=SIZE, width=SIZE, channels=self.config.image_channels)


@torch.no_grad()
def held_out_scores(tokenizer: Tokenizer, images: ImageSet) -> dict[str, float]:
    """Returns scores of the reconstructions and codes of all held-out images.

    Returns:
        `mse`, the mean squared error of pixels in [0, 1]; `codes_used`, the number of codes that occur; `perplexity` of
        their distribution; `images`, their number.

    Raises:
        UserError: if no image is held out.
    """
    rows = ImageRows(images, split="held_out", flips=False)
    if not len(rows):
        raise UserError("no image is held out, so nothing can be measured; give more images")
    tokenizer, device = tokenizer.to(best_device()), best_device()
    counts, error, values = torch.zeros(tokenizer.layout.levels[0].codebook_size).long(), 0.0, 0
    for indices in torch.arange(len(rows)).split(IMAGES_AT_ONCE):
        batch = to_float(rows.__getitems__(indices.tolist())["images"]).to(device)
        codes = tokenizer.encode(batch)
        error += float((tokenizer.decode(codes) - batch).square().sum(dtype=torch.float64)) / 4
        values += batch.numel()
        counts += torch.bincount(codes[0].flatten().cpu(), minlength=len(counts))
    used = int((counts > 0).sum())
    return {"mse": error / values, "codes_used": used, "perplexity": perplexity(counts), "images": len(rows)}


def reproduce_quantizers(config: ReproduceQuantizers) -> None:
    """Trains and measures what is missing, seed by seed, and writes the page after each training.

    Raises:
        UserError: for images that cannot be used.
        Interrupted: if a signal stopped a training; the same command resumes it.
    """
    study = Quantizers(config)
    results: dict[tuple[int, int], dict[str, list[dict[str, Any]]]] = {}
    for seed, side, bits, variant in _trainings(config):
        table_results = results.setdefault((side, bits), {})
        table_results.setdefault(variant.label, []).append(study.result(variant, side, bits, seed))
        section = f"quantizers {study.name} {side}x{side} {bits} bits"
        budget = f"{config.steps} steps of {BATCH_SIZE} images each"
        write_section(config.out, section, table(study.name, side, bits, table_results), budget)


def _trainings(config: ReproduceQuantizers) -> Iterator[tuple[int, int, int, Variant]]:
    """Yields seed, side, bits and variant of every training, a whole table of one seed before the next seed."""
    variants = [variant for variant in VARIANTS if variant.quantizer in config.quantizers]
    for seed in range(config.seeds):
        for side in config.sides:
            for bits in config.bits:
                yield from ((seed, side, bits, variant) for variant in variants)


def table(name: str, side: int, bits: int, results: dict[str, list[dict[str, Any]]]) -> str:
    """Returns the table of one grid and size: a row for each variant, with means and spreads over the seeds."""
    count = next(iter(results.values()))[0]["images"]
    rows = [
        f"`{name}`, {side}×{side} codes of {bits} bits; {count} held-out images. The mean over seeds, from the least "
        "to the most.",
        "",
        table_row(COLUMNS),
        table_row(["---", *["---:"] * (len(COLUMNS) - 1)]),
    ]
    best_first = sorted(results.items(), key=lambda each: statistics.mean(run["mse"] for run in each[1]))
    for label, runs in best_first:
        forms = {"mse": ".5f", "codes_used": ".0f", "perplexity": ".0f", "seconds": ".3f"}
        cells = [in_spread([float(run[key]) for run in runs], form) for key, form in forms.items()]
        rows.append(table_row([label, str(2**bits), str(len(runs)), *cells]))
    return "\n".join(rows)
