"""What is written of the HR-VQVAE paper's study of generation: Table 3, samples, and the heads of PixelCNN; and the
distances of Table 1, which are of the same features.

Which priors there are and what is measured of them: `reproduce_samples.py`.
"""

import statistics
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any, TypeAlias

import torch

from smalti.benchmarks.comparison import in_seconds, in_spread
from smalti.images.decoding import to_float
from smalti.images.image_set import ImageSet
from smalti.images.sheets import save_sheet
from smalti.studies.hr_vqvae.samples import PRIORS, Drawn, Judge, bits, floor, prior_folder, reconstructed, sampled
from smalti.studies.hr_vqvae.study import KINDS, LEAVES, NAMES, PAPER_GRID, Cell, DataName, Reproduce, result, trained

PAPER_FRECHET: dict[DataName, dict[str, float]] = {
    "mnist": {"vqvae": 16.69, "vqvae2": 11.81, "hrvq": 11.75},
    "cifar10": {"vqvae": 78.90, "vqvae2": 74.43, "hrvq": 71.38},
}
"""Table 3: of samples by PixelCNN, by Inception's features."""
PAPER_RECONSTRUCTED: dict[DataName, dict[str, float]] = {
    "mnist": {"vqvae": 7.9, "vqvae2": 6.7, "hrvq": 6.1},
    "cifar10": {"vqvae": 21.65, "vqvae2": 18.03, "hrvq": 18.11},
}
"""Table 1: of reconstructions, by the same."""
PRIOR_NAMES = {"pixelcnn": "PixelCNN", "hourglass": "hourglass"}
RECONSTRUCTED = "reconstructed"
Found: TypeAlias = dict[tuple[str, str], list[dict[str, Any]]]
"""What was measured of each seed, by kind of tokenizer and of prior; or, in a prior's place, `RECONSTRUCTED`."""


def distances(config: Reproduce, runs: Sequence[Cell], images: ImageSet, write: Callable[[str], None]) -> None:
    """Trains and measures what is missing of Table 1's Fréchet distances, and writes the table after each run."""
    judge = Judge(config)
    real, found = floor(config, judge), {(kind, plain): [] for kind in KINDS for plain in (True, False)}
    for run in runs:
        found[run.kind, run.plain].append(reconstructed(run, config, images, judge))
        write(distances_table(config, found, real))


def distances_table(
    config: Reproduce, found: Mapping[tuple[str, bool], Sequence[dict[str, Any]]], real: dict[str, Any]
) -> str:
    """Table 1's distances of what there is, by kind and whether trained plainly; `real` as in `samples_table`."""
    settings = config.generating
    lines = [
        f"Table 1, {config.data}: Fréchet distance ({settings.extractor}) of the reconstructions of {real['num']} "
        f"held-out images to {settings.reference} training images; of the images themselves it is "
        f"{real['frechet']:.1f}. {config.steps} steps; means over {config.seeds} seed(s), and from the least to "
        "the most.",
        "",
        "| | paper: FID | trained as the paper | at its best |",
        "|---|---:|---:|---:|",
    ]
    for kind in KINDS:
        ours = [_each(found[kind, plain], "frechet", ".1f") for plain in (True, False)]
        lines.append(f"| {NAMES[kind]} | {PAPER_RECONSTRUCTED[config.data][kind]} | {' | '.join(ours)} |")
    return "\n".join(lines)


def samples(config: Reproduce, runs: Sequence[Cell], images: ImageSet, write: Callable[[str], None]) -> None:
    """Trains and measures what is missing of Table 3, run by run, and writes the table and the sheet after each."""
    judge = Judge(config)
    real = floor(config, judge)
    found: Found = {}
    for run in runs:
        trained(run, config, images)
        tokenizer = result(run, config)
        assert tokenizer is not None, "measured when it was trained"
        found.setdefault((run.kind, RECONSTRUCTED), []).append(tokenizer | reconstructed(run, config, images, judge))
        for prior in PRIORS:
            drawn = Drawn(run, prior)
            measured = sampled(drawn, config, images, judge)
            if prior == "pixelcnn":
                measured |= bits(drawn, config, images)
            found.setdefault((run.kind, prior), []).append(measured)
            write(f"{samples_table(config, found, real)}\n\n{sheet(config, runs)}")


def samples_table(config: Reproduce, found: Found, real: dict[str, Any]) -> str:
    """Table 3, the tokenizers' held-out MSE (in [0, 1] units) beside, and what became of the paper's order.

    Args:
        config: the budgets.
        found: what there is so far.
        real: see `floor`.
    """
    paper, settings = PAPER_FRECHET[config.data], config.generating
    lines = [
        f"Table 3, {config.data}: Fréchet distance ({settings.extractor}) of {real['num']} samples to "
        f"{settings.reference} training images; of as many held-out images it is {real['frechet']:.1f}. Means over "
        f"seeds, and from the least to the most; MSE in [0, 1] units. {_budget(config)}",
        "",
        "| | seeds | paper: FID | MSE | reconstructions | PixelCNN | bits per image | s per image | parameters | "
        "hourglass | s per image | parameters |",
        f"|---|{'---:|' * 11}",
    ]
    for kind in KINDS:
        of = {who: found.get((kind, who), []) for who in (RECONSTRUCTED, *PRIORS)}
        row = [NAMES[kind], str(len(of["hourglass"])), f"{paper[kind]:.2f}"]
        row += [_each(of[RECONSTRUCTED], name, form) for name, form in (("mse", ".5f"), ("frechet", ".1f"))]
        for prior in PRIORS:
            row.append(_each(of[prior], "frechet", ".1f"))
            if prior == "pixelcnn":
                row.append(_each(of[prior], "per_image", ".1f"))
            row += [_seconds(of[prior]), f"{of[prior][0]['parameters']:,}" if of[prior] else ""]
        lines.append(f"| {' | '.join(row)} |")
    verdicts = [order({kind: _of(found.get((kind, prior), []), "frechet") for kind in KINDS}) for prior in PRIORS]
    said = [f"- {PRIOR_NAMES[prior]}: {verdict}" for prior, verdict in zip(PRIORS, verdicts, strict=True)]
    theirs = f"The paper's order is {' < '.join(NAMES[kind] for kind in _order(paper))}."
    return "\n".join([*lines, "", theirs, "", *said])


