"""The contract of all quantizers: radices, codes, autocast, digits; and the tables of their settings."""

import dataclasses
import inspect
import math
from typing import get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from smalti import Level, UserError
from smalti.core import models
from smalti.tokenizers.quantizers.registry import (
    QUANTIZERS,
    Quantizer,
    QuantizerName,
    build_quantizer,
    code_radices,
    unused_settings,
)
from smalti.tokenizers.vqgan.vqgan import VQGANConfig

D = 6
SIZES = {"linked": (4, 4), "residual": (4, 4), "lfq": (2,) * 5, "fsq": (5, 4, 3)}
of_each = pytest.mark.parametrize("name", list(QUANTIZERS))


def quantizer_of(name, **settings):
    torch.manual_seed(0)
    config = VQGANConfig(code_width=D, **settings)
    return build_quantizer(name, code_width=D, radices=SIZES.get(name, (16,)), config=config)


def features(b=3, h=4, w=5, seed=0):
    return torch.randn(b, D, h, w, generator=torch.Generator().manual_seed(seed))


def test_every_name_has_a_quantizer_and_others_are_refused():
    assert set(QUANTIZERS) == set(get_args(QuantizerName))
    with pytest.raises(UserError, match=r"^there is no quantizer 'mine'; quantizers: linked, flat, "):
        build_quantizer("mine", code_width=D, radices=(16,), config=VQGANConfig())


@of_each
def test_quantizers_keep_the_contract(name):
    quantizer, z_e = quantizer_of(name), features()
    assert isinstance(quantizer, Quantizer)
    assert quantizer.radices == SIZES.get(name, (16,))
    quantizer.init_from_data(z_e)
    output = quantizer(z_e)
    assert (output.z_q.shape, output.z_q.dtype) == (z_e.shape, torch.float32)
    assert output.codes.equal(quantizer.encode(z_e))
    assert 0 <= output.codes.min() <= output.codes.max() < math.prod(quantizer.radices)
    assert len(output.codes.unique()) > 1
    torch.testing.assert_close(quantizer.lookup(output.codes), output.z_q, atol=1e-5, rtol=1e-5)
    assert all(loss.ndim == 0 and loss.isfinite() for loss in output.losses.values())
    assert quantizer.encode(z_e[1:2]).equal(output.codes[1:2])


@of_each
def test_codes_and_losses_are_float32_under_autocast(name):
    """Half precision swaps near neighbours, so codes must be those without autocast."""
    quantizer, z_e = quantizer_of(name), features(8, 8, 8)
    quantizer.init_from_data(z_e)
    plain, lookup = quantizer(z_e), quantizer.lookup(quantizer.encode(z_e))
    with torch.autocast("cpu", torch.bfloat16):
        mixed, codes = quantizer(z_e), quantizer.encode(z_e)
        assert quantizer.lookup(codes).equal(lookup)
    assert mixed.codes.equal(plain.codes)
    assert codes.equal(plain.codes)
    assert mixed.z_q.equal(plain.z_q)
    assert {key: loss.item() for key, loss in mixed.losses.items()} == {
        key: loss.item() for key, loss in plain.losses.items()
    }


@of_each
def test_gradients_reach_the_encoder_and_every_parameter(name):
    quantizer, z_e = quantizer_of(name, codebook_learning="gradient"), features().requires_grad_()
    output = quantizer(z_e)
    (output.z_q.square().sum() + sum(output.losses.values())).backward()
    assert z_e.grad.abs().sum() > 0
    assert all(parameter.grad.abs().sum() > 0 for parameter in quantizer.parameters())


@of_each
def test_only_digits_that_exist_are_decoded(name):
    quantizer = quantizer_of(name)
    codes = torch.randint(math.prod(quantizer.radices), (2, 3, 3))
    count = len(quantizer.radices)
    whole = quantizer.lookup(codes)
    assert quantizer.lookup(codes, count).equal(whole)
    for digits in range(1, count):
        shown = Level(1, 1, quantizer.radices).prefix(codes, digits) * math.prod(quantizer.radices[digits:])
        assert quantizer.lookup(codes, digits).equal(quantizer.lookup(shown, digits))
        assert not quantizer.lookup(codes, digits).equal(whole)
    for digits in (0, count + 1):
        with pytest.raises(UserError, match=f"give a number from 1 to {count}, or a slice within them"):
            quantizer.lookup(codes, digits)


@of_each
@pytest.mark.parametrize("offset", [-1, 0, 1, 100])
def test_codes_outside_of_the_codebook_are_refused(name, offset):
    """Those without a codebook, and of several stages, would decode another code: digits wrap around."""
    quantizer = quantizer_of(name)
    size = math.prod(quantizer.radices)
    codes = torch.zeros(2, 3, 3, dtype=torch.int64)
    codes[1, 2, 0] = -1 if offset < 0 else size + offset
    one_line = name in ("fsq", "lfq", "residual")
    with pytest.raises(
        UserError if one_line else IndexError, match=f"from 0 to {size - 1}, not from" if one_line else None
    ):
        quantizer.lookup(codes)


