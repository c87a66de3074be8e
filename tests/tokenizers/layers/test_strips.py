"""Networks in strips of rows: the whole's result at every pixel, in memory that the image's size does not decide."""

import itertools
import math
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from smalti import HRVQ, VQGAN, VQVAE2, HRVQConfig, VQGANConfig, VQVAE2Config
from smalti.tokenizers.layers import strips
from smalti.tokenizers.layers.attention_blocks import GroupNorm
from smalti.tokenizers.layers.strips import in_bounded_memory

SHAPE = {"height": 16, "width": 24, "code_width": 4}
GAN = {**SHAPE, "norm_groups": 2, "latent_width": 6, "branching": 7}
TOKENIZERS = {
    "vqgan": lambda: VQGAN(VQGANConfig(**GAN, widths=(16, 8, 6), attention_stages=(1,), depth=2)),
    "hrvq": lambda: HRVQ(HRVQConfig(**SHAPE, widths=(24, 6), residual_blocks=1)),
    "vqvae2": lambda: VQVAE2(VQVAE2Config(**SHAPE, widths=(4, 6), residual_blocks=1, codebook_size=7)),
}


def made(name):
    """A tokenizer all of whose layers matter."""
    torch.manual_seed(0)
    tokenizer = TOKENIZERS[name]().eval()
    for module in tokenizer.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.normal_(module.weight, std=module.weight[0].numel() ** -0.5)
        if isinstance(module, nn.GroupNorm):
            nn.init.normal_(module.weight, 1, 0.3)
            nn.init.normal_(module.bias, 0, 0.3)
    tokenizer.init_from_data(images_of(8, 16, 24, seed=1))
    return tokenizer


def images_of(b, h, w, seed=0):
    return torch.rand(b, 3, h, w, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def limits(*, strip, held, whole=0):
    return patch.multiple(strips, LARGEST_WHOLE={"cpu": whole}, LARGEST_CACHED=held, STRIP=strip)


@pytest.mark.parametrize("name", TOKENIZERS)
@given(rows=st.integers(1, 3), columns=st.integers(1, 3), strip=st.integers(500, 3_000), held=st.integers(0, 3_000))
@settings(max_examples=3)
def test_strips_are_equal_to_the_whole(name, rows, columns, strip, held):
    """Every pixel of an image, with statistics over all of it, whatever is held and however thin the strips are."""
    tokenizer = made(name)
    images = images_of(2, rows * tokenizer.downsampling, columns * tokenizer.downsampling)
    codes = tokenizer.encode(images)
    with torch.no_grad():
        z_e, decoded = tokenizer.encoder(images), tokenizer.decode(codes)
        with limits(strip=strip, held=held):
            torch.testing.assert_close(in_bounded_memory(tokenizer.encoder, images), z_e, atol=1e-5, rtol=0)
            torch.testing.assert_close(tokenizer.decode(codes), decoded, atol=1e-5, rtol=0)
            assert all(ours.equal(theirs) for ours, theirs in zip(tokenizer.encode(images), codes, strict=True))


@pytest.mark.parametrize("way", ["whole", "strips"])
def test_statistics_of_many_positions_are_exact(way):
    """Where torch's own, of channels-last maps on CPUs, are off by 3e-4."""
    torch.manual_seed(0)
    x = (torch.randn(1, 8, 512, 512) * 0.7 + 0.9).contiguous(memory_format=torch.channels_last)
    norm = GroupNorm(4, 8)
    with torch.no_grad(), limits(strip=2**18, held=0, whole=2**30 if way == "whole" else 0):
        ours = in_bounded_memory(nn.Sequential(norm), x)
    torch.testing.assert_close(ours, F.group_norm(x.double(), 4, eps=1e-6).float(), atol=1e-5, rtol=0)


class Sizes(TorchDispatchMode):
    """Sees how many numbers the tensors have that operations make."""

    def __init__(self):
        super().__init__()
        self.largest, self.operations = 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.largest = max(self.largest, *(each.numel() for each in tree_leaves(result)))
        self.operations += 1
        return result


@pytest.mark.parametrize(("name", "part"), [*itertools.product(("vqgan", "hrvq"), ("encoder", "decoder"))])
def test_no_large_map_is_ever_made(name, part):
    """Of tall images, but for what goes in and what comes out."""
    tokenizer, (height, width) = made(name), (128, 16)
    x = images_of(1, height, width)
    with torch.no_grad():
        x = x if part == "encoder" else tokenizer.encoder(x)
        network = getattr(tokenizer, part)
        with Sizes() as seen_whole:
            whole = network(x)
        with limits(strip=1_000, held=1_000), Sizes() as seen:
            ours = in_bounded_memory(network, x)
    assert seen.largest <= max(x.numel(), whole.numel()) < seen_whole.largest
    torch.testing.assert_close(ours, whole, atol=1e-5, rtol=0)


def test_as_many_images_at_once_as_there_is_room_for():
    tokenizer, images = made("hrvq"), images_of(5, 16, 24)
    with torch.no_grad():
        expected = tokenizer.encoder(images)
        largest = 8 * 12 * 24  # of the first layer, which halves the size
        with limits(strip=1, held=0, whole=2 * largest + 1), Sizes() as seen:
            ours = in_bounded_memory(tokenizer.encoder, images)
    assert seen.largest == 2 * largest
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=0)


def test_what_is_small_enough_is_held_and_not_computed_again():
    tokenizer, images = made("vqgan"), images_of(1, 64, 16)
    counted = []
    for held in (0, math.inf):
        with torch.no_grad(), limits(strip=1_000, held=held), Sizes() as seen:
            in_bounded_memory(tokenizer.encoder, images)
        counted.append(seen.operations)
    assert counted[1] < counted[0] / 1.5


def test_only_what_is_large_goes_in_strips_and_nothing_with_gradients():
    tokenizer, images = made("vqgan"), images_of(2, 16, 24)
    largest = 16 * 24 * 16  # of the decoder, at the image's size
    for whole, strips_are_used in ((largest, False), (largest - 1, True)):
        with limits(strip=1_000, held=0, whole=whole), patch.object(strips, "_whole", wraps=strips._whole) as used:
            codes = tokenizer.encode(images)
            with torch.no_grad():
                tokenizer.decode(codes)
            assert used.called == strips_are_used
    with limits(strip=1_000, held=0):
        tokenizer.decode(codes).square().sum().backward()
    assert all(parameter.grad is not None for parameter in tokenizer.decoder.parameters())


def test_strips_under_autocast():
    """In bf16 as near to float32 as the whole network is."""
    tokenizer, images = made("vqgan"), images_of(1, 16, 24)
    codes = tokenizer.encode(images)
    with torch.no_grad():
        exact = tokenizer.decode(codes)
        with torch.autocast("cpu", torch.bfloat16):
            whole = tokenizer.decode(codes)
            with limits(strip=1_000, held=0):
                ours = tokenizer.decode(codes)
    assert 0 < (ours - exact).abs().max() < 2 * (whole - exact).abs().max()
