"""Fig. 5 of HR-VQVAE's paper: the error by layers of HR-VQVAE and by levels of VQ-VAE-2."""

import statistics
from itertools import pairwise

from matplotlib.figure import Figure

from smalti.benchmarks.comparison import in_spread
from smalti.studies.experiment import save_figure, table_row
from smalti.studies.hr_vqvae.settings import ReproduceHRVQVAE
from smalti.studies.hr_vqvae.study import DEPTH_LEAVES, DEPTHS, LEVELS, PAPER_GRID, TokenizerSpec, branching_of, result


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
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.add_subplot(xlabel="layers of HR-VQVAE, levels of VQ-VAE-2", ylabel="held-out MSE", yscale="log")
    for kind, name, counts in (("hrvq", "HR-VQVAE", DEPTHS), ("vqvae2", "VQ-VAE-2", (1, *LEVELS))):
        rows = {count: [name, str(count), _shape(kind, count)] for count in counts}
        for plain in (True, False):
            points: list[tuple[int, float]] = []
            for before, count in pairwise((0, *counts)):
                ours, fewer = (
                    {
                        seed: measured[key]
                        for seed in range(config.seeds)
                        if (key := ("hrvq" if n == 1 else kind, n, plain, seed)) in measured
                    }
                    for n in (count, before)
                )
                errors = [scores["mse"] for scores in ours.values()]
                lower = [ours[seed]["mse"] < fewer[seed]["mse"] for seed in ours.keys() & fewer.keys()]
                rows[count] += [in_spread(errors, ".5f"), f"{sum(lower)} of {len(lower)}" if lower else ""]
                rows[count] += [in_spread([statistics.mean(each["used"]) for each in ours.values()], ".0%")]
                rows[count] += [in_spread([statistics.mean(each["perplexity"]) for each in ours.values()], ".0f")]
                points += [(count, statistics.mean(errors))] if errors else []
            if points:
                how = "by the paper's losses" if plain else "at its best"
                axes.plot(*zip(*points, strict=True), marker="o", label=f"{name}, {how}")
        lines += [table_row(rows[count]) for count in counts if kind == "hrvq" or count > 1]
    axes.legend()
    save_figure(figure, path := config.picture("depth"))
    return "\n".join([*lines, "", f"![MSE by layers and levels]({path.name})"])


def _count(spec: TokenizerSpec) -> int:
    """Returns the number of layers of HR-VQVAE or of levels of VQ-VAE-2."""
    return spec.levels if spec.kind == "vqvae2" else spec.depth


def _shape(kind: str, count: int) -> str:
    """Names the branchings of the layers, or the sizes of the levels' grids."""
    if kind == "hrvq":
        return "·".join(map(str, branching_of(DEPTH_LEAVES, count)))
    return ", ".join(f"{size}×{size}" for size in (PAPER_GRID // 2**level for level in reversed(range(count))))
