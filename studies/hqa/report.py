"""The report of the study of HQA: our numbers beside the paper's, in tables, plots and pictures.

The tokenizers and the measurements are in `study.py`.
"""

from typing import cast

import torch
from matplotlib.figure import Figure
from torch import Tensor

from smalti.benchmarks.comparison import in_spread
from smalti.benchmarks.run import insert
from smalti.core.devices import best_device, resolve
from smalti.images.sheets import save_sheet
from smalti.studies.experiment import Trial, picture_path, save_figure, table_row, write_section
from smalti.studies.hqa.classifier import ClassifierEvaluator
from smalti.studies.hqa.four_modes import MODES, Decoded, four_modes, real_points
from smalti.studies.hqa.study import (
    CURVES,
    HQAS,
    MODELS,
    Data,
    ReproduceHQA,
    compressed,
    evaluator_of,
    interpolations,
    is_sampled,
    measured,
    open_data,
    rate_curve,
    trained,
)
from smalti.tokenizers.hqa.hqa import HQA

NAMES = {
    "vqvae": "VQ-VAE",
    "hams": "HAMs",
    "hams-gs": "HAMs + GS",
    "hams-mse": "HAMs + MSE",
    "hams-gs-mse": "HAMs + GS + MSE",
    "hqa": "HQA",
    "hams-gs-mse-principal": "HAMs + GS + MSE, principal encoders",
    "hqa-principal": "HQA, principal encoders",
}
PAPER = {
    "vqvae": (0.040, 85.9, 21.6),
    "hams": (0.090, 45.6, 29.9),
    "hams-gs": (0.108, 38.6, 51.1),
    "hams-mse": (0.052, 36.0, 11.1),
    "hams-gs-mse": (0.054, 21.0, 10.6),
    "hqa": (0.053, 22.8, 12.4),
}
"""Table 3's rows: MSE, Fréchet distance of reconstructions, classification error in per cent."""
SHOWN, INTERPOLATED, PAIRS = 10, 10, 4
"""Images in a row of reconstructions, points of an interpolation, and pairs of images that are interpolated."""
ORDER = ("hqa-principal", "hqa", "vqvae", "hams-gs-mse-principal", "hams-gs-mse", "hams-mse", "hams", "hams-gs")
"""Order of training, extremes first, so that a study that is stopped early has them."""


def reproduce_hqa(config: ReproduceHQA) -> None:
    """Trains and measures what is missing, part by part, and writes each part of the report as soon as it is measured.

    Raises:
        UserError: if the images cannot be used.
        Interrupted: if a signal stopped a training; the same command resumes it.
    """
    if "modes" in config.parts:
        insert(config.out, "modes", modes(config, four_modes()))
    if not {"table", "curves"} & set(config.parts):
        return
    data = open_data(config)
    evaluator = evaluator_of(config, data)
    if "table" in config.parts:
        trials: dict[str, list[Trial]] = {kind: [] for kind in MODELS}
        for seed in range(config.seeds):
            for kind in (kind for kind in ORDER if kind in config.models):
                trials[kind].append(trained(kind, config, data, seed=seed))
                write(config, "table", table(config, trials, evaluator, data))
        write(config, "pictures", pictures(config, trials, data))
    if "curves" in config.parts:
        write(config, "curves", curves(config, evaluator, data))


def write(config: ReproduceHQA, part: str, text: str) -> None:
    """Writes a part of the report with the budget that it was measured with."""
    steps = "/".join(str(count) for count in config.layer_steps) or str(config.steps)
    sizes = "/".join(str(size) for size in config.layer_batch_sizes) or str(config.batch_size)
    vqvae_steps = config.vqvae_steps or sum(config.steps_of_layers)
    vqvae_rate = config.vqvae_learning_rate or config.learning_rate
    budget = [
        f"{steps} steps of {sizes} images in each layer, AdamW at {config.learning_rate}; VQ-VAE {vqvae_steps} of "
        f"{config.batch_size}, at {vqvae_rate}",
        f"latent weight {config.upper_latent_weight} above the first layer",
        *(["features normalized"] if config.normalize else []),
        resolve(config.precision),
    ]
    write_section(config.out, part, text, ", ".join(budget))


def modes(config: ReproduceHQA, models: dict[str, Decoded]) -> str:
    """Draws Fig. 1 beside the report; prints and returns the share of unrealistic decodes of each model."""
    figure = Figure(figsize=(10, 3), layout="constrained")
    points = real_points()
    shown = {"data": points, **{name: decoded.points for name, decoded in models.items()}}
    for number, (name, decoded_points) in enumerate(shown.items(), 1):
        axes = figure.add_subplot(1, len(shown), number, title=name, aspect="equal", xlim=(-2, 2), ylim=(-2.5, 2.5))
        axes.scatter(*points.T, s=2, color="#cccccc")
        if decoded_points is not points:
            axes.scatter(*decoded_points.T, s=14, color="#c0392b", alpha=0.3)
        axes.set_xticks([])
        axes.set_yticks([])
    save_figure(figure, path := picture_path(config.out, "modes"))
    lines = [
        f"Fig. 1: points around {len(MODES)} modes, each kept in one bit.",
        "",
        "| | unrealistic decodes | modes reached |",
        "|---|---:|---:|",
        *(f"| {name} | {d.unrealistic:.1%} | {d.modes} of {len(MODES)} |" for name, d in models.items()),
    ]
    for name, decoded in models.items():
        print(
            f"{name}: {decoded.unrealistic:.1%} of decodes unrealistic, {decoded.modes} of {len(MODES)} modes reached"
        )
    return "\n".join([*lines, "", f"![Points, and their decodes from one bit]({path.name})"])


