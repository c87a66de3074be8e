"""The models in the package are what their card says."""

import json
import re
from importlib.resources import files
from pathlib import Path

import pytest
import torch
from helpers.toys import Rows

from smalti import load_prior, load_tokenizer, open_images
from smalti.images.decoding import to_float
from smalti.images.image_set import ImageRows
from smalti.metrics.image_errors import mse
from smalti.priors.base import CodePrior
from smalti.priors.methods.sundae import SundaeConfig
from smalti.training.accelerator import accelerator
from smalti.training.checkpoints_and_logs import held_out_losses
from smalti.training.config import FitConfig

PACKAGE = Path(str(files("smalti")))
CARD = json.loads((PACKAGE / "shipped/portraits/card.json").read_text())

FIRST_HELD_OUT_IMAGE = """
    2385 2388 2328 2615 2612 2538 2388 2385 2385 3140 4017 2714 2714 569 3082 2384 2385 3973 2712 2714 2714 2714
    2531 2384 2385 4085 2714 2780 2665 2712 1517 2384 2385 2551 2641 2762 2756 2765 2454 2384 2385 3276 904 2708
    2714 898 3222 2384 2393 3162 906 2705 2717 2704 3223 2393 2387 4074 1232 3255 3152 2133 622 2387
"""


@pytest.fixture(scope="module")
def held_out():
    """The held-out images in [-1, 1], and their labels."""
    batch = (rows := ImageRows(open_images("portraits"), split="held_out", flips=False)).__getitems__(range(len(rows)))
    return to_float(batch["images"]), batch["labels"]


@torch.no_grad()
def test_the_portraits_have_the_errors_and_codes_of_their_card(held_out):
    tokenizer, prior = load_tokenizer("portraits"), load_prior("portraits")
    assert tokenizer.digest() == CARD["tokenizer"]["digest"]
    assert prior.digest() == CARD["prior"]["digest"]
    images, labels = held_out
    assert len(images) == CARD["images"]["held_out"]
    codes = torch.cat([tokenizer.encode(batch)[0] for batch in images.split(128)])
    rebuilt = torch.cat([tokenizer.decode((batch,)) for batch in codes.split(128)])
    assert float(mse(rebuilt, images).mean()) == pytest.approx(CARD["tokenizer"]["mse"], rel=0.01)
    equal = codes[0].flatten() == torch.tensor(list(map(int, FIRST_HELD_OUT_IMAGE.split())))
    assert equal.sum() >= 63  # another machine may round a near tie the other way

    assert isinstance(prior, CodePrior)
    objective = prior.method.objective(prior, SundaeConfig()).eval()
    losses = held_out_losses(accelerator("fp32"), objective, Rows(codes=codes, labels=labels), FitConfig())
    assert losses["held_out_loss"] == pytest.approx(CARD["prior"]["held_out_loss"], rel=0.01)


def test_models_in_the_package_name_no_folder_of_a_machine():
    for path in PACKAGE.glob("shipped/**/*.json"):
        assert not re.search(r'"/', path.read_text()), "an absolute path"


def test_models_in_the_package_are_small():
    assert sum(path.stat().st_size for path in PACKAGE.glob("shipped/**/*")) <= 16e6
