"""The study of HR-VQVAE, tiny: which runs it has, what is measured of them, that it goes on, and what is written."""

import json
import sys
from dataclasses import asdict

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from helpers.image_toys import write_patches
from PIL import Image

from smalti import load
from smalti.images.decoding import to_float
from smalti.scripts import reproduce as command
from smalti.studies.hr_vqvae import report, study
from smalti.studies.hr_vqvae.study import (
    RESULT_NAME,
    Cell,
    Reproduce,
    cells,
    features,
    folder_of,
    model_of,
    open_data,
    result,
    trained,
)

FLAGS = "--images img --parts methods depth search size --seeds 2 --steps 2 --size-steps 1 --batch-size 4 --channels 4 "
FLAGS += "--code-width 3"
SHARED = "-batch_size4-channels4-code_width3"  # in the folders' names
PARTS = ("methods", "depth", "search", "size")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A whole study with codebooks of at most 64, in a folder of its own, which is the current one."""
    folder = tmp_path_factory.mktemp("study")
    write_patches(folder / "img", 40)
    small = {"LEAVES": 8, "DEPTH_LEAVES": 64, "SIZES": (8, 27), "CODES_OF_IMAGES": 8, "SEARCH_BLOCK": 4}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for module in (study, report):
            for name, value in small.items():
                patch.setattr(module, name, value, raising=False)
        run(patch)
        yield folder


def run(patch):
    AcceleratorState._reset_state(reset_partial_state=True)
    patch.setattr(sys, "argv", ["reproduce.py", "hr-vqvae", *FLAGS.split()])
    command.main()


def config_of(**changes) -> Reproduce:
    settings = {"study": "hr-vqvae", "images": "img", "parts": PARTS, "seeds": 2, "steps": 2, "size_steps": 1}
    return Reproduce(**{**settings, "batch_size": 4, "channels": 4, "code_width": 3, **changes})


def results(folder):
    paths = folder.glob(f"runs/reproductions/mnist/*/{RESULT_NAME}")
    return {path.parent.name: (path, json.loads(path.read_text())) for path in paths}


def test_every_run_is_there_and_its_error_is_that_of_its_model(folder):
    found = results(folder)
    expected = {folder_of(run, config_of()).name: run for runs in cells(config_of()).values() for run in runs}
    assert found.keys() == expected.keys()
    assert len(found) == 3 * 2 * 2 + 2 * 2 * 4 + 2 * 3
    images = open_data(config_of())
    held_out = study.ImageRows(images, split="held_out", flips=False)
    batch = to_float(held_out.__getitems__(range(len(held_out)))["images"])
    for name in (f"hrvq-8-depth3-best-2steps-seed1{SHARED}", f"vqvae2-8-depth1-plain-2steps-seed0{SHARED}"):
        path, measured = found[name]
        assert measured["cell"] == asdict(expected[name])
        tokenizer = load(path.parent, "tokenizer")
        error = ((tokenizer.decode(tokenizer.encode(batch)) - batch) / 2).square().mean().item()
        assert measured["mse"] == pytest.approx(error, rel=1e-4)
        assert len(measured["used"]) == len(tokenizer.layout.levels)


def test_plain_and_best_differ_as_the_issue_says(folder):
    for kind in ("hrvq", "vqvae", "vqvae2"):
        plain, best = (asdict(model_of(Cell(kind, plain, 1, 8), config_of())) for plain in (True, False))
        changed = {name for name in plain if plain[name] != best[name]}
        assert changed == {"codebook_learning", "revive_below", "kmeans_start"}
    deep = model_of(Cell("hrvq", False, 1, leaves=64, depth=6), config_of())
    assert (deep.depth, deep.branching) == (6, 2)


def test_a_finished_study_trains_nothing_again(folder):
    before = {path: path.stat().st_mtime_ns for path in folder.glob("runs/**/*") if path.is_file()}
    with pytest.MonkeyPatch.context() as patch:
        run(patch)
    assert {path: path.stat().st_mtime_ns for path in folder.glob("runs/**/*") if path.is_file()} == before


def test_the_report_says_what_was_measured_beside_the_paper(folder):
    text = (folder / "docs/reproductions/hr-vqvae.md").read_text()
    errors = [
        measured["mse"] for name, (_, measured) in results(folder).items() if name.startswith("hrvq-8-depth3-best-2")
    ]
    assert len(errors) == 2
    (row,) = [line for line in text.splitlines() if line.startswith("| HR-VQVAE | 0.00011 | 0.27 |")]
    assert f"{np.mean(errors):.5f} ({min(errors):.5f} to {max(errors):.5f})" in row
    assert text.count("<!-- measured: mnist ") == 5
    assert "not run" not in text
    for what in ("layers", "size"):
        assert f"(hr-vqvae-mnist-{what}.png)" in text
        assert Image.open(folder / f"docs/reproductions/hr-vqvae-mnist-{what}.png").width > 100


def test_what_was_not_run_is_said(folder):
    config = config_of(work=folder / "none", out=folder / "x.md")
    found = report.size_table(config, cells(config)["size"])
    assert found.count("| not run | | |") == 6


def test_a_run_is_measured_anew_of_other_images_and_not_trained(folder):
    """And a result from before the number of images was kept is of the default."""
    config, (*_, run) = config_of(usage_images=7), cells(config_of())["depth"]
    path = folder / folder_of(run, config) / RESULT_NAME
    before, weights = json.loads(path.read_text()), path.with_name("model.safetensors").stat().st_mtime_ns
    assert result(run, config) is None
    trained(run, config, open_data(config))
    assert result(run, config)["train_seconds"] == before["train_seconds"]
    assert result(run, config_of()) is None
    assert path.with_name("model.safetensors").stat().st_mtime_ns == weights
    path.write_text(json.dumps({name: value for name, value in before.items() if name != "usage_images"}))
    assert result(run, config_of())["perplexity"] == before["perplexity"]


def test_cells_of_the_first_settings_keep_their_names():
    run = Cell("hrvq", False, 600, 512, 3)
    assert folder_of(run, Reproduce("hr-vqvae", "img")).name == "hrvq-512-depth3-best-600steps-seed0"


@torch.no_grad()
def test_searches_are_for_what_reaches_each_quantizer(folder):
    """The codes found in it are the tokenizer's."""
    tokenizer = load(folder / f"runs/reproductions/mnist/vqvae2-8-depth1-best-2steps-seed0{SHARED}", "tokenizer")
    batch = torch.rand(2, 1, 32, 32) * 2 - 1
    found = [quantizer.encode(z_e) for quantizer, z_e in features(tokenizer, batch)]
    assert all(a.equal(b) for a, b in zip(found, tokenizer.encode(batch), strict=True))
