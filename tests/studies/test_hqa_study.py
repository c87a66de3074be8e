"""The study of HQA, tiny: the four modes of Fig. 1, which tokenizers it trains, and what is measured of them."""

import json
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers.image_toys import write_patches
from PIL import Image

from smalti.core import models
from smalti.core.errors import UserError
from smalti.core.models import load
from smalti.images.image_set import open_images
from smalti.metrics.frechet import Moments, frechet_distance
from smalti.scripts import reproduce as command
from smalti.studies.hqa import report, study
from smalti.studies.hqa.classifier import CLASSIFIER_FEATURES, ClassifierEvaluator
from smalti.studies.hqa.four_modes import COVERING, DROPPING, MODES, SINGLE, evaluate_points, four_modes
from smalti.studies.hqa.study import MODELS, ReproduceHQA, compressed, evaluator_of, interpolations, open_data

FLAGS = "--images img --test-images img --steps 1 --batch-size 4 --classifier-steps 2 --test-num 6"
PAPER_MODEL_OF = study.model_of


def test_one_layer_averages_modes_and_only_two_stochastic_layers_cover_them_all():
    """Fig. 1 of the paper."""
    decoded = four_modes()
    assert (decoded[SINGLE].unrealistic, decoded[SINGLE].modes) == (1.0, 0)
    assert (decoded[DROPPING].unrealistic, decoded[DROPPING].modes) == (0.0, 2)
    assert (decoded[COVERING].unrealistic, decoded[COVERING].modes) == (0.0, 4)
    shares = torch.bincount(torch.cdist(decoded[COVERING].points, MODES).argmin(1)) / len(decoded[COVERING].points)
    assert shares.min() > 0.15


