"""The report of the study of HR-VQVAE: our numbers beside the paper's, in tables, plots and pictures.

The tokenizers and the measurements are in `study.py`. Fig. 5 is in `depth.py`, Fig. 6 in `size.py`, the curve in
`curve.py`, Table 3 and the heads in `samples_report.py`.
"""

import statistics
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from smalti.benchmarks.comparison import NOT_RUN, in_spread
from smalti.core.codes import Codes
from smalti.core.devices import best_device, resolve
from smalti.images.decoding import to_float
from smalti.images.image_set import ImageRows, ImageSet
from smalti.images.sheets import save_sheet
from smalti.studies.experiment import measure_once, table_row, write_section
from smalti.studies.hr_vqvae.curve import curve_table
from smalti.studies.hr_vqvae.depth import depth_table
from smalti.studies.hr_vqvae.rate_distortion import bits_of, gaussian_distortion, pixel_variances
from smalti.studies.hr_vqvae.samples_report import distances, heads, samples
from smalti.studies.hr_vqvae.settings import PAPER_START, DataName, ReproduceHRVQVAE
from smalti.studies.hr_vqvae.size import size_table
from smalti.studies.hr_vqvae.study import (
    CODES_OF_IMAGES,
    KINDS,
    LEAVES,
    NAMES,
    PAPER_GRID,
    TokenizerSpec,
    branching_of,
    open_data,
    result,
    search_seconds,
    specs_by_part,
    trained,
    used,
)
from smalti.tokenizers.base import Tokenizer

PAPER_MSE: dict[DataName, dict[str, float]] = {
    "mnist": {"vqvae": 0.00041, "vqvae2": 0.00025, "hrvq": 0.00011},
    "cifar10": {"vqvae": 0.00092, "vqvae2": 0.00068, "hrvq": 0.00041},
}
"""Table 1."""
PAPER_SECONDS: dict[DataName, dict[str, float]] = {
    "mnist": {"vqvae": 0.062474, "vqvae2": 0.090778, "hrvq": 0.010830},
    "cifar10": {"vqvae": 2.7087896, "vqvae2": 4.4492340, "hrvq": 0.4667842},
}
"""Table 2."""
SHOWN = 12
"""Images in a row of a picture."""


def reproduce_hr_vqvae(config: ReproduceHRVQVAE) -> None:
    """Trains and measures what is missing, part by part, and writes each part of the report as soon as it is measured.

    Raises:
        UserError: if the images cannot be used.
        Interrupted: if a signal stopped a training; the same command resumes it.
    """
    torch.manual_seed(0)
    images = open_data(config)
    ideal = partial(_ideal_mse, config, images)
    tables: dict[str, Callable[[ReproduceHRVQVAE, list[TokenizerSpec]], str]] = {
        "methods": partial(methods_table, ideal=ideal),
        "depth": depth_table,
        "size": partial(size_table, ideal=ideal),
        "curve": partial(curve_table, paper=PAPER_MSE[config.data]["hrvq"], ideal=ideal),
    }
    evaluated = {"distances": distances, "samples": samples, "heads": heads}
    for part, specs in specs_by_part(config).items():
        if part in evaluated:
            evaluated[part](config, specs, images, partial(write, config, part))
            continue
        for spec in specs:
            new = result(spec, config) is None
            trained(spec, config, images)
            if new or spec == specs[-1]:  # drawing takes a second
                write(config, part, tables[part](config, specs))
        if part == "search":
            write(config, part, search_table(config, images))
        if part == "methods":
            pictures(config, images)
        if part in ("depth", "size"):
            reconstructions(config, part, specs, images)


def write(config: ReproduceHRVQVAE, part: str, text: str) -> None:
    """Writes a part of the report with the budget that it was measured with. Table 1 has a section for each budget."""
    section = f"{config.data} {part}{f' {config.steps} steps' if part in ('methods', 'distances') else ''}"
    budget = f"batches of {config.batch_size}, networks {config.channels} wide, codewords of {config.code_width}"
    write_section(config.out, section, text, f"{budget}, trained in {resolve(config.precision)}")


def _ideal_mse(config: ReproduceHRVQVAE, images: ImageSet, leaves: int) -> float:
    """Returns the error of an ideal coder of a Gaussian source with the images' covariance, at the bits of one grid."""
    path = config.work / config.data / f"variances-{images.fingerprint[:12]}.json"
    variances = measure_once(path, lambda: {"variances": pixel_variances(images)})["variances"]
    return gaussian_distortion(torch.tensor(variances), bits_of(PAPER_GRID**2, leaves))


