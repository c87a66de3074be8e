"""Reading latent sets: rows, replaced files, usage, perplexity and the tokenizer's digest.

Damaged files are in test_refusals.py.
"""

import pickle

import numpy as np
import pytest
import torch
from helpers.latents import GRID, PROVENANCE, extended_set, make_codes, small_set, write
from hypothesis import given, settings
from hypothesis import strategies as st

from smalti.core.codes import perplexity
from smalti.core.errors import UserError
from smalti.latentsets.reader import LatentSet, require_tokenizer


def test_set_replaced_after_opening_is_detected(tmp_path):
    codes = small_set(tmp_path / "latents.h5")
    latent_set = LatentSet(tmp_path / "latents.h5")
    pickled = pickle.dumps(latent_set)
    assert torch.equal(pickle.loads(pickled).batch([3, 1])[0], codes[0][[3, 1]])
    write(tmp_path / "latents.h5", GRID, make_codes(GRID, 70, seed=1), [0])
    assert torch.equal(latent_set.batch([3, 1])[0], codes[0][[3, 1]])  # the old file stays readable while it is mapped
    for read_again in (lambda: pickle.loads(pickled), latent_set.verify):
        with pytest.raises(UserError, match="was replaced by another latent set"):
            read_again()


def test_captions_and_digests_of_a_replaced_set_are_refused(tmp_path):
    """The columns of one file are in memory: with the bytes of another one they would make the captions of neither."""
    _, _, captions = extended_set(tmp_path / "latents.h5")
    latent_set = LatentSet(tmp_path / "latents.h5")
    assert latent_set.captions([2, 1]) == [captions[2], captions[1]]
    assert latent_set.digest() == latent_set.content_digest
    extended_set(tmp_path / "latents.h5", rows=58)
    for read in (lambda: latent_set.captions([2, 1]), latent_set.digest):
        with pytest.raises(UserError, match="was replaced by another latent set"):
            read()


def test_rows_outside_the_set_are_refused(tmp_path):
    small_set(tmp_path / "latents.h5")
    with pytest.raises(IndexError):
        LatentSet(tmp_path / "latents.h5").batch([60])


def test_usage_counts_every_prefix(tmp_path, monkeypatch):
    monkeypatch.setattr("smalti.latentsets.reader.BLOCK_VALUES", 100)  # several blocks
    codes = small_set(tmp_path / "latents.h5")[0]
    latent_set = LatentSet(tmp_path / "latents.h5")
    for digits in (1, 2, 3):
        prefixes = codes // 8 ** (3 - digits)
        expected = [(prefixes == code).sum().item() for code in range(8**digits)]
        assert latent_set.usage(0, digits).tolist() == expected
        frequencies = np.array(expected)[np.array(expected) > 0] / codes.numel()
        entropy_bits = -sum(p * np.log2(p) for p in frequencies)
        assert latent_set.perplexity(0, digits) == pytest.approx(2**entropy_bits)
    assert torch.equal(latent_set.usage(), latent_set.usage(0, 3))
    for digits in (0, 4):
        with pytest.raises(UserError, match=f"has 3 digits; {digits} cannot be counted"):
            latent_set.usage(0, digits)


@settings(max_examples=30)
@given(counts=st.lists(st.integers(0, 50), min_size=1, max_size=20).filter(any))
def test_perplexity_is_between_one_and_the_number_of_used_codes(counts):
    value = perplexity(torch.tensor(counts))
    assert 1 - 1e-9 <= value <= np.count_nonzero(counts) + 1e-9
    assert perplexity(torch.full((len(counts),), 3)) == pytest.approx(len(counts))


def test_another_tokenizer_is_refused(tmp_path):
    small_set(tmp_path / "latents.h5")
    latent_set = LatentSet(tmp_path / "latents.h5")
    require_tokenizer(latent_set, ["cd" * 32, PROVENANCE.tokenizer_digest])
    with pytest.raises(UserError, match=r"tokenizer abababababab .* but the tokenizer given is cdcdcdcdcdcd") as caught:
        require_tokenizer(latent_set, ["cd" * 32])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "message"), [("", "the latent set is empty; give a value"), ("x" * 5000, "File name too long")]
)
def test_names_that_no_file_has_are_one_line(name, message):
    with pytest.raises(UserError, match=message):
        LatentSet(name)
