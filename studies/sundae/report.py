"""The report of the study of SUNDAE: a table of priors, one of samplers by steps, a plot and a sheet.

The priors are trained in `study.py`.
"""

from dataclasses import replace
from itertools import product
from typing import Any

from matplotlib.figure import Figure

from smalti.benchmarks.comparison import in_spread
from smalti.commands.model_paths import prior_class
from smalti.images.decoding import to_float
from smalti.images.sheets import save_sheet
from smalti.priors.methods.sundae import SundaeSampling
from smalti.studies.experiment import picture_path, save_figure, table_row, write_section
from smalti.studies.sundae.study import ReproduceSundae, Study, Trained

AUTHORS = SundaeSampling(temperature=(0.8, 0.8), proportion=(0.5, 0.5), order="random", guidance=1.0)
"""The authors' settings for FFHQ at 256x256 (arXiv 2206.12351). They may stop after 11 steps, these after 10."""
FORMER = SundaeSampling(steps=32, temperature=(1.0, 0.6), proportion=(0.94, 0.31))
"""smalti's former defaults."""
SAMPLERS: dict[str, SundaeSampling] = {
    "smalti's defaults": SundaeSampling(),
    "smalti's defaults without guidance": SundaeSampling(guidance=1.0),
    "the former defaults: proportion 0.94 to 0.31": FORMER,
    "the former defaults without guidance": replace(FORMER, guidance=1.0),
    "the authors', FFHQ256: temperature 0.8": AUTHORS,
    "the authors', FFHQ1024: temperature 1.0 to 0.7": replace(AUTHORS, temperature=(1.0, 0.7)),
}
SHEET_STEPS = 25
"""Denoising steps of the samples in the sheet."""
SHOWN = 12
"""Samples in a row of the sheet."""

Results = dict[tuple[str, int], list[dict[str, Any]]]
"""Measurements of each sampler at each number of steps, one for each seed."""


def reproduce_sundae(config: ReproduceSundae) -> None:
    """Trains and measures what is missing, seed by seed, and writes the report after each training and each sampler.

    Raises:
        UserError: for images that cannot be used.
        Interrupted: if a signal stopped a training; the same command resumes it.
    """
    study, priors, samplers = Study(config), {}, {}
    budget = f"tokenizer {config.tokenizer_steps} steps, the first prior {config.prior_steps} steps of 32 rows"
    for seed in range(config.seeds):
        for prior in config.priors:
            sampling = prior_class(prior.kind).method.sampling()
            priors.setdefault(prior, []).append(study.result(prior, seed, sampling))
            write_section(config.out, f"sundae {study.name} priors", prior_table(study, priors), budget)
            if prior != config.priors[0]:
                text = sampler_table(study, samplers, priors)
                write_section(config.out, f"sundae {study.name} samplers", text, budget)
                continue
            if seed == 0:
                sheet(study)
            for label, steps in product(SAMPLERS, config.step_counts):
                sampling = replace(SAMPLERS[label], steps=steps, min_steps=min(SAMPLERS[label].min_steps, steps))
                samplers.setdefault((label, steps), []).append(study.result(prior, seed, sampling))
                text = sampler_table(study, samplers, priors)
                write_section(config.out, f"sundae {study.name} samplers", text, budget)


def prior_table(study: Study, results: dict[Trained, list[dict[str, Any]]]) -> str:
    """Returns the table of priors, each sampled with the defaults of its kind."""
    floors, samples = study.floors(), study.config.samples
    columns = ("prior", "seeds", "steps", "parameters", "bits a code", "Fréchet distance", "precision", "recall", "s")
    rows = [
        f"`{study.name}`: Fréchet distance (lite0) of {samples} samples with the defaults of each kind, trained for "
        f"the same time, and the CPU seconds of a sample; of real images it is {floors['real']:.0f}, of "
        f"reconstructions {floors['reconstructions_frechet']:.0f} (MSE {floors['reconstructions_mse']:.5f}). Means "
        "over seeds, from the least to the most.",
        "",
        table_row(columns),
        table_row(["---", *["---:"] * (len(columns) - 1)]),
    ]
    for prior, runs in results.items():
        bits = [run["bits"] for run in runs if run["bits"] is not None]
        cells = [str(len(runs)), str(runs[0]["steps"]), f"{runs[0]['parameters'] / 1e6:.2f} M"]
        cells.append(in_spread(bits, ".3f") if bits else "")
        cells += [in_spread([run[key] for run in runs], form) for key, form in (("frechet", ".0f"),)]
        cells += [in_spread([run[key] for run in runs], ".2f") for key in ("precision", "recall")]
        cells.append(in_spread([run["seconds"] for run in runs], ".3f"))
        rows.append(table_row([prior.label, *cells]))
    return "\n".join(rows)


def sampler_table(study: Study, results: Results, priors: dict[Trained, list[dict[str, Any]]]) -> str:
    """Returns the table of samplers by denoising steps, and draws the plot of distance by time.

    The plot also has a point for each other kind of prior, with its defaults.
    """
    counts = [steps for steps in study.config.step_counts if any(each == steps for _, each in results)]
    rows = [
        f"`{study.name}`: Fréchet distance of {study.config.samples} samples of the first prior, by denoising steps, "
        "and the CPU seconds of a sample. Means over seeds, from the least to the most.",
        "",
        table_row(["sampler", "seeds", *map(str, counts)]),
        table_row(["---", "---:", *["---:"] * len(counts)]),
    ]
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot(xlabel="CPU seconds of a sample", ylabel="Fréchet distance", xscale="log")
    for label in SAMPLERS:
        cells, points = [], []
        for steps in counts:
            runs = results.get((label, steps), [])
            if runs:
                seconds = sum(run["seconds"] for run in runs) / len(runs)
                points.append((seconds, sum(run["frechet"] for run in runs) / len(runs)))
                cells.append(f"{in_spread([run['frechet'] for run in runs], '.0f')}, {seconds:.3f} s")
            else:
                cells.append("")
        seeds = max((len(results.get((label, steps), [])) for steps in counts), default=0)
        rows.append(table_row([label, str(seeds), *cells]))
        if points:
            axes.plot(*zip(*points, strict=True), marker="o", label=label)
    for prior, runs in priors.items():
        if prior.kind != study.config.priors[0].kind:
            means = [sum(run[key] for run in runs) / len(runs) for key in ("seconds", "frechet")]
            axes.plot(*([mean] for mean in means), marker="s", linestyle="", label=prior.kind)
    axes.axhline(study.floors()["reconstructions_frechet"], color="grey", linestyle=":", label="reconstructions")
    axes.legend()
    save_figure(figure, path := picture_path(study.config.out, study.name, "samplers"))
    sheet_path = picture_path(study.config.out, study.name, "sheet")
    caption = f"{study.name}: samples of {SHEET_STEPS} steps, none selected"
    links = ["", f"![{study.name}: distance by time]({path.name})", "", f"![{caption}]({sheet_path.name})"]
    return "\n".join([*rows, *links])


def sheet(study: Study) -> None:
    """Draws samples of the first seed of each sampler, in equal numbers of steps."""
    folder = study.trained(study.config.priors[0], 0)
    rows = {
        label: to_float(study.draw(folder, replace(sampling, steps=SHEET_STEPS), SHOWN))
        for label, sampling in SAMPLERS.items()
    }
    save_sheet(picture_path(study.config.out, study.name, "sheet"), rows)
