"""The study of the priors' parts, tiny: budgets of the runs, measurements, resuming, and the report."""

import json
import shutil
import sys
from dataclasses import replace

import pytest
import torch
from helpers.build_toys import write_images
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch.nn import functional as F

from smalti import HRVQ, LatentSet
from smalti.commands.train_prior import TrainPrior
from smalti.core.errors import UserError
from smalti.core.models import load
from smalti.core.randomness import row_seeds
from smalti.evaluation import real_images
from smalti.evaluation.config import EvaluationSettings, PriorEvaluation
from smalti.evaluation.prior import evaluate_prior
from smalti.latentsets.dataset import LatentRows
from smalti.metrics.extractors import Extractor
from smalti.priors.methods.canvas import window_starts
from smalti.priors.methods.sundae import Sundae, corrupt
from smalti.scripts import reproduce as command
from smalti.studies.priors import samples, training
from smalti.studies.priors.hourglass_of_runs import RunsHourglass
from smalti.studies.priors.report import pair_table
from smalti.studies.priors.samples import (
    HUNDRED_STEPS,
    SampleEvaluator,
    canvases,
    columns,
    differences_across,
    draws,
    proportion,
)
from smalti.studies.priors.study import RESAMPLING, SETUPS, Cell, Grid, ReproducePriors, ResamplingPart
from smalti.studies.priors.training import (
    RESULT_NAME,
    equal_time_steps,
    latents_of,
    step_seconds,
    tokenizer_of,
    trained,
)

FLAGS = (
    "--images img --parts resampling positions samplers head depth canvas --seeds 2 --steps 2 --sampler-steps 2 "
    "--head-steps 1 --depth-steps 1 --tokenizer-steps 1 --channels 4 --step-counts 2 --num 4 --reference 8 "
    "--canvases 2 --canvas-codes 10 --canvas-steps 2 --precision fp32"
)
CONFIG = ReproducePriors(
    study="priors",
    images="img",
    seeds=2,
    steps=2,
    sampler_steps=2,
    head_steps=1,
    depth_steps=1,
    tokenizer_steps=1,
    channels=4,
    step_counts=(2,),
    num=4,
    reference=8,
    canvases=2,
    canvas_codes=10,
    canvas_steps=2,
    precision="fp32",
)


