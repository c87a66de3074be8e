"""VQ-GAN as a tokenizer: quantizers, sizes, presets, refused settings. Its losses are tested in test_losses.py."""

import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from smalti import VQGAN, Layout, Level, UserError, VQGANConfig
from smalti.commands.presets import default_config
from smalti.core import models
from smalti.training.config import FitConfig

TINY = {"widths": (4, 6, 6), "norm_groups": 2, "latent_width": 5, "code_width": 3, "branching": 5}

DIGEST = "6ccd2056c296"  # of this network with weights of 0.5, before `middle_attention` and others were added


def vqgan(**changes):
    torch.manual_seed(0)
    return VQGAN(VQGANConfig(**{**TINY, **changes})).eval()


def images_of(b=2, h=16, w=16, seed=0):
    return torch.rand(b, 3, h, w, generator=torch.Generator().manual_seed(seed)) * 2 - 1


@given(rows=st.integers(1, 4), columns=st.integers(1, 4), quantizer=st.sampled_from(["linked", "gumbel", "dot"]))
@settings(max_examples=8)
def test_accepts_any_size_divisible_by_the_downsampling(rows, columns, quantizer):
    tokenizer = vqgan(quantizer=quantizer, attention_stages=(0, 2))
    images = images_of(h=rows * 4, w=columns * 4)
    (codes,), output = tokenizer.encode(images), tokenizer(images)
    assert tokenizer.downsampling == 4
    assert codes.shape == (2, rows, columns)
    assert codes.equal(output.codes[0])
    torch.testing.assert_close(tokenizer.decode((codes,)), output.reconstruction.clamp(-1, 1), atol=1e-5, rtol=0)
    with pytest.raises(UserError, match="are not divisible by 4"):
        tokenizer.encode(images_of(h=rows * 4 + 2))


def test_vqgan_with_linked_codebooks():
    """Codes are paths, fewer digits give other images, and a flat codebook is the case of one layer."""
    tokenizer = vqgan(branching=(4, 2, 3))
    tokenizer.init_from_data(images_of(16))
    (codes,) = tokenizer.encode(images_of())
    assert tokenizer.layout == Layout((Level(8, 8, (4, 2, 3)),))
    assert 6 <= codes.max() < 24
    pictures = [tokenizer.decode((codes,), digits) for digits in (1, 2, 3)]
    assert not pictures[0].equal(pictures[1])
    assert pictures[2].equal(tokenizer.decode((codes,)))
    assert pictures[0].equal(tokenizer.decode((codes // 6 * 6,), 1))
    assert vqgan().layout == Layout((Level(8, 8, (5,)),))


def test_reconstruction_loss_is_the_absolute_error():
    images, tokenizer = images_of(), vqgan(codebook_learning="gradient")
    output = tokenizer(images)
    assert set(output.losses) == {"reconstruction", "commitment", "codebook"}
    torch.testing.assert_close(output.losses["reconstruction"], (output.reconstruction - images).abs().mean())


def test_middle_without_attention_has_two_blocks():
    one, other = (vqgan(middle_attention=attention).state_dict() for attention in (True, False))
    assert sum(name.endswith("q.weight") for name in one) == 2
    assert not any(name.endswith("q.weight") for name in other)
    assert len(one) - len(other) == 2 * 10


def test_maskgit_network_takes_any_size_and_trains_without_attention():
    tokenizer = vqgan(architecture="maskgit", middle_attention=False, latent_width=3, codebook_learning="gradient")
    images = images_of(h=12, w=20)
    output = tokenizer(images)
    assert output.reconstruction.shape == images.shape
    assert tokenizer.encode(images)[0].equal(output.codes[0])
    sum(output.losses.values()).backward()
    assert all(parameter.grad is not None for parameter in tokenizer.parameters())


def test_settings_added_later_leave_digests_alone(tmp_path):
    """A model that was saved before they existed loads, with the digest of then."""
    tokenizer = VQGAN(VQGANConfig(**TINY))
    for tensor in tokenizer.state_dict().values():
        tensor.fill_(0.5)
    assert tokenizer.digest()[:12] == DIGEST
    tokenizer.save(tmp_path)
    described = json.loads((tmp_path / "config.json").read_text())
    for name in ("middle_attention", "architecture", "entropy_weight"):
        del described["config"][name]
    (tmp_path / "config.json").write_text(json.dumps(described))
    assert VQGAN.load(tmp_path).digest()[:12] == DIGEST


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"norm_groups": 4}, "width of 6 is not divisible into 4 groups"),
        ({"attention_stages": (1, 3)}, "no stage 3 for attention; stages are 0 to 2"),
        (
            {"quantizer": "gumbel", "branching": (3, 2)},
            "gumbel needs codes of one layer; use --depth 1 and",
        ),
        ({"quantizer": "dot", "commitment_weight": (0.1, 0.2)}, "2 values, but codes have 1 layer;"),
        ({"quantizer": "dot", "depth": 2}, "dot needs codes of one layer"),
        ({"quantizer": "dot", "branching": 1}, "branching at least 2, not 1 and 1"),
        ({"architecture": "maskgit"}, "has no attention; use --no-middle-attention"),
        ({"architecture": "maskgit", "middle_attention": False}, "--latent-width equal to --code-width, not 5 and 3"),
        ({"widths": ()}, "at least one stage"),
        ({"height": 18}, "are not divisible by 4"),
    ],
)
def test_invalid_settings_are_refused(change, message):
    with pytest.raises(UserError, match=message):
        vqgan(**change)


