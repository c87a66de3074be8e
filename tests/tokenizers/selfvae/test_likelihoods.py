"""Densities of selfVAE: discretized logistics and their mixtures by enumeration, normal samples, the RealNVP flow."""

import math
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.distributions import Normal

from smalti.core.randomness import normal, row_seeds
from smalti.core.realnvp_flow import Flow
from smalti.tokenizers.selfvae.logistic import LogisticMixture, log_discretized_logistic, parameters_for

SEEDS = row_seeds(0, torch.arange(3))


def values(bins):
    """Returns all possible values in [-1, 1]."""
    return torch.arange(bins) * (2 / (bins - 1)) - 1


def mixture(channels, bins, seed=0, size=1):
    generator = torch.Generator().manual_seed(seed)
    parameters = 1.5 * torch.randn(2, parameters_for(3, channels), 1, size, generator=generator)
    return LogisticMixture.of(parameters, channels=channels, bins=bins)


@settings(deadline=None, max_examples=60)
@given(
    mean=st.one_of(st.floats(-1.5, 1.5), st.sampled_from([-1.0, 1.0, 0.0, 1e4, -1e4])),
    log_scale=st.one_of(st.floats(-7, 3), st.sampled_from([-30.0, -12.0, 12.0])),
    bins=st.sampled_from([256, 16, 4, 2]),
)
def test_discretized_logistic_sums_to_one_with_finite_gradients(mean, log_scale, bins):
    """Sums over all values, edges included, also at extreme means and scales."""
    parameters = torch.tensor([mean, log_scale], requires_grad=True)
    log_p = log_discretized_logistic(values(bins), parameters[0].expand(bins), parameters[1].expand(bins), bins)
    assert log_p.double().exp().sum().item() == pytest.approx(1, abs=2e-5)
    log_p.logsumexp(0).backward()
    assert parameters.grad.isfinite().all()


def test_discretized_logistic_is_a_difference_of_cdfs():
    """Computes Eq. 19 in the paper's units, values 0..255, in float64, whose precision survives the cancellation."""
    for mean, scale in product((3.0, 127.2, 250.0), (0.7, 5.0, 40.0)):
        value = torch.arange(1, 255, dtype=torch.float64)
        expected = torch.sigmoid((value + 0.5 - mean) / scale) - torch.sigmoid((value - 0.5 - mean) / scale)
        log_scale = torch.tensor(math.log(scale / 127.5)).expand(254)
        log_p = log_discretized_logistic(values(256)[1:-1], torch.tensor(mean / 127.5 - 1).expand(254), log_scale, 256)
        likely = expected > 1e-8
        torch.testing.assert_close(log_p.double().exp()[likely], expected[likely], rtol=2e-3, atol=1e-9)


@pytest.mark.parametrize("channels", [1, 3])
def test_mixture_probabilities_of_all_pixels_sum_to_one(channels):
    """Enumerates every colour with four values per channel."""
    likelihood = mixture(channels, 4)
    pixels = torch.stack([torch.stack(list(v)) for v in product(values(4), repeat=channels)])
    total = sum(likelihood.log_prob(pixel.view(1, channels, 1, 1).expand(2, -1, -1, -1)).exp() for pixel in pixels)
    torch.testing.assert_close(total, torch.ones(2), rtol=1e-5, atol=0)


def test_mixture_samples_have_their_probabilities():
    likelihood, rows = mixture(2, 4), 40_000
    parameters = [value[:1].expand(rows, *value.shape[1:]) for value in list(vars(likelihood).values())[:4]]
    samples = LogisticMixture(*parameters, bins=4).sample(row_seeds(3, torch.arange(rows)))
    for pixel in product(values(4), repeat=2):
        pixel = torch.stack(list(pixel)).view(1, 2, 1, 1)
        share = (samples - pixel).abs().amax((1, 2, 3)).lt(1e-3).float().mean()
        expected = likelihood.log_prob(pixel.expand(2, -1, -1, -1))[0].exp()
        assert abs(share - expected) < 4 * (expected * (1 - expected) / rows).sqrt() + 1e-4


def test_normal_samples_are_normally_distributed():
    samples = normal(SEEDS, 20_000).double().flatten().sort().values
    quantiles = (torch.arange(60_000, dtype=torch.float64) + 0.5) / 60_000
    assert (Normal(0.0, 1.0).cdf(samples) - quantiles).abs().max() < 1.6 / 60_000**0.5  # Kolmogorov-Smirnov, p < 0.02
    assert samples.abs().max() < 5.6


def flow_of(channels=2, layers=5):
    torch.manual_seed(1)
    flow = Flow(channels, layers=layers, width=6)
    for parameter in flow.parameters():
        nn.init.normal_(parameter, std=0.25)
    return flow


def test_flow_log_determinant_equals_that_of_its_jacobian():
    flow = flow_of()
    z = torch.randn(1, 2, 2, 3, generator=torch.Generator().manual_seed(0))
    jacobian = torch.autograd.functional.jacobian(lambda x: flow.to_base(x.view_as(z))[0].flatten(), z.flatten())
    v, log_det = flow.to_base(z)
    torch.testing.assert_close(torch.linalg.slogdet(jacobian.double())[1].float(), log_det[0], rtol=1e-4, atol=1e-5)
    expected = Normal(0.0, 1.0).log_prob(v).sum() + log_det[0]
    torch.testing.assert_close(flow.log_prob(z)[0], expected)
    assert log_det.abs().item() > 0.1  # the flow is not the identity


@pytest.mark.parametrize("shape", [(2, 2, 4, 4), (3, 1, 1, 1), (1, 5, 3, 2)])
def test_flow_is_invertible(shape):
    flow = flow_of(shape[1])
    v = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(flow.to_base(flow.from_base(v))[0], v, rtol=0, atol=1e-5)
    torch.testing.assert_close(flow.from_base(flow.to_base(v)[0]), v, rtol=0, atol=1e-5)
