"""HR-VQVAE's error by training steps, at its best: trainings of several lengths, and the course of the longest one."""

from collections.abc import Callable

from matplotlib.figure import Figure

from smalti.core.provenance import logged_values
from smalti.studies.experiment import save_figure, table_row
from smalti.studies.hr_vqvae.settings import ReproduceHRVQVAE
from smalti.studies.hr_vqvae.study import CURVE_DECAY, LEAVES, TokenizerSpec, result, trial_of


def curve_table(
    config: ReproduceHRVQVAE, specs: list[TokenizerSpec], *, paper: float, ideal: Callable[[int], float]
) -> str:
    """Formats the error by training steps, and draws it beside the report.

    Args:
        config: of the study.
        specs: the tokenizers of the curve.
        paper: the error of HR-VQVAE in the paper's Table 1.
        ideal: a function that gives an ideal coder's error by leaves.
    """
    lines = [
        f"HR-VQVAE at its best on {config.data} by training steps, one seed, trained by Muon, the default of "
        f"train-tokenizer, with a decay of {CURVE_DECAY} of the codewords' running means. The learning rate of each "
        "training falls in its last half.",
        "",
        "| steps | held-out MSE | of the paper's | leaves in use | perplexity | minutes |",
        "|---:|---:|---:|---:|---:|---:|",
    ]
    points: list[tuple[int, float]] = []
    for spec in sorted(specs, key=lambda spec: spec.steps):
        if measured := result(spec, config):
            points.append((spec.steps, measured["mse"]))
            scores = [f"{measured['used'][0]:.1%}", f"{measured['perplexity'][0]:.0f}"]
            cells = [f"{spec.steps}", f"{measured['mse']:.6f}", f"{measured['mse'] / paper:.2f}", *scores]
            lines.append(table_row([*cells, f"{measured['train_seconds'] / 60:.0f}"]))
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.add_subplot(xlabel="training steps", ylabel="held-out MSE", xscale="log", yscale="log")
    axes.plot(*zip(*points, strict=True), marker="o", label="at the end of a training")
    longest = max(specs, key=lambda spec: spec.steps)
    if course := held_out_course(longest, config):
        axes.plot(*zip(*course, strict=True), lw=1, label="in the course of the longest")
    axes.axhline(paper, color="tab:red", ls="--", label=f"the paper's {paper}")
    axes.axhline(ideal(LEAVES), color="k", ls="--", label="ideal transform coder")
    figure.legend(loc="outside upper center", ncols=2)
    save_figure(figure, path := config.picture("curve"))
    return "\n".join([*lines, "", f"![MSE by training steps]({path.name})"])


def held_out_course(spec: TokenizerSpec, config: ReproduceHRVQVAE) -> list[tuple[int, float]]:
    """Returns the steps at which a training measured its held-out MSE, and the MSE; nothing if it was not trained."""
    folder = trial_of(spec, config).folder
    return list(logged_values(folder, "held_out_mse").items()) if result(spec, config) else []
