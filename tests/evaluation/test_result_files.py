"""Default names of results, and how many images scores need."""

from pathlib import Path

import pytest

from smalti.evaluation.config import TokenizerEvaluation
from smalti.evaluation.result_files import result_path
from smalti.evaluation.sample_size import too_few_images


@pytest.mark.parametrize(("images", "references", "warned"), [(1280, 1280, 0), (1279, 5000, 1), (1280, 999, 2)])
def test_enough_images_are_not_warned_about(images, references, warned):
    scores = {name: {"model": 1.0} for name in ("frechet", "precision", "recall", "mse")}
    conditions = {"images": images, "reference_images": references, "feature_dimensions": 1280}
    assert len(too_few_images(scores, conditions)) == warned


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("hourglass", "hourglass"),
        ("someone/photos-prior", "photos-prior"),
        ("a/my run", "my-run"),
        ("a/demo/prior", "demo"),
        ("a/demo/prior/states/step_00000250", "demo-step_00000250"),
        ("a/hqa/layer-2", "hqa-layer-2"),
    ],
)
def test_default_name_is_that_of_the_run(tmp_path, monkeypatch, source, name):
    monkeypatch.chdir(tmp_path)
    if source.startswith("a/"):
        Path(source).mkdir(parents=True)
    config = TokenizerEvaluation(tokenizer=source)
    assert result_path(config, {}) == Path(f"runs/evaluations/tokenizer-{name}.json")
