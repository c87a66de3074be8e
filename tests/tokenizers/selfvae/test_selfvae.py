"""selfVAE and VAE: the ELBO against torch's distributions, generation modes, refused settings.

Likelihoods and the flow prior are tested in test_likelihoods.py, transformations in test_transformations.py.
"""

import math
from dataclasses import replace

import pytest
import torch
from helpers import toys
from torch import nn
from torch.distributions import Normal

from smalti.core import models
from smalti.core.errors import UserError
from smalti.core.randomness import Stream, derive, normal, row_seeds
from smalti.tokenizers.selfvae.hierarchical_vae import MODES
from smalti.tokenizers.selfvae.logistic import to_bins
from smalti.tokenizers.selfvae.selfvae import SelfVAE, SelfVAEConfig
from smalti.tokenizers.selfvae.vae import VAE

SEEDS = row_seeds(0, torch.arange(3))
SMALL = replace(toys.TINY["selfvae"], height=8, width=8, stages=2)


def images(count=3, height=8, width=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(256, (count, 3, height, width), generator=generator) / 127.5 - 1


def model_of(cls=SelfVAE, config=SMALL, seed=0):
    """A model with weights large enough that every output depends on every input."""
    torch.manual_seed(seed)
    model = cls(config).eval()
    model.init_from_data(images(64))
    for coupling in model.flow.couplings:
        nn.init.normal_(coupling.net[-1].weight, std=0.1)
    return model


def by_hand(model, x, seeds):
    """Computes the ELBO, Eq. 23 (Eq. 11 if K = 1), in nats, from torch's distributions and the networks alone."""
    y, big_k = model.representations(x), model.top

    def gaussian(output):
        return Normal(output.mean, output.log_deviation.exp())

    q = [gaussian(model.posteriors[k](y[k])) for k in range(big_k + 1)]  # posteriors of z_1, ..., z_K, u
    z = [each.loc + each.scale * normal(derive(seeds, k), *each.loc.shape[1:]) for k, each in enumerate(q)]

    def total(values):
        return values.flatten(1).sum(1)

    def ln_u(u):
        v, log_det = u, 0
        for coupling in reversed(model.flow.couplings):
            v, coupling_log_det = coupling.inverse(v)
            log_det = log_det + coupling_log_det
        return total(Normal(0.0, 1.0).log_prob(v)) + log_det

    elbo = model.likelihoods[big_k](z[big_k]).log_prob(y[big_k]) + ln_u(z[big_k]) - total(q[big_k].log_prob(z[big_k]))
    for k in range(1, big_k + 1):
        elbo = elbo + model.likelihoods[k - 1](z[k - 1], y[k]).log_prob(y[k - 1])
        elbo = elbo + total(gaussian(model.priors[k - 1](y[k], z[k])).log_prob(z[k - 1]))
        elbo = elbo - total(q[k - 1].log_prob(z[k - 1]))
    return elbo


@torch.no_grad()
@pytest.mark.parametrize(("cls", "levels"), [(VAE, 1), (SelfVAE, 2), (SelfVAE, 3)])
def test_elbo_equals_the_papers_equations(cls, levels):
    """Covers Eq. 4 (VAE), Eq. 11 (two levels) and Eq. 23 (three levels)."""
    config = replace(SMALL, levels=levels) if levels > 1 else replace(toys.TINY["vae"], height=8, width=8)
    model = model_of(cls, config)
    expected = by_hand(model, images(), SEEDS)
    y = model.representations(images())
    terms = model.terms(y, [model.posterior(k, image) for k, image in enumerate(y)], SEEDS)
    names = {1: ["x", "u"], 2: ["x", "z1", "y1", "u"], 3: ["x", "z1", "y1", "z2", "y2", "u"]}
    assert list(terms) == names[levels]
    torch.testing.assert_close(-torch.stack(list(terms.values())).sum(0), expected, rtol=1e-5, atol=1e-3)
    loss = torch.stack(list(model(images(), SEEDS).losses.values())).sum()
    torch.testing.assert_close(loss, -expected.mean() / (3 * 8 * 8 * math.log(2)), rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize(("progress", "weight"), [(0.0, 0.0), (0.1, 0.25), (0.4, 1.0), (0.9, 1.0), (None, 1.0)])
def test_kl_warm_up_weights_latents_only_in_training(progress, weight):
    whole = model_of(config=replace(SMALL, levels=3))(images(), SEEDS).losses
    model = model_of(config=replace(SMALL, levels=3, warm_up=0.4))
    progress = None if progress is None else torch.full((3,), progress)
    trained = model.train()(images(), SEEDS, progress).losses
    for name, loss in whole.items():
        torch.testing.assert_close(trained[name], loss * (weight if name[5] in "zu" else 1), rtol=1e-4, atol=1e-5)
    evaluated = model.eval()(images(), SEEDS, progress).losses
    assert all(evaluated[name].equal(loss) for name, loss in whole.items())


def test_elbo_has_gradients_to_every_parameter():
    model = model_of(SelfVAE, replace(SMALL, levels=3))
    torch.stack(list(model(images(), SEEDS).losses.values())).sum().backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []


def decoded_by_hand(model, parts, x):
    """Decodes two levels from the parts that are transmitted, with the networks alone: the rest is drawn from SEEDS."""

    def draw(gaussian, *stream):
        return gaussian.mean + gaussian.log_deviation.exp() * normal(derive(SEEDS, *stream), *gaussian.mean.shape[1:])

    y, posteriors = model.representations(x), model.posteriors
    sent = {name: draw(posteriors[k](y[k]), k).half().float() for k, name in enumerate("zu") if name in parts}
    u = sent["u"] if "u" in parts else draw(posteriors[1](y[1]), Stream.VAE_LATENTS, 1)
    coarse = y[1] if "y" in parts else model.likelihoods[1](u).nearest_to_mean()
    z = sent["z"] if "z" in parts else draw(model.priors[0](coarse, u), Stream.VAE_LATENTS, 0)
    return model.likelihoods[0](z, coarse).nearest_to_mean()


@torch.no_grad()
def test_modes_decode_from_transmitted_parts_and_sample_the_rest():
    """For each mode: decoding uses only what is transmitted, its bits are counted, and seeds decide what is sampled."""
    model, x = model_of(), images()
    other = derive(SEEDS, 1)
    bits = {"y": 3 * 4 * 4 * 8, "u": 2 * 2 * SMALL.latent_channels * 16, "z": 2 * 2 * SMALL.latent_channels * 16}
    for mode, parts in list(MODES.items())[1:]:
        transmitted = model.transmit(x, mode, SEEDS)
        assert model.bits_sent(transmitted) == sum(bits[part] for part in parts)
        decoded = model.decode_from(transmitted, SEEDS)
        assert decoded.equal(decoded_by_hand(model, parts, x))
        assert to_bins(decoded, 256).equal(decoded)
        assert not decoded.equal(model.decode_from(transmitted, SEEDS, "sample"))
        differs = not decoded.equal(model.decode_from(transmitted, other))
        assert differs == (mode in ("conditional-generation", "reconstruction-1"))  # others transmit all latents
    u = model.transmit(x, "reconstruction-1").u
    torch.testing.assert_close(u, model.encode(x)[0], rtol=1e-3, atol=1e-3)
    coarse = model.likelihoods[1](u).nearest_to_mean()
    z = model.priors[0](coarse, u).mean
    assert model.decode((u,)).equal(model.likelihoods[0](z, coarse).nearest_to_mean())
    assert model.draw((u,), SEEDS).equal(model.decode_from(replace(model.transmit(x, "reconstruction-1"), z=()), SEEDS))
    generated = model.generation(SEEDS)
    assert generated.shape == x.shape
    assert generated[1:].equal(model.generation(SEEDS[1:]))  # an image depends on its seed alone


@torch.no_grad()
def test_vae_has_two_modes():
    model = model_of(VAE, toys.TINY["vae"])
    x = images(3, 8, 12)
    assert model.modes == ("generation", "reconstruction-1")
    assert set(model.reconstructions(x)) == {"generation", "reconstruction-1, 3:1"}
    with pytest.raises(UserError, match="vae has no reconstruction-2; its modes are generation, reconstruction-1"):
        model.transmit(x, "reconstruction-2")


def test_invalid_settings_are_refused():
    with pytest.raises(UserError, match="smaller than the latent grid: it is halved 2 times, the latents 1 times;"):
        SelfVAE(replace(SMALL, stages=1, levels=3))
    with pytest.raises(UserError, match="images of 6x8 are not divisible by 4"):
        SelfVAE(SMALL)(images(1, 6, 8))
    with pytest.raises(UserError, match="mixtures must be at least 1"):
        SelfVAEConfig(mixtures=0)
    with pytest.raises(UserError, match="warm_up must be a share from 0 to 1, not 2"):
        SelfVAEConfig(warm_up=2.0)
    with pytest.raises(UserError, match="cannot decode some digits"):
        model_of(VAE, toys.TINY["vae"]).decode((torch.zeros(1, 2, 4, 6),), 1)
    assert models.class_of_kind("tokenizer", "vae") is VAE
