"""The report of generation in the study of HR-VQVAE: Table 3, samples, PixelCNN's heads, and Table 1's distances.

The priors and the measurements are in `samples.py`. The other tables are in `report.py`.
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
from smalti.studies.experiment import table_row
from smalti.studies.hr_vqvae.samples import (
    PRIORS,
    PriorSpec,
    code_bits,
    evaluator_of,
    prior_trial,
    real_scores,
    reconstruction_scores,
    sample_scores,
)
from smalti.studies.hr_vqvae.settings import DataName, ReproduceHRVQVAE
from smalti.studies.hr_vqvae.study import KINDS, LEAVES, NAMES, PAPER_GRID, TokenizerSpec, result, trained

PAPER_FRECHET: dict[DataName, dict[str, float]] = {
    "mnist": {"vqvae": 16.69, "vqvae2": 11.81, "hrvq": 11.75},
    "cifar10": {"vqvae": 78.90, "vqvae2": 74.43, "hrvq": 71.38},
}
"""Table 3: Fréchet distances of PixelCNN's samples, by Inception's features."""
PAPER_RECONSTRUCTED: dict[DataName, dict[str, float]] = {
    "mnist": {"vqvae": 7.9, "vqvae2": 6.7, "hrvq": 6.1},
    "cifar10": {"vqvae": 21.65, "vqvae2": 18.03, "hrvq": 18.11},
}
"""Table 1: Fréchet distances of reconstructions, by Inception's features."""
PRIOR_NAMES = {"pixelcnn": "PixelCNN", "hourglass": "hourglass"}
RECONSTRUCTED = "reconstructed"
Results: TypeAlias = dict[tuple[str, str], list[dict[str, Any]]]
"""The results of each seed, by kind of tokenizer and kind of prior (or `RECONSTRUCTED`)."""


def distances(
    config: ReproduceHRVQVAE, specs: Sequence[TokenizerSpec], images: ImageSet, write: Callable[[str], None]
) -> None:
    """Trains and measures what is missing for Table 1's Fréchet distances; writes the table after each tokenizer."""
    evaluator = evaluator_of(config)
    real = real_scores(config, images, evaluator)
    results = {(kind, plain): [] for kind in KINDS for plain in (True, False)}
    for spec in specs:
        results[spec.kind, spec.plain].append(reconstruction_scores(spec, config, images, evaluator))
        write(distances_table(config, results, real))


def distances_table(
    config: ReproduceHRVQVAE, results: Mapping[tuple[str, bool], Sequence[dict[str, Any]]], real: dict[str, Any]
) -> str:
    """Formats Table 1's Fréchet distances.

    Args:
        config: The budgets.
        results: The results so far, by kind and by whether codebooks were trained as in the paper.
        real: The scores of the held-out images (`real_scores`).
    """
    settings = config.generating
    lines = [
        f"Table 1, {config.data}: Fréchet distance ({settings.extractor}) of the reconstructions of {real['num']} "
        f"held-out images to {settings.reference} training images; of the images themselves it is "
        f"{real['frechet']:.1f}. {config.steps} steps; means over {config.seeds} seed(s), and from the least to "
        "the most.",
        "",
        "| | paper: FID | by the paper's losses | at its best |",
        "|---|---:|---:|---:|",
    ]
    for kind in KINDS:
        ours = [_spread(results[kind, plain], "frechet", ".1f") for plain in (True, False)]
        lines.append(table_row([NAMES[kind], str(PAPER_RECONSTRUCTED[config.data][kind]), *ours]))
    return "\n".join(lines)


def samples(
    config: ReproduceHRVQVAE, specs: Sequence[TokenizerSpec], images: ImageSet, write: Callable[[str], None]
) -> None:
    """Trains and measures what is missing for Table 3; writes the table and the samples after each prior."""
    evaluator = evaluator_of(config)
    real = real_scores(config, images, evaluator)
    results: Results = {}
    for spec in specs:
        trained(spec, config, images)
        tokenizer = result(spec, config)
        assert tokenizer is not None, "it is measured when it is trained"
        reconstructions = reconstruction_scores(spec, config, images, evaluator)
        results.setdefault((spec.kind, RECONSTRUCTED), []).append(tokenizer | reconstructions)
        for prior in PRIORS:
            prior_spec = PriorSpec(spec, prior)
            scores = sample_scores(prior_spec, config, images, evaluator)
            if prior == "pixelcnn":
                scores |= code_bits(prior_spec, config, images)
            results.setdefault((spec.kind, prior), []).append(scores)
            write(f"{samples_table(config, results, real)}\n\n{sheet(config, specs)}")


