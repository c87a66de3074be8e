"""VQ-GAN as a tokenizer: its quantizers, sizes, presets, what it refuses. Its losses are in test_adversarial.py."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from smalti import VQGAN, Layout, Level, UserError, VQGANConfig
from smalti.commands.presets import default_config
from smalti.core import models
from smalti.core.randomness import derive
from smalti.tokenizers.quantizers.gumbel import GumbelQuantizer
from smalti.training.config import FitConfig

TINY = {"widths": (4, 6, 6), "norm_groups": 2, "latent_width": 5, "code_width": 3, "branching": 5}


def vqgan(**changes):
    torch.manual_seed(0)
    return VQGAN(VQGANConfig(**{**TINY, **changes})).eval()


def images_of(b=2, h=16, w=16, seed=0):
    return torch.rand(b, 3, h, w, generator=torch.Generator().manual_seed(seed)) * 2 - 1


@given(rows=st.integers(1, 4), columns=st.integers(1, 4), quantizer=st.sampled_from(["nearest", "gumbel"]))
@settings(max_examples=8)
def test_any_size_that_divides(rows, columns, quantizer):
    tokenizer = vqgan(quantizer=quantizer, attention_stages=(0, 2))
    images = images_of(h=rows * 4, w=columns * 4)
    (codes,), output = tokenizer.encode(images), tokenizer(images)
    assert tokenizer.downsampling == 4
    assert codes.shape == (2, rows, columns)
    assert codes.equal(output.codes[0])
    torch.testing.assert_close(tokenizer.decode((codes,)), output.reconstruction.clamp(-1, 1), atol=1e-5, rtol=0)
    with pytest.raises(UserError, match="do not divide by 4"):
        tokenizer.encode(images_of(h=rows * 4 + 2))


def test_linked_codebooks_inside_vqgan():
    """Paths as codes; fewer digits, other images; a flat codebook is the case of one layer."""
    tokenizer = vqgan(depth=3, branching=4)
    tokenizer.init_from_data(images_of(16))
    (codes,) = tokenizer.encode(images_of())
    assert tokenizer.layout == Layout((Level(8, 8, (4, 4, 4)),))
    assert codes.max() >= 16
    pictures = [tokenizer.decode((codes,), digits) for digits in (1, 2, 3)]
    assert not pictures[0].equal(pictures[1])
    assert pictures[2].equal(tokenizer.decode((codes,)))
    assert pictures[0].equal(tokenizer.decode((codes // 16 * 16,), 1))
    assert vqgan().layout == Layout((Level(8, 8, (5,)),))


def test_the_reconstruction_s_loss_is_the_absolute_error():
    images, tokenizer = images_of(), vqgan(codebook_learning="gradient")
    output = tokenizer(images)
    assert set(output.losses) == {"reconstruction", "commitment", "codebook"}
    torch.testing.assert_close(output.losses["reconstruction"], (output.reconstruction - images).abs().mean())


def gumbel(k=4, d=3, **more):
    torch.manual_seed(0)
    return GumbelQuantizer(code_width=d, codebook_size=k, **{"temperature": 0.7, "kl_weight": 0.5, **more})


def test_codes_are_drawn_as_often_as_their_probability():
    """A chi-square test over 4000 images of one position."""
    quantizer, b = gumbel(), 4_000
    z_e = torch.randn(1, 3, 1, 1).expand(b, -1, -1, -1)
    codes = quantizer(z_e, derive(torch.arange(b), 1)).codes.flatten()
    expected = b * quantizer.logits(z_e[:1]).softmax(1).flatten()
    statistic = ((codes.bincount(minlength=4) - expected) ** 2 / expected).sum()
    assert statistic < 16.3  # of 3 degrees of freedom: once in a thousand
    assert codes.unique().numel() > 2


def test_a_draw_is_the_image_s_alone_and_none_is_the_likeliest():
    quantizer, z_e, seeds = gumbel(), torch.randn(5, 3, 2, 4), torch.arange(5)
    drawn = quantizer(z_e, seeds).codes
    assert quantizer(z_e[3:4], seeds[3:4]).codes.equal(drawn[3:4])
    likeliest = quantizer.logits(z_e).argmax(1)
    assert quantizer(z_e).codes.equal(likeliest)
    assert quantizer.encode(z_e).equal(likeliest)
    assert not drawn.equal(likeliest)
    torch.testing.assert_close(quantizer(z_e, seeds).z_q, quantizer.lookup(drawn))
    with pytest.raises(UserError, match="cannot decode 2"):
        quantizer.lookup(drawn, 2)


def test_the_gradient_is_that_of_the_relaxed_draw():
    """And the KL term is torch's."""
    quantizer, z_e = gumbel(kl_weight=1.0), torch.randn(2, 3, 2, 2, requires_grad=True)
    output, weights = quantizer(z_e), torch.randn(2, 3, 2, 2)
    (output.z_q * weights).sum().backward()
    ours, z_e.grad = z_e.grad, None
    soft = (quantizer.logits(z_e) / 0.7).softmax(1)
    relaxed = torch.einsum("bkhw,kd->bdhw", soft, quantizer.codebook)
    (relaxed * weights).sum().backward()
    torch.testing.assert_close(ours, z_e.grad)
    probabilities = quantizer.logits(z_e).softmax(1).permute(0, 2, 3, 1)
    even = torch.full_like(probabilities, 1 / 4)
    expected = F.kl_div(even.log(), probabilities, reduction="none").sum(-1).mean()
    torch.testing.assert_close(output.losses["kl"], expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"norm_groups": 4}, "widths of 6 do not divide into 4 groups"),
        ({"attention_stages": (1, 3)}, "no stage 3 for attention: stages are 0 to 2"),
        ({"quantizer": "gumbel", "depth": 2}, "drawn codes have one digit"),
        ({"widths": ()}, "at least one stage"),
        ({"height": 18}, "do not divide by 4"),
    ],
)
def test_networks_that_cannot_be_are_refused(change, message):
    with pytest.raises(UserError, match=message):
        vqgan(**change)