def test_unrealistic_points_are_far_from_every_mode():
    decoded = evaluate_points(torch.cat([MODES[:3], MODES[:1] + 0.3, torch.zeros(4, 2)]))
    assert (decoded.unrealistic, decoded.modes) == (5 / 8, 3)  # 0.3 on both axes is farther than 0.4


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with the whole study, of stacks of two layers; it is the current folder."""
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
        patch.setattr(report, "four_modes", lambda: {SINGLE: evaluate_points(MODES), COVERING: evaluate_points(MODES)})
        run_study(patch)
        yield folder


def run_study(patch):
    patch.setattr(sys, "argv", ["reproduce.py", "hqa", *FLAGS.split()])
    command.main()


def model_of(kind, layers, config, real=PAPER_MODEL_OF):
    return replace(real(kind, layers, config), widths=(4, 4)[:layers], codebook_size=4, code_width=4)


def config_of(**more) -> ReproduceHQA:
    return ReproduceHQA("hqa", "img", "img", test_num=6, classifier_steps=2, **more)


def folder_of(folder, kind):
    return folder / f"runs/reproductions/hqa/{kind}-normalized-weight0.05-1steps-seed0"


def test_scores_are_those_of_the_reconstructed_test_images(folder):
    config = config_of()
    data = open_data(config)
    classifier = evaluator_of(config, data).classifier
    path = folder_of(folder, "hams")
    scores = json.loads((path / f"result-probable-{evaluator_of(config, data).key}.json").read_text())
    tokenizer = load(path, "tokenizer")
    with torch.no_grad():
        images = tokenizer.decode(tokenizer.encode(data.test))
        wrong = (classifier(images).argmax(1) != data.labels).float().mean().item()
        moments = [Moments(CLASSIFIER_FEATURES).update(classifier.body(each)) for each in (data.test, images)]
    assert scores["mse"] == pytest.approx(((images - data.test) / 2).square().mean().item(), rel=1e-4)
    assert scores["error"] == pytest.approx(wrong)
    assert scores["frechet"] == pytest.approx(frechet_distance(*moments), rel=1e-3, abs=1e-6)
    assert scores["bits"] == 8 * 8 * 2
    assert scores["parameters"] == sum(parameter.numel() for parameter in tokenizer.parameters())


def test_codes_are_sampled_if_the_posterior_is_stochastic(folder):
    names = {path.parent.name: path.name for path in folder.glob("runs/reproductions/hqa/*seed0/result-*.json")}
    sampled = {name.split("-normalized")[0] for name, file in names.items() if "sampled" in file}
    assert sampled == {"hqa", "hams-gs", "hams-gs-mse", "hqa-principal", "hams-gs-mse-principal"}
    tokenizer = load(folder_of(folder, "hqa"), "tokenizer")
    test = open_data(config_of()).test
    assert compressed(tokenizer, test, sampled=True).equal(compressed(tokenizer, test, sampled=True))
    assert not compressed(tokenizer, test, sampled=True).equal(compressed(tokenizer, test, sampled=False))


def test_interpolations_start_and_end_at_the_reconstructions(folder):
    tokenizer = load(folder_of(folder, "hqa"), "tokenizer")
    test = open_data(config_of()).test
    points = interpolations(tokenizer, test[:2], test[2:4], 5)
    assert len(points) == 5
    for decoded, images in ((points[0], test[:2]), (points[-1], test[2:4])):
        assert decoded.equal(tokenizer.decode(tokenizer.encode(images)).detach())


def test_report_has_every_part_and_row(folder):
    text = (folder / "docs/reproductions/hqa.md").read_text()
    assert "not run" not in text
    assert "| HQA | 0.053 | 22.8 | 12.4 % |" in text
    assert text.count("<!-- measured: ") == 4
    (path,) = folder.glob("runs/reproductions/hqa/vqvae-2steps-in-all-seed0/result-probable-6images-*.json")
    scores = json.loads(path.read_text())
    (row,) = [line for line in text.splitlines() if line.startswith("| VQ-VAE |")]
    assert f"| {scores['mse']:.4f} | {scores['frechet']:.1f} | {scores['error']:.1%} |" in row
    for name in ("modes", "reconstructions", "interpolations", "curves"):
        assert f"(hqa-{name}.png)" in text
        assert Image.open(folder / f"docs/reproductions/hqa-{name}.png").width > 100
    assert {line.split(" | ")[0] for line in text.splitlines() if line[:5].strip("| ").isdigit()} == {"| 128", "| 512"}


def test_finished_study_trains_nothing_again(folder):
    before = {path: path.stat().st_mtime_ns for path in folder.glob("runs/**/*") if path.is_file()}
    with pytest.MonkeyPatch.context() as patch:
        run_study(patch)
    assert {path: path.stat().st_mtime_ns for path in folder.glob("runs/**/*") if path.is_file()} == before


def test_layer_steps_apply_per_layer_and_vqvae_gets_their_sum(folder):
    config = config_of(layer_steps=(1, 2), normalize=False, batch_size=4, work=folder / "own")
    data = open_data(config)
    steps, names = {}, {"hqa": "hqa-weight0.05-1-2steps-seed0", "vqvae": "vqvae-3steps-in-all-seed0"}
    for kind in ("hqa", "vqvae"):
        path = study.trained(kind, config, data).folder
        assert path.name == names[kind]
        paths = [path / "layer-1", path] if kind == "hqa" else [path]
        settings = [json.loads((each / "run.json").read_text())["settings"] for each in paths]
        steps[kind] = [(run["steps"], run.get("normalize")) for run in settings]
    assert steps == {"hqa": [(1, False), (2, False)], "vqvae": [(3, None)]}
    few = study.trained("vqvae", replace(config, vqvae_steps=1), data).folder
    assert few.name == "vqvae-1steps-in-all-seed0"
    assert json.loads((few / "run.json").read_text())["settings"]["steps"] == 1


def test_vqvae_of_the_default_steps_and_of_as_many_as_a_layer_has_are_two_trainings(folder):
    config = config_of(steps=2, batch_size=4, work=folder / "budgets")
    data = open_data(config)
    trained = [study.trained("vqvae", each, data).folder for each in (config, replace(config, vqvae_steps=2))]
    assert [json.loads((path / "run.json").read_text())["settings"]["steps"] for path in trained] == [4, 2]


def test_other_images_have_a_classifier_and_results_of_their_own(folder):
    data = open_data(config_of())
    other = ClassifierEvaluator(data.train, -data.test, data.labels, steps=2, folder=folder / "classifiers")
    same = ClassifierEvaluator(data.train, data.test, data.labels, steps=2, folder=folder / "classifiers")
    assert other.key != same.key
    relabelled = ClassifierEvaluator(data.train, data.test, 1 - data.labels, steps=2, folder=folder / "classifiers")
    assert relabelled.key != same.key
    assert len([*(folder / "classifiers").iterdir()]) == 1
    write_patches(folder / "img2" / "0", 4)
    train = open_images(str(folder / "img2"), channels=1)
    retrained = ClassifierEvaluator(train, data.test, data.labels, steps=2, folder=folder / "classifiers")
    assert retrained.key != same.key
    assert len([*(folder / "classifiers").iterdir()]) == 2


def test_layers_and_vqvae_have_their_own_batch_sizes_and_learning_rates(folder):
    config = config_of(steps=1, layer_batch_sizes=(2, 3), vqvae_learning_rate=0.5, batch_size=4, work=folder / "sizes")
    data = open_data(config)
    hqa, vqvae = (study.trained(kind, config, data).folder for kind in ("hqa", "vqvae"))
    runs = [json.loads((path / "run.json").read_text())["settings"] for path in (hqa / "layer-1", hqa, vqvae)]
    rate = config.learning_rate
    assert [(run["batch_size"], run["learning_rate"]) for run in runs] == [(2, rate), (3, rate), (4, 0.5)]


@pytest.mark.parametrize("name", ["layer_steps", "layer_batch_sizes"])
def test_settings_for_another_number_of_layers_are_refused(folder, name):
    for wrong in ((1,), (1, 0)):
        with pytest.raises(UserError, match=f"--{name.replace('_', '-')} must have 2 numbers of at least 1"):
            config_of(**{name: wrong})


def test_models_of_the_table_have_a_million_parameters_and_8_bits():
    for kind in MODELS:
        config = PAPER_MODEL_OF(kind, 5, config_of())
        tokenizer = models.class_of_kind("tokenizer", study.registered_kind(kind))(config)
        assert 0.9e6 < sum(parameter.numel() for parameter in tokenizer.parameters()) < 1.15e6
        assert tokenizer.layout.levels[0].shape == (1, 1)
        assert tokenizer.layout.levels[0].codebook_size == 256
