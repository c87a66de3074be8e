"""What is written of HQA's studies: our numbers beside the paper's, in tables, plots and pictures.

Which runs there are and what is measured of them: `reproduce_hqa.py`.
"""

from pathlib import Path
from typing import cast

import torch
from matplotlib.figure import Figure
from torch import Tensor

from smalti.benchmarks.comparison import in_spread
from smalti.benchmarks.run import insert
from smalti.commands.model_paths import load_tokenizer
from smalti.core.devices import best_device, resolve
from smalti.core.files import whole_file
from smalti.core.provenance import machine
from smalti.images.sheets import save_sheet
from smalti.studies.hqa.four_modes import MODES, Decoded, four_modes, real_points
from smalti.studies.hqa.study import (
    CURVES,
    HQAS,
    MODELS,
    Classifier,
    Data,
    ReproduceHQA,
    classifier,
    compressed,
    interpolations,
    judged,
    measured,
    open_data,
    rate_curve,
    sampled_in,
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
"""Table 3, of the rows it has: MSE, reconstruction Fréchet distance, classification error in per cent."""
SHOWN, INTERPOLATED, PAIRS = 10, 10, 4
ORDER = ("hqa-principal", "hqa", "vqvae", "hams-gs-mse-principal", "hams-gs-mse", "hams-mse", "hams", "hams-gs")
"""Of training: a study that is stopped early has its extremes."""


def reproduce_hqa(config: ReproduceHQA) -> None:
    """Trains and measures what is missing, part by part, and writes each part of the report as soon as it is there.

    Raises:
        UserError: for images that will not do.
        Interrupted: if a signal stopped a run; the same command goes on with it.
    """
    if "modes" in config.parts:
        write(config, "modes", modes(config, four_modes()))
    if not {"table", "curves"} & set(config.parts):
        return
    data = open_data(config)
    judge = classifier(config, data)
    if "table" in config.parts:
        folders: dict[str, list[Path]] = {kind: [] for kind in MODELS}
        for seed in range(config.seeds):
            for kind in (kind for kind in ORDER if kind in config.models):
                folders[kind].append(trained(kind, config, data, seed=seed))
                write(config, "table", table(config, folders, judge, data))
        write(config, "pictures", pictures(config, folders, data))
    if "curves" in config.parts:
        write(config, "curves", curves(config, judge, data))


def write(config: ReproduceHQA, part: str, text: str) -> None:
    """Puts a part into the report, with what it was measured on."""
    steps = "/".join(str(count) for count in config.layer_steps) or str(config.steps)
    of_vqvae = config.vqvae_steps or sum(config.steps_of_layers)
    sizes = "/".join(str(size) for size in config.layer_batch_sizes) or str(config.batch_size)
    rate = config.vqvae_learning_rate or config.learning_rate
    budget = f"{steps} steps of {sizes} images in each layer, AdamW at {config.learning_rate}; VQ-VAE {of_vqvae} of "
    budget += f"{config.batch_size}, at {rate}"
    budget += f", latent weight {config.upper_latent_weight} above the first layer"
    budget += ", features normalized" if config.normalize else ""
    insert(
        config.out, part, text if part == "modes" else f"{text}\n\n{machine()}; {budget}, {resolve(config.precision)}."
    )


def modes(config: ReproduceHQA, found: dict[str, Decoded]) -> str:
    """Fig. 1: the picture and, printed too, the share of unrealistic decodes of each model."""
    figure = Figure(figsize=(10, 3), layout="constrained")
    points = real_points()
    shown = {"data": points, **{name: decoded.points for name, decoded in found.items()}}
    for number, (name, drawn) in enumerate(shown.items(), 1):
        axes = figure.add_subplot(1, len(shown), number, title=name, aspect="equal", xlim=(-2, 2), ylim=(-2.5, 2.5))
        axes.scatter(*points.T, s=2, color="#cccccc")
        if drawn is not points:
            axes.scatter(*drawn.T, s=14, color="#c0392b", alpha=0.3)
        axes.set_xticks([])
        axes.set_yticks([])
    with whole_file(path := _beside(config, "modes")) as partial:
        figure.savefig(partial, format="png", dpi=100)
    lines = [
        f"Fig. 1: points around {len(MODES)} modes, each kept in one bit.",
        "",
        "| | unrealistic decodes | modes reached |",
        "|---|---:|---:|",
        *(f"| {name} | {d.unrealistic:.1%} | {d.modes} of {len(MODES)} |" for name, d in found.items()),
    ]
    for name, decoded in found.items():
        print(
            f"{name}: {decoded.unrealistic:.1%} of decodes unrealistic, {decoded.modes} of {len(MODES)} modes reached"
        )
    return "\n".join([*lines, "", f"![Points, and what they come back as from one bit]({path.name})"])


def table(config: ReproduceHQA, runs: dict[str, list[Path]], judge: Classifier, data: Data) -> str:
    """Table 3: of 8 bits an image, of the runs that are there."""
    real = judged(data.test, judge, data)
    lines = [
        f"Table 3: {len(data.test)} test images, each kept in 8 bits; the mean of {config.seeds} seed(s), and from the "
        "least to the most.",
        "",
        "| | paper: MSE | Fréchet | error | ours: MSE | Fréchet | error | parameters |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
        f"| No compression | 0.000 | 0.0 | 3.1 % | 0.000 | 0.0 | {real['error']:.1%} | |",
    ]
    for kind, folders in runs.items():
        theirs = PAPER.get(kind)
        row = [NAMES[kind], *((f"{theirs[0]:.3f}", f"{theirs[1]:.1f}", f"{theirs[2]:.1f} %") if theirs else [""] * 3)]
        if not folders:
            lines.append(f"| {' | '.join(row)} | not run | | | |")
            continue
        if len(folders) < config.seeds:
            row[0] += f", {len(folders)} of them"
        found = [measured(folder, judge, data, sampled=sampled_in(kind)) for folder in folders]
        scores = {"mse": ".4f", "frechet": ".1f", "error": ".1%"}
        row += [in_spread([result[name] for result in found], form) for name, form in scores.items()]
        lines.append(f"| {' | '.join(row)} | {found[0]['parameters']:,} |")
    return "\n".join(lines)


def curves(config: ReproduceHQA, judge: Classifier, data: Data) -> str:
    """Fig. 3, also drawn beside the report."""
    found = {kind: rate_curve(kind, config, judge, data) for kind in CURVES}
    what = {"mse": "MSE", "frechet": "Fréchet distance", "error": "classification error"}
    figure = Figure(figsize=(12, 3.5), layout="constrained")
    for number, (name, caption) in enumerate(what.items(), 1):
        axes = figure.add_subplot(1, len(what), number, xlabel="bits an image", ylabel=caption, xscale="log")
        for kind, results in found.items():
            axes.plot([r["bits"] for r in results], [r[name] for r in results], marker="o", label=_short(kind))
        axes.legend()
    with whole_file(path := _beside(config, "curves")) as partial:
        figure.savefig(partial, format="png", dpi=100)
    lines = [
        "Fig. 3: by rate, the first seed; of HQA and HAMs the codes of each layer of a model, of VQ-VAE a model each.",
        "",
        f"| bits an image | {' | '.join(f'{_short(kind)}: MSE | Fréchet | error' for kind in CURVES)} |",
        f"|---:|{'---:|' * 3 * len(CURVES)}",
    ]
    for at_rate in reversed(list(zip(*found.values(), strict=True))):
        cells = [f"{r['mse']:.4f} | {r['frechet']:.1f} | {r['error']:.1%}" for r in at_rate]
        lines.append(f"| {at_rate[0]['bits']} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", f"![By rate]({path.name})"])


