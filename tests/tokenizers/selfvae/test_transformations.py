"""selfVAE's image transformations: the form of every representation, values of simple images, refused levels."""

from dataclasses import replace

import pytest
import torch
from helpers import toys

from smalti.core.errors import UserError
from smalti.images.decoding import visible
from smalti.tokenizers.selfvae.logistic import to_bins
from smalti.tokenizers.selfvae.selfvae import SelfVAE
from smalti.tokenizers.selfvae.transformations import Form, forms, sketch, transform

SMALL = replace(toys.TINY["selfvae"], height=8, width=8, stages=2)


def images(count=3, height=8, width=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(256, (count, 3, height, width), generator=generator) / 127.5 - 1


@pytest.mark.parametrize(
    ("name", "levels", "expected"),
    [
        ("downscale", 3, [Form(3), Form(3, 1), Form(3, 2)]),
        ("bits", 4, [Form(3), Form(3, bins=16), Form(3, bins=4), Form(3, bins=2)]),
        ("sketch", 2, [Form(3), Form(1)]),
        ("grayscale", 2, [Form(3), Form(1)]),
    ],
)
def test_representations_have_their_form(name, levels, expected):
    """Checks values, channels and size, and that a batch gives the same as its images alone."""
    model = SelfVAE(replace(SMALL, levels=levels, transformation=name))
    assert list(model.forms) == expected
    representations = model.representations(images())
    for y, form in zip(representations, expected, strict=True):
        assert y.shape == (3, form.channels, 8 >> form.halvings, 8 >> form.halvings)
        assert to_bins(y, form.bins).equal(y)
        assert len(y.unique()) > 1
    for alone, batched in zip(model.representations(images()[1:2]), representations, strict=True):
        assert alone.equal(batched[1:2])


@pytest.mark.parametrize("channels", [2, 4, 5])
@pytest.mark.parametrize("name", ["sketch", "grayscale"])
def test_grey_forms_are_those_of_the_visible_channels(name, channels):
    x = to_bins(torch.rand(3, channels, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1, 256)
    before, after = forms(name, 2, channels)
    assert transform(name, x, before, after).equal(transform(name, visible(x), Form(visible(x).shape[1]), after))


def test_transformations_of_simple_images():
    x = images()
    two_bits = transform("bits", x, Form(3, bins=256), Form(3, bins=4))
    assert (two_bits * 1.5 + 1.5).round().equal(((x + 1) * 127.5).round() // 64)
    flat = to_bins(torch.full((1, 3, 8, 8), -0.2), 256)
    assert transform("downscale", flat, Form(3), Form(3, 1)).equal(flat[..., :4, :4])
    assert sketch(flat).eq(1).all()  # without edges the sketch is white
    edge = flat.clone()
    edge[..., 4:] = -1.0
    sketched = sketch(edge)
    assert sketched[..., 4].max() < sketched[..., 0].min()  # a line on the dark side of the edge


@pytest.mark.parametrize(
    ("name", "levels", "channels", "message"),
    [
        ("sketch", 3, 3, "1 to 2 levels"),
        ("bits", 5, 3, "1 to 4"),
        ("grayscale", 2, 1, "1 to 1"),
        ("downscale", 0, 3, "not 0"),
    ],
)
def test_unsupported_numbers_of_levels_are_refused(name, levels, channels, message):
    with pytest.raises(UserError, match=message):
        forms(name, levels, channels)
