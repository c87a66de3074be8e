"""Inpainting with tiny untrained models: known pixels stay, masked pixels have no influence, at any size."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers.toys import untrained_pair
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw, ImageFont

from smalti.commands.inpaint import Inpaint, _jobs
from smalti.commands.inpainting import Filling, WorkingSize, _to_working_size, fill, working_size
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


def box_masks(seed, count=3):
    """Returns a box in each image, never all of it."""
    mask = torch.zeros(count, 8, 16, dtype=torch.bool)
    for index in range(count):
        top, left = torch.randint(0, 5, (2,), generator=torch.Generator().manual_seed(seed + index)).tolist()
        mask[index, top : top + 3, left : left + 4] = True
    return mask


def shaped_masks(kind, seed):
    """Returns masks of a common shape for three images of 8x16 pixels."""
    if kind == "box":
        return box_masks(seed)
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
def test_a_fill_keeps_known_pixels_and_ignores_masked_ones(models, kind, seed, filling):
    images, mask, seeds = pixels(seed), shaped_masks(kind, seed), row_seeds(seed, torch.arange(3))
    others = torch.where(mask.unsqueeze(1), pixels(seed + 1), images)
    assert mask.any() == (not torch.equal(images, others))
    filled = fill(*models, images, mask, seeds=seeds, sampling=SAMPLING, filling=filling)
    assert filled.dtype == torch.uint8
    assert torch.equal(filled, fill(*models, others, mask, seeds=seeds, sampling=SAMPLING, filling=filling))
    reach = 2 * filling.feather + 1
    band = torch.nn.functional.max_pool2d(mask.float()[:, None], reach, stride=1, padding=filling.feather) > 0
    beyond = ~band.expand_as(images)
    assert torch.equal(filled[beyond], images[beyond])


@pytest.mark.parametrize("size", [(7, 15), (9, 16), (1, 3), (5, 40), (40, 24)])
def test_images_of_any_size_keep_their_size(models, size):
    """Sizes that do not divide are padded and large ones are reduced; known pixels stay exact."""
    images = torch.randint(256, (2, 3, *size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    mask = torch.zeros(2, *size, dtype=torch.bool)
    mask[:, : (size[0] + 1) // 2, 1 : 1 + size[1] // 3] = True
    seeds = row_seeds(0, torch.arange(2))
    filled = fill(*models, images, mask, seeds=seeds, sampling=SAMPLING, filling=PLAIN)
    known = ~mask.unsqueeze(1).expand_as(images)
    assert torch.equal(filled[known], images[known])
    assert not torch.equal(filled[~known], images[~known])
    others = torch.where(known, images, 255 - images)
    assert torch.equal(filled, fill(*models, others, mask, seeds=seeds, sampling=SAMPLING, filling=PLAIN))


@given(st.integers(8, 40), st.integers(8, 40), st.integers(2, 8), st.integers(2, 8), st.integers(0, 2**16))
def test_no_masked_pixel_shows_in_known_pixels_of_a_reduced_image(height, width, new_height, new_width, seed):
    """Resampling filters reach further than the pixels that a pixel replaces."""
    draw = torch.Generator().manual_seed(seed)
    mask = torch.zeros(1, height, width, dtype=torch.bool)
    top, left = (int(torch.randint(side, (1,), generator=draw)) for side in (height, width))
    mask[:, top : top + height // 2, left : left + width // 2] = True
    image = torch.rand(1, 3, height, width, generator=draw) * 2 - 1
    size = WorkingSize(new_height, new_width, new_height, new_width)
    reduced, reduced_mask = _to_working_size(image, mask, size)
    other, _ = _to_working_size(torch.where(mask.unsqueeze(1), -image, image), mask, size)
    known = ~reduced_mask.unsqueeze(1).expand_as(reduced)
    torch.testing.assert_close(reduced[known], other[known], atol=1e-5, rtol=0)
    plain = F.interpolate(image, (new_height, new_width), mode="bicubic", antialias=True).clamp(-1, 1)
    torch.testing.assert_close(_to_working_size(image, mask & False, size)[0], plain)


@given(st.integers(1, 400), st.integers(1, 400), st.sampled_from([0.5, 1.0, 4.0]))
def test_the_working_size_divides_and_is_limited(models, height, width, largest):
    """The model was trained at 8x16 pixels with codes of two pixels."""
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


@pytest.mark.parametrize("size", [(1, 65000), (65000, 1), (1, 10**8), (3, 10**6)])
def test_the_working_size_of_narrow_images_is_limited_after_padding(models, size):
    working = working_size(models[1], *size, 4.0)
    assert working.padded_height * working.padded_width <= 4 * 8 * 16
    assert min(working) >= 1


def test_a_large_image_is_filled_the_same_alone_and_among_others(models):
    images = torch.randint(256, (3, 3, 40, 300), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    masks = strokes(row_seeds(0, torch.arange(3)), 40, 300)
    seeds, options = row_seeds(1, torch.arange(3)), {"sampling": SAMPLING, "filling": Filling(candidates=2)}
    together = fill(*models, images, masks, seeds=seeds, **options)
    for index in range(3):
        one = slice(index, index + 1)
        assert torch.equal(together[one], fill(*models, images[one], masks[one], seeds=seeds[one], **options))


def test_large_and_small_images_are_filled_at_the_same_size(models):
    """With a limit below both sizes, both are filled on the same grid of codes."""
    small = torch.randint(256, (1, 3, 4, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(2))
    large = small.repeat_interleave(4, 2).repeat_interleave(4, 3)
    mask = torch.zeros(1, 4, 8, dtype=torch.bool)
    mask[:, 1:3, 2:4] = True
    large_mask = mask.repeat_interleave(4, 1).repeat_interleave(4, 2)
    sampled = []
    for image, image_mask in ((small, mask), (large, large_mask)):
        fill(
            *models,
            image,
            image_mask,
            seeds=row_seeds(1, torch.arange(1)),
            sampling=SAMPLING,
            filling=replace(PLAIN, largest=0.25),
            callback=lambda _, codes: sampled.append(codes),
        )
    assert sampled[0].shape == sampled[-1].shape == (1, 2, 4)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"candidates": 0}, "--candidates must be at least 1 and --largest above 0, not 0 and 4.0"),
        ({"largest": 0.0}, "not 16 and 0.0"),
        ({"dilation": -1}, "--dilation and --feather must be at least 0, not -1 and 0"),
        ({"feather": -2}, "not 1 and -2"),
    ],
)
def test_invalid_filling_settings_are_refused(values, message):
    with pytest.raises(UserError, match=message):
        Filling(**values)


def test_without_blanking_known_codes_depend_on_masked_pixels(models):
    """Shows that the test of masked pixels can fail: the receptive field of kept codes reaches into the mask."""
    images, mask = pixels(0), box_masks(0)
    others = torch.where(mask.unsqueeze(1), pixels(1), images)
    kept = known_codes(mask, models[1].downsampling)
    (codes,), (theirs,) = (models[1].encode(to_float(each)) for each in (images, others))
    assert not torch.equal(codes[kept], theirs[kept])


def test_a_fill_depends_on_its_seed_and_on_the_known_pixels(models):
    """Otherwise the test of masked pixels would pass for a fill that ignores its image."""
    images, mask, seeds = pixels(0), box_masks(0), row_seeds(0, torch.arange(3))
    filled = fill(*models, images, mask, seeds=seeds, sampling=SAMPLING, filling=PLAIN)
    masked = mask.unsqueeze(1).expand_as(images)
    assert not torch.equal(
        filled[masked], fill(*models, images, mask, seeds=seeds + 1, sampling=SAMPLING, filling=PLAIN)[masked]
    )
    brighter = torch.where(masked, images, 255 - images)
    assert not torch.equal(
        filled[masked], fill(*models, brighter, mask, seeds=seeds, sampling=SAMPLING, filling=PLAIN)[masked]
    )


def test_a_fill_keeps_known_codes_and_samples_the_rest(models):
    """The sampler's callback receives the codes after every step."""
    priors, tokenizer = models
    images, mask = pixels(3), box_masks(3)
    steps = []
    fill(
        priors,
        tokenizer,
        images,
        mask,
        seeds=row_seeds(0, torch.arange(3)),
        sampling=replace(SAMPLING, min_steps=4),
        filling=PLAIN,
        callback=lambda step, codes: steps.append((step, codes)),
    )
    assert [step for step, _ in steps] == [0, 1, 2, 3]
    known = known_codes(mask, tokenizer.downsampling)
    assert known.any()
    assert not known.all()
    first, last = steps[0][1], steps[-1][1]
    assert torch.equal(first[known], last[known])
    assert not torch.equal(first[~known], last[~known])


