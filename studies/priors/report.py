"""What is written of the study of priors: tables, a plot of distance by steps of sampling, and pictures.

Which runs there are: `reproduce_priors.py`; what is measured of samples: `reproduce_priors_samples.py`.
"""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from smalti.benchmarks.comparison import in_spread
from smalti.benchmarks.run import insert
from smalti.core.devices import resolve
from smalti.core.files import whole_file
from smalti.core.provenance import machine
from smalti.images.sheets import save_sheet
from smalti.studies.priors.samples import Draw, Judge, canvases, drawn, draws, loaded, steps_across
from smalti.studies.priors.study import RESAMPLING, SETUPS, Cell, Part, ReproducePriors
from smalti.studies.priors.training import RESULT_NAME, equal_time_steps, given_steps, step_seconds, trained

NONE = "not run"
SHOWN, SHOWN_STEPS, SHOWN_CANVASES = 10, (4, 16, 100), 3  # samples in a row, and of how many steps there are rows


def reproduce_priors(config: ReproducePriors) -> None:
    """Trains and measures what is missing, part by part, and writes each part of the report as soon as it is there.

    Raises:
        UserError: for images that will not do.
        Interrupted: if a signal stopped a run; the same command goes on with it.
    """
    parts: dict[Part, Callable[[ReproducePriors], None]] = {
        "samplers": samplers,
        "head": partial(race, "head"),
        "depth": partial(race, "depth"),
        "canvas": canvas,
        **{part: partial(resampling, part) for part in RESAMPLING},
    }
    for part in dict.fromkeys(config.parts):
        parts[part](config)


def write(config: ReproducePriors, part: Part, text: str) -> None:
    """Puts a part into the report, with what it was measured on."""
    of = "samplers" if part == "canvas" else part
    budget = f"tokenizer {config.tokenizer_steps} steps, priors in batches of {SETUPS[of].batch * config.factor}"
    insert(config.out, f"{config.data} {part}", f"{text}\n\n{machine()}; {budget}, {resolve(config.precision)}.")


def resampling(part: Part, config: ReproducePriors) -> None:
    """Seed by seed, so that a study that is stopped has pairs."""
    found: dict[str, list[float]] = {name: [] for name in SETUPS[part].models}
    for seed in range(config.seeds):
        for name, losses in found.items():
            losses.append(result(trained(Cell(part, name, config.steps, seed), config))["held_out_loss"])
            write(config, part, resampling_table(part, config, found))


def resampling_table(part: Part, config: ReproducePriors, found: dict[str, list[float]]) -> str:
    """Means over seeds, and what each seed gains by patches."""
    setup = SETUPS[part]
    depth = "-".join(map(str, setup.models["patches"].changes["depth"]))
    pairs = zip(found["patches"], found["runs"], strict=False)  # the last seed's second run may be to come
    more = ", ".join(f"{runs - patches:+.4f}" for patches, runs in pairs)
    return "\n".join(
        [
            f"{config.data}, {setup.grid}, hourglass {depth}, {config.steps} steps: held-out loss of "
            f"SUNDAE's objective, nats a code; the mean of {len(found['patches'])} seed(s), from the least to the "
            "most. A seed's two runs share rows and draws.",
            "",
            "| patches of 2×2 | runs of 4 | runs less patches, by seed |",
            "|---:|---:|---|",
            f"| {in_spread(found['patches'], '.4f')} | {in_spread(found['runs'], '.4f')} | {more or NONE} |",
        ]
    )


def race(part: Part, config: ReproducePriors) -> None:
    """Each model at the first one's steps and at its time."""
    equal_time, given = equal_time_steps(part, config), given_steps(part, config)
    found: dict[tuple[str, int], dict[str, Any]] = {}
    for name in SETUPS[part].models:
        for steps in dict.fromkeys((given, equal_time[name])):
            found[name, steps] = result(trained(Cell(part, name, steps), config))
            write(config, part, race_table(part, config, found))


