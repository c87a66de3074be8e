"""Fig. 5 of HR-VQVAE's paper: the error by layers of HR-VQVAE and by levels of VQ-VAE-2."""

import statistics
from itertools import pairwise
from typing import Any

from matplotlib.figure import Figure

from smalti.benchmarks.comparison import in_spread
from smalti.studies.experiment import save_figure, table_row
from smalti.studies.hr_vqvae.settings import ReproduceHRVQVAE
from smalti.studies.hr_vqvae.study import (
    DEPTH_LEAVES,
    DEPTHS,
    LEVELS,
    NAMES,
    PAPER_GRID,
    TokenizerSpec,
    branching_of,
    result,
)


def depth_table(config: ReproduceHRVQVAE, specs: list[TokenizerSpec]) -> str:
    """Formats Fig. 5 and draws it beside the report: means over seeds, and in how many seeds the MSE falls.

    HR-VQVAE with one layer is VQ-VAE, and so the row above the first one of VQ-VAE-2 too.
    """
    lines = [
        f"Fig. 5, {config.data}: HR-VQVAE of {DEPTH_LEAVES} leaves by layers, and VQ-VAE-2 of {DEPTH_LEAVES} codewords "
        f"a level by levels, {config.steps} steps; held-out MSE, the mean of {config.seeds} seed(s) and from the least "
        "to the most; in how many seeds it is below that of a layer or level less. Leaves in use and perplexity are "
        "means over levels. VQ-VAE-2 with one level is HR-VQVAE with one layer: VQ-VAE.",
        "",
        "| | layers, levels | codewords by layer, grids by level | by the paper's losses | below | leaves in use "
        "| perplexity | at its best | below | leaves in use | perplexity |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    measured = {
        (spec.kind, _count(spec), spec.plain, spec.seed): scores for spec in specs if (scores := result(spec, config))
    }

    def by_seed(kind: str, count: int, plain: bool) -> dict[int, dict[str, Any]]:
        keys = {seed: ("hrvq" if count == 1 else kind, count, plain, seed) for seed in range(config.seeds)}
        return {seed: measured[key] for seed, key in keys.items() if key in measured}

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.add_subplot(xlabel="layers of HR-VQVAE, levels of VQ-VAE-2", ylabel="held-out MSE", yscale="log")
    for kind, counts in (("hrvq", (0, *DEPTHS)), ("vqvae2", (1, *LEVELS))):
        for fewer, count in pairwise(counts):
            row = [NAMES[kind], str(count), _shape(kind, count)]
            for plain in (True, False):
                row += _cells(by_seed(kind, count, plain), by_seed(kind, fewer, plain))
            lines.append(table_row(row))
        for plain in (True, False):
            points = [
                (count, statistics.mean(each["mse"] for each in ours.values()))
                for count in counts
                if (ours := by_seed(kind, count, plain))
            ]
            how = "by the paper's losses" if plain else "at its best"
            axes.plot([x for x, _ in points], [y for _, y in points], marker="o", label=f"{NAMES[kind]}, {how}")
    figure.legend(loc="outside upper center", ncols=2)
    save_figure(figure, path := config.picture("depth"))
    return "\n".join([*lines, "", f"![MSE by layers and levels]({path.name})"])


def _cells(ours: dict[int, dict[str, Any]], fewer: dict[int, dict[str, Any]]) -> list[str]:
    """Formats results by seed, beside those of a layer or level less."""
    lower = [ours[seed]["mse"] < fewer[seed]["mse"] for seed in ours.keys() & fewer.keys()]
    shares, perplexities = ([statistics.mean(each[name]) for each in ours.values()] for name in ("used", "perplexity"))
    return [
        in_spread([each["mse"] for each in ours.values()], ".5f"),
        f"{sum(lower)} of {len(lower)}" if lower else "",
        in_spread(shares, ".0%"),
        in_spread(perplexities, ".0f"),
    ]


def _count(spec: TokenizerSpec) -> int:
    """Returns the number of layers of HR-VQVAE or of levels of VQ-VAE-2."""
    return spec.levels if spec.kind == "vqvae2" else spec.depth


def _shape(kind: str, count: int) -> str:
    """Names the branchings of the layers, or the sizes of the levels' grids."""
    if kind == "hrvq":
        return "·".join(map(str, branching_of(DEPTH_LEAVES, count)))
    return ", ".join(f"{size}×{size}" for size in (PAPER_GRID // 2**level for level in reversed(range(count))))