@pytest.mark.parametrize(
    ("name", "grid", "radix", "attends_at", "parameters"),
    [
        ("f16-1024", 16, 1024, 16, 72),  # millions, without the codebook, which learns as running means
        ("f16-16384", 16, 16384, 16, 72),
        ("f8-gumbel-8192", 32, 8192, 32, 69),
        ("f32-megapixel", 32, 8192, 64, 73),
    ],
)
def test_a_preset_has_the_published_network(name, grid, radix, attends_at, parameters):
    _, config = default_config(name, "vqgan")
    with torch.device("meta"):
        tokenizer = models.class_of_kind("tokenizer", "vqgan")(config.model)
    assert tokenizer.layout == Layout((Level(grid, grid, (radix,)),))
    assert [config.model.height >> stage for stage in config.model.attention_stages] == [attends_at]
    assert sum(parameter.numel() for parameter in tokenizer.parameters()) / 1e6 == pytest.approx(parameters, abs=0.5)
    assert (config.tokenizer, config.preset) == ("vqgan", name)
    assert math.isclose(config.fit.learning_rate, 5e-6 if grid == 32 and radix == 8192 and attends_at == 64 else 5.4e-5)
    with pytest.raises(UserError, match=f"{name} is for vqgan, not for hrvq"):
        default_config(name, "hrvq")


def test_the_vq_vae_family_s_presets_are_not_for_vqgan():
    with pytest.raises(UserError, match="not for vqgan"):
        default_config("paper32", "vqgan")


def test_the_device_that_counts_steps_is_waited_for_on_the_ramp_alone(monkeypatch):
    """And the discriminator is heard as the count says: after bad steps, which are put back, and a loaded state too."""
    start, ramp, reads = 6, 3, []
    model = vqgan(perceptual_weight=0.0, discriminator_start=start, discriminator_ramp=ramp)
    objective = model.phases(FitConfig())[0].objective
    monkeypatch.setattr(torch.Tensor, "__int__", lambda tensor: reads.append(calls) or tensor.item())
    for calls in range(start + ramp + 6):
        assert objective._heard() == min(1.0, max(0, objective.steps.item() - start + 1) / ramp)
        objective.after_step(torch.arange(1), torch.tensor(False))
        objective.steps -= int(calls in (1, start + 2))
    assert set(reads) <= {0, *range(start, start + ramp + 3)}
    objective.load_state_dict(objective.state_dict() | {"steps": torch.tensor(start)})
    assert objective._heard() == 1 / ramp
