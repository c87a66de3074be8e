"""VQ-VAE and VQ-VAE-2 as tokenizers, warnings of codebook collapse, and VQ-VAE-2 from command to file.

HR-VQVAE is tested in test_hrvq.py.
"""

import os
import sys

import numpy as np
import pytest
import torch
from helpers.build_toys import run, write_images
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from smalti import (
    HRVQ,
    VQGAN,
    VQVAE,
    VQVAE2,
    HRVQConfig,
    LatentSet,
    Layout,
    Level,
    UserError,
    VQGANConfig,
    VQVAE2Config,
    VQVAEConfig,
)
from smalti.commands.codebook_usage import CodebookAlarm
from smalti.core.models import digest
from smalti.images.image_set import ImageRows, open_images
from smalti.scripts import inspect_latents, train_tokenizer

SMALL = {"height": 16, "width": 16, "residual_blocks": 1, "code_width": 4}


def images_of(b: int = 2, c: int = 3, h: int = 16, w: int = 16, seed: int = 0) -> Tensor:
    return torch.rand(b, c, h, w, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def vqvae2_of(**changes) -> VQVAE2:
    torch.manual_seed(0)
    return VQVAE2(VQVAE2Config(**{**SMALL, "widths": (6,), "codebook_size": 9, **changes})).eval()


def test_vqvae_equals_hrvqvae_with_one_layer():
    """Names of weights, losses, codes and images are the same."""
    torch.manual_seed(0)
    flat = VQVAE(VQVAEConfig(**SMALL, widths=(6, 8), codebook_size=9))
    linked = HRVQ(HRVQConfig(**SMALL, widths=(6, 8), depth=1, branching=9))
    linked.load_state_dict(flat.state_dict())
    images = images_of()
    one, other = flat(images), linked(images)
    assert flat.layout == linked.layout == Layout((Level(4, 4, (9,)),))
    assert one.codes[0].equal(other.codes[0])
    assert one.reconstruction.equal(other.reconstruction)
    assert one.losses == other.losses
    with pytest.raises(UserError, match="1 digit; give a number from 1 to 1"):
        flat.decode(one.codes, 2)
    with pytest.raises(UserError, match="1 digit; give a number from 1 to 1, or a slice within them"):
        flat.decode(one.codes, slice(1, 3))
    assert flat.decode(one.codes, slice(0, 1)).equal(flat.decode(one.codes))


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (HRVQConfig(depth=4, branching=16, commitment_weight=0.5), "0670516cc97732bc"),
        (HRVQConfig(codebook_init="uniform"), "e94d7942a1f63e1c"),
        (VQVAEConfig(codebook_init="uniform"), "f245036b4cdf077e"),
        (VQVAE2Config(), "63bcb8383db5d36e"),
        (VQGANConfig(depth=2, branching=9, codebook_init="uniform"), "9b8b09c2da0852c5"),
    ],
)
def test_digests_are_those_of_the_version_without_settings_of_single_layers(config, expected):
    assert digest(type(config).__name__, config, {"w": torch.ones(2)}).startswith(expected)


