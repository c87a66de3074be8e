"""The page of the study of quantizers: a table and a sheet of reconstructions for each grid and number of codes."""

import statistics
from collections.abc import Iterator, Sequence
from itertools import count
from pathlib import Path
from typing import Any, TypeAlias

import torch

from smalti.benchmarks.comparison import in_spread
from smalti.commands.model_paths import load_tokenizer
from smalti.core.devices import best_device
from smalti.images.decoding import to_float
from smalti.images.image_set import ImageRows
from smalti.images.sheets import save_sheet
from smalti.studies.experiment import picture_path, table_row, write_section
from smalti.studies.quantizers.study import BATCH_SIZE, VARIANTS, Quantizers, ReproduceQuantizers, Variant

COLUMNS = {
    "mse": ("held-out MSE", ".5f"),
    "codes_used": ("codes in use", ".0f"),
    "perplexity": ("perplexity", ".0f"),
    "seconds": ("seconds a step", ".3f"),
    "search": ("search, ms an image", ".3f"),
    "nats": ("nats an image", ".0f"),
}
"""Heading and format of each score."""
SHOWN = 12
"""Images in a row of the sheet."""
Results: TypeAlias = dict[str, dict[int, dict[str, Any]]]
"""The scores of each variant, by its label and the seed."""


def reproduce_quantizers(config: ReproduceQuantizers) -> None:
    """Trains and measures what is missing, seed by seed, and writes the page after each training.

    The page also has what was measured before, of other quantizers and seeds.

    Raises:
        UserError: for images that cannot be used.
        Interrupted: if a signal stopped a training; the same command resumes it.
    """
    study = Quantizers(config)
    results: dict[tuple[int, int], Results] = {}
    for seed, side, bits, variant in _trainings(config):
        if (side, bits) not in results:
            results[side, bits] = _measured(study, side, bits)
        of_table = results[side, bits]
        of_table.setdefault(variant.label, {})[seed] = study.result(variant, side, bits, seed)
        if seed == 0:
            draw(study, side, bits, [each for each in VARIANTS if 0 in of_table.get(each.label, ())])
        write(study, side, bits, table(study, side, bits, of_table))


def _measured(study: Quantizers, side: int, bits: int) -> Results:
    """Returns what was measured before of all variants, up to the first seed that was not."""
    results: Results = {}
    for variant in VARIANTS:
        for seed in count():
            if not study.is_measured(variant, side, bits, seed):
                break
            results.setdefault(variant.label, {})[seed] = study.result(variant, side, bits, seed)
    return results


def write(study: Quantizers, side: int, bits: int, text: str) -> None:
    """Writes the section of a grid and number of codes, with the budget that it was measured with."""
    config = study.config
    budget = f"{config.steps} steps of {BATCH_SIZE} images each"
    if config.prior_steps:
        budget += f", priors {config.prior_steps} steps of {BATCH_SIZE} rows, or the steps that take as long"
    write_section(config.out, f"quantizers {study.name} {side}x{side} {bits} bits", text, budget)


def _trainings(config: ReproduceQuantizers) -> Iterator[tuple[int, int, int, Variant]]:
    """Yields seed, side, bits and variant of every training, a whole table of one seed before the next seed."""
    variants = [variant for variant in VARIANTS if variant.quantizer in config.quantizers]
    for seed in range(config.seeds):
        for side in config.sides:
            for bits in config.bits:
                yield from ((seed, side, bits, variant) for variant in variants)


def table(study: Quantizers, side: int, bits: int, results: Results) -> str:
    """Formats a row for each variant, with means and spreads over the seeds, above the sheet of reconstructions."""
    by_seed = {label: [runs[seed] for seed in sorted(runs)] for label, runs in results.items()}
    first = next(iter(by_seed.values()))[0]
    columns = {name: column for name, column in COLUMNS.items() if name in first}
    headings = ["quantizer", "codes", "seeds", *(heading for heading, _ in columns.values())]
    lines = [
        f"`{study.name}`, {side}×{side} codes of {bits} bits; {first['images']} held-out images. Means over seeds, "
        "with the lowest and the highest in brackets.",
        "",
        table_row(headings),
        table_row(["---", *["---:"] * (len(headings) - 1)]),
    ]
    best_first = sorted(by_seed.items(), key=lambda each: statistics.mean(run["mse"] for run in each[1]))
    for label, runs in best_first:
        cells = [in_spread([float(run[name]) for run in runs], form) for name, (_, form) in columns.items()]
        lines.append(table_row([label, str(2**bits), str(len(runs)), *cells]))
    return "\n".join([*lines, "", f"![Reconstructions by quantizer]({picture(study, side, bits).name})"])


def picture(study: Quantizers, side: int, bits: int) -> Path:
    """Returns the path of the sheet of a grid and number of codes, beside the page."""
    return picture_path(study.config.out, study.name, f"{side}x{side}", f"{bits}bits")


@torch.no_grad()
def draw(study: Quantizers, side: int, bits: int, variants: Sequence[Variant]) -> None:
    """Draws reconstructions of the same held-out images by each variant's first seed."""
    batch = to_float(ImageRows(study.images, split="held_out", flips=False).spread(SHOWN))
    sheet = {"original": batch}
    for variant in variants:
        tokenizer = load_tokenizer(str(study.folder(variant, side, bits, 0))).to(best_device())
        sheet[variant.label.replace("`", "")] = tokenizer.decode(tokenizer.encode(batch.to(best_device()))).cpu()
    save_sheet(picture(study, side, bits), sheet)