class Quarters(Extractor):
    """Features for tests: the mean colours of an image's quarters."""

    name, width, size, resampling = "lite0", 12, 2, "none"

    def features(self, colour):
        return F.adaptive_avg_pool2d(colour.float(), 2).flatten(1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A whole study of 4x4 codes, with networks of width 16, in a temporary working directory."""
    folder = tmp_path_factory.mktemp("study")
    write_images(folder / "img", count=80)
    small = {"model_width": 16, "heads": 2}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(training, "REPETITIONS", 1)
        for module in (real_images, samples):
            patch.setattr(module, "find_extractor", lambda _name, device: Quarters(device))
        for part, setup in SETUPS.items():
            models = {name: replace(model, changes={**model.changes, **small}) for name, model in setup.models.items()}
            patch.setitem(SETUPS, part, replace(setup, grid=Grid(8, 1, branching=2), models=models))
        study(patch)
        yield folder


def study(patch):
    patch.setattr(sys, "argv", ["reproduce.py", "priors", *FLAGS.split()])
    command.main()


def results(folder):
    paths = folder.glob(f"runs/reproductions/priors/*/{RESULT_NAME}")
    return {path.parent.name: json.loads(path.read_text()) for path in paths}


def report(folder):
    return (folder / "docs/reproductions/priors.md").read_text()


def row_of(text, part, first):
    """Returns the cells of a table's row."""
    section = text.split(f"<!-- measured: emoji {part} -->")[1]
    return next(line for line in section.splitlines() if line.startswith(f"| {first}")).strip("| ").split(" | ")


def test_runs_have_the_configured_steps_or_take_the_same_time(folder):
    names = {"resampling": ("patches", "runs"), "positions": ("with", "without")}
    expected = {f"{part}-emoji-{each}-2steps-seed{seed}" for part in names for each in names[part] for seed in (0, 1)}
    for part, first_steps in {"samplers": 2, "head": 1, "depth": 1}.items():
        seconds = step_seconds(part, CONFIG)
        first, *_ = seconds
        for name, each in seconds.items():
            steps = equal_time_steps(part, CONFIG)[name]
            assert steps == 1 or steps * each <= first_steps * seconds[first] < (steps + 1) * each
            counts = {steps} if part == "samplers" else {steps, first_steps}
            expected |= {f"{part}-emoji-{name.replace(' ', '-')}-{count}steps-seed0" for count in counts}
    assert {name.rsplit("-", 1)[0] for name in results(folder)} == expected
    assert equal_time_steps("depth", replace(CONFIG, depth_steps=7))["flat, 6 blocks"] == 7
    assert not list(folder.glob("runs/**/samples.png"))  # sampling would take longer than training


@torch.no_grad()
def test_held_out_loss_is_that_of_all_held_out_codes(folder):
    """It is the SUNDAE loss of the saved model, with the draws of the run's seed."""
    run = trained(Cell("resampling", "runs", 2, seed=1), CONFIG)
    prior = load(run, "prior")
    rows = LatentRows(LatentSet(latents_of(SETUPS["resampling"].grid, CONFIG)), split="held_out")
    batch = rows.__getitems__(range(len(rows)))
    losses = []
    for start in range(0, len(rows), SETUPS["resampling"].batch):
        part = {name: column[start : start + SETUPS["resampling"].batch] for name, column in batch.items()}
        loss, _ = Sundae(prior, prior.method.objective_config()).eval()({**part, "seeds": row_seeds(1, part["rows"])})
        losses += [float(loss)] * len(part["rows"])
    result = json.loads((run / RESULT_NAME).read_text())
    assert result["held_out_loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-4)
    assert result["parameters"] == sum(parameter.numel() for parameter in prior.parameters())
    assert isinstance(prior, RunsHourglass)


def test_flat_codes_are_the_same_codes_with_one_digit(folder):
    paths = [latents_of(SETUPS["head"].grid, CONFIG, flat=flat) for flat in (False, True)]
    tree, flat = map(LatentSet, paths)
    assert (tree.layout.levels[0].radices, flat.layout.levels[0].radices) == ((2, 2, 2), (8,))
    rows = torch.arange(len(tree))
    assert tree.batch(rows)[0].equal(flat.batch(rows)[0])
    assert tree.held_out.equal(flat.held_out)
    assert flat.provenance == tree.provenance
    flat.verify()
    one, digits = (load(trained(Cell("head", name, 1), CONFIG), "prior") for name in SETUPS["head"].models)
    assert (one.head.radices, digits.head.radices) == ((8,), (2, 2, 2))


def test_distances_equal_those_of_the_evaluate_command(folder):
    steps, evaluator = equal_time_steps("samplers", CONFIG), SampleEvaluator(CONFIG)
    settings = EvaluationSettings(images="img", num=4, reference=8, precision="fp32")
    for draw in draws(CONFIG):
        run = trained(Cell("samplers", draw.model, steps[draw.model]), CONFIG)
        scores, _ = evaluate_prior(
            PriorEvaluation(draw.sampling, prior=(str(run),), protocol=settings, out=folder / "x.json")
        )
        measured = evaluator.evaluate(draw, run)
        assert measured["frechet"] == pytest.approx(scores["frechet"]["model"])
        cell = row_of(report(folder), "samplers", draw.variant)[1 if draw.steps else 2]
        assert cell == f"{measured['frechet']:.0f}, {measured['seconds']:.3f} s"
        assert evaluator.floors()["held-out images"] == pytest.approx(scores["frechet"]["real"])


@given(st.integers(1, 400))
def test_proportion_updates_each_code_as_often_with_fewer_steps(steps):
    first, last = proportion(steps)
    assert 0 < last <= first <= 1
    default = HUNDRED_STEPS
    updates, by_default = steps * (first + last) / 2, default.steps * sum(default.proportion) / 2
    assert updates == pytest.approx(by_default) or (updates < by_default and first == 1)
    assert proportion(default.steps) == pytest.approx(default.proportion)
    assert proportion(1) == (1, 1)


@given(st.integers(2, 12), st.integers(1, 4), st.data())
def test_differences_are_measured_across_the_right_columns(wide, pixels, data):
    """The image changes at some edges of codes and nowhere else."""
    edges = data.draw(st.sets(st.integers(1, wide - 1), min_size=1))
    image = torch.zeros(1, 3, 2, wide * pixels)
    for edge in edges:
        image[..., edge * pixels :] += 2 / len(edges)
    selected = columns(torch.tensor([0, *edges, wide]), wide, pixels)
    assert selected.sum() == len(edges)
    assert differences_across(image, selected).item() == pytest.approx(1 / len(edges), rel=1e-4)
    if len(edges) < len(selected):
        assert differences_across(image, ~selected).item() == 0


def test_canvas_has_the_borders_of_its_windows_and_tiles(folder):
    run = trained(Cell("samplers", "SUNDAE", equal_time_steps("samplers", CONFIG)["SUNDAE"]), CONFIG)
    wide = canvases(run, CONFIG)
    assert wide.windows.shape == wide.tiles.shape == (2, 3, 8, 20)
    starts = window_starts(10, 4).tolist()
    inner = sorted({*starts, *(start + 4 for start in starts)} - {0, 10})
    assert [int(column) for column in wide.borders.nonzero()] == [2 * edge - 1 for edge in inner]
    assert [int(column) for column in wide.tile_borders.nonzero()] == [7, 15]
    others = [2 * edge - 1 for edge in range(1, 10) if edge not in (*inner, 4, 8)]
    assert [int(column) for column in wide.code_borders.nonzero()] == others
    prior, alone = load(run, "prior"), load(run / "tokenizer", "tokenizer")
    (codes,) = alone.encode(wide.tiles)
    assert codes.shape == (2, prior.level.height, 10)


@torch.no_grad()
@pytest.mark.parametrize("percent", [25, 100])
@torch.no_grad()
def test_losses_by_corruption_are_means_over_all_held_out_codes(folder, percent):
    run = trained(Cell("positions", "with", 2), CONFIG)
    prior, measured = load(run, "prior"), results(folder)[run.name]["by_corruption"]
    rows = LatentRows(LatentSet(latents_of(SETUPS["positions"].grid, CONFIG)), split="held_out")
    batch = rows.__getitems__(range(len(rows)))
    assert list(measured) == ["25", "50", "75", "100"]
    corrupted = corrupt(prior.head, batch["codes"], row_seeds(0, batch["rows"]), percent / 100)
    features = prior.features(corrupted, condition=batch["labels"] if prior.classes else None)
    nll = float(prior.head.nll(features, batch["codes"].flatten(1)).mean())
    assert measured[str(percent)] == pytest.approx(nll, rel=1e-5)


def test_study_resumes_with_missing_runs_only(folder):
    """A run that is missing is trained again, to the same result, and no other file changes."""
    lost = trained(Cell("depth", "hourglass 0-5-0", 1), CONFIG)
    before = {path: path.stat().st_mtime_ns for path in folder.glob("runs/**/*") if path.is_file()}
    result = (lost / RESULT_NAME).read_bytes()
    shutil.rmtree(lost)
    with pytest.MonkeyPatch.context() as patch:
        study(patch)
    after = {path: path.stat().st_mtime_ns for path in folder.glob("runs/**/*") if path.is_file()}
    assert {path.is_relative_to(folder / lost) for path in before if after[path] != before[path]} == {True}
    assert (lost / RESULT_NAME).read_bytes() == result


def test_different_budgets_are_different_runs(folder):
    cell = Cell("resampling", "runs", 2)
    names = [
        trained(cell, replace(CONFIG, work=folder / "other", **changes)).name
        for changes in ({}, {"tokenizer_steps": 2}, {"factor": 2})
    ]
    assert len(set(names)) == 3
    assert names[0] == trained(cell, CONFIG).name


def test_report_has_the_measurements(folder):
    text = report(folder)
    assert "not run" not in text
    assert text.count("<!-- measured: emoji ") == 6
    losses = {
        name: [json.loads((trained(Cell("resampling", name, 2, s), CONFIG) / RESULT_NAME).read_text())["held_out_loss"]
               for s in (0, 1)]
        for name in ("patches", "runs")
    }  # fmt: skip
    mean, less = sum(losses["patches"]) / 2, [b - a for a, b in zip(losses["patches"], losses["runs"], strict=True)]
    assert row_of(text, "resampling", f"{mean:.4f} ({min(losses['patches']):.4f} to ")[2] == ", ".join(
        f"{each:+.4f}" for each in less
    )
    depth = row_of(text, "depth", "flat, 6 blocks")
    assert depth[2:] == ["1.000", depth[5], "1", depth[5]]
    for name in ("steps", "samples", "canvas"):
        assert f"(priors-emoji-{name}.png)" in text
        with Image.open(folder / f"docs/reproductions/priors-emoji-{name}.png") as picture:
            assert picture.width > 100
            assert str(folder) not in str(picture.info)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"depth_steps": 0}, "--depth-steps must be at least 1, not 0"),
        ({"num": 3}, "--num and --reference must be at least 4"),
        ({"step_counts": (4, 0)}, "--steps must be at least 1, not 0"),
        ({"guidance": -1.0}, "guidance must not be negative"),
    ],
)
def test_invalid_settings_are_refused_before_training(changes, message):
    with pytest.raises(UserError, match=message):
        ReproducePriors("priors", **changes)


def test_negative_number_of_samples_is_refused():
    with pytest.raises(UserError, match="--sheet-samples must not be negative, not -1"):
        TrainPrior(model=None, objective=None, sheet_samples=-1)


def test_missing_runs_are_marked_in_the_table():
    table = pair_table("resampling", CONFIG, {"patches": [{"held_out_loss": 1.5}], "runs": []})
    assert "| 1.5000 | not run | not run |" in table


@pytest.mark.parametrize(("part", "codes"), [("resampling-outer", "8×8 codes"), ("resampling-outer-16", "16×16 codes")])
def test_table_names_the_grid_of_the_comparison(part: ResamplingPart, codes: str, monkeypatch):
    monkeypatch.setitem(SETUPS, part, RESAMPLING[part])  # the fixture's are smaller
    table = pair_table(part, CONFIG, {"patches": [{"held_out_loss": 1.5}], "runs": [{"held_out_loss": 1.25}]})
    assert f"emoji, {codes} of 8³, hourglass 1-2-1" in table
    assert "| -0.2500 |" in table
    tokenizer = tokenizer_of(SETUPS[part].grid, CONFIG).model
    (level,) = HRVQ(tokenizer).layout.levels
    assert codes.startswith(f"{level.height}×{level.width} ")