@torch.no_grad()
def pictures(config: ReproduceHQA, runs: dict[str, list[Path]], data: Data) -> str:
    """Table 3's reconstructions, of the first seed, and Table 4's interpolations."""
    sheet: dict[str, Tensor] = {"original": data.test[:SHOWN]}
    between: dict[str, Tensor] = {}
    for kind, folder in ((kind, folders[0]) for kind, folders in runs.items() if folders):
        tokenizer = load_tokenizer(str(folder)).to(best_device())
        sheet[NAMES[kind]] = compressed(tokenizer, data.test[:SHOWN], sampled=sampled_in(kind))
        if kind in HQAS:
            ends = data.test[: 2 * PAIRS].to(best_device())
            decoded = torch.stack(interpolations(cast(HQA, tokenizer), ends[0::2], ends[1::2], INTERPOLATED), 1)
            for pair, row in enumerate(torch.cat([ends[0::2, None], decoded, ends[1::2, None]], 1).cpu(), 1):
                between[f"{NAMES[kind]}, pair {pair}: originals at both ends, decodes from between their z_e"] = row
    save_sheet(_beside(config, "reconstructions"), sheet)
    shown = [f"![Test images kept in 8 bits by each model]({_beside(config, 'reconstructions').name})"]
    if between:
        save_sheet(_beside(config, "interpolations"), between)
        shown.append(f"![Table 4: HQA between pairs of images]({_beside(config, 'interpolations').name})")
    return "\n\n".join(shown)


def _short(kind: str) -> str:
    return {"hqa": "HQA", "hams": "HAMs", "vqvae": "VQ-VAE"}[kind]


def _beside(config: ReproduceHQA, what: str) -> Path:
    return config.out.with_name(f"{config.out.stem}-{what}.png")
