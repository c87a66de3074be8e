"""The study of HQA, tiny: the four modes as the paper has them; its runs, what is measured of them, what is written."""

import json
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image

from smalti import load
from smalti.core import models
from smalti.core.errors import UserError
from smalti.metrics.frechet import Moments, frechet_distance
from smalti.scripts import reproduce as command
from smalti.studies.hqa import report, study
from smalti.studies.hqa.four_modes import COVERING, DROPPING, MODES, SINGLE, four_modes, judged
from smalti.studies.hqa.study import MODELS, ReproduceHQA, classifier, compressed, interpolations, open_data

FLAGS = "--images img --test-images img --steps 1 --batch-size 4 --classifier-steps 2 --test-num 6"
PAPER_MODEL_OF = study.model_of


def test_one_layer_lands_between_modes_two_drop_some_and_two_that_sample_cover_all():
    """Must-show 1."""
    found = four_modes()
    assert (found[SINGLE].unrealistic, found[SINGLE].modes) == (1.0, 0)
    assert (found[DROPPING].unrealistic, found[DROPPING].modes) == (0.0, 2)
    assert (found[COVERING].unrealistic, found[COVERING].modes) == (0.0, 4)
    shares = torch.bincount(torch.cdist(found[COVERING].points, MODES).argmin(1)) / len(found[COVERING].points)
    assert shares.min() > 0.15


