"""Principal encoders, and the linear start of learned ones, by numpy's principal components; stages of one position, by
those that see more."""

import numpy as np
import pytest
import torch
from torch import nn

from smalti.core.models import load
from smalti.core.randomness import row_seeds
from smalti.tokenizers.hqa.hams import HAMs, HAMsConfig
from smalti.tokenizers.hqa.hqa import HQA
from smalti.tokenizers.hqa.layer import HQAConfig
from smalti.tokenizers.hqa.pca_encoder import PrincipalEncoder, start_linear
from smalti.tokenizers.layers import conv
from smalti.tokenizers.quantizers.stochastic import START_LENGTH


def images_of(b: int, h: int, w: int, channels: int = 3) -> torch.Tensor:
    return torch.rand(b, channels, h, w, generator=torch.Generator().manual_seed(1)) * 2 - 1


def stage(*, channels: int, width: int, code_width: int, alone: bool) -> tuple[nn.Sequential, nn.Sequential]:
    torch.manual_seed(0)
    shape = {"image_channels": channels, "widths": (width,), "residual_blocks": 2, "code_width": code_width}
    return conv.encoder(**shape, alone=alone), conv.decoder(**shape, alone=alone)


def projected(given: np.ndarray, components: int) -> np.ndarray:
    """Its 2x2 patches, brought to their `components` principal components and back."""
    b, c, h, w = given.shape
    patches = given.reshape(b, c, h // 2, 2, w // 2, 2).transpose(0, 2, 4, 1, 3, 5).reshape(-1, 4 * c)
    mean = patches.mean(0)
    _, _, axes = np.linalg.svd(patches - mean, full_matrices=False)
    kept = (patches - mean) @ axes[:components].T @ axes[:components] + mean
    return kept.reshape(b, h // 2, w // 2, c, 2, 2).transpose(0, 3, 1, 4, 2, 5).reshape(given.shape)


@pytest.mark.parametrize(
    ("channels", "width", "code_width", "components"),
    [(3, 8, 5, 4), (3, 9, 5, 4), (3, 40, 5, 5), (1, 40, 9, 4)],
    ids=["half the channels", "an odd one left", "the code width", "all there is"],
)
@pytest.mark.parametrize("alone", [False, True])
@torch.no_grad()
def test_a_stage_starts_as_the_principal_components(channels, width, code_width, components, alone):
    encoder, decoder = stage(channels=channels, width=width, code_width=code_width, alone=alone)
    given = images_of(6, 8, 4, channels=channels) + 0.5
    start_linear(encoder, decoder, given)
    made = decoder(encoder(given)).numpy()
    np.testing.assert_allclose(made, projected(given.double().numpy(), components), atol=1e-4)


def test_every_channel_learns_from_there():
    encoder, decoder = stage(channels=3, width=9, code_width=4, alone=False)
    given = images_of(6, 8, 4)
    start_linear(encoder, decoder, given)
    for _ in range(2):  # what is left over of the channels is zero on one side: it learns there first
        parameters = [*encoder.parameters(), *decoder.parameters()]
        loss = (decoder(encoder(given)) - given).square().mean()
        gradients = torch.autograd.grad(loss, parameters)
        with torch.no_grad():
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter -= 0.01 * gradient
    for name, network, gradient in zip(
        [*dict(encoder.named_parameters()), *dict(decoder.named_parameters())], parameters, gradients, strict=True
    ):
        assert gradient.flatten(1).abs().amax(1).gt(0).all() if network.ndim > 1 else gradient.abs().gt(0).all(), name


@torch.no_grad()
def test_data_that_does_not_vary_starts_finite():
    encoder, decoder = stage(channels=1, width=8, code_width=4, alone=True)
    given = torch.full((3, 1, 2, 2), 0.25)
    start_linear(encoder, decoder, given)
    assert torch.allclose(decoder(encoder(given)), given)


@pytest.mark.parametrize(("code_width", "components"), [(5, 5), (12, 12), (15, 12)])
@torch.no_grad()
def test_a_principal_encoder_keeps_the_distances_that_its_components_do(code_width, components):
    given = images_of(6, 8, 4) + 0.5
    encoder = PrincipalEncoder(3, code_width)
    encoder.init_from_data(given)
    encoder.multiply(torch.tensor(3.0))
    kept = projected(given.double().numpy(), components).reshape(6, -1)
    apart = np.linalg.norm(kept[:, None] - kept, axis=-1)
    z_e = encoder(given)
    assert z_e.shape == (6, code_width, 4, 2)
    assert not z_e[:, components:].any()
    np.testing.assert_allclose(torch.cdist(z_e.flatten(1), z_e.flatten(1)).numpy(), 3 * apart, atol=1e-3)
    np.testing.assert_allclose(z_e.mean((0, 2, 3)), 0, atol=1e-5)


def principal_of(kind: type[HQA] = HQA, **more) -> HQA:
    torch.manual_seed(0)
    shape = {"height": 8, "width": 8, "image_channels": 1, "widths": (4, 4, 4), "code_width": 16, "codebook_size": 4}
    return kind(kind.config_class(**{**shape, "principal_encoders": True, "normalize": True, **more}))


@pytest.mark.parametrize("kind", [HQA, HAMs])
def test_a_stack_of_principal_encoders_keeps_distances_up_to_where_components_are_left_out(kind):
    """Of 64 pixels, 4 a patch, then 16: two layers of 16 components lose nothing, the third loses some; and training,
    which makes features longer or shorter, changes none of this."""
    images = images_of(40, 8, 8, channels=1)
    apart = torch.pdist(images.flatten(1))
    below = None
    for layers in (1, 2, 3):
        made = principal_of(kind, widths=(4,) * layers)
        if below is not None:
            made.build_on(below)
        made.init_from_data(images)
        top = made.layers[-1]
        before = {name: tensor.clone() for name, tensor in top.state_dict().items()}
        optimizer = torch.optim.Adam([p for p in made.parameters() if p.requires_grad], lr=0.01)
        for step in range(3):
            losses = made.train()(images, row_seeds(step, torch.arange(40)), torch.zeros(40)).losses
            optimizer.zero_grad()
            sum(losses.values()).backward()
            optimizer.step()
        moved = {name for name, tensor in top.state_dict().items() if not tensor.equal(before[name])}
        assert {"encoder.log_factor", "decoder.0.weight"} <= moved
        assert not {"encoder.axes", "encoder.shift"} & moved
        longer = torch.pdist(made.features(images).detach().flatten(1)) / apart
        spread = float((longer.max() - longer.min()) / longer.mean())
        assert spread < 1e-3 if layers < 3 else spread > 0.05
        below = made


@torch.no_grad()
def test_principal_encoders_start_as_widely_as_codewords(tmp_path):
    images = images_of(64, 8, 8, channels=1)
    tokenizer = principal_of(widths=(4,)).eval()
    tokenizer.init_from_data(images)
    vectors = tokenizer.features(images).transpose(0, 1).flatten(1)
    assert float(vectors.var(1).sum().sqrt()) == pytest.approx(START_LENGTH, rel=0.05)
    tokenizer.save(tmp_path / "kept")
    assert load(tmp_path / "kept", "tokenizer").features(images).equal(tokenizer.features(images))


@torch.no_grad()
def test_a_stage_that_sees_its_patch_alone_is_the_wide_one_where_there_is_nothing_else():
    """With the same weights at what both see, they agree on one position; on two, the wide one sees the neighbour."""
    few, many = (stage(channels=3, width=8, code_width=5, alone=alone) for alone in (True, False))
    for alone, wide in zip(few, many, strict=True):
        for mine, theirs in zip(alone.parameters(), wide.parameters(), strict=True):
            if mine.shape == theirs.shape:
                theirs.copy_(mine)
            else:
                lost = theirs.shape[-1] - mine.shape[-1]  # of a kernel's side
                theirs[:, :, lost // 2 : theirs.shape[2] - lost // 2, lost // 2 : theirs.shape[3] - lost // 2] = mine
    image, two = images_of(4, 2, 2), images_of(4, 2, 4)
    z_e = few[0](image)
    assert torch.allclose(z_e, many[0](image), atol=1e-6)
    assert torch.allclose(few[1](z_e), many[1](z_e), atol=1e-6)
    assert not torch.allclose(few[0](two), many[0](two), atol=1e-3)
    assert sum(one.numel() for one in few[1].parameters()) < sum(one.numel() for one in many[1].parameters()) / 3


@torch.no_grad()
def test_a_layer_of_one_code_an_image_starts_so_and_no_other():
    """Its loss starts far below that from random weights; HAMs' that predicts codes, and layers of more, do not."""
    images = images_of(256, 8, 8)
    small = {"height": 8, "width": 8, "widths": (8, 8, 32), "code_width": 16, "codebook_size": 32}

    def started(kind: type[HQA], config: HQAConfig) -> HQA:
        torch.manual_seed(0)
        made = kind(config)
        made.init_from_data(images)
        return made

    def loss(linear_start: bool) -> float:
        made = started(HQA, HQAConfig(**small, linear_start=linear_start, normalize=True))
        return float(made(images).losses["reconstruction"])

    assert loss(True) < 0.7 * loss(False)
    more = {**small, "widths": (8, 8)}
    for kind, config_class, shape in ((HQA, HQAConfig, more), (HAMs, HAMsConfig, small)):
        with_it, without = (started(kind, config_class(**shape, linear_start=chosen)) for chosen in (True, False))
        for mine, theirs in zip(with_it.parameters(), without.parameters(), strict=True):
            assert mine.equal(theirs)
