"""The report of the study of priors: tables, a plot of distance by sampling steps, and pictures.

Which runs there are is in `study.py`, what is measured of samples in `samples.py`.
"""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from smalti.benchmarks.comparison import NOT_RUN, in_spread
from smalti.core.devices import resolve
from smalti.images.sheets import save_sheet
from smalti.studies.experiment import picture_path, save_figure, write_section
from smalti.studies.priors.samples import (
    Draw,
    SampleEvaluator,
    canvases,
    differences_across,
    draws,
    loaded,
    sample_images,
)
from smalti.studies.priors.study import PAIRS, SETUPS, Cell, PairPart, Part, ReproducePriors
from smalti.studies.priors.training import RESULT_NAME, equal_time_steps, first_model_steps, step_seconds, trained

TITLES = {
    "patches": "patches of 2×2",
    "runs": "runs of 4",
    "with": "with absolute positions",
    "without": "without",
    "now": "the defaults",
    "before": "those of before",
}
"""Titles of the models of pairs."""
SHOWN, SHOWN_STEPS, SHOWN_CANVASES = 10, (4, 16, 100), 3  # samples in a row, step counts with a row, canvases


def reproduce_priors(config: ReproducePriors) -> None:
    """Trains and measures what is missing, and writes each part of the report as soon as it is measured.

    Raises:
        UserError: for images that cannot be used.
        Interrupted: if a signal stopped a run; the same command resumes it.
    """
    parts: dict[Part, Callable[[ReproducePriors], None]] = {
        "samplers": samplers,
        "head": partial(race, "head"),
        "depth": partial(race, "depth"),
        "canvas": canvas,
        **{part: partial(pair, part) for part in PAIRS},
    }
    for part in dict.fromkeys(config.parts):
        parts[part](config)


def write(config: ReproducePriors, part: Part, text: str) -> None:
    """Inserts a part into the report, with the machine and the budget."""
    batch = SETUPS["samplers" if part == "canvas" else part].batch * config.factor
    budget = f"tokenizer {config.tokenizer_steps} steps, priors in batches of {batch}, {resolve(config.precision)}"
    write_section(config.out, f"{config.data} {part}", text, budget)


def pair(part: PairPart, config: ReproducePriors) -> None:
    """Compares two models, seed by seed, so that a stopped study has complete pairs."""
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in SETUPS[part].models}
    for seed in range(config.seeds):
        for name, of_model in results.items():
            of_model.append(result(trained(Cell(part, name, config.steps, seed), config)))
            write(config, part, pair_table(part, config, results))


def pair_table(part: PairPart, config: ReproducePriors, results: dict[str, list[dict[str, Any]]]) -> str:
    """Returns the table of mean losses over seeds, and of each seed's difference; and those by corruption."""
    setup, (first, second) = SETUPS[part], results
    losses = {name: [each["held_out_loss"] for each in of_model] for name, of_model in results.items()}
    pairs = zip(losses[first], losses[second], strict=False)  # the last seed's second run may be missing
    differences = ", ".join(f"{of_second - of_first:+.4f}" for of_first, of_second in pairs)
    model = setup.models[first]
    what = " ".join([model.kind, "-".join(map(str, model.changes.get("depth", ())))]).strip()
    titles = {name: TITLES[name] for name in (first, second)}
    lines = [
        f"{config.data}, {setup.grid}, {what}, {config.steps} steps: held-out loss, nats a code; the mean of "
        f"{len(losses[first])} seed(s), from the least to the most. A seed's two runs share rows and draws.",
        "",
        f"| {titles[first]} | {titles[second]} | the second's less the first's, by seed |",
        "|---:|---:|---|",
        f"| {in_spread(losses[first], '.4f')} | {in_spread(losses[second], '.4f')} | {differences or NOT_RUN} |",
    ]
    if "by_corruption" in results[first][0]:
        shares = list(results[first][0]["by_corruption"])
        lines += [
            "",
            "Loss of one denoising step, by the share of the codes that are replaced by random ones:",
            "",
            f"| | {' | '.join(f'{share} %' for share in shares)} |",
            "|---|" + "---:|" * len(shares),
        ]
        for name, of_model in results.items():
            cells = [in_spread([each["by_corruption"][share] for each in of_model], ".3f") for share in shares]
            lines.append(f"| {titles[name]} | {' | '.join(cells)} |")
    return "\n".join(lines)


