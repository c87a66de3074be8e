"""Evaluations of priors on images that are sorted by class, as those of folders are."""

import numpy as np
from helpers.command_toys import save_pair
from helpers.image_toys import Projections
from PIL import Image

from smalti.evaluation import real_images
from smalti.evaluation.config import EvaluationSettings, PriorEvaluation
from smalti.evaluation.prior import evaluate_prior
from smalti.priors.methods.sundae import SundaeSampling


def test_precision_and_recall_compare_with_all_classes(tmp_path, monkeypatch):
    """Held-out images are as near to training images as these are to each other; of the first class few are."""
    monkeypatch.setattr(real_images, "find_extractor", lambda _, device: Projections(device))
    random = np.random.default_rng(0)
    for number, name in enumerate("abcd"):
        (tmp_path / "img" / name).mkdir(parents=True)
        for index in range(60):
            pixels = random.integers(0, 30, (8, 16, 3)) + 70 * number
            Image.fromarray(pixels.astype(np.uint8)).save(tmp_path / "img" / name / f"{index}.png")
    protocol = EvaluationSettings(images=str(tmp_path / "img"), precision="fp32")
    prior = str(save_pair(tmp_path / "pair"))
    scores, _ = evaluate_prior(
        PriorEvaluation(SundaeSampling(steps=2), prior=(prior,), protocol=protocol, out=tmp_path / "x.json"),
        sheet=False,
    )
    assert scores["precision"]["real"] > 0.6
    assert scores["recall"]["real"] > 0.6
