"""selfVAE's parts and its bound: each against a way of computing it that shares no code with it."""

import math
from dataclasses import replace
from itertools import product

import pytest
import torch
from helpers import toys
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.distributions import Normal

from smalti.core import models
from smalti.core.errors import UserError
from smalti.core.randomness import derive, normal, row_seeds
from smalti.core.realnvp_flow import Flow
from smalti.tokenizers.layers.dense import DenseBlock, WeightNormConv, start_from_data
from smalti.tokenizers.selfvae.hierarchical_vae import MODES
from smalti.tokenizers.selfvae.logistic import LogisticMixture, log_discretized_logistic, parameters_for, to_bins
from smalti.tokenizers.selfvae.selfvae import SelfVAE, SelfVAEConfig
from smalti.tokenizers.selfvae.transformations import Form, forms, sketch, transform
from smalti.tokenizers.selfvae.vae import VAE

SEEDS = row_seeds(0, torch.arange(3))
SMALL = replace(toys.TINY["selfvae"], height=8, width=8, stages=2)


def values(bins):
    """All possible ones, [-1, 1]."""
    return torch.arange(bins) * (2 / (bins - 1)) - 1


def images(count=3, height=8, width=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(256, (count, 3, height, width), generator=generator) / 127.5 - 1


def model_of(cls=SelfVAE, config=SMALL, seed=0):
    """With weights large enough that everything hangs on everything."""
    torch.manual_seed(seed)
    model = cls(config).eval()
    model.init_from_data(images(64))
    for coupling in model.flow.couplings:
        nn.init.normal_(coupling.net[-1].weight, std=0.1)
    return model


@settings(deadline=None, max_examples=60)
@given(
    mean=st.one_of(st.floats(-1.5, 1.5), st.sampled_from([-1.0, 1.0, 0.0, 1e4, -1e4])),
    log_scale=st.one_of(st.floats(-7, 3), st.sampled_from([-30.0, -12.0, 12.0])),
    bins=st.sampled_from([256, 16, 4, 2]),
)
def test_the_discretised_logistic_sums_to_one(mean, log_scale, bins):
    """Over all values, edges included, at extreme means and scales too; with finite gradients."""
    at = torch.tensor([mean, log_scale], requires_grad=True)
    found = log_discretized_logistic(values(bins), at[0].expand(bins), at[1].expand(bins), bins)
    assert found.double().exp().sum().item() == pytest.approx(1, abs=2e-5)
    found.logsumexp(0).backward()
    assert at.grad.isfinite().all()


def test_the_discretised_logistic_is_the_difference_of_two_distribution_functions():
    """Eq. 19 in the paper's units, values 0..255, in float64, where it does not cancel."""
    for mean, scale in product((3.0, 127.2, 250.0), (0.7, 5.0, 40.0)):
        value = torch.arange(1, 255, dtype=torch.float64)
        expected = torch.sigmoid((value + 0.5 - mean) / scale) - torch.sigmoid((value - 0.5 - mean) / scale)
        log_scale = torch.tensor(math.log(scale / 127.5)).expand(254)
        found = log_discretized_logistic(values(256)[1:-1], torch.tensor(mean / 127.5 - 1).expand(254), log_scale, 256)
        likely = expected > 1e-8
        torch.testing.assert_close(found.double().exp()[likely], expected[likely], rtol=2e-3, atol=1e-9)


def mixture(channels, bins, seed=0, size=1):
    generator = torch.Generator().manual_seed(seed)
    parameters = 1.5 * torch.randn(2, parameters_for(3, channels), 1, size, generator=generator)
    return LogisticMixture.of(parameters, channels=channels, bins=bins)


@pytest.mark.parametrize("channels", [1, 3])
def test_a_mixture_s_probabilities_of_all_pixels_sum_to_one(channels):
    """Enumerated: every colour that four values of a channel make."""
    of = mixture(channels, 4)
    everything = torch.stack([torch.stack(list(v)) for v in product(values(4), repeat=channels)])
    total = sum(of.log_prob(pixel.view(1, channels, 1, 1).expand(2, -1, -1, -1)).exp() for pixel in everything)
    torch.testing.assert_close(total, torch.ones(2), rtol=1e-5, atol=0)


def test_samples_of_a_mixture_occur_as_often_as_they_are_likely():
    of, rows = mixture(2, 4), 40_000
    many = LogisticMixture(*(part[:1].expand(rows, *part.shape[1:]) for part in list(vars(of).values())[:4]), bins=4)
    drawn = many.sample(row_seeds(3, torch.arange(rows)))
    for pixel in product(values(4), repeat=2):
        pixel = torch.stack(list(pixel)).view(1, 2, 1, 1)
        share = (drawn - pixel).abs().amax((1, 2, 3)).lt(1e-3).float().mean()
        expected = of.log_prob(pixel.expand(2, -1, -1, -1))[0].exp()
        assert abs(share - expected) < 4 * (expected * (1 - expected) / rows).sqrt() + 1e-4


def test_normal_numbers_are_normal():
    drawn = normal(SEEDS, 20_000).double().flatten().sort().values
    even = (torch.arange(60_000, dtype=torch.float64) + 0.5) / 60_000
    assert (Normal(0.0, 1.0).cdf(drawn) - even).abs().max() < 1.6 / 60_000**0.5  # Kolmogorov's, beyond the 98 % point
    assert drawn.abs().max() < 5.6


def flow_of(channels=2, layers=5):
    torch.manual_seed(1)
    flow = Flow(channels, layers=layers, width=6)
    for parameter in flow.parameters():
        nn.init.normal_(parameter, std=0.25)
    return flow


def test_the_flow_s_determinant_is_that_of_its_jacobian():
    flow = flow_of()
    z = torch.randn(1, 2, 2, 3, generator=torch.Generator().manual_seed(0))
    jacobian = torch.autograd.functional.jacobian(lambda x: flow.to_base(x.view_as(z))[0].flatten(), z.flatten())
    v, log_det = flow.to_base(z)
    torch.testing.assert_close(torch.linalg.slogdet(jacobian.double())[1].float(), log_det[0], rtol=1e-4, atol=1e-5)
    expected = Normal(0.0, 1.0).log_prob(v).sum() + log_det[0]
    torch.testing.assert_close(flow.log_prob(z)[0], expected)
    assert log_det.abs().item() > 0.1  # no identity


@pytest.mark.parametrize("shape", [(2, 2, 4, 4), (3, 1, 1, 1), (1, 5, 3, 2)])
def test_the_flow_comes_back(shape):
    flow = flow_of(shape[1])
    v = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(flow.to_base(flow.from_base(v))[0], v, rtol=0, atol=1e-5)
    torch.testing.assert_close(flow.from_base(flow.to_base(v)[0]), v, rtol=0, atol=1e-5)


def test_the_start_from_data_makes_every_convolution_s_output_standard():
    torch.manual_seed(0)
    net = nn.Sequential(
        WeightNormConv(3, 8, resize=-1), DenseBlock(8, growth=4, layers=2), WeightNormConv(8, 5, resize=1)
    )
    seen = []
    given = images(32) * 3 + 1
    start_from_data(net, lambda: net(given))
    for module in net.modules():
        if isinstance(module, WeightNormConv):
            module.register_forward_hook(lambda conv, _, out: seen.append((conv.gain, *torch.std_mean(out, (0, 2, 3)))))
    net(given)
    assert len(seen) == 5
    for gain, deviation, mean in seen:
        torch.testing.assert_close(deviation, torch.full_like(deviation, gain), rtol=1e-3, atol=0)
        assert mean.abs().max() < 1e-4


@pytest.mark.parametrize(
    ("name", "levels", "expected"),
    [
        ("downscale", 3, [Form(3), Form(3, 1), Form(3, 2)]),
        ("bits", 4, [Form(3), Form(3, bins=16), Form(3, bins=4), Form(3, bins=2)]),
        ("sketch", 2, [Form(3), Form(1)]),
        ("grayscale", 2, [Form(3), Form(1)]),
    ],
)
def test_representations_have_the_form_they_say(name, levels, expected):
    """Values, channels and size; and the same on a batch as alone."""
    model = SelfVAE(replace(SMALL, levels=levels, transformation=name))
    assert list(model.forms) == expected
    found = model.representations(images())
    for y, form in zip(found, expected, strict=True):
        assert y.shape == (3, form.channels, 8 >> form.halvings, 8 >> form.halvings)
        assert to_bins(y, form.bins).equal(y)
        assert len(y.unique()) > 1
    for alone, batched in zip(model.representations(images()[1:2]), found, strict=True):
        assert alone.equal(batched[1:2])


def test_what_the_transformations_do():
    x = images()
    two_bits = transform("bits", x, Form(3, bins=256), Form(3, bins=4))
    assert (two_bits * 1.5 + 1.5).round().equal(((x + 1) * 127.5).round() // 64)
    flat = to_bins(torch.full((1, 3, 8, 8), -0.2), 256)
    assert transform("downscale", flat, Form(3), Form(3, 1)).equal(flat[..., :4, :4])
    assert sketch(flat).eq(1).all()  # no edge: white paper
    edge = flat.clone()
    edge[..., 4:] = -1.0
    drawn = sketch(edge)
    assert drawn[..., 4].max() < drawn[..., 0].min()  # a line on the dark side of the edge


@pytest.mark.parametrize(
    ("name", "levels", "channels", "said"),
    [
        ("sketch", 3, 3, "1 to 2 levels"),
        ("bits", 5, 3, "1 to 4"),
        ("grayscale", 2, 1, "1 to 1"),
        ("downscale", 0, 3, "not 0"),
    ],
)
def test_levels_that_there_are_not_are_refused(name, levels, channels, said):
    with pytest.raises(UserError, match=said):
        forms(name, levels, channels)


def by_hand(model, x, seeds):
    """The bound, Eq. 23 as it stands (Eq. 11 where K = 1), nats, from torch's distributions and the networks alone."""
    y, big_k = model.representations(x), model.top

    def gaussian(of):
        return Normal(of.mean, of.log_deviation.exp())

    q = [gaussian(model.posteriors[k](y[k])) for k in range(big_k + 1)]  # of z_1 .. z_K, u
    z = [of.loc + of.scale * normal(derive(seeds, k), *of.loc.shape[1:]) for k, of in enumerate(q)]

    def total(of):
        return of.flatten(1).sum(1)

    def ln_u(u):
        v, log_det = u, 0
        for coupling in reversed(model.flow.couplings):
            v, of_coupling = coupling.inverse(v)
            log_det = log_det + of_coupling
        return total(Normal(0.0, 1.0).log_prob(v)) + log_det

    bound = model.likelihoods[big_k](z[big_k]).log_prob(y[big_k]) + ln_u(z[big_k]) - total(q[big_k].log_prob(z[big_k]))
    for k in range(1, big_k + 1):
        bound = bound + model.likelihoods[k - 1](z[k - 1], y[k]).log_prob(y[k - 1])
        bound = bound + total(gaussian(model.priors[k - 1](y[k], z[k])).log_prob(z[k - 1]))
        bound = bound - total(q[k - 1].log_prob(z[k - 1]))
    return bound


@torch.no_grad()
@pytest.mark.parametrize(("cls", "levels"), [(VAE, 1), (SelfVAE, 2), (SelfVAE, 3)])
def test_the_bound_is_the_paper_s_term_by_term(cls, levels):
    """Must-show 1: Eqs. 4, 11 and 23."""
    config = replace(SMALL, levels=levels) if levels > 1 else replace(toys.TINY["vae"], height=8, width=8)
    model = model_of(cls, config)
    expected = by_hand(model, images(), SEEDS)
    y = model.representations(images())
    found = model.terms(y, [model.posterior(k, image) for k, image in enumerate(y)], SEEDS)
    assert list(found) == ["x", "u"] if levels == 1 else ["x", "z1", "y1", "u"] if levels == 2 else found
    torch.testing.assert_close(-torch.stack(list(found.values())).sum(0), expected, rtol=1e-5, atol=1e-3)
    loss = torch.stack(list(model(images(), SEEDS).losses.values())).sum()
    torch.testing.assert_close(loss, -expected.mean() / (3 * 8 * 8 * math.log(2)), rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize(("progress", "share"), [(0.0, 0.0), (0.1, 0.25), (0.4, 1.0), (0.9, 1.0), (None, 1.0)])
def test_what_latents_cost_comes_in_slowly_in_training_alone(progress, share):
    whole = model_of(config=replace(SMALL, levels=3))(images(), SEEDS).losses
    model = model_of(config=replace(SMALL, levels=3, warm_up=0.4))
    given = None if progress is None else torch.full((3,), progress)
    found = model.train()(images(), SEEDS, given).losses
    for name, loss in whole.items():
        torch.testing.assert_close(found[name], loss * (share if name[5] in "zu" else 1), rtol=1e-4, atol=1e-5)
    evaluated = model.eval()(images(), SEEDS, given).losses
    assert all(evaluated[name].equal(loss) for name, loss in whole.items())


def test_every_network_learns_from_the_bound():
    model = model_of(SelfVAE, replace(SMALL, levels=3))
    torch.stack(list(model(images(), SEEDS).losses.values())).sum().backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []


@torch.no_grad()
def test_what_is_sent_decides_and_the_rest_is_drawn():
    """Of each way: the receiver needs no more than what was sent, its size is counted, other seeds draw others."""
    model, x = model_of(), images()
    other = derive(SEEDS, 1)
    numbers = {"y": 3 * 4 * 4 * 8, "u": 2 * 2 * SMALL.latent_channels * 16, "z": 2 * 2 * SMALL.latent_channels * 16}
    methods = [model.conditional_generation, model.conditional_reconstruction, model.reconstruction_1]
    for (mode, what), method in zip(list(MODES.items())[1:], [*methods, model.reconstruction_2], strict=True):
        sent = model.transmit(x, mode, SEEDS)
        assert model.bits_sent(sent) == sum(numbers[part] for part in what)
        received = model.decode_from(sent, SEEDS)
        assert received.equal(method(x, SEEDS))
        assert to_bins(received, 256).equal(received)
        assert not received.equal(model.decode_from(sent, SEEDS, "sample"))
        redrawn = not received.equal(model.decode_from(sent, other))
        assert redrawn == (mode in ("conditional-generation", "reconstruction-1"))  # else all latents are known
    u = model.transmit(x, "reconstruction-1").u
    torch.testing.assert_close(u, model.encode(x)[0], rtol=1e-3, atol=1e-3)
    assert model.decode((u,)).equal(model.reconstruction_1(x))
    assert model.draw((u,), SEEDS).equal(model.decode_from(replace(model.transmit(x, "reconstruction-1"), z=()), SEEDS))
    generated = model.generation(SEEDS)
    assert generated.shape == x.shape
    assert generated[1:].equal(model.generation(SEEDS[1:]))  # an image hangs on its seed alone


@torch.no_grad()
def test_a_vae_has_two_ways():
    model = model_of(VAE, toys.TINY["vae"])
    x = images(3, 8, 12)
    assert model.modes == ("generation", "reconstruction-1")
    assert set(model.reconstructions(x)) == {"generation", "reconstruction-1, 3:1"}
    with pytest.raises(UserError, match="vae has no reconstruction-2; its ways are generation, reconstruction-1"):
        model.reconstruction_2(x)


def test_settings_that_will_not_do_are_refused():
    with pytest.raises(UserError, match="2 halvings go below the grid of latents"):
        SelfVAE(replace(SMALL, stages=1, levels=3))
    with pytest.raises(UserError, match="images of 6x8 do not divide by 4"):
        SelfVAE(SMALL)(images(1, 6, 8))
    with pytest.raises(UserError, match="mixtures must be at least 1"):
        SelfVAEConfig(mixtures=0)
    with pytest.raises(UserError, match="warm_up must be a share from 0 to 1: got 2"):
        SelfVAEConfig(warm_up=2.0)
    with pytest.raises(UserError, match="no digits"):
        model_of(VAE, toys.TINY["vae"]).decode((torch.zeros(1, 2, 4, 6),), 1)
    assert models.class_of_kind("tokenizer", "vae") is VAE
