"""Fig. 6 of HR-VQVAE's paper: the error by the number of codewords, and by how they start."""

from collections.abc import Callable
from typing import Any

from matplotlib.figure import Figure

from smalti.benchmarks.comparison import NOT_RUN
from smalti.studies.experiment import save_figure, table_row
from smalti.studies.hr_vqvae.settings import ReproduceHRVQVAE
from smalti.studies.hr_vqvae.study import KINDS, NAMES, SIZES, TokenizerSpec, result, used

LINES = ("-", "--", ":", "-.", (0, (1, 5)))
"""Styles of the lines: those at their best, and one for each of the four starts."""


def size_table(config: ReproduceHRVQVAE, specs: list[TokenizerSpec], *, ideal: Callable[[int], float]) -> str:
    """Formats Fig. 6, and draws it beside the report.

    Args:
        config: of the study.
        specs: the tokenizers of the figure.
        ideal: a function that gives an ideal coder's error by leaves.
    """
    variants = list(dict.fromkeys(_variant(spec) for spec in specs))
    lines = [
        f"Fig. 6, {config.data}: held-out MSE by leaves, {config.size_steps} steps, one seed; in brackets leaves in "
        f"use and perplexity, by level from the coarsest, over {config.usage_images} training images at most, of a "
        f"flat codebook of {SIZES[-1]} over an eighth of them.",
        "",
        f"| leaves | | {' | '.join(variants)} |",
        f"|---:|---|{'---:|' * len(variants)}",
    ]
    measured = {(spec.kind, spec.leaves, _variant(spec)): result(spec, config) for spec in specs}
    for leaves in SIZES:
        for kind in KINDS:
            scores = [_scores(measured.get((kind, leaves, variant))) for variant in variants]
            lines.append(table_row([str(leaves), NAMES[kind], *scores]))
    figure = Figure(figsize=(6, 4.5), layout="constrained")
    axes = figure.add_subplot(xlabel="leaves", ylabel="held-out MSE", xscale="log", yscale="log")
    for colour, kind in enumerate(KINDS):
        for style, variant in zip(LINES[: len(variants)], variants, strict=True):
            points = [(leaves, each["mse"]) for leaves in SIZES if (each := measured.get((kind, leaves, variant)))]
            if points:
                label = f"{NAMES[kind]}, {variant}"
                axes.plot(*zip(*points, strict=True), marker="o", color=f"C{colour}", ls=style, label=label)
    axes.plot(SIZES, [ideal(leaves) for leaves in SIZES], "k--", label="ideal coder, Gaussian source")
    figure.legend(loc="outside upper center", ncols=2, fontsize="small")
    save_figure(figure, path := config.picture("size"))
    return "\n".join([*lines, "", f"![MSE by leaves]({path.name})"])


def _variant(spec: TokenizerSpec) -> str:
    return f"plain, {spec.start}" if spec.plain else "best"


def _scores(measured: dict[str, Any] | None) -> str:
    if not measured:
        return NOT_RUN
    return f"{measured['mse']:.5f} ({used(measured)}; {', '.join(f'{each:.0f}' for each in measured['perplexity'])})"
