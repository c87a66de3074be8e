"""The three commands that programs call: names as texts and paths, and what they leave of the caller's own state."""

import threading
from pathlib import Path

import datasets
import jaxtyping
import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from helpers.image_toys import write_patches

from smalti import LatentSet, UserError, load_prior, open_images
from smalti.commands.build_latents import BuildLatents, build_latents
from smalti.commands.train_prior import TrainPrior, train_prior
from smalti.commands.train_tokenizer import TrainTokenizer, train_tokenizer
from smalti.images.reading import Reading
from smalti.priors.methods.sundae import SundaeConfig
from smalti.priors.networks.hourglass import HourglassConfig
from smalti.tokenizers.vq.hrvq import HRVQConfig
from smalti.training.config import FitConfig

FIT = FitConfig(steps=2, batch_size=4)
NETWORK = HRVQConfig(8, 16, widths=(6,), code_width=5, depth=2, branching=3)
PRIOR = HourglassConfig(model_width=16, heads=2, depth=(1, 1, 1), shorten=(2,))


@pytest.fixture(autouse=True)
def unchecked(monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # which checks types in tests alone


def test_texts_and_paths_are_alike_and_the_callers_state_stays(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_patches(tmp_path / "emoji", 12)
    AcceleratorState._reset_state(reset_partial_state=True)  # what other tests of this process have left
    own, state = Accelerator(cpu=True, mixed_precision="bf16"), torch.get_rng_state()
    tokenizer = train_tokenizer(TrainTokenizer(NETWORK, FIT, images=Path("emoji"), out="portraits", precision="fp32"))
    assert tokenizer == Path("portraits")
    latents = build_latents(BuildLatents(tokenizer=tokenizer, out="set.h5"))
    assert LatentSet(str(latents)).provenance.image_source == "./emoji"
    prior = train_prior(TrainPrior(PRIOR, SundaeConfig(), FIT, latents=str(latents), out="prior", precision="fp32"))
    assert load_prior(prior).provenance["latents_digest"] == LatentSet(latents).content_digest
    assert torch.equal(torch.get_rng_state(), state)
    assert (own.mixed_precision, Accelerator(cpu=True).mixed_precision) == ("bf16", "bf16")


def test_a_training_on_another_thread_runs(tmp_path):
    write_patches(tmp_path / "images", 12)
    config = TrainTokenizer(NETWORK, FIT, images=str(tmp_path / "images"), out=tmp_path / "run")
    done = []
    worker = threading.Thread(target=lambda: done.append(train_tokenizer(config)))
    worker.start()
    worker.join()
    assert done == [tmp_path / "run"]


def test_empty_names_are_refused():
    with pytest.raises(UserError, match="out is empty; give a value, or leave it out for its default"):
        TrainTokenizer(NETWORK, out="")
    with pytest.raises(UserError, match="tokenizer is empty"):
        BuildLatents(tokenizer="")
    with pytest.raises(UserError, match="latents is empty"):
        TrainPrior(PRIOR, SundaeConfig(), latents="")
    assert Reading(held_out=0.25) == Reading(held_out="0.25")


def test_images_and_sets_that_are_no_files_are_refused(tmp_path):
    """Data in memory has no name; programs store it first."""
    for given in (np.zeros((4, 8, 16, 3), np.uint8), torch.zeros(4, 3, 8, 16), datasets.Dataset.from_dict({"a": [1]})):
        message = f"is named by a text or a Path, not by {type(given).__name__}; store it, and give the file's name"
        for call in (open_images, LatentSet, lambda given: TrainTokenizer(NETWORK, images=given)):
            with pytest.raises(UserError, match=message):
                call(given)
        with pytest.raises(UserError, match=f"images is given as {type(given).__name__}; give the ImageSet that open"):
            train_tokenizer(TrainTokenizer(NETWORK, FIT, out=tmp_path), given)
        with pytest.raises(UserError, match=f"latents is given as {type(given).__name__}; give a LatentSet"):
            train_prior(TrainPrior(PRIOR, SundaeConfig(), FIT, out=tmp_path), given)