def race_table(part: Part, config: ReproducePriors, found: dict[tuple[str, int], dict[str, Any]]) -> str:
    """A row of each model."""
    seconds, given = step_seconds(part, config), given_steps(part, config)
    equal_time, (first, *_) = equal_time_steps(part, config), seconds
    lines = [
        f"{config.data}, {SETUPS[part].grid}: held-out loss of SUNDAE's objective, nats a code, one seed.",
        "",
        f"| | parameters | a step's time | after {given} steps | steps in the same time | after these |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for name in SETUPS[part].models:
        results = [found.get((name, steps)) for steps in (given, equal_time[name])]
        losses = [f"{each['held_out_loss']:.4f}" if each else NONE for each in results]
        parameters = next((f"{each['parameters']:,}" for each in results if each), NONE)
        ratio = f"{seconds[name] / seconds[first]:.3f}"
        lines.append(f"| {name} | {parameters} | {ratio} | {losses[0]} | {equal_time[name]} | {losses[1]} |")
    return "\n".join([*lines, "", f"A step's time is in units of the first one's, {seconds[first]:.3g} s."])


def samplers(config: ReproducePriors) -> None:
    """Trains the three, then judges the ways to draw from each, one by one."""
    steps = equal_time_steps("samplers", config)
    folders = {name: trained(Cell("samplers", name, steps[name]), config) for name in steps}
    judge, found, variants = Judge(config), {}, draws(config)
    for draw in variants:
        found[draw] = judge.of_draw(draw, folders[draw.model])
        write(config, "samplers", samplers_table(config, found, judge.floors(), steps))
    plot(config, found, judge.floors())
    best = [draw for draw in variants if draw.variant == draw.model and draw.steps in (*SHOWN_STEPS, None)]
    rows = {caption(draw): drawn(draw, loaded(folders[draw.model]), SHOWN, config) for draw in best}
    save_sheet(beside(config, "samples"), rows)
    table = samplers_table(config, found, judge.floors(), steps)
    beneath = {"steps": "Distance by steps and by time", "samples": "Samples, none of them picked"}
    shown = [f"![{what}]({beside(config, name).name})" for name, what in beneath.items()]
    write(config, "samplers", "\n\n".join([table, *shown]))


def samplers_table(
    config: ReproducePriors,
    found: dict[Draw, dict[str, float]],
    floors: dict[str, float],
    trained_steps: dict[str, int],
) -> str:
    """Distances by steps, with seconds an image."""
    images = next(iter(found.values()))["images"]
    lines = [
        f"{config.data}, {SETUPS['samplers'].grid}: Fréchet distance of {images:.0f} samples to at most "
        f"{config.reference} training images, and seconds an image, decoding among them. Trained in equal time: "
        f"{', '.join(f'{name} {steps} steps' for name, steps in trained_steps.items())}. Guidance {config.guidance:g}.",
        "",
        f"| steps | {' | '.join(map(str, config.step_counts))} | one a code |",
        f"|---|{'---:|' * (len(config.step_counts) + 1)}",
    ]
    for variant in dict.fromkeys(draw.variant for draw in found):
        at = {
            draw.steps: f"{r['frechet']:.0f}, {r['seconds']:.3f} s"
            for draw, r in found.items()
            if draw.variant == variant
        }
        lines.append(f"| {variant} | {' | '.join(at.get(steps, '') for steps in (*config.step_counts, None))} |")
    return "\n".join([*lines, "", f"The floor: {', '.join(f'{who} {value:.0f}' for who, value in floors.items())}."])


def plot(config: ReproducePriors, found: dict[Draw, dict[str, float]], floors: dict[str, float]) -> None:
    """Distance by steps and by seconds an image."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    left = figure.add_subplot(1, 2, 1, xlabel="steps", ylabel="Fréchet distance", xscale="log")
    right = figure.add_subplot(1, 2, 2, xlabel="seconds an image", xscale="log", sharey=left)
    for variant in dict.fromkeys(draw.variant for draw in found):
        of = [(draw.steps, r["seconds"], r["frechet"]) for draw, r in found.items() if draw.variant == variant]
        steps, seconds, distances = zip(*of, strict=True)
        (drawn_line,) = right.plot(seconds, distances, marker="o")
        colour = drawn_line.get_color()
        if None in steps:
            left.axhline(distances[0], linestyle=":", color=colour, label=f"{variant}, one step a code")
        else:
            left.plot(steps, distances, marker="o", color=colour, label=variant)
    for axes in (left, right):
        axes.axhline(floors["their reconstructions"], linestyle="--", color="#999999", label="reconstructions")
    left.legend()
    with whole_file(beside(config, "steps")) as unfinished:
        figure.savefig(unfinished, format="png", dpi=100)


def canvas(config: ReproducePriors) -> None:
    """Wide canvases of the SUNDAE of `samplers`: a picture, and steps across the borders of windows and of tiles."""
    folder = trained(Cell("samplers", "SUNDAE", equal_time_steps("samplers", config)["SUNDAE"]), config)
    made = canvases(folder, config)
    lines = [
        f"{config.data}: {config.canvases} canvases, {made.windows.shape[-2]}×{made.windows.shape[-1]} pixels of "
        f"{config.canvas_codes} codes in a row, of a prior of {config.sampler_steps} steps on 8×8; mean absolute "
        "difference of neighbouring pixels across borders, in units of [0, 1], and from the least to the most of the "
        "canvases.",
        "",
        "| | across borders of windows | of tiles | of other codes |",
        "|---|---:|---:|---:|",
    ]
    for who, images in {"overlapping windows": made.windows, "samples side by side": made.tiles}.items():
        kinds = [steps_across(images, where) for where in (made.borders, made.tile_borders, made.code_borders)]
        lines.append(f"| {who} | {' | '.join(in_spread(of.tolist(), '.4f') for of in kinds)} |")
    sheet = {
        f"{who}, {number}": images[number - 1 : number]
        for who, images in {"overlapping windows": made.windows, "samples side by side": made.tiles}.items()
        for number in range(1, min(SHOWN_CANVASES, config.canvases) + 1)
    }
    save_sheet(beside(config, "canvas"), sheet)
    write(config, "canvas", "\n".join([*lines, "", f"![Canvases]({beside(config, 'canvas').name})"]))


def result(folder: Path) -> dict[str, Any]:
    """Of a run that is trained."""
    return json.loads((folder / RESULT_NAME).read_text())


def caption(draw: Draw) -> str:
    """Of a row of samples."""
    return f"{draw.variant}, {draw.steps} steps" if draw.steps else f"{draw.variant}, one step a code"


def beside(config: ReproducePriors, what: str) -> Path:
    """A picture's place."""
    return config.out.with_name(f"{config.out.stem}-{config.data}-{what}.png")