@torch.no_grad()
def test_the_candidate_nearest_to_the_known_pixels_is_kept(models):
    """Brute force: one image, candidate and patch at a time."""
    (prior,), tokenizer = models
    images, mask, seeds, size = pixels(5), box_masks(5), row_seeds(5, torch.arange(3)), tokenizer.downsampling
    filled = fill(
        [prior], tokenizer, images, mask, seeds=seeds, sampling=SAMPLING, filling=replace(PLAIN, candidates=4)
    )
    (known,) = tokenizer.encode(blank(to_float(images), mask))
    kept = known_codes(mask, size)
    kept_candidates = []
    for row in range(3):
        tries = []
        for candidate in range(4):
            one = slice(row, row + 1)
            candidate_seed = derive(seeds[one], candidate)
            codes = sample_sundae(
                prior, known=known[one], known_mask=kept[one], seeds=candidate_seed, sampling=SAMPLING
            )
            decoded, error = tokenizer.decode((codes,))[0], 0.0
            for y, x in (~kept[row]).nonzero().tolist():
                patch = (slice(y * size, (y + 1) * size), slice(x * size, (x + 1) * size))
                difference = (decoded - to_float(images)[row])[:, *patch]
                error += float(difference[:, ~mask[row][patch]].square().sum())
            tries.append((error, candidate, torch.where(mask[row], to_uint8(decoded), images[row])))
        kept_candidates.append(min(tries, key=lambda each: each[0]))
        assert torch.equal(filled[row], kept_candidates[-1][2])
    assert {candidate for _, candidate, _ in kept_candidates} != {0}  # else always keeping the first would pass


def test_pairing_names_takes_time_in_proportion_to_their_number(tmp_path, monkeypatch):
    """Counted as comparisons of names: a folder may have many thousand images."""
    comparisons = []

    class Stem(str):
        def __eq__(self, other):
            comparisons.append(other)
            return str.__eq__(self, other)

        __hash__ = str.__hash__

    class Named(type(Path())):
        stem = property(lambda self: Stem(super().stem))

    for folder in ("images", "masks"):
        (tmp_path / folder).mkdir()
    listed = [Named(tmp_path / "images" / f"{number}.png") for number in range(300)]
    monkeypatch.setattr("smalti.commands.inpaint._image_files", lambda folder: listed)
    config = Inpaint(SundaeSampling(), image=tmp_path / "images", mask=tmp_path / "masks", out=tmp_path / "out")
    assert len(_jobs(config, tmp_path / "images")) == 300
    assert len(comparisons) < 10 * 300
