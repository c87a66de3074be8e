"""The curve of the study of HR-VQVAE, tiny: its trainings, its table, and the course of the longest training."""

import json

import pytest
from helpers.image_toys import write_patches
from PIL import Image

from smalti.core.errors import UserError
from smalti.core.provenance import logged_metrics
from smalti.studies.hr_vqvae import report, study
from smalti.studies.hr_vqvae.curve import held_out_course
from smalti.studies.hr_vqvae.settings import ReproduceHRVQVAE
from smalti.studies.hr_vqvae.study import TokenizerSpec, model_of, result, specs_by_part, trial_of

SMALL = {"batch_size": 4, "channels": 4, "code_width": 3, "usage_images": 8}


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> ReproduceHRVQVAE:
    """The settings of a curve of trainings of three and five steps with a report after every two, which was drawn."""
    folder = tmp_path_factory.mktemp("curve")
    write_patches(folder / "img", 60)
    place = {"work": folder / "runs", "out": folder / "page.md"}
    config = ReproduceHRVQVAE("hr-vqvae", str(folder / "img"), parts=("curve",), curve_steps=(5, 3), **place, **SMALL)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(study, "REPORT_STEPS", 2)
        report.reproduce_hr_vqvae(config)
    return config


def test_rows_are_the_errors_of_the_trainings_in_order(config):
    rows = [line for line in config.out.read_text().splitlines() if line.startswith(("| 3 |", "| 5 |"))]
    short, long = sorted(specs_by_part(config)["curve"], key=lambda spec: spec.steps)
    for spec, row in zip((short, long), rows, strict=True):
        measured = result(spec, config)
        assert measured is not None
        assert row.startswith(f"| {spec.steps} | {measured['mse']:.6f} | {measured['mse'] / 0.00011:.2f} |")
        settings = json.loads((trial_of(spec, config).folder / "run.json").read_text())["settings"]
        assert (settings["codebook_decay"], settings["optimizer"]) == (0.99, "muon")
    assert Image.open(config.picture("curve")).width > 100
    assert f"({config.picture('curve').name})" in config.out.read_text()


def test_course_is_what_the_training_logged(config):
    spec = max(specs_by_part(config)["curve"], key=lambda spec: spec.steps)
    course, measured = dict(held_out_course(spec, config)), result(spec, config)
    assert measured is not None
    assert list(course) == [2, 4, 5]
    assert course[5] == pytest.approx(measured["mse"], rel=1e-4)
    logged = [line for line in logged_metrics(trial_of(spec, config).folder) if "held_out_mse" in line]
    assert course[2] == logged[0]["held_out_mse"]
    assert held_out_course(TokenizerSpec("hrvq", False, 7, 512, 3), config) == []


def test_tokenizers_of_the_curve_have_folders_of_their_own():
    spec = TokenizerSpec("hrvq", False, 600, 512, 3, curve=True)
    assert spec.name == "hrvq-512-depth3-best-600steps-seed0-curve"
    assert model_of(spec, ReproduceHRVQVAE("hr-vqvae", "img")).codebook_decay == 0.99


@pytest.mark.parametrize("steps", [(), (100, 0)])
def test_curve_without_steps_is_refused(steps):
    with pytest.raises(UserError, match="--curve-steps needs numbers of at least 1"):
        ReproduceHRVQVAE("hr-vqvae", "img", curve_steps=steps)