@pytest.mark.parametrize(
    ("name", "grid", "radix", "attention_size", "parameters", "base_rate"),
    [
        ("f16-1024", 16, 1024, 16, 72, 4.5e-6),  # millions, without the codebook, which is a buffer
        ("f16-16384", 16, 16384, 16, 72, 4.5e-6),
        ("f8-gumbel-8192", 32, 8192, 32, 69, 4.5e-6),
        ("f32-megapixel", 32, 8192, 64, 73, 5e-6),
    ],
)
def test_presets_have_the_published_networks_and_rates(name, grid, radix, attention_size, parameters, base_rate):
    _, config = default_config(name, "vqgan")
    with torch.device("meta"):
        tokenizer = models.class_of_kind("tokenizer", "vqgan")(config.model)
    assert tokenizer.layout == Layout((Level(grid, grid, (radix,)),))
    assert [config.model.height >> stage for stage in config.model.attention_stages] == [attention_size]
    assert sum(parameter.numel() for parameter in tokenizer.parameters()) / 1e6 == pytest.approx(parameters, abs=0.5)
    assert (config.tokenizer, config.preset) == ("vqgan", name)
    assert math.isclose(config.fit.learning_rate, base_rate * config.fit.batch_size)
    with pytest.raises(UserError, match=f"{name} is for vqgan, not for hrvq"):
        default_config(name, "hrvq")


def test_presets_of_the_vqvae_family_are_refused_for_vqgan():
    with pytest.raises(UserError, match="not for vqgan"):
        default_config("paper32", "vqgan")


def test_step_count_is_read_from_the_device_only_on_the_ramp(monkeypatch):
    """The adversarial loss's ramp stays exact, also after restored bad steps and after loading a state."""
    start, ramp, reads = 6, 3, []
    model = vqgan(perceptual_weight=0.0, discriminator_start=start, discriminator_ramp=ramp)
    objective = model.phases(FitConfig())[0].objective
    monkeypatch.setattr(torch.Tensor, "__int__", lambda tensor: reads.append(calls) or tensor.item())
    for calls in range(start + ramp + 6):
        assert objective._ramp() == min(1.0, max(0, objective.steps.item() - start + 1) / ramp)
        objective.after_step(torch.arange(1), torch.tensor(False))
        objective.steps -= int(calls in (1, start + 2))
    assert set(reads) <= {0, *range(start, start + ramp + 3)}
    objective.load_state_dict(objective.state_dict() | {"steps": torch.tensor(start)})
    assert objective._ramp() == 1 / ramp