def samples_table(config: ReproduceHRVQVAE, results: Results, real: dict[str, Any]) -> str:
    """Formats Table 3 with the tokenizers' held-out MSE (in [0, 1] units), and compares the order with the paper's.

    Args:
        config: The budgets.
        results: The results so far.
        real: The scores of the held-out images (`real_scores`).
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
        of_kind = {name: results.get((kind, name), []) for name in (RECONSTRUCTED, *PRIORS)}
        row = [NAMES[kind], str(len(of_kind["hourglass"])), f"{paper[kind]:.2f}"]
        row += [_spread(of_kind[RECONSTRUCTED], name, form) for name, form in (("mse", ".5f"), ("frechet", ".1f"))]
        for prior in PRIORS:
            row.append(_spread(of_kind[prior], "frechet", ".1f"))
            if prior == "pixelcnn":
                row.append(_spread(of_kind[prior], "per_image", ".1f"))
            row += [_seconds(of_kind[prior]), f"{of_kind[prior][0]['parameters']:,}" if of_kind[prior] else ""]
        lines.append(table_row(row))
    verdicts = [order({kind: _values(results.get((kind, prior), []), "frechet") for kind in KINDS}) for prior in PRIORS]
    verdict_lines = [f"- {PRIOR_NAMES[prior]}: {verdict}" for prior, verdict in zip(PRIORS, verdicts, strict=True)]
    paper_order = f"The paper's order is {' < '.join(NAMES[kind] for kind in _order(paper))}."
    return "\n".join([*lines, "", paper_order, "", *verdict_lines])


def order(distances: Mapping[str, Sequence[float]]) -> str:
    """Compares the order of the distances with the paper's: by the means over common seeds, and seed by seed."""
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


def sheet(config: ReproduceHRVQVAE, specs: Sequence[TokenizerSpec]) -> str:
    """Draws the first samples of each trained prior of the first seed beside the report; returns Markdown."""
    rows = {}
    for spec in (spec for spec in specs if spec.seed == 0):
        for prior in PRIORS:
            path = prior_trial(PriorSpec(spec, prior), config).folder / "samples.pt"
            if path.exists():
                rows[f"{NAMES[spec.kind]}, {PRIOR_NAMES[prior]}"] = to_float(torch.load(path, weights_only=True))
    path = config.picture("samples")
    save_sheet(path, rows)
    return f"![The first samples of each, of the first seed]({path.name})"


def heads(
    config: ReproduceHRVQVAE, specs: Sequence[TokenizerSpec], images: ImageSet, write: Callable[[str], None]
) -> None:
    """Trains and measures PixelCNN with both heads on HR-VQVAE's codes; writes the table after each pair."""
    pairs: list[tuple[dict[str, Any], dict[str, Any]]] = []
    for spec in specs:
        digits, flat = (code_bits(PriorSpec(spec, "pixelcnn", flat=flat), config, images) for flat in (False, True))
        pairs.append((digits, flat))
        write(heads_table(config, pairs))


def heads_table(config: ReproduceHRVQVAE, pairs: Sequence[tuple[dict[str, Any], dict[str, Any]]]) -> str:
    """Formats the held-out bits per code by both heads, for the tokenizer of each seed."""
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
        lines.append(table_row([str(seed), str(digits["rows"]), *cells, f"{saved:+.4f}"]))
    return "\n".join(lines)


def _order(distances: Mapping[str, float]) -> list[str]:
    return sorted(distances, key=lambda kind: distances[kind])


def _budget(config: ReproduceHRVQVAE) -> str:
    budget, side = config.generating, config.generating.grid
    than = "" if side == PAPER_GRID else f", where the paper has {PAPER_GRID}×{PAPER_GRID}"
    coarser = f"{side // 2}×{side // 2} and {side // 4}×{side // 4} above them in VQ-VAE-2"
    steps = f"tokenizers {config.steps} steps, each prior {budget.prior_steps} of {budget.prior_batch_size} rows"
    widths = f"PixelCNN {budget.pixelcnn_width} wide, the hourglass {budget.hourglass_width}"
    return f"{side}×{side} codes{than}, and {coarser}; {steps}; {widths}."


def _values(results: Sequence[dict[str, Any]], name: str) -> list[float]:
    return [result[name] for result in results]


def _spread(results: Sequence[dict[str, Any]], name: str, form: str) -> str:
    return in_spread(_values(results, name), form)


def _seconds(results: Sequence[dict[str, Any]]) -> str:
    return in_seconds(statistics.median(_values(results, "seconds"))) if results else ""
