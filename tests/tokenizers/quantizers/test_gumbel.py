"""Gumbel-softmax quantizer: sampling frequencies, seeds, the straight-through gradient and the KL term."""

import pytest
import torch
import torch.nn.functional as F

from smalti import UserError
from smalti.core.randomness import derive
from smalti.tokenizers.quantizers.gumbel import GumbelQuantizer


def gumbel(k=4, d=3, **more):
    torch.manual_seed(0)
    return GumbelQuantizer(code_width=d, codebook_size=k, **{"temperature": 0.7, "kl_weight": 0.5, **more})


@pytest.mark.parametrize("setting", ["temperature", "kl_weight"])
@pytest.mark.parametrize("value", [-1.0, float("nan")])
def test_settings_that_cannot_train_are_refused(setting, value):
    with pytest.raises(UserError, match=f"temperature must be above 0 and kl_weight at least 0, not .*{value}"):
        gumbel(**{setting: value})


def test_a_temperature_of_0_is_refused():
    gumbel(kl_weight=0.0)
    with pytest.raises(UserError, match=r"temperature must be above 0 .* not 0\.0 and 0\.5"):
        gumbel(temperature=0.0)


def test_codes_are_sampled_with_their_probabilities():
    """A chi-square test over 4000 images of one position."""
    quantizer, b = gumbel(), 4_000
    z_e = torch.randn(1, 3, 1, 1).expand(b, -1, -1, -1)
    codes = quantizer(z_e, derive(torch.arange(b), 1)).codes.flatten()
    expected = b * quantizer.logits(z_e[:1]).softmax(1).flatten()
    statistic = ((codes.bincount(minlength=4) - expected) ** 2 / expected).sum()
    assert statistic < 16.3  # p = 0.001 with 3 degrees of freedom
    assert codes.unique().numel() > 2


def test_samples_depend_on_the_image_alone_and_no_seed_gives_the_most_probable():
    quantizer, z_e, seeds = gumbel(), torch.randn(5, 3, 2, 4), torch.arange(5)
    sampled = quantizer(z_e, seeds).codes
    assert quantizer(z_e[3:4], seeds[3:4]).codes.equal(sampled[3:4])
    most_probable = quantizer.logits(z_e).argmax(1)
    assert quantizer(z_e).codes.equal(most_probable)
    assert quantizer.encode(z_e).equal(most_probable)
    assert not sampled.equal(most_probable)
    assert quantizer.eval()(z_e, seeds).codes.equal(most_probable)  # so held-out losses are those of `encode`
    quantizer.train()
    torch.testing.assert_close(quantizer(z_e, seeds).z_q, quantizer.lookup(sampled))
    with pytest.raises(UserError, match="1 digit; give a number"):
        quantizer.lookup(sampled, 2)


def test_straight_through_gradient_is_that_of_the_relaxed_sample():
    """Also compares the KL term with torch's."""
    quantizer, z_e = gumbel(kl_weight=1.0), torch.randn(2, 3, 2, 2, requires_grad=True)
    output, weights = quantizer(z_e), torch.randn(2, 3, 2, 2)
    (output.z_q * weights).sum().backward()
    ours, z_e.grad = z_e.grad, None
    soft = (quantizer.logits(z_e) / 0.7).softmax(1)
    relaxed = torch.einsum("bkhw,kd->bdhw", soft, quantizer.codebook)
    (relaxed * weights).sum().backward()
    torch.testing.assert_close(ours, z_e.grad)
    probabilities = quantizer.logits(z_e).softmax(1).permute(0, 2, 3, 1)
    uniform = torch.full_like(probabilities, 1 / 4)
    expected = F.kl_div(uniform.log(), probabilities, reduction="none").sum(-1).mean()
    torch.testing.assert_close(output.losses["kl"], expected)