@of_each
def test_settings_are_fields_of_vqgan_and_arguments(name):
    """The table names neither a field nor an argument that does not exist, and only what changes the quantizer."""
    registered = QUANTIZERS[name]
    fields = {field.name for field in dataclasses.fields(VQGANConfig)}
    quantizer = quantizer_of(name)
    assert set(registered.settings) <= fields
    assert set(registered.settings.values()) <= set(inspect.signature(type(quantizer)).parameters)
    changed = {"commitment_weight": 0.5, "gradient": "rotation", "codebook_learning": "gradient", "revive_below": 0.3}
    changed |= {"codebook_decay": 0.5, "shared_codebooks": True, "temperature": 2.0, "kl_weight": 0.5}
    changed |= {"entropy_weight": 0.5, "codebook_init": "scaled", "combined_commitment_weight": 0.5}
    attributes = {"combined_commitment_weight": "combined_weight"}
    for field, argument in registered.settings.items():
        built = quantizer_of(name, **{field: changed[field]})
        book = built.books[0] if name == "residual" else built
        if field == "codebook_init":
            assert book.codebook_0.abs().max() <= 1 / built.radices[0]
        elif field == "commitment_weight" and hasattr(built, "commitment_weights"):
            assert set(built.commitment_weights) == {0.5}
        else:
            attribute = attributes.get(argument, argument)
            holder = built if hasattr(built, attribute) else book  # residual VQ hands some to its codebooks
            assert getattr(holder, attribute) == changed[field]
    assert not unused_settings(name) & set(registered.settings)
    assert unused_settings(name) | set(registered.settings) >= set(changed) - {"codebook_init"}


def test_unused_settings_of_each_quantizer():
    of_others = {"kl_weight", "temperature", "entropy_weight", "shared_codebooks", "levels"}
    assert unused_settings("flat") == {*of_others, "combined_commitment_weight"}
    assert "levels" not in unused_settings("fsq")
    assert {"codebook_size", "depth", "commitment_weight", "codebook_init"} <= unused_settings("fsq", (8, 5))
    assert "codebook_size" not in unused_settings("fsq")


@given(bits=st.integers(1, 30))
def test_lfq_takes_powers_of_two(bits):
    assert math.prod(code_radices("lfq", (2**bits,))) == 2**bits
    if bits > 1:
        with pytest.raises(UserError, match="needs a power of two"):
            code_radices("lfq", (2**bits - 1,))


@pytest.mark.parametrize(
    ("name", "sizes", "levels", "expected"),
    [
        ("linked", (8, 8, 8), (), (8, 8, 8)),
        ("residual", (16,), (), (16,)),
        ("flat", (512,), (), (512,)),
        ("fsq", (1024,), (), (8, 5, 5, 5)),
        ("fsq", (512,), (7, 5), (7, 5)),
    ],
)
def test_radices_follow_from_sizes_or_levels(name, sizes, levels, expected):
    assert code_radices(name, sizes, levels) == expected


@pytest.mark.parametrize(
    ("name", "sizes", "levels", "message"),
    [
        ("cosine", (4, 4), (), "one layer; use --depth 1 and one --branching, not 2 layers"),
        ("fsq", (), (), "one layer; use --depth 1 and one --branching, not 0 layers"),
        ("fsq", (500,), (), "no recommended levels for 500 codes"),
        ("simvq", (1,), (), "needs at least 2 codes, not 1"),
    ],
)
def test_sizes_without_codes_are_refused(name, sizes, levels, message):
    with pytest.raises(UserError, match=message):
        code_radices(name, sizes, levels)


def test_quantizers_without_digits_are_refused():
    with pytest.raises(UserError, match="--depth of at least 1"):
        build_quantizer("linked", code_width=D, radices=(), config=VQGANConfig())


def test_old_name_of_the_linked_quantizer_keeps_its_digest():
    """Checkpoints of vqgan before the registry call it `nearest`; the digest was computed with that word."""
    fields = {**dataclasses.asdict(VQGANConfig()), "quantizer": "nearest"}
    fields = {name: list(value) if isinstance(value, tuple) else value for name, value in fields.items()}
    config = models.config_from_json(VQGANConfig, fields, "config.json")
    assert config == VQGANConfig()
    assert config.quantizer == "linked"
    other = dataclasses.replace(config, quantizer="cosine")
    assert models.digest("vqgan", config, {}) == NEAREST_DIGEST
    assert models.digest("vqgan", other, {}) != NEAREST_DIGEST


NEAREST_DIGEST = "017d9e3b24dd81196c1475f3146f0fe7a2c3598cac28d93a89c26432df34339d"
