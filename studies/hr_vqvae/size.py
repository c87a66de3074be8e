"""Fig. 6 of HR-VQVAE's paper: the error by the number of codewords, and by how they start."""

from collections.abc import Callable
from typing import Any

from matplotlib.figure import Figure

from smalti.benchmarks.comparison import NOT_RUN
from smalti.studies.experiment import save_figure, table_row
from smalti.studies.hr_vqvae.settings import ReproduceHRVQVAE
from smalti.studies.hr_vqvae.study import KINDS, NAMES, SIZES, TokenizerSpec, result, used

BEST = "best"
"""The name of the training in which no codebook collapses; the others are named by their start."""


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
    figure = Figure(figsize=(max(7.5, 2.4 * len(variants) + 1.5), 3.8), layout="constrained")
    panels = figure.subplots(1, len(variants), squeeze=False)[0]
    plain = [each["mse"] for (_, _, variant), each in measured.items() if each and variant != BEST]
    for axes, variant in zip(panels, variants, strict=True):
        axes.set(title=variant, xlabel="leaves", xscale="log", yscale="log")
        for kind in KINDS:
            points = [(leaves, each["mse"]) for leaves in SIZES if (each := measured.get((kind, leaves, variant)))]
            axes.plot([leaves for leaves, _ in points], [mse for _, mse in points], marker="o", label=NAMES[kind])
        if variant == BEST:
            axes.plot(SIZES, [ideal(leaves) for leaves in SIZES], "k--", label="ideal coder, Gaussian source")
        elif plain:  # one scale, which a training that diverges does not stretch
            axes.set_ylim(0.8 * min(plain), min(1.2 * max(plain), 10 * min(plain)))
    panels[0].set_ylabel("held-out MSE")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=4)
    save_figure(figure, path := config.picture("size"))
    return "\n".join([*lines, "", f"![MSE by leaves]({path.name})"])


def _variant(spec: TokenizerSpec) -> str:
    return f"plain, {spec.start}" if spec.plain else BEST


def _scores(measured: dict[str, Any] | None) -> str:
    if not measured:
        return NOT_RUN
    return f"{measured['mse']:.5f} ({used(measured)}; {', '.join(f'{each:.0f}' for each in measured['perplexity'])})"