def methods_table(config: ReproduceHRVQVAE, specs: list[TokenizerSpec], *, ideal: Callable[[int], float]) -> str:
    """Formats Table 1: the mean over seeds with minimum and maximum. `ideal` gives an ideal coder's error by leaves."""
    paper = PAPER_MSE[config.data]
    lines = [
        f"Table 1, {config.data}: held-out MSE in [0, 1] units, the mean of {config.seeds} seed(s) and from the "
        f"least to the most, {config.steps} steps each.",
        "",
        "| | paper | ratio | by the paper's losses | ratio | leaves in use | at its best | ratio | leaves in use |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    results: dict[tuple[str, bool], list[dict[str, Any]]] = {(kind, p): [] for kind in KINDS for p in (True, False)}
    for spec in specs:
        if measured := result(spec, config):
            results[spec.kind, spec.plain].append(measured)
    for kind in KINDS:
        row = [NAMES[kind], f"{paper[kind]:.5f}", f"{paper[kind] / paper['vqvae']:.2f}"]
        for plain in (True, False):
            ours, vqvae = results[kind, plain], results["vqvae", plain]
            ratio = f"{_mean_mse(ours) / _mean_mse(vqvae):.2f}" if ours and vqvae else NOT_RUN
            errors = in_spread([each["mse"] for each in ours], ".6f")
            row += [errors, ratio, used(ours[0]) if ours else NOT_RUN]
        lines.append(table_row(row))
    seconds = statistics.mean([each["train_seconds"] for seeds in results.values() for each in seeds] or [0.0])
    below = (
        f"At the {bits_of(PAPER_GRID**2, LEAVES):.0f} bits of VQ-VAE and HR-VQVAE, an ideal coder of a Gaussian source "
        f"with the covariance of the training images has an MSE of {ideal(LEAVES):.3g}."
    )
    time = f"A run took {seconds:.0f} s on average, other work on the machine beside it."
    return "\n".join([*lines, "", f"{below} {time}"])


def search_table(config: ReproduceHRVQVAE, images: ImageSet) -> str:
    """Formats Table 2: search times of Table 1's models with smalti's defaults, of the first seed."""
    paper = PAPER_SECONDS[config.data]
    seconds = {kind: search_seconds(_model(config, kind, images), images) for kind in KINDS}
    lines = [
        f"Table 2, {config.data}: seconds to search the codes of {CODES_OF_IMAGES} images, {LEAVES} leaves. The "
        "paper's are of reconstructing them.",
        "",
        "| | paper | of HR-VQVAE's | ours | of HR-VQVAE's |",
        "|---|---:|---:|---:|---:|",
    ]
    for kind in KINDS:
        times = [(paper[kind], paper[kind] / paper["hrvq"]), (seconds[kind], seconds[kind] / seconds["hrvq"])]
        lines.append(table_row([NAMES[kind], *(f"{time:.3f} | {ratio:.1f}×" for time, ratio in times)]))
    return "\n".join(lines)


@torch.no_grad()
def pictures(config: ReproduceHRVQVAE, images: ImageSet) -> None:
    """Draws Figs. 1 and 8: decodes of single layers of HR-VQVAE, and of the coarsest levels of VQ-VAE-2."""
    rows = ImageRows(images, split="held_out", flips=False)
    batch = to_float(rows.spread(SHOWN)).to(best_device())
    linked, levels = (_model(config, kind, images) for kind in ("hrvq", "vqvae2"))
    sheet = {"original": batch, **layer_rows(linked, batch)}
    codes = levels.encode(batch)
    for count in range(len(codes), 0, -1):
        sheet[f"VQ-VAE-2, {count} of {len(codes)} levels"] = levels.decode(_coarsest(codes, count))
    save_sheet(path := config.picture("layers"), {caption: row.cpu() for caption, row in sheet.items()})
    write(config, "pictures", f"![What each layer and each level adds]({path.name})")


def layer_rows(linked: Tokenizer, batch: Float[Tensor, "b c h w"]) -> dict[str, Float[Tensor, "b c h w"]]:
    """Decodes the codes of images by layers: all, without the last ones, and without the first ones as in Fig. 1."""
    codes, depth = linked.encode(batch), len(linked.layout.levels[0].radices)
    chosen = [(0, end) for end in range(depth, 0, -1)] + [(first, depth) for first in range(1, depth)]
    return {
        f"HR-VQVAE, layer{f's {first + 1} to' if end - first > 1 else ''} {end}": linked.decode(
            codes, slice(first, end)
        )
        for first, end in chosen
    }


@torch.no_grad()
def reconstructions(
    config: ReproduceHRVQVAE, part: Literal["depth", "size"], specs: list[TokenizerSpec], images: ImageSet
) -> None:
    """Draws Fig. 4 (depth) or 7 (size): reconstructions of the first seed, by the paper's losses and at their best.

    Fig. 4 is of HR-VQVAE alone. Rows are named for the model and the branching of its layers.
    """
    batch = to_float(ImageRows(images, split="held_out", flips=False).spread(SHOWN))
    sheet = {"original": batch}
    for spec in specs:
        if spec.seed == 0 and spec.start == PAPER_START and (part == "size" or spec.kind == "hrvq"):
            tokenizer = trained(spec, config, images).tokenizer()
            model = f"{NAMES[spec.kind]} {'x'.join(map(str, branching_of(spec.leaves, spec.depth)))}"
            reconstructed = tokenizer.decode(tokenizer.encode(batch.to(best_device()))).cpu()
            sheet[f"{model}, {'plain' if spec.plain else 'at its best'}"] = reconstructed
    save_sheet(path := config.picture(f"{part}-reconstructions"), sheet)
    write(config, f"{part} pictures", f"![Reconstructions by {part}]({path.name})")


def _coarsest(codes: Codes, count: int) -> Codes:
    """Keeps the codes of the coarsest levels, and fills the finer ones with their most frequent code."""
    return tuple(
        grid if level < count else torch.full_like(grid, int(grid.flatten().mode().values))
        for level, grid in enumerate(codes)
    )


def _model(config: ReproduceHRVQVAE, kind: str, images: ImageSet) -> Tokenizer:
    """Loads Table 1's model with smalti's defaults, of the first seed; trains it if it was not."""
    methods = specs_by_part(replace(config, parts=("methods",)))["methods"]
    spec = next(spec for spec in methods if spec.kind == kind and not spec.plain)
    return trained(spec, config, images).tokenizer()


def _mean_mse(results: list[dict[str, Any]]) -> float:
    return statistics.mean(result["mse"] for result in results)
