"""Tests that GroupNorm's own gradients of channels-last maps are torch's of float64 maps."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from smalti.tokenizers.layers.attention_blocks import EPSILON, GroupNorm


def gradients(normed, x, parameters, upstream):
    return torch.autograd.grad(normed, (x, *parameters), upstream)


def random_case(groups, per_group, size, dtype=torch.float32):
    """Returns a norm, channels-last maps and a gradient of the norm's output."""
    norm = GroupNorm(groups, groups * per_group)
    for parameter in norm.parameters():
        nn.init.normal_(parameter)
    shape = (3, groups * per_group, *size)
    x, upstream = (torch.randn(shape).to(dtype, memory_format=torch.channels_last) for _ in range(2))
    return norm, (x * 2 + 1).requires_grad_(), upstream


def double_gradients(norm, x, upstream):
    x = x.detach().double().contiguous().requires_grad_()
    parameters = [parameter.detach().double().requires_grad_() for parameter in norm.parameters()]
    normed = F.group_norm(x, norm.num_groups, *parameters, eps=EPSILON)
    return gradients(normed, x, parameters, upstream.double())


def errors_of_both(norm, x, upstream):
    """Returns the errors of our gradients and of torch's, and the exact gradients' sizes."""
    normed = norm(x)
    assert "ChannelsLast" in normed.grad_fn.name()
    theirs = F.group_norm(x, norm.num_groups, norm.weight, norm.bias, EPSILON)
    ours, theirs = (gradients(each, x, norm.parameters(), upstream) for each in (normed, theirs))
    for one, other, exact in zip(ours, theirs, double_gradients(norm, x, upstream), strict=True):
        assert one.dtype == other.dtype
        assert one.shape == other.shape
        yield (one - exact).norm(), (other - exact).norm(), exact.norm()


@given(st.integers(2, 6), st.integers(1, 5), st.tuples(st.integers(1, 9), st.integers(2, 9)), st.integers(0, 2**32 - 1))
def test_gradients_are_as_near_as_those_of_torch(groups, per_group, size, seed):
    """A group of nearly equal values, whose variance is small, has inexact gradients in both."""
    torch.manual_seed(seed)
    for ours, theirs, size_of_gradient in errors_of_both(*random_case(groups, per_group, size)):
        assert ours <= 10 * theirs + 2e-6 * size_of_gradient + 1e-5


def test_gradients_of_the_largest_maps_far_from_zero():
    torch.manual_seed(0)
    norm, x, upstream = random_case(4, 2, (64, 64))
    x = (x.detach() + 30).requires_grad_()
    for ours, theirs, size in errors_of_both(norm, x, upstream):
        assert ours <= 2 * theirs + 1e-6 * size


def test_gradients_within_autocast_are_computed_in_float32():
    """Adaptive weights are such gradients."""
    torch.manual_seed(0)
    norm, x, upstream = random_case(4, 2, (9, 9))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        errors = list(errors_of_both(norm, x, upstream))
    assert all(ours <= 2 * theirs + 1e-6 * size for ours, theirs, size in errors)


def test_gradients_of_double_maps_are_exact():
    torch.manual_seed(0)
    norm, x, upstream = random_case(4, 2, (9, 9), torch.float64)
    for ours, _, size in errors_of_both(norm.double(), x, upstream):
        assert ours <= 1e-13 * size


@pytest.mark.parametrize("cut", [lambda x: x[:, :, 1:, 1:], lambda x: x[:, 2:6], lambda x: x.transpose(2, 3)])
def test_maps_that_are_not_dense_have_the_gradients_of_torch(cut):
    torch.manual_seed(0)
    maps = torch.randn(2, 8, 5, 5).to(memory_format=torch.channels_last).requires_grad_()
    x = cut(maps)
    norm = GroupNorm(2, x.shape[1])
    upstream = torch.randn(x.shape)
    theirs = F.group_norm(x, 2, norm.weight, norm.bias, EPSILON)
    for one, other in zip(
        gradients(norm(x), maps, norm.parameters(), upstream),
        gradients(theirs, maps, norm.parameters(), upstream),
        strict=True,
    ):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("per_group", [1, 2])
def test_gradients_in_bfloat16_are_as_near_as_those_of_torch(per_group):
    torch.manual_seed(0)
    for ours, theirs, size in errors_of_both(*random_case(16, per_group, (16, 16), torch.bfloat16)):
        assert ours <= 1.1 * theirs + 1e-6 * size


def test_gradients_can_be_computed_for_the_maps_alone():
    """The adaptive weight and a frozen encoder need this."""
    norm, x, upstream = random_case(4, 2, (5, 5))
    normed = norm.requires_grad_(False)(x)
    (ours,) = torch.autograd.grad(normed, x, upstream)
    torch.testing.assert_close(ours.double(), double_gradients(norm, x, upstream)[0], atol=1e-4, rtol=1e-4)
