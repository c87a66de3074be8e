"""Sinusoidal embeddings of positions against their formula, and what they change in hourglass and MaskGIT."""

import math

import pytest
import torch
from helpers.hourglass import codes_of, model_of

from smalti.priors.methods.masked import MASK_TOKEN
from smalti.priors.networks.hourglass import Hourglass
from smalti.priors.networks.maskgit import MaskGIT
from smalti.priors.networks.positions import ROTARY_THETA, sinusoidal_positions


def test_sinusoids_are_those_of_the_formula():
    h, w, width = 3, 5, 12
    embedded = sinusoidal_positions(h, w, width, torch.device("cpu")).view(h, w, width)
    for row in range(h):
        for column in range(w):
            expected = [
                2**0.5 * function(coordinate / ROTARY_THETA ** (i / 3))
                for coordinate in (row, column)
                for function in (math.sin, math.cos)
                for i in range(3)
            ]
            assert embedded[row, column].tolist() == pytest.approx(expected, abs=1e-6)


def test_every_position_of_a_large_grid_has_its_own_sinusoids():
    embedded = sinusoidal_positions(64, 64, 32, torch.device("cpu"))
    nearest = torch.cdist(embedded, embedded).fill_diagonal_(1.0).min()
    assert nearest > 0.1
    assert embedded.pow(2).mean() == pytest.approx(1.0, abs=1e-6)


def test_features_are_those_of_codes_whose_embedding_holds_the_sinusoids(monkeypatch):
    """The embeddings are the only difference between an hourglass with and one without them."""
    model, plain = model_of(absolute_positions=True), model_of()
    codes = codes_of(model, 2, 4, 6)
    with torch.no_grad():
        expected = model.features(codes)
        assert not torch.allclose(plain.features(codes), expected, atol=1e-2)
        embedded = plain.head.embed(codes) + sinusoidal_positions(4, 6, 32, torch.device("cpu"))
        monkeypatch.setattr(plain, "embed", lambda _codes: embedded)
        assert torch.equal(plain.features(codes), expected)


@pytest.mark.parametrize("kind", [Hourglass, MaskGIT])
def test_features_on_a_grid_of_equal_codes_differ_only_with_absolute_positions(kind):
    """Attention with rotary embeddings alone cannot: all codes are equal, so all keys and values are."""
    codes = torch.full((1, 4, 6), MASK_TOKEN if kind is MaskGIT else 5)
    shape = {"depth": (0, 2, 0), "shorten": (2,)}
    with torch.no_grad():
        relative = model_of(kind, absolute_positions=False, **shape).features(codes)[0].view(2, 2, 3, 2, -1)
        absolute = model_of(kind, absolute_positions=True, **shape).features(codes)[0]
    patches = relative.transpose(1, 2).flatten(0, 1)  # patch, row and column in it, d
    assert torch.allclose(patches, patches[:1].expand_as(patches), atol=1e-5)
    assert torch.cdist(absolute, absolute).fill_diagonal_(1.0).min() > 1e-2