def race(part: Part, config: ReproducePriors) -> None:
    """Compares the models after as many steps as the first one has, and after the same time."""
    equal_time, first_steps = equal_time_steps(part, config), first_model_steps(part, config)
    runs: dict[tuple[str, int], dict[str, Any]] = {}
    for name in SETUPS[part].models:
        for steps in dict.fromkeys((first_steps, equal_time[name])):
            runs[name, steps] = result(trained(Cell(part, name, steps), config))
            write(config, part, race_table(part, config, runs))


def race_table(part: Part, config: ReproducePriors, runs: dict[tuple[str, int], dict[str, Any]]) -> str:
    """Returns a table with a row for each model; `runs` maps (model, steps) to results."""
    seconds, first_steps = step_seconds(part, config), first_model_steps(part, config)
    equal_time, (first, *_) = equal_time_steps(part, config), seconds
    lines = [
        f"{config.data}, {SETUPS[part].grid}: held-out loss of SUNDAE's objective, nats a code, one seed.",
        "",
        f"| | parameters | a step's time | after {first_steps} steps | steps in the same time | after these |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for name in SETUPS[part].models:
        results = [runs.get((name, steps)) for steps in (first_steps, equal_time[name])]
        losses = [f"{each['held_out_loss']:.4f}" if each else NOT_RUN for each in results]
        parameters = next((f"{each['parameters']:,}" for each in results if each), NOT_RUN)
        ratio = f"{seconds[name] / seconds[first]:.3f}"
        lines.append(f"| {name} | {parameters} | {ratio} | {losses[0]} | {equal_time[name]} | {losses[1]} |")
    return "\n".join([*lines, "", f"A step's time is in units of the first one's, {seconds[first]:.3g} s."])


def samplers(config: ReproducePriors) -> None:
    """Trains the three priors, then evaluates each sampler at each number of steps."""
    steps = equal_time_steps("samplers", config)
    folders = {name: trained(Cell("samplers", name, steps[name]), config) for name in steps}
    evaluator, scores, variants = SampleEvaluator(config), {}, draws(config)
    for draw in variants:
        scores[draw] = evaluator.evaluate(draw, folders[draw.model])
        write(config, "samplers", samplers_table(config, scores, evaluator.floors(), steps))
    plot(config, scores, evaluator.floors())
    best = [draw for draw in variants if draw.variant == draw.model and draw.steps in (*SHOWN_STEPS, None)]
    rows = {caption(draw): sample_images(draw, loaded(folders[draw.model]), SHOWN, config) for draw in best}
    save_sheet(picture(config, "samples"), rows)
    table = samplers_table(config, scores, evaluator.floors(), steps)
    captions = {"steps": "Distance by steps and by time", "samples": "Samples, none of them picked"}
    pictures = [f"![{text}]({picture(config, name).name})" for name, text in captions.items()]
    write(config, "samplers", "\n\n".join([table, *pictures]))


def samplers_table(
    config: ReproducePriors,
    scores: dict[Draw, dict[str, float]],
    floors: dict[str, float],
    trained_steps: dict[str, int],
) -> str:
    """Returns the table of distances and seconds per image, by sampling steps."""
    images = next(iter(scores.values()))["images"]
    lines = [
        f"{config.data}, {SETUPS['samplers'].grid}: Fréchet distance of {images:.0f} samples to at most "
        f"{config.reference} training images, and seconds an image, decoding among them. Trained in equal time: "
        f"{', '.join(f'{name} {steps} steps' for name, steps in trained_steps.items())}. Guidance {config.guidance:g}.",
        "",
        f"| steps | {' | '.join(map(str, config.step_counts))} | one a code |",
        f"|---|{'---:|' * (len(config.step_counts) + 1)}",
    ]
    for variant in dict.fromkeys(draw.variant for draw in scores):
        cells = {
            draw.steps: f"{score['frechet']:.0f}, {score['seconds']:.3f} s"
            for draw, score in scores.items()
            if draw.variant == variant
        }
        lines.append(f"| {variant} | {' | '.join(cells.get(steps, '') for steps in (*config.step_counts, None))} |")
    return "\n".join([*lines, "", f"The floor: {', '.join(f'{name} {value:.0f}' for name, value in floors.items())}."])


def plot(config: ReproducePriors, scores: dict[Draw, dict[str, float]], floors: dict[str, float]) -> None:
    """Plots the distance by sampling steps and by seconds per image."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    left = figure.add_subplot(1, 2, 1, xlabel="steps", ylabel="Fréchet distance", xscale="log")
    right = figure.add_subplot(1, 2, 2, xlabel="seconds an image", xscale="log", sharey=left)
    for variant in dict.fromkeys(draw.variant for draw in scores):
        points = [(draw.steps, s["seconds"], s["frechet"]) for draw, s in scores.items() if draw.variant == variant]
        steps, seconds, distances = zip(*points, strict=True)
        (line,) = right.plot(seconds, distances, marker="o")
        colour = line.get_color()
        if None in steps:
            left.axhline(distances[0], linestyle=":", color=colour, label=f"{variant}, one step a code")
        else:
            left.plot(steps, distances, marker="o", color=colour, label=variant)
    for axes in (left, right):
        axes.axhline(floors["their reconstructions"], linestyle="--", color="#999999", label="reconstructions")
    left.legend()
    save_figure(figure, picture(config, "steps"))


def canvas(config: ReproducePriors) -> None:
    """Measures wide canvases of the SUNDAE of `samplers`: differences across window borders and across tile borders."""
    folder = trained(Cell("samplers", "SUNDAE", equal_time_steps("samplers", config)["SUNDAE"]), config)
    wide = canvases(folder, config)
    by_name = {"overlapping windows": wide.windows, "samples side by side": wide.tiles}
    lines = [
        f"{config.data}: {config.canvases} canvases, {wide.windows.shape[-2]}×{wide.windows.shape[-1]} pixels of "
        f"{config.canvas_codes} codes in a row, of a prior of {config.sampler_steps} steps on 8×8; mean absolute "
        "difference of neighbouring pixels across borders, in units of [0, 1], and from the least to the most of the "
        "canvases.",
        "",
        "| | across borders of windows | of tiles | of other codes |",
        "|---|---:|---:|---:|",
    ]
    for name, images in by_name.items():
        borders = (wide.borders, wide.tile_borders, wide.code_borders)
        cells = [in_spread(differences_across(images, columns).tolist(), ".4f") for columns in borders]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    sheet = {
        f"{name}, {number}": images[number - 1 : number]
        for name, images in by_name.items()
        for number in range(1, min(SHOWN_CANVASES, config.canvases) + 1)
    }
    save_sheet(picture(config, "canvas"), sheet)
    write(config, "canvas", "\n".join([*lines, "", f"![Canvases]({picture(config, 'canvas').name})"]))


def result(folder: Path) -> dict[str, Any]:
    """Returns the result of a finished run."""
    return json.loads((folder / RESULT_NAME).read_text())


def caption(draw: Draw) -> str:
    """Returns the caption of a row of samples."""
    return f"{draw.variant}, {draw.steps} steps" if draw.steps else f"{draw.variant}, one step a code"


def picture(config: ReproducePriors, name: str) -> Path:
    """Returns the path of a picture of the report."""
    return picture_path(config.out, config.data, name)