def test_unrealistic_is_far_from_every_mode():
    found = judged(torch.cat([MODES[:3], MODES[:1] + 0.3, torch.zeros(4, 2)]))
    assert (found.unrealistic, found.modes) == (5 / 8, 3)  # 0.3 on both axes is farther than 0.4


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A whole study of stacks of two layers, in a folder of its own, which is the current one."""
    folder = tmp_path_factory.mktemp("study")
    random = np.random.default_rng(0)
    for index in range(12):
        (folder / "img" / str(index % 2)).mkdir(parents=True, exist_ok=True)
        pixels = random.integers(0, 256, (4, 4), dtype=np.uint8).repeat(7, 0).repeat(7, 1)
        Image.fromarray(pixels).save(folder / "img" / str(index % 2) / f"{index}.png")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(study, "LAYERS", 2)
        patch.setattr(study, "model_of", model_of)
        patch.setattr(report, "PAIRS", 2)
        patch.setattr(report, "four_modes", lambda: {SINGLE: judged(MODES), COVERING: judged(MODES)})
        study(patch)
        yield folder
    AcceleratorState._reset_state(reset_partial_state=True)  # its arithmetic is not that of the next test


def study(patch):
    AcceleratorState._reset_state(reset_partial_state=True)
    patch.setattr(sys, "argv", ["reproduce.py", "hqa", *FLAGS.split()])
    command.main()


def model_of(kind, layers, config, real=PAPER_MODEL_OF):
    return replace(real(kind, layers, config), widths=(4, 4)[:layers], codebook_size=4, code_width=4)


def config_of(**more) -> ReproduceHQA:
    return ReproduceHQA("hqa", "img", "img", test_num=6, classifier_steps=2, **more)


def test_what_is_measured_is_of_what_images_come_back_as(folder):
    config = config_of()
    data = open_data(config)
    judge = classifier(config, data)
    path = folder / "runs/reproductions/hqa/hams-normalized-weight0.05-1steps-seed0"
    found = json.loads((path / "result-probable-6images-2steps.json").read_text())
    tokenizer = load(path, "tokenizer")
    with torch.no_grad():
        back = tokenizer.decode(tokenizer.encode(data.test))
        wrong = (judge(back).argmax(1) != data.labels).float().mean().item()
        moments = [Moments(study.CLASSIFIER_FEATURES).update(judge.body(images)) for images in (data.test, back)]
    assert found["mse"] == pytest.approx(((back - data.test) / 2).square().mean().item(), rel=1e-4)
    assert found["error"] == pytest.approx(wrong)
    assert found["frechet"] == pytest.approx(frechet_distance(*moments), rel=1e-3, abs=1e-6)
    assert found["bits"] == 8 * 8 * 2
    assert found["parameters"] == sum(parameter.numel() for parameter in tokenizer.parameters())


def test_posteriors_that_can_be_are_sampled(folder):
    names = {path.parent.name: path.name for path in folder.glob("runs/reproductions/hqa/*seed0/result-*.json")}
    sampled = {name.split("-normalized")[0] for name, file in names.items() if "sampled" in file}
    assert sampled == {"hqa", "hams-gs", "hams-gs-mse", "hqa-principal", "hams-gs-mse-principal"}
    tokenizer = load(folder / "runs/reproductions/hqa/hqa-normalized-weight0.05-1steps-seed0", "tokenizer")
    test = open_data(config_of()).test
    assert compressed(tokenizer, test, sampled=True).equal(compressed(tokenizer, test, sampled=True))
    assert not compressed(tokenizer, test, sampled=True).equal(compressed(tokenizer, test, sampled=False))


def test_interpolations_begin_and_end_as_the_images_do(folder):
    tokenizer = load(folder / "runs/reproductions/hqa/hqa-normalized-weight0.05-1steps-seed0", "tokenizer")
    test = open_data(config_of()).test
    found = interpolations(tokenizer, test[:2], test[2:4], 5)
    assert len(found) == 5
    for ours, images in ((found[0], test[:2]), (found[-1], test[2:4])):
        assert ours.equal(tokenizer.decode(tokenizer.encode(images)).detach())


def test_the_report_has_every_row_beside_the_paper(folder):
    text = (folder / "docs/reproductions/hqa.md").read_text()
    assert "not run" not in text
    assert "| HQA | 0.053 | 22.8 | 12.4 % |" in text
    assert text.count("<!-- measured: ") == 4
    found = json.loads(
        (folder / "runs/reproductions/hqa/vqvae-1steps-seed0/result-probable-6images-2steps.json").read_text()
    )
    (row,) = [line for line in text.splitlines() if line.startswith("| VQ-VAE |")]
    assert f"| {found['mse']:.4f} | {found['frechet']:.1f} | {found['error']:.1%} | {found['parameters']:,} |" in row
    for what in ("modes", "reconstructions", "interpolations", "curves"):
        assert f"(hqa-{what}.png)" in text
        assert Image.open(folder / f"docs/reproductions/hqa-{what}.png").width > 100
    assert {line.split(" | ")[0] for line in text.splitlines() if line[:5].strip("| ").isdigit()} == {"| 128", "| 512"}


def test_a_row_of_fewer_seeds_than_asked_for_says_so(folder):
    config = config_of(seeds=2)
    data = open_data(config)
    runs = {"hqa": [folder / "runs/reproductions/hqa/hqa-normalized-weight0.05-1steps-seed0"], "hams": []}
    lines = report.table(config, runs, classifier(config, data), data).splitlines()
    assert any(line.startswith("| HQA, 1 of them |") for line in lines)
    assert lines[-1].endswith("| not run | | | |")


def test_a_finished_study_trains_nothing_again(folder):
    before = {path: path.stat().st_mtime_ns for path in folder.glob("runs/**/*") if path.is_file()}
    with pytest.MonkeyPatch.context() as patch:
        study(patch)
    assert {path: path.stat().st_mtime_ns for path in folder.glob("runs/**/*") if path.is_file()} == before


def test_layers_have_steps_of_their_own_and_vqvae_as_many_in_all(folder):
    config = config_of(layer_steps=(1, 2), normalize=False, batch_size=4, work=folder / "own")
    data = open_data(config)
    steps = {}
    for kind in ("hqa", "vqvae"):
        path = study.trained(kind, config, data)
        assert path.name == f"{kind}{'-weight0.05' if kind == 'hqa' else ''}-1-2steps-seed0"
        found = [
            json.loads((one / "run.json").read_text())["settings"] for one in (path / "layer-1", path) if one.exists()
        ]
        steps[kind] = [(run["steps"], run.get("normalize")) for run in found]
    assert steps == {"hqa": [(1, False), (2, False)], "vqvae": [(3, None)]}
    few = study.trained("vqvae", replace(config, vqvae_steps=1), data)
    assert (few.name, json.loads((few / "run.json").read_text())["settings"]["steps"]) == ("vqvae-1steps-seed0", 1)


def test_layers_and_vqvae_have_images_a_step_and_rates_of_their_own(folder):
    config = config_of(steps=1, layer_batch_sizes=(2, 3), vqvae_learning_rate=0.5, batch_size=4, work=folder / "sizes")
    data = open_data(config)
    hqa, vqvae = (study.trained(kind, config, data) for kind in ("hqa", "vqvae"))
    runs = [json.loads((path / "run.json").read_text())["settings"] for path in (hqa / "layer-1", hqa, vqvae)]
    found = [(run["batch_size"], run["learning_rate"]) for run in runs]
    assert found == [(2, config.learning_rate), (3, config.learning_rate), (4, 0.5)]


@pytest.mark.parametrize("name", ["layer_steps", "layer_batch_sizes"])
@pytest.mark.parametrize("wrong", [(1,), (1, 0)])
def test_refuses_numbers_of_other_layers_than_there_are(folder, name, wrong):
    with pytest.raises(UserError, match=f"--{name.replace('_', '-')} must have 2 numbers of at least 1"):
        config_of(**{name: wrong})


def test_the_models_of_the_table_are_a_million_parameters_and_8_bits():
    for kind in MODELS:
        config = PAPER_MODEL_OF(kind, 5, config_of())
        tokenizer = models.class_of_kind("tokenizer", study.registered(kind))(config)
        assert 0.9e6 < sum(parameter.numel() for parameter in tokenizer.parameters()) < 1.15e6
        assert tokenizer.layout.levels[0].shape == (1, 1)
        assert tokenizer.layout.levels[0].codebook_size == 256