def order(distances: Mapping[str, Sequence[float]]) -> str:
    """Whether the paper's order is ours, by the means of the seeds that all have and, step by step, in each of them."""
    seeds = min(map(len, distances.values()))
    if not seeds:
        return "not run."
    distances = {kind: values[:seeds] for kind, values in distances.items()}
    ours = sorted(distances, key=lambda kind: statistics.mean(distances[kind]))
    theirs = _order(PAPER_FRECHET["mnist"])
    steps = []
    for better, worse in pairwise(theirs):
        below = sum(a < b for a, b in zip(distances[better], distances[worse], strict=True))
        apart = max(distances[better]) < min(distances[worse]) or min(distances[better]) > max(distances[worse])
        within = "" if apart else ", less apart than the seeds are"
        steps.append(f"{NAMES[better]} is below {NAMES[worse]} in {below} of {seeds} seed(s){within}")
    verdict = "confirmed" if ours == theirs else "refuted"
    return f"{' < '.join(NAMES[kind] for kind in ours)}, by the means: {verdict} at this budget; {'; '.join(steps)}."


def sheet(config: Reproduce, runs: Sequence[Cell]) -> str:
    """The first samples of each prior that is there, of the first seed, drawn beside the report."""
    rows = {}
    for run in (run for run in runs if run.seed == 0):
        for prior in PRIORS:
            path = prior_folder(Drawn(run, prior), config) / "samples.pt"
            if path.exists():
                rows[f"{NAMES[run.kind]}, {PRIOR_NAMES[prior]}"] = to_float(torch.load(path, weights_only=True))
    path = config.picture("samples")
    save_sheet(path, rows)
    return f"![The first samples of each, of the first seed]({path.name})"


def heads(config: Reproduce, runs: Sequence[Cell], images: ImageSet, write: Callable[[str], None]) -> None:
    """Trains what is missing of PixelCNN with both heads on HR-VQVAE's codes, and writes the table after each pair."""
    pairs: list[tuple[dict[str, Any], dict[str, Any]]] = []
    for run in runs:
        digits, flat = (bits(Drawn(run, "pixelcnn", flat=flat), config, images) for flat in (False, True))
        pairs.append((digits, flat))
        write(heads_table(config, pairs))


def heads_table(config: Reproduce, pairs: Sequence[tuple[dict[str, Any], dict[str, Any]]]) -> str:
    """Held-out bits per code of each seed's tokenizer, by both heads."""
    budget = config.generating
    lines = [
        f"HR-VQVAE's codes, {config.data}, {budget.grid}×{budget.grid} of {LEAVES} leaves, PixelCNN "
        f"{budget.pixelcnn_width} wide, {budget.prior_steps} steps of {budget.prior_batch_size} rows each: held-out "
        "bits per code, exactly, ± the standard error over rows.",
        "",
        "| seed | rows | digit by digit | one softmax over all | saved |",
        "|---:|---:|---:|---:|---:|",
    ]
    for seed, (digits, flat) in enumerate(pairs):
        cells = [f"{each['per_code'][0]:.4f} ± {each['standard_errors'][0]:.4f}" for each in (digits, flat)]
        saved = flat["per_code"][0] - digits["per_code"][0]
        lines.append(f"| {seed} | {digits['rows']} | {' | '.join(cells)} | {saved:+.4f} |")
    return "\n".join(lines)


def _order(distances: Mapping[str, float]) -> list[str]:
    return sorted(distances, key=lambda kind: distances[kind])


def _budget(config: Reproduce) -> str:
    budget, side = config.generating, config.generating.grid
    than = "" if side == PAPER_GRID else f", where the paper has {PAPER_GRID}×{PAPER_GRID}"
    above = f"{side // 2}×{side // 2} and {side // 4}×{side // 4} above them in VQ-VAE-2"
    steps = f"tokenizers {config.steps} steps, each prior {budget.prior_steps} of {budget.prior_batch_size} rows"
    widths = f"PixelCNN {budget.pixelcnn_width} wide, the hourglass {budget.hourglass_width}"
    return f"{side}×{side} codes{than}, and {above}; {steps}; {widths}."


def _of(results: Sequence[dict[str, Any]], name: str) -> list[float]:
    return [result[name] for result in results]


def _each(results: Sequence[dict[str, Any]], name: str, form: str) -> str:
    return in_spread(_of(results, name), form)


def _seconds(results: Sequence[dict[str, Any]]) -> str:
    return in_seconds(statistics.median(_of(results, "seconds"))) if results else ""