@given(rows=st.integers(1, 3), columns=st.integers(1, 3), stages=st.integers(1, 2), levels=st.integers(2, 4))
@settings(max_examples=8)
def test_each_level_is_twice_as_fine_at_any_divisible_size(rows, columns, stages, levels):
    factor = 2 ** (stages + levels - 1)
    tokenizer = vqvae2_of(widths=(4,) * stages, levels=levels, height=2 * factor, width=factor)
    images = images_of(h=rows * factor, w=columns * factor)
    codes, output = tokenizer.encode(images), tokenizer(images)
    grids = [(rows * 2**level, columns * 2**level) for level in range(levels)]
    assert tokenizer.downsampling == factor
    assert tokenizer.layout.resized(grids).check(codes) is None
    assert all(a.equal(b) for a, b in zip(codes, output.codes, strict=True))
    decoded = tokenizer.decode(codes)
    torch.testing.assert_close(decoded, output.reconstruction.clamp(-1, 1), atol=1e-5, rtol=0)
    with pytest.raises(UserError, match=f"are not divisible by {factor}"):
        tokenizer.encode(images_of(h=rows * factor + factor // 2))


def test_three_levels_have_the_papers_grids():
    """The HR-VQVAE paper has grids of 16, 8 and 4 for CIFAR10 (32x32) and MNIST (28x28, here enlarged)."""
    tokenizer = vqvae2_of(height=32, width=32, widths=(4,), levels=3, codebook_size=512)
    assert tokenizer.layout == Layout(tuple(Level(size, size, (512,)) for size in (4, 8, 16)))


def test_finer_levels_are_conditioned_on_coarser_codewords():
    """Changing a level's codewords changes the codes of finer levels of the same image, and of no coarser level."""
    images = images_of()
    codes = vqvae2_of(levels=3).encode(images)
    for changed in range(3):
        tokenizer = vqvae2_of(levels=3)
        tokenizer.quantizers[changed].codebook_0.mul_(-20)
        new_codes = tokenizer.encode(images)
        for level in {0, 1, 2} - {changed}:
            assert codes[level].equal(new_codes[level]) == (level < changed)


def test_decoded_image_depends_on_every_level():
    tokenizer = vqvae2_of(levels=3)
    codes = tokenizer.encode(images_of())
    whole = tokenizer.decode(codes)
    for level in range(3):
        other = tuple((grid + (i == level)) % 9 for i, grid in enumerate(codes))
        assert not tokenizer.decode(other).allclose(whole)


@pytest.mark.parametrize("levels", [-1, 1])
def test_fewer_than_two_levels_are_refused(levels):
    with pytest.raises(UserError, match=f"--levels must be at least 2, not {levels}"):
        vqvae2_of(levels=levels)


@pytest.mark.parametrize("size", [0, 1])
def test_codebook_of_fewer_than_two_codes_is_refused(size):
    with pytest.raises(UserError, match=f"--codebook-size must be at least 2, not {size}"):
        vqvae2_of(codebook_size=size)


def test_losses_are_the_sums_over_levels():
    """Also checks that every part gets gradients, coarse levels through the finer ones."""
    tokenizer = vqvae2_of(levels=3, codebook_learning="gradient").train()
    outputs, images = [], images_of()
    for quantizer in tokenizer.quantizers:
        quantizer.register_forward_hook(lambda _module, _inputs, output: outputs.append(output))
    output = tokenizer(images)
    for name in ("codebook", "commitment"):
        torch.testing.assert_close(output.losses[name], sum(each.losses[name] for each in outputs))
    expected = (output.reconstruction - images).square().mean()
    torch.testing.assert_close(output.losses["reconstruction"], expected)
    sum(output.losses.values()).backward()
    no_gradient = [name for name, p in tokenizer.named_parameters() if p.grad is None or not p.grad.any()]
    assert all(name.endswith(("first.weight", "first.bias")) for name in no_gradient)  # followed by weights of zero


@pytest.mark.parametrize("make", [vqvae2_of, lambda **more: VQVAE(VQVAEConfig(**SMALL, widths=(6, 8), **more))])
def test_kmeans_uses_all_codewords_and_other_initializations_are_random(make):
    images, bounds = images_of(16), {"uniform": 1.0, "unit-variance": (3 / 4) ** 0.5, "scaled": 1 / 9}
    for init, bound in bounds.items():
        tokenizer = make(codebook_init=init, codebook_size=9)
        before = {name: tensor.clone() for name, tensor in tokenizer.state_dict().items()}
        largest = {tensor.abs().max().item() for name, tensor in before.items() if "codebook_" in name}
        assert all(0.8 * bound < each <= bound for each in largest)
        tokenizer.init_from_data(images)
        assert all(tensor.equal(before[name]) for name, tensor in tokenizer.state_dict().items())
    tokenizer = make(codebook_size=6)
    tokenizer.init_from_data(images)
    assert all(codes.unique().numel() == 6 for codes in tokenizer.encode(images))


@pytest.fixture
def rows(tmp_path):
    write_images(tmp_path, count=40)
    return ImageRows(open_images(str(tmp_path), height=16, width=16), split="all", flips=False)


def test_codebook_usage_is_measured_per_level_and_digit(rows):
    """Compares with counts over all codes at once."""
    torch.manual_seed(0)
    tokenizer = HRVQ(HRVQConfig(**SMALL, widths=(6,), depth=2, branching=3))
    images = rows.__getitems__(range(40))["images"].float() / 127.5 - 1
    tokenizer.init_from_data(images)
    measured = CodebookAlarm().measure(tokenizer, rows)
    (codes,) = tokenizer.encode(images)
    for name, digit_codes, size in [("_first_1", codes // 3, 3), ("", codes, 9)]:
        frequencies = np.bincount(digit_codes.flatten(), minlength=size) / codes.numel()
        assert measured[f"codes_used{name}"] == pytest.approx((frequencies > 0).mean())
        entropy = -sum(p * np.log(p) for p in frequencies if p)
        assert measured[f"code_perplexity{name}"] == pytest.approx(np.exp(entropy))
    two = CodebookAlarm().measure(vqvae2_of(), rows)
    assert set(two) == {f"{name}_{level}" for name in ("codes_used", "code_perplexity") for level in (0, 1)}


def test_codebook_collapse_warns_once_with_a_remedy(rows, capsys):
    def collapsed(**more):
        tokenizer = vqvae2_of(codebook_size=64, **more)
        tokenizer.init_from_data(rows.__getitems__(range(40))["images"].float() / 127.5 - 1)
        with torch.no_grad():
            tokenizer.quantizers[1].codebook_0[0, 2:] += 100
        alarm = CodebookAlarm()
        for _ in range(2):
            alarm.measure(tokenizer, rows)
        return capsys.readouterr().err.strip().splitlines()

    (warning,) = collapsed()
    assert warning.startswith("warning: level 1 collapses: ")
    assert "of 64 codes are in use, perplexity " in warning
    assert warning.endswith("Try fewer codes, more images, or a lower --learning-rate")
    assert "Try --revive-below 0.05" in collapsed(revive_below=0.0)[0]
    assert "Try --codebook-init kmeans" in collapsed(codebook_init="scaled")[0]


def test_vqvae2_commands_train_build_and_inspect(tmp_path, monkeypatch, capfd):
    """Trains a tokenizer of two levels, builds its latent set, verifies it and plots its codes, each by its command."""
    monkeypatch.chdir(tmp_path)
    write_images(tmp_path / "img", count=30)
    flags = "--tokenizer vqvae2 --height 8 --width 8 --widths 6 --residual-blocks 1 --code-width 4 --codebook-size 8"
    fit = "--images img --steps 20 --batch-size 8 --precision fp32 --out two"
    monkeypatch.setattr(sys, "argv", ["train_tokenizer.py", *flags.split(), *fit.split()])
    train_tokenizer.main()
    assert Image.open("two/reconstructions.png").width > 0
    status, out, _ = run(capfd, "--tokenizer", "two", "--workers", "0", "--device", "cpu", "--out", "two.h5")
    assert status == 0
    assert "2×2 of 8 + 4×4 of 8" in out
    assert len(LatentSet("two.h5")) == 60
    monkeypatch.setattr(
        sys, "argv", ["inspect_latents.py", "--latents", "two.h5", "--verify", "--codes", "c.png", "--plot", "p.png"]
    )
    inspect_latents.main()
    assert {"c.png", "p.png"} <= set(os.listdir())


@pytest.mark.parametrize("cls", [VQVAE, VQVAE2, HRVQ, VQGAN])
@torch.no_grad()
def test_reconstruction_loss_is_the_configured_error(cls):
    """It does not change the digest of the codes. VQ-GAN's default is the absolute error, the others' the squared."""
    sizes = {**SMALL, "widths": (8, 8), **({"norm_groups": 4, "latent_width": 8} if cls is VQGAN else {})}
    images, losses, digests = images_of(), {}, set()
    for loss in ("mse", "l1"):
        torch.manual_seed(0)
        model = cls(cls.config_class(**sizes, reconstruction_loss=loss)).eval()
        output = model(images)
        losses[loss], error = float(output.losses["reconstruction"]), (output.reconstruction - images).double()
        assert losses[loss] == pytest.approx(float(error.square().mean() if loss == "mse" else error.abs().mean()))
        digests.add(model.code_digest())
    assert len(digests) == 1
    default = cls.config_class(**sizes).reconstruction_loss
    assert default == ("l1" if cls is VQGAN else "mse")
