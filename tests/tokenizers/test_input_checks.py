"""Every kind of tokenizer refuses images and codes of wrong types, shapes and values in one line."""

import jaxtyping
import pytest
import torch
from helpers import toys
from torch import Tensor, nn

from smalti import UserError
from smalti.core.models import class_of_kind
from smalti.images.decoding import to_float
from smalti.tokenizers.base import Tokenizer
from smalti.tokenizers.vq.hrvq import HRVQ, HRVQConfig
from smalti.tokenizers.vq.vqvae2 import VQVAE2

TOKENIZERS = [kind for family, kind in toys.KINDS if family == "tokenizer"]


@pytest.fixture(autouse=True)
def unchecked(monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # which checks types in tests alone


def tiny(kind: str) -> Tokenizer:
    torch.manual_seed(0)
    return class_of_kind("tokenizer", kind)(toys.TINY[kind]).eval()


def pixels_of(tokenizer: Tokenizer) -> Tensor:
    shape = (2, tokenizer.image_channels, tokenizer.config.height, tokenizer.config.width)
    return torch.randint(256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_wrong_images_are_refused(kind):
    tokenizer = tiny(kind)
    pixels = pixels_of(tokenizer)
    images = to_float(pixels)
    c, h, w = images.shape[1:]
    needed = rf"^images must be float32 in \[-1, 1\] with shape \(b, {c}, h, w\); these "
    for wrong, message in [
        (images.numpy(), "are a ndarray: smalti.images.decoding.to_float makes them"),
        (pixels, "are uint8: convert them with smalti.images.decoding.to_float$"),
        (images.half(), r"are float16: convert them with images.to\(torch.float32\)$"),
        (images.double(), r"are float64: convert them with images.to\(torch.float32\)$"),
        (images[0], rf"have the shape \({c}, {h}, {w}\)$"),
        (torch.cat([images, images], 1), rf"have the shape \(2, {2 * c}, {h}, {w}\)$"),
        (images.movedim(1, -1), rf"have the shape \(2, {h}, {w}, {c}\)$"),
        (pixels.float(), r"have values from 0 to 25\d: make them from pixels with smalti.images.decoding.to_float$"),
        (images * torch.nan, r"have values that are not a number \(NaN\)$"),
        (images / 0, "have values from -inf to inf"),
    ]:
        with pytest.raises(UserError, match=needed + message):
            tokenizer.encode(wrong)
    with pytest.raises(UserError, match=needed + "are uint8"):
        tokenizer.encode(images=pixels)


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_wrong_codes_are_refused(kind):
    tokenizer = tiny(kind)
    codes, levels = tokenizer.encode(to_float(pixels_of(tokenizer))), tokenizer.layout.levels
    last, level = len(levels) - 1, levels[-1]
    needed = "int64 with shape (b, h, w)" if level.radices else f"float32 with shape (b, {level.channels}, h, w)"
    needed = f"the codes of level {last} must be {needed}; these "
    number = (
        f"codes must be a tuple of {len(levels)} tensor{'s' if last else ''}, one for each level, as encode returns"
    )
    for wrong, message in [
        (codes[0], f"{number}; this is a Tensor"),
        ((*codes, codes[0]), f"{number}; this is {len(levels) + 1} tensors"),
        ((*codes[:-1], codes[-1].numpy()), f"{needed}are a ndarray"),
        ((*codes[:-1], codes[-1].to(torch.uint16)), f"{needed}are uint16"),
        ((*codes[:-1], codes[-1].double()), f"{needed}are float64"),
        ((*codes[:-1], codes[-1][0]), f"{needed}have the shape {level.shape}"),
    ]:
        for function in (tokenizer.decode, lambda codes: tokenizer.draw(codes, torch.zeros(2, dtype=torch.long))):
            with pytest.raises(UserError) as refused:
                function(wrong)
            assert str(refused.value) == message
    if level.radices:
        for outside in (-1, level.codebook_size):
            codes[-1][1, 0, 0] = outside
            with pytest.raises(
                UserError, match=f"level {last} has codes from 0 to {level.codebook_size - 1}, not from"
            ):
                tokenizer.decode(codes)


def test_levels_that_do_not_fit_together_are_refused():
    tokenizer = tiny("vqvae2")
    coarse, fine = tokenizer.encode(to_float(pixels_of(tokenizer)))
    with pytest.raises(UserError, match="the codes of level 1 are of 1 images, those of level 0 of 2"):
        tokenizer.decode((coarse, fine[:1]))
    with pytest.raises(UserError, match=r"level 1 has a grid of \(4, 5\), but the coarser level one for \(4, 6\)"):
        tokenizer.decode((coarse, fine[..., :5]))


def test_numbers_of_digits_must_be_whole():
    tokenizer = tiny("hrvq")
    with pytest.raises(UserError, match=r"digits must be a whole number, not 1\.0"):
        tokenizer.decode(tokenizer.encode(to_float(pixels_of(tokenizer))), digits=1.0)


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_resampling_may_overshoot_and_batches_may_be_empty(kind):
    tokenizer = tiny(kind)
    images = to_float(pixels_of(tokenizer)) * 1.5
    assert tokenizer.decode(tokenizer.encode(images)).shape == images.shape
    codes = tokenizer.encode(images[:0])
    assert tokenizer.decode(list(codes)).shape == (0, *images.shape[1:])


def test_other_precisions_are_accepted_where_networks_compute_in_them():
    tokenizer = tiny("hrvq")
    images = to_float(pixels_of(tokenizer))
    codes = tokenizer.encode(images)
    with torch.autocast("cpu", torch.bfloat16):
        assert tokenizer.encode(images.bfloat16())[0].shape == codes[0].shape
        with pytest.raises(UserError, match="these are float64"):
            tokenizer.encode(images.double())
    assert tokenizer.decode((codes[0].int(),)).equal(tokenizer.decode(codes))
    tokenizer.bfloat16()
    assert tokenizer.encode(images.bfloat16())[0].shape == codes[0].shape
    with pytest.raises(UserError, match=r"^images must be bfloat16 .* these are float32"):
        tokenizer.encode(images)


def test_values_are_not_read_on_accelerators_and_nothing_is_checked_while_tracing(monkeypatch):
    tokenizer = tiny("vqvae2").to("meta")
    with pytest.raises(UserError, match="these are uint8"):
        tokenizer.encode(torch.zeros(1, 3, 8, 12, dtype=torch.uint8, device="meta"))
    codes = tuple(torch.zeros(1, *level.shape, dtype=torch.long, device="meta") for level in tokenizer.layout.levels)
    assert tokenizer.decode(codes).shape == (1, 3, 8, 12)  # reading a value of these tensors would raise
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    with pytest.raises(AttributeError):
        tokenizer.encode([0.0])


def test_a_kind_of_ones_own_is_checked_too():
    class Mine(HRVQ):
        def encode(self, images):
            return super().encode(images)

        def decode(self, codes, digits=None):
            return torch.zeros(1, 3, 8, 8)

    mine = Mine(HRVQConfig(8, 8, widths=(4,), code_width=3, depth=1, branching=4))
    with pytest.raises(UserError, match="these are a list"):
        mine.encode([0.0])
    with pytest.raises(UserError, match="this is a Tensor"):
        mine.decode(torch.zeros(1, 4, 4, dtype=torch.long))
    assert Mine.encode.__name__ == "encode"
    assert isinstance(mine, nn.Module)
    assert VQVAE2.decode.__doc__
