"""Filling holes with tiny untrained models: nothing known changes, nothing hidden is seen, at any size."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers.toys import untrained_pair
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw, ImageFont

from smalti.commands.inpainting import Filling, fill, working_size
from smalti.core.errors import UserError
from smalti.core.randomness import derive, row_seeds
from smalti.images.decoding import to_float, to_uint8
from smalti.images.masks import blank, known_codes, strokes
from smalti.priors.methods.sundae import SundaeSampling, sample_sundae

SAMPLING = SundaeSampling(steps=4, min_steps=2)
PLAIN = Filling(candidates=1, feather=0, match_colour=False)


@pytest.fixture(scope="module")
def models():
    prior, tokenizer = untrained_pair()
    return [prior], tokenizer


def pixels(seed, count=3):
    return torch.randint(256, (count, 3, 8, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def holes(seed, count=3):
    """A box in each image, never all of it."""
    hole = torch.zeros(count, 8, 16, dtype=torch.bool)
    for index in range(count):
        top, left = torch.randint(0, 5, (2,), generator=torch.Generator().manual_seed(seed + index)).tolist()
        hole[index, top : top + 3, left : left + 4] = True
    return hole


def shaped(kind, seed):
    """Holes of every shape that people make, in three images of 8x16."""
    if kind == "box":
        return holes(seed)
    if kind == "strokes":
        return strokes(row_seeds(seed, torch.arange(3)), 8, 16)
    if kind == "checkerboard":
        return ((torch.arange(8)[:, None] + torch.arange(16) + seed) % 2 == 0).expand(3, -1, -1)
    if kind == "pixels":
        return torch.rand(3, 8, 16, generator=torch.Generator().manual_seed(seed)) < 0.03
    picture = Image.new("L", (16, 8))
    ImageDraw.Draw(picture).text((1 + seed % 3, -3), "ab", fill=255, font=ImageFont.load_default(10))
    return (torch.from_numpy(np.array(picture)) > 127).expand(3, -1, -1)


KINDS = ["box", "strokes", "checkerboard", "pixels", "text"]
FILLINGS = [
    PLAIN,
    Filling(candidates=2),
    Filling(candidates=2, dilation=0, feather=2),
    Filling(candidates=1, largest=0.5),
]


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=6)
@given(seed=st.integers(0, 999), filling=st.sampled_from(FILLINGS))
def test_a_fill_keeps_what_is_known_and_never_sees_what_is_hidden(models, kind, seed, filling):
    images, hole, seeds = pixels(seed), shaped(kind, seed), row_seeds(seed, torch.arange(3))
    others = torch.where(hole.unsqueeze(1), pixels(seed + 1), images)
    assert hole.any() == (not torch.equal(images, others))
    filled = fill(*models, images, hole, seeds=seeds, sampling=SAMPLING, filling=filling)
    assert filled.dtype == torch.uint8
    assert torch.equal(filled, fill(*models, others, hole, seeds=seeds, sampling=SAMPLING, filling=filling))
    reach = 2 * filling.feather + 1
    band = torch.nn.functional.max_pool2d(hole.float()[:, None], reach, stride=1, padding=filling.feather) > 0
    beyond = ~band.expand_as(images)
    assert torch.equal(filled[beyond], images[beyond])


@pytest.mark.parametrize("size", [(7, 15), (9, 16), (1, 3), (5, 40), (40, 24)])
def test_an_image_of_any_size_is_filled_at_that_size(models, size):
    """Odd ones with their edges repeated, and what is too large at fewer pixels; the known ones stay all the same."""
    images = torch.randint(256, (2, 3, *size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    hole = torch.zeros(2, *size, dtype=torch.bool)
    hole[:, : (size[0] + 1) // 2, 1 : 1 + size[1] // 3] = True
    seeds = row_seeds(0, torch.arange(2))
    filled = fill(*models, images, hole, seeds=seeds, sampling=SAMPLING, filling=PLAIN)
    known = ~hole.unsqueeze(1).expand_as(images)
    assert torch.equal(filled[known], images[known])
    assert not torch.equal(filled[~known], images[~known])
    others = torch.where(known, images, 255 - images)
    assert torch.equal(filled, fill(*models, others, hole, seeds=seeds, sampling=SAMPLING, filling=PLAIN))


@given(st.integers(1, 400), st.integers(1, 400), st.sampled_from([0.5, 1.0, 4.0]))
def test_the_working_size_divides_and_is_not_too_large(models, height, width, largest):
    """Trained at 8x16 with codes of two pixels."""
    size = working_size(models[1], height, width, largest)
    assert size.padded_height % 2 == size.padded_width % 2 == 0
    assert 0 <= size.padded_height - size.height < 2
    assert 0 <= size.padded_width - size.width < 2
    if height * width <= largest * 8 * 16:
        assert size[:2] == (height, width)
    else:
        assert size.height * size.width <= largest * 8 * 16 + height + width  # rounded
        if min(size[:2]) > 4:
            assert size.height / size.width == pytest.approx(height / width, rel=0.3)


def test_a_picture_is_worked_on_shrunk_with_every_known_pixel_in_it(models):
    """At the size it was shrunk to, a fill at no more than that size is the same fill, enlarged."""
    small = torch.randint(256, (1, 3, 4, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(2))
    large = small.repeat_interleave(4, 2).repeat_interleave(4, 3)
    hole = torch.zeros(1, 4, 8, dtype=torch.bool)
    hole[:, 1:3, 2:4] = True
    hole_large = hole.repeat_interleave(4, 1).repeat_interleave(4, 2)
    seen = []
    for image, where in ((small, hole), (large, hole_large)):
        fill(
            *models,
            image,
            where,
            seeds=row_seeds(1, torch.arange(1)),
            sampling=SAMPLING,
            filling=replace(PLAIN, largest=0.25),
            callback=lambda _, codes: seen.append(codes),
        )
    assert seen[0].shape == seen[-1].shape == (1, 2, 4)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"candidates": 0}, "--candidates must be at least 1 and --largest above 0, not 0 and 4.0"),
        ({"largest": 0.0}, "not 16 and 0.0"),
        ({"dilation": -1}, "--dilation and --feather must be at least 0, not -1 and 0"),
        ({"feather": -2}, "not 1 and -2"),
    ],
)
def test_a_filling_that_cannot_be_is_refused(wrong, said):
    with pytest.raises(UserError, match=said):
        Filling(**wrong)


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
    filled = fill(*models, images, hole, seeds=seeds, sampling=SAMPLING, filling=PLAIN)
    at = hole.unsqueeze(1).expand_as(images)
    assert not torch.equal(
        filled[at], fill(*models, images, hole, seeds=seeds + 1, sampling=SAMPLING, filling=PLAIN)[at]
    )
    brighter = torch.where(at, images, 255 - images)
    assert not torch.equal(filled[at], fill(*models, brighter, hole, seeds=seeds, sampling=SAMPLING, filling=PLAIN)[at])


def test_a_fill_keeps_the_known_codes_and_draws_the_rest(models):
    """By the sampler's callback, which sees the codes after every step."""
    priors, tokenizer = models
    images, hole = pixels(3), holes(3)
    steps = []
    fill(
        priors,
        tokenizer,
        images,
        hole,
        seeds=row_seeds(0, torch.arange(3)),
        sampling=replace(SAMPLING, min_steps=4),
        filling=PLAIN,
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
    (prior,), tokenizer = models
    images, hole, seeds, size = pixels(5), holes(5), row_seeds(5, torch.arange(3)), tokenizer.downsampling
    filled = fill(
        [prior], tokenizer, images, hole, seeds=seeds, sampling=SAMPLING, filling=replace(PLAIN, candidates=4)
    )
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
