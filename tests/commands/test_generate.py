"""Generating codes with tiny untrained models: a sample does not depend on its batch."""

import pytest
import torch
from helpers.toys import untrained_pair

from smalti.commands.generating import generate_batches, generate_codes, generate_images, generate_levels
from smalti.commands.sample import Sample, sample
from smalti.core.devices import autocast, device
from smalti.core.errors import UserError
from smalti.core.randomness import Stream, derive, row_seeds
from smalti.images.decoding import to_uint8
from smalti.priors.methods.sundae import SundaeSampling

SAMPLING = SundaeSampling(steps=4, min_steps=2)


@pytest.fixture(scope="module")
def models():
    return untrained_pair()


def test_a_sample_does_not_depend_on_its_batch(models):
    prior, _ = models
    rows = torch.arange(5)
    together = generate_codes(prior, rows, None, seed=3, sampling=SAMPLING)
    assert together.shape == (5, 4, 8)
    separate = [generate_codes(prior, row.view(1), None, seed=3, sampling=SAMPLING) for row in rows]
    assert torch.equal(torch.cat(separate), together)
    assert len(together.unique(dim=0)) == 5
    assert not torch.equal(together, generate_codes(prior, rows, None, seed=4, sampling=SAMPLING))


@torch.no_grad()
def test_batches_are_the_images_that_are_drawn_at_once(models):
    prior, tokenizer = models
    rows = torch.arange(7)
    codes = generate_levels([prior], rows, torch.ones(7).long(), grids=[(4, 8)], seed=3, samplings=[SAMPLING])
    at_once = to_uint8(tokenizer.draw(codes, derive(row_seeds(3, rows), Stream.IMAGE_DETAILS)))
    options = {"num": 7, "seed": 3, "sampling": SAMPLING, "conditions": [1], "precision": "fp32"}
    batches = list(generate_batches([prior], tokenizer, **options, batch_size=3))
    assert [len(batch) for batch in batches] == [3, 3, 1]
    assert torch.equal(torch.cat(batches), at_once)
    assert torch.equal(generate_images([prior], tokenizer, **options), at_once)


def test_counts_below_one_are_refused():
    for wrong in ({"num": 0}, {"batch_size": 0}):
        with pytest.raises(UserError, match=r"--(num|batch-size) must be at least 1, not 0"):
            sample(Sample(sampling=SAMPLING, **wrong))


@pytest.mark.parametrize("name", ["cuda", "mps"])
def test_a_missing_device_is_refused(name, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(UserError, match=f"--device {name}: there is none here"):
        device(name)
    assert device("auto") == device("cpu") == torch.device("cpu")


@pytest.mark.parametrize(("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_autocast_sets_the_precision_of_matrix_products(precision, dtype):
    with autocast(torch.device("cpu"), precision):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == dtype
