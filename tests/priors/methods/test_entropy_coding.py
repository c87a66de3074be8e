"""Entropy coding: exact round trips, lengths equal to the exact likelihood, and the same bits from other sums."""

import math
import sys
from decimal import Decimal, localcontext

import pytest
import torch
from helpers.causal import OPTIONS, prior_of, random_conditioning
from hypothesis import given, settings
from hypothesis import strategies as st

from smalti.core.errors import UserError
from smalti.priors.methods import entropy_coding
from smalti.priors.methods.entropy_coding import (
    OCTAVES,
    STEPS_PER_OCTAVE,
    WEIGHTS,
    decode_codes,
    encode_codes,
    quantized_weights,
)

ROWS = 5


def random_codes(rows: int = ROWS) -> torch.Tensor:
    return torch.randint(6, (rows, 4, 4), generator=torch.Generator().manual_seed(2))


def priors_of_all_levels(finest):
    """Returns untrained priors of the coarser levels, and the given one."""
    radices, factors, kind = finest.config.upper_radices, finest.config.upper_factors, finest.kind
    coarser = [
        prior_of(
            *(4 // factor, 4 // factor),
            kind=kind,
            radices=radices[level],
            layers=2,
            upper_radices=radices[:level],
            upper_factors=tuple(above // factor for above in factors[:level]),
        )
        for level, factor in enumerate(factors)
    ]
    return [*coarser, finest]


@pytest.mark.parametrize("name", ["plain", "classes", "everything", "transformer, everything"])
@torch.no_grad()
def test_codes_return_and_take_the_bits_of_their_exact_likelihood(name, monkeypatch):
    """The likelihood is that of teacher forcing over the whole grid, in float32."""
    pytest.importorskip("constriction")
    monkeypatch.setattr(entropy_coding, "BATCH_ROWS", 3)
    priors = priors_of_all_levels(prior_of(4, 4, **OPTIONS[name]))
    conditioning = random_conditioning(priors[-1], ROWS, 4, 4)
    labels, codes = conditioning["condition"], (*conditioning["upper"], random_codes())
    payload = encode_codes(priors, codes, labels)
    grids = [(grid.shape[1], grid.shape[2]) for grid in codes]
    decoded = decode_codes(priors, payload + b"\0" * 3, ROWS, grids, labelled=labels is not None)
    assert decoded is not None
    assert all(map(torch.equal, decoded, codes))
    bits = 0.0 if labels is None else ROWS * math.log2(priors[-1].classes + 1)
    for level, (prior, grid) in enumerate(zip(priors, codes, strict=True)):
        nats = prior.head.nll(prior.features(grid, labels, codes[:level]), grid.flatten(1))
        bits += nats.double().sum().item() / math.log(2)
    assert bits * 0.999 < 8 * len(payload) < bits * 1.001 + 64  # whole words


@pytest.mark.parametrize(("noise", "same"), [(1e-12, True), (1e-2, False)])
def test_the_rounding_of_sums_changes_nothing_and_other_probabilities_do(noise, same):
    """Noise on the features stands for another machine; 1e-12 is a hundred times what threads and batches change."""
    pytest.importorskip("constriction")
    prior, codes = prior_of(4, 4), random_codes()
    payload = encode_codes([prior], (codes,))
    generator = torch.Generator().manual_seed(0)

    def disturb(_module, _inputs, features):
        return features + noise * torch.randn(features.shape, dtype=features.dtype, generator=generator)

    prior.get_submodule("norm").register_forward_hook(disturb)
    decoded = decode_codes([prior], payload, ROWS, [(4, 4)])
    assert (decoded is not None and torch.equal(decoded[0], codes)) == same


@settings(max_examples=10)
@given(payload=st.binary(max_size=40))
def test_any_bytes_decode_to_codes_of_the_codebook_or_none(payload):
    pytest.importorskip("constriction")
    decoded = decode_codes([prior_of(2, 2, layers=1)], payload, 3, [(2, 2)])
    assert decoded is None or (decoded[0].shape == (3, 2, 2) and 0 <= decoded[0].min() <= decoded[0].max() < 6)


def test_weights_are_the_same_integers_for_any_power_function():
    """Exact powers with 40 digits: none is near a half, where a power function's last digits would matter."""
    with localcontext() as context:
        context.prec = 40
        for index, weight in enumerate(WEIGHTS.tolist()):
            exact = Decimal(2) ** (OCTAVES - Decimal(index) / STEPS_PER_OCTAVE)
            assert abs(exact - Decimal(weight)) < Decimal("0.5") - Decimal("1e-6")


@given(logits=st.lists(st.floats(-40, 40), min_size=2, max_size=9))
def test_weights_are_proportional_to_the_probabilities(logits):
    """Up to half a step, and except for probabilities below 2**-23 of the largest."""
    logits = torch.tensor([logits], dtype=torch.float64)
    weights = torch.from_numpy(quantized_weights(logits))
    expected = (logits - logits.max()).exp() * 2**OCTAVES
    assert weights.max() == 2**OCTAVES
    assert weights.min() >= 1
    tolerance = 2 ** (0.51 / STEPS_PER_OCTAVE) - 1
    assert ((weights - expected).abs() <= tolerance * expected + 1).all()


def test_priors_without_exact_likelihoods_and_a_missing_library_are_refused_in_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "constriction", None)
    with pytest.raises(UserError, match=r"pip install -e '.\[entropy\]'"):
        encode_codes([prior_of()], (random_codes(2),))
