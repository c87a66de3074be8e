"""What is written of the HR-VQVAE paper's studies: our numbers beside the paper's, in tables, plots and pictures.

Which runs there are and what is measured of them: `reproduce.py`. Table 3 and the heads: `reproduce_samples_report.py`.
"""

import statistics
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from matplotlib.figure import Figure

from smalti.benchmarks.comparison import in_spread
from smalti.benchmarks.run import insert
from smalti.commands.model_paths import load_tokenizer
from smalti.core.codes import Codes
from smalti.core.devices import best_device, resolve
from smalti.core.files import whole_file
from smalti.core.provenance import machine
from smalti.images.decoding import to_float
from smalti.images.image_set import ImageRows, ImageSet
from smalti.images.sheets import save_sheet
from smalti.studies.hr_vqvae.samples_report import distances, heads, samples
from smalti.studies.hr_vqvae.study import (
    CODES_OF_IMAGES,
    DEPTH_LEAVES,
    DEPTHS,
    KINDS,
    LEAVES,
    NAMES,
    SIZES,
    Cell,
    DataName,
    Reproduce,
    cells,
    open_data,
    result,
    search_seconds,
    trained,
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
SHOWN = 12  # images in a row of a picture
NONE = "not run"


def reproduce(config: Reproduce) -> None:
    """Trains and measures what is missing, part by part, and writes each part of the report as soon as it is there.

    Raises:
        UserError: for images that will not do.
        Interrupted: if a signal stopped a run; the same command goes on with it.
    """
    torch.manual_seed(0)
    images = open_data(config)
    parts: dict[str, Callable[[Reproduce, list[Cell]], str]] = {
        "methods": methods_table,
        "depth": depth_table,
        "size": size_table,
    }
    by_judges = {"distances": distances, "samples": samples, "heads": heads}
    for part, runs in cells(config).items():
        if part in by_judges:
            by_judges[part](config, runs, images, partial(write, config, part))
            continue
        for run in runs:
            trained(run, config, images)
            write(config, part, parts[part](config, runs))
        if part == "search":
            write(config, part, search_table(config, images))
        if part == "methods":
            pictures(config, images)


def write(config: Reproduce, part: str, text: str) -> None:
    """Puts a part into the report, with what it was measured on."""
    budget = f"batches of {config.batch_size}, networks {config.channels} wide, codewords of {config.code_width}"
    insert(
        config.out, f"{config.data} {part}", f"{text}\n\n{machine()}; {budget}, trained in {resolve(config.precision)}."
    )


def methods_table(config: Reproduce, runs: list[Cell]) -> str:
    """Table 1: means over seeds, and from the least to the most."""
    paper = PAPER_MSE[config.data]
    lines = [
        f"Table 1, {config.data}: held-out MSE in [0, 1] units, the mean of {config.seeds} seed(s) and from the "
        f"least to the most, {config.steps} steps each.",
        "",
        "| | paper | ratio | trained as the paper | ratio | leaves in use | at its best | ratio | leaves in use |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    found = {
        (kind, plain): [r for run in runs if (run.kind, run.plain) == (kind, plain) if (r := result(run, config))]
        for kind in KINDS
        for plain in (True, False)
    }
    for kind in KINDS:
        row = [NAMES[kind], f"{paper[kind]:.5f}", f"{paper[kind] / paper['vqvae']:.2f}"]
        for plain in (True, False):
            results, flat = found[kind, plain], found["vqvae", plain]
            ratio = f"{_mean(results) / _mean(flat):.2f}" if results and flat else NONE
            errors = in_spread([result["mse"] for result in results], ".5f")
            row += [errors, ratio, _used(results[0]) if results else NONE]
        lines.append(f"| {' | '.join(row)} |")
    seconds = statistics.mean([r["train_seconds"] for each in found.values() for r in each] or [0.0])
    return "\n".join([*lines, "", f"A run took {seconds:.0f} s on average, other work on the machine beside it."])


def depth_table(config: Reproduce, runs: list[Cell]) -> str:
    """Fig. 5: means over seeds, and in how many seeds a depth is ahead of the one before."""
    lines = [
        f"Fig. 5, {config.data}: HR-VQVAE of {DEPTH_LEAVES} leaves by depth, {config.steps} steps; held-out MSE, the "
        f"mean of {config.seeds} seed(s) and from the least to the most; in how many seeds it is below the row above.",
        "",
        "| layers | codewords of a codebook | trained as the paper | below | leaves in use | perplexity "
        "| at its best | below | leaves in use | perplexity |",
        "|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    found = {(run.depth, run.plain, run.seed): result(run, config) for run in runs}
    for before, depth in pairwise((0, *DEPTHS)):
        row = [str(depth), str(round(DEPTH_LEAVES ** (1 / depth)))]
        for plain in (True, False):
            pairs = [(found[depth, plain, seed], found.get((before, plain, seed))) for seed in range(config.seeds)]
            results = [here for here, _ in pairs if here]
            compared = [here["mse"] < above["mse"] for here, above in pairs if here and above]
            below = f"{sum(compared)} of {len(compared)}" if compared else ""
            row += [in_spread([r["mse"] for r in results], ".5f"), below]
            row += [in_spread([r["used"][0] for r in results], ".0%")]
            row += [in_spread([r["perplexity"][0] for r in results], ".0f")]
        lines.append(f"| {' | '.join(row)} |")
    return "\n".join(lines)


def size_table(config: Reproduce, runs: list[Cell]) -> str:
    """Fig. 6, also drawn beside the report."""
    lines = [
        f"Fig. 6, {config.data}: by leaves, {config.size_steps} steps, one seed; use and perplexity over "
        f"{config.usage_images} training images at most, of a flat codebook of {SIZES[-1]} over an eighth of them.",
        "",
        "| leaves | | held-out MSE | leaves in use | perplexity |",
        "|---:|---|---:|---:|---:|",
    ]
    curves: dict[str, list[tuple[int, float]]] = {}
    for run in runs:
        found, name = result(run, config), f"{NAMES[run.kind]}, {'plain' if run.plain else 'best'}"
        lines.append(f"| {run.leaves} | {name} | {_numbers(found)} |")
        if found:
            curves.setdefault(name, []).append((run.leaves, found["mse"]))
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.add_subplot(xlabel="leaves", ylabel="held-out MSE", xscale="log", yscale="log")
    for name, points in curves.items():
        axes.plot(*zip(*points, strict=True), marker="o", label=name)
    axes.legend()
    with whole_file(path := config.picture("size")) as partial:
        figure.savefig(partial, format="png", dpi=100)
    return "\n".join([*lines, "", f"![MSE by leaves]({path.name})"])


def search_table(config: Reproduce, images: ImageSet) -> str:
    """Table 2, of the models of Table 1 at their best, the first seed."""
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
        theirs, our = paper[kind] / paper["hrvq"], seconds[kind] / seconds["hrvq"]
        lines.append(f"| {NAMES[kind]} | {paper[kind]:.3f} | {theirs:.1f}× | {seconds[kind]:.3f} | {our:.1f}× |")
    return "\n".join(lines)


@torch.no_grad()
def pictures(config: Reproduce, images: ImageSet) -> None:
    """Figs. 1 and 8: what each layer of HR-VQVAE adds, and what each level of VQ-VAE-2 does."""
    rows = ImageRows(images, split="held_out", flips=False)
    batch = to_float(rows.spread(SHOWN)).to(best_device())
    linked, levels = (_model(config, kind, images) for kind in ("hrvq", "vqvae2"))
    codes = linked.encode(batch)
    sheet = {"original": batch}
    digits = len(linked.layout.levels[0].radices)
    for count in range(digits, 0, -1):
        sheet[f"HR-VQVAE, {count} of {digits} layers"] = linked.decode(codes, count)
    codes = levels.encode(batch)
    for count in range(len(codes), 0, -1):
        sheet[f"VQ-VAE-2, {count} of {len(codes)} levels"] = levels.decode(_coarsest(codes, count))
    save_sheet(config.picture("layers"), {caption: row.cpu() for caption, row in sheet.items()})
    write(config, "pictures", f"![What each layer and each level adds]({config.picture('layers').name})")


def _coarsest(codes: Codes, count: int) -> Codes:
    """The coarsest levels as they are; the finer ones hold their most frequent code everywhere."""
    return tuple(
        grid if level < count else torch.full_like(grid, int(grid.flatten().mode().values))
        for level, grid in enumerate(codes)
    )


def _model(config: Reproduce, kind: str, images: ImageSet) -> Tokenizer:
    """The first seed's of Table 1 at its best, trained if it was not."""
    methods = cells(Reproduce(**{**vars(config), "parts": ("methods",)}))["methods"]
    run = next(run for run in methods if run.kind == kind and not run.plain)
    return load_tokenizer(str(trained(run, config, images))).to(best_device())


def _mean(results: list[dict[str, Any]]) -> float:
    return statistics.mean(found["mse"] for found in results)


def _used(found: dict[str, Any]) -> str:
    return ", ".join(f"{share:.0%}" for share in found["used"])


def _numbers(found: dict[str, Any] | None) -> str:
    if not found:
        return f"{NONE} | |"
    return f"{found['mse']:.5f} | {_used(found)} | {', '.join(f'{p:.0f}' for p in found['perplexity'])}"