def table(config: ReproduceHQA, trials: dict[str, list[Trial]], evaluator: ClassifierEvaluator, data: Data) -> str:
    """Formats Table 3, reconstructions from 8 bits per image, for the trials so far."""
    real = evaluator.scores(data.test)
    lines = [
        f"Table 3: {len(data.test)} test images, each kept in 8 bits; the mean of {config.seeds} seed(s), and from the "
        "least to the most.",
        "",
        "| | paper: MSE | Fréchet | error | ours: MSE | Fréchet | error | parameters |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
        f"| No compression | 0.000 | 0.0 | 3.1 % | 0.000 | 0.0 | {real['error']:.1%} | |",
    ]
    for kind, seeds in trials.items():
        paper = PAPER.get(kind)
        row = [NAMES[kind], *((f"{paper[0]:.3f}", f"{paper[1]:.1f}", f"{paper[2]:.1f} %") if paper else [""] * 3)]
        if not seeds:
            lines.append(f"| {' | '.join(row)} | not run | | | |")
            continue
        if len(seeds) < config.seeds:
            row[0] += f", {len(seeds)} of them"
        results = [measured(trial, evaluator, data, sampled=is_sampled(kind)) for trial in seeds]
        scores = {"mse": ".4f", "frechet": ".1f", "error": ".1%"}
        row += [in_spread([result[name] for result in results], form) for name, form in scores.items()]
        lines.append(table_row([*row, f"{results[0]['parameters']:,}"]))
    return "\n".join(lines)


def curves(config: ReproduceHQA, evaluator: ClassifierEvaluator, data: Data) -> str:
    """Formats Fig. 3, and draws it beside the report."""
    results = {kind: rate_curve(kind, config, evaluator, data) for kind in CURVES}
    captions = {"mse": "MSE", "frechet": "Fréchet distance", "error": "classification error"}
    figure = Figure(figsize=(12, 3.5), layout="constrained")
    for number, (name, caption) in enumerate(captions.items(), 1):
        axes = figure.add_subplot(1, len(captions), number, xlabel="bits an image", ylabel=caption, xscale="log")
        for kind, rates in results.items():
            axes.plot([r["bits"] for r in rates], [r[name] for r in rates], marker="o", label=_short(kind))
        axes.legend()
    save_figure(figure, path := picture_path(config.out, "curves"))
    lines = [
        "Fig. 3: by rate, the first seed; of HQA and HAMs the codes of each layer of a model, of VQ-VAE a model each.",
        "",
        f"| bits an image | {' | '.join(f'{_short(kind)}: MSE | Fréchet | error' for kind in CURVES)} |",
        f"|---:|{'---:|' * 3 * len(CURVES)}",
    ]
    for at_rate in reversed(list(zip(*results.values(), strict=True))):
        cells = [f"{r['mse']:.4f} | {r['frechet']:.1f} | {r['error']:.1%}" for r in at_rate]
        lines.append(table_row([str(at_rate[0]["bits"]), *cells]))
    return "\n".join([*lines, "", f"![By rate]({path.name})"])


@torch.no_grad()
def pictures(config: ReproduceHQA, trials: dict[str, list[Trial]], data: Data) -> str:
    """Draws the first seed's reconstructions and Table 4's interpolations beside the report; returns Markdown."""
    sheet: dict[str, Tensor] = {"original": data.test[:SHOWN]}
    between: dict[str, Tensor] = {}
    for kind, trial in ((kind, seeds[0]) for kind, seeds in trials.items() if seeds):
        tokenizer = trial.tokenizer()
        sheet[NAMES[kind]] = compressed(tokenizer, data.test[:SHOWN], sampled=is_sampled(kind))
        if kind in HQAS:
            ends = data.test[: 2 * PAIRS].to(best_device())
            decoded = torch.stack(interpolations(cast(HQA, tokenizer), ends[0::2], ends[1::2], INTERPOLATED), 1)
            for pair, row in enumerate(torch.cat([ends[0::2, None], decoded, ends[1::2, None]], 1).cpu(), 1):
                between[f"{NAMES[kind]}, pair {pair}: originals at both ends, decodes from between their z_e"] = row
    save_sheet(path := picture_path(config.out, "reconstructions"), sheet)
    shown = [f"![Test images kept in 8 bits by each model]({path.name})"]
    if between:
        save_sheet(path := picture_path(config.out, "interpolations"), between)
        shown.append(f"![Table 4: HQA between pairs of images]({path.name})")
    return "\n\n".join(shown)


def _short(kind: str) -> str:
    return {"hqa": "HQA", "hams": "HAMs", "vqvae": "VQ-VAE"}[kind]
