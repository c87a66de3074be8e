"""Filling holes and drawing images with tiny untrained models: nothing known changes, nothing hidden is seen."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from smalti.devices import autocast, device
from smalti.errors import UserError
from smalti.masks import blank, known_codes
from smalti.pipeline.generate import Sample, generate_codes, sample
from smalti.pipeline.inpaint import fill
from smalti.preprocess import to_float, to_uint8
from smalti.priors.hourglass import Hourglass, HourglassConfig
from smalti.priors.samplers import SundaeSampling, sample_sundae
from smalti.randomness import derive, row_seeds
from smalti.tokenizers.hrvq import HRVQ, HRVQConfig

SAMPLING = SundaeSampling(steps=4, min_steps=2)
TOKENIZER = HRVQConfig(8, 16, widths=(6,), residual_blocks=3, code_width=5, depth=2, branching=3)
PRIOR = HourglassConfig(4, 8, radices=(3, 3), model_width=16, heads=2, depth=(1, 1, 1), shorten=(2,))


@pytest.fixture(scope="module")
def models():
    """Untrained, but with weights large enough that what a network sees decides what it says."""
    torch.manual_seed(0)
    prior, tokenizer = Hourglass(PRIOR).eval(), HRVQ(TOKENIZER).eval()
    for parameter in tokenizer.parameters():
        torch.nn.init.normal_(parameter, std=0.5)  # residual blocks start as the identity, which sees no neighbours
    tokenizer.start_from(torch.rand(16, 3, 8, 16) * 2 - 1)
    torch.nn.init.normal_(prior.head.weight)
    return prior, tokenizer


def pixels(seed, count=3):
    return torch.randint(256, (count, 3, 8, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def holes(seed, count=3):
    """A box in each image, never all of it."""
    hole = torch.zeros(count, 8, 16, dtype=torch.bool)
    for index in range(count):
        top, left = torch.randint(0, 5, (2,), generator=torch.Generator().manual_seed(seed + index)).tolist()
        hole[index, top : top + 3, left : left + 4] = True
    return hole


@settings(max_examples=15)
@given(st.integers(0, 999))
def test_a_fill_keeps_what_is_known_and_never_sees_what_is_hidden(models, seed):
    images, hole, seeds = pixels(seed), holes(seed), row_seeds(seed, torch.arange(3))
    others = torch.where(hole.unsqueeze(1), pixels(seed + 1), images)
    assert not torch.equal(images, others)
    filled = fill(*models, images, hole, seeds=seeds, sampling=SAMPLING)
    assert filled.dtype == torch.uint8
    known = ~hole.unsqueeze(1).expand_as(images)
    assert torch.equal(filled[known], images[known])
    assert torch.equal(filled, fill(*models, others, hole, seeds=seeds, sampling=SAMPLING))


def test_these_images_would_leak_if_the_hole_were_not_painted_over(models):
    """That the test above can fail: codes that are kept see into the hole."""
    images, hole = pixels(0), holes(0)
    others = torch.where(hole.unsqueeze(1), pixels(1), images)
    kept = known_codes(hole, models[1].downsampling)
    (codes,), (theirs,) = (models[1].encode(to_float(which)) for which in (images, others))
    assert not torch.equal(codes[kept], theirs[kept])


def test_a_fill_depends_on_its_seed_and_on_what_is_known(models):
    """Or the leak test would pass for a fill that looks at nothing."""
    images, hole, seeds = pixels(0), holes(0), row_seeds(0, torch.arange(3))
    filled = fill(*models, images, hole, seeds=seeds, sampling=SAMPLING)
    at = hole.unsqueeze(1).expand_as(images)
    assert not torch.equal(filled[at], fill(*models, images, hole, seeds=seeds + 1, sampling=SAMPLING)[at])
    brighter = torch.where(at, images, 255 - images)
    assert not torch.equal(filled[at], fill(*models, brighter, hole, seeds=seeds, sampling=SAMPLING)[at])


def test_a_fill_keeps_the_known_codes_and_draws_the_rest(models):
    """By the sampler's callback, which sees the codes after every step."""
    prior, tokenizer = models
    images, hole = pixels(3), holes(3)
    steps = []
    fill(
        prior,
        tokenizer,
        images,
        hole,
        seeds=row_seeds(0, torch.arange(3)),
        sampling=replace(SAMPLING, min_steps=4),
        callback=lambda step, codes: steps.append((step, codes)),
    )
    assert [step for step, _ in steps] == [0, 1, 2, 3]
    known = known_codes(hole, tokenizer.downsampling)
    assert known.any()
    assert not known.all()
    first, last = steps[0][1], steps[-1][1]
    assert torch.equal(first[known], last[known])
    assert not torch.equal(first[~known], last[~known])


@torch.no_grad()
def test_of_several_candidates_the_one_nearest_to_the_known_pixels_beside_the_hole_is_kept(models):
    """Each image alone, candidate by candidate and patch by patch."""
    prior, tokenizer = models
    images, hole, seeds, size = pixels(5), holes(5), row_seeds(5, torch.arange(3)), tokenizer.downsampling
    filled = fill(prior, tokenizer, images, hole, seeds=seeds, sampling=SAMPLING, candidates=4)
    (known,) = tokenizer.encode(blank(to_float(images), hole))
    kept = known_codes(hole, size)
    chosen = []
    for row in range(3):
        tries = []
        for candidate in range(4):
            one = slice(row, row + 1)
            of_candidate = derive(seeds[one], candidate)
            codes = sample_sundae(prior, known=known[one], known_mask=kept[one], seeds=of_candidate, sampling=SAMPLING)
            decoded, error = tokenizer.decode((codes,))[0], 0.0
            for y, x in (~kept[row]).nonzero().tolist():
                patch = (slice(y * size, (y + 1) * size), slice(x * size, (x + 1) * size))
                difference = (decoded - to_float(images)[row])[:, *patch]
                error += float(difference[:, ~hole[row][patch]].square().sum())
            tries.append((error, candidate, torch.where(hole[row], to_uint8(decoded), images[row])))
        chosen.append(min(tries, key=lambda found: found[0]))
        assert torch.equal(filled[row], chosen[-1][2])
    assert {candidate for _, candidate, _ in chosen} != {0}  # or choosing nothing would pass


def test_a_sample_is_that_of_its_number_whatever_the_batch(models):
    prior, _ = models
    rows = torch.arange(5)
    together = generate_codes(prior, rows, None, seed=3, sampling=SAMPLING)
    assert together.shape == (5, 4, 8)
    apart = [generate_codes(prior, row.view(1), None, seed=3, sampling=SAMPLING) for row in rows]
    assert torch.equal(torch.cat(apart), together)
    assert len(together.unique(dim=0)) == 5
    assert not torch.equal(together, generate_codes(prior, rows, None, seed=4, sampling=SAMPLING))


def test_numbers_that_make_no_sheet_are_refused():
    for wrong in ({"num": 0}, {"batch_size": 0}):
        with pytest.raises(UserError, match="--num and --batch-size must be at least 1"):
            sample(Sample(sampling=SAMPLING, **wrong))


@pytest.mark.parametrize("name", ["cuda", "mps"])
def test_a_device_that_is_not_there_is_one_line(name, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(UserError, match=f"--device {name}: there is none here"):
        device(name)
    assert device("auto") == device("cpu") == torch.device("cpu")


@pytest.mark.parametrize(("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_precision_is_that_of_matrix_products(precision, dtype):
    with autocast(torch.device("cpu"), precision):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == dtype
