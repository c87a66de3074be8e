"""Networks computed in strips of rows: equal to the whole network at every pixel, in bounded memory."""

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
MASKGIT = {"architecture": "maskgit", "middle_attention": False, "latent_width": 4}
TOKENIZERS = {
    "vqgan": lambda: VQGAN(VQGANConfig(**GAN, widths=(16, 8, 6), attention_stages=(1,), depth=2)),
    "maskgit": lambda: VQGAN(VQGANConfig(**{**GAN, **MASKGIT}, widths=(8, 4, 6))),
    "hrvq": lambda: HRVQ(HRVQConfig(**SHAPE, widths=(24, 6), residual_blocks=1)),
    "vqvae2": lambda: VQVAE2(VQVAE2Config(**SHAPE, widths=(4, 6), residual_blocks=1, codebook_size=7)),
}


def tokenizer_of(name):
    """A tokenizer with random weights in every layer, none of which is the identity."""
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


def limits(*, strip, cached, whole=0):
    return patch.multiple(strips, LARGEST_WHOLE={"cpu": whole}, LARGEST_CACHED=cached, STRIP=strip)


@pytest.mark.parametrize("name", TOKENIZERS)
@given(rows=st.integers(1, 3), columns=st.integers(1, 3), strip=st.integers(500, 3_000), cached=st.integers(0, 3_000))
@settings(max_examples=3)
def test_strips_equal_the_whole_network(name, rows, columns, strip, cached):
    """Compares every pixel, for strips of any height and any limit of the cache."""
    tokenizer = tokenizer_of(name)
    images = images_of(2, rows * tokenizer.downsampling, columns * tokenizer.downsampling)
    codes = tokenizer.encode(images)
    with torch.no_grad():
        z_e, decoded = tokenizer.encoder(images), tokenizer.decode(codes)
        with limits(strip=strip, cached=cached):
            torch.testing.assert_close(in_bounded_memory(tokenizer.encoder, images), z_e, atol=1e-5, rtol=0)
            torch.testing.assert_close(tokenizer.decode(codes), decoded, atol=1e-5, rtol=0)
            assert all(ours.equal(theirs) for ours, theirs in zip(tokenizer.encode(images), codes, strict=True))


@pytest.mark.parametrize("whole", [2**30, 0], ids=["whole", "strips"])
def test_group_norm_of_large_maps_is_accurate(whole):
    """On CPUs torch's own statistics of channels-last maps are off by 3e-4 at this size."""
    torch.manual_seed(0)
    x = (torch.randn(1, 8, 512, 512) * 0.7 + 0.9).contiguous(memory_format=torch.channels_last)
    norm = GroupNorm(4, 8)
    with torch.no_grad(), limits(strip=2**18, cached=0, whole=whole):
        ours = in_bounded_memory(nn.Sequential(norm), x)
    torch.testing.assert_close(ours, F.group_norm(x.double(), 4, eps=1e-6).float(), atol=1e-5, rtol=0)


class Sizes(TorchDispatchMode):
    """Records the size of the largest tensor that operations return, and the number of operations."""

    def __init__(self):
        super().__init__()
        self.largest, self.operations = 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.largest = max(self.largest, *(each.numel() for each in tree_leaves(result)))
        self.operations += 1
        return result


@pytest.mark.parametrize(("name", "part"), [*itertools.product(("vqgan", "hrvq"), ("encoder", "decoder"))])
def test_strips_allocate_no_map_larger_than_input_and_output(name, part):
    """Uses tall images, whose inner maps are larger than input and output."""
    tokenizer, (height, width) = tokenizer_of(name), (128, 16)
    x = images_of(1, height, width)
    with torch.no_grad():
        x = x if part == "encoder" else tokenizer.encoder(x)
        network = getattr(tokenizer, part)
        with Sizes() as whole_sizes:
            whole = network(x)
        with limits(strip=1_000, cached=1_000), Sizes() as sizes:
            ours = in_bounded_memory(network, x)
    assert sizes.largest <= max(x.numel(), whole.numel()) < whole_sizes.largest
    torch.testing.assert_close(ours, whole, atol=1e-5, rtol=0)


def test_small_images_are_computed_in_batches_that_fit_the_limit():
    tokenizer, images = tokenizer_of("hrvq"), images_of(5, 16, 24)
    with torch.no_grad():
        expected = tokenizer.encoder(images)
        largest = 8 * 12 * 24  # map of the first layer, which halves the size
        with limits(strip=1, cached=0, whole=2 * largest + 1), Sizes() as sizes:
            ours = in_bounded_memory(tokenizer.encoder, images)
    assert sizes.largest == 2 * largest
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=0)


def test_small_maps_are_cached_instead_of_recomputed():
    tokenizer, images = tokenizer_of("vqgan"), images_of(1, 64, 16)
    operations = []
    for cached in (0, math.inf):
        with torch.no_grad(), limits(strip=1_000, cached=cached), Sizes() as sizes:
            in_bounded_memory(tokenizer.encoder, images)
        operations.append(sizes.operations)
    assert operations[1] < operations[0] / 1.5


def test_strips_are_used_only_for_large_maps_without_gradients():
    tokenizer, images = tokenizer_of("vqgan"), images_of(2, 16, 24)
    largest = 16 * 24 * 16  # map of the decoder at the image's size
    for whole, strips_are_used in ((largest, False), (largest - 1, True)):
        with (
            limits(strip=1_000, cached=0, whole=whole),
            patch.object(strips, "_whole", wraps=strips._whole) as in_strips,
        ):
            codes = tokenizer.encode(images)
            with torch.no_grad():
                tokenizer.decode(codes)
            assert in_strips.called == strips_are_used
    with limits(strip=1_000, cached=0):
        tokenizer.decode(codes).square().sum().backward()
    assert all(parameter.grad is not None for parameter in tokenizer.decoder.parameters())


def test_strips_under_autocast_are_as_precise_as_the_whole_network():
    """Compares the errors of bfloat16 with and without strips against float32."""
    tokenizer, images = tokenizer_of("vqgan"), images_of(1, 16, 24)
    codes = tokenizer.encode(images)
    with torch.no_grad():
        exact = tokenizer.decode(codes)
        with torch.autocast("cpu", torch.bfloat16):
            whole = tokenizer.decode(codes)
            with limits(strip=1_000, cached=0):
                ours = tokenizer.decode(codes)
    assert 0 < (ours - exact).abs().max() < 2 * (whole - exact).abs().max()
