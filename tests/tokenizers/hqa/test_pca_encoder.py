"""PCA encoders and the PCA initialization of learned ones, against numpy's singular value decomposition.

Also compares convolutional stages whose positions depend on their own patch only with ordinary ones.
"""

import numpy as np
import pytest
import torch
from torch import nn

from smalti.core.models import load
from smalti.core.randomness import row_seeds
from smalti.tokenizers.hqa.hams import HAMs, HAMsConfig
from smalti.tokenizers.hqa.hqa import HQA
from smalti.tokenizers.hqa.layer import HQAConfig
from smalti.tokenizers.hqa.pca_encoder import PCAEncoder, init_linear
from smalti.tokenizers.layers import conv
from smalti.tokenizers.quantizers.stochastic import START_LENGTH


def images_of(b: int, h: int, w: int, channels: int = 3) -> torch.Tensor:
    return torch.rand(b, channels, h, w, generator=torch.Generator().manual_seed(1)) * 2 - 1


def stage(*, channels: int, width: int, code_width: int, alone: bool) -> tuple[nn.Sequential, nn.Sequential]:
    torch.manual_seed(0)
    shape = {"image_channels": channels, "widths": (width,), "residual_blocks": 2, "code_width": code_width}
    return conv.encoder(**shape, alone=alone), conv.decoder(**shape, alone=alone)


def projected(inputs: np.ndarray, components: int) -> np.ndarray:
    """Projects the 2x2 patches of `inputs` onto their first principal components, and back."""
    b, c, h, w = inputs.shape
    patches = inputs.reshape(b, c, h // 2, 2, w // 2, 2).transpose(0, 2, 4, 1, 3, 5).reshape(-1, 4 * c)
    mean = patches.mean(0)
    _, _, axes = np.linalg.svd(patches - mean, full_matrices=False)
    kept = (patches - mean) @ axes[:components].T @ axes[:components] + mean
    return kept.reshape(b, h // 2, w // 2, c, 2, 2).transpose(0, 3, 1, 4, 2, 5).reshape(inputs.shape)


@pytest.mark.parametrize(
    ("channels", "width", "code_width", "components"),
    [(3, 8, 5, 4), (3, 9, 5, 4), (3, 40, 5, 5), (1, 40, 9, 4)],
    ids=["half the channels", "odd number of channels", "code width", "all components"],
)
@pytest.mark.parametrize("alone", [False, True])
@torch.no_grad()
def test_linear_start_reconstructs_principal_components(channels, width, code_width, components, alone):
    encoder, decoder = stage(channels=channels, width=width, code_width=code_width, alone=alone)
    inputs = images_of(6, 8, 4, channels=channels) + 0.5
    init_linear(encoder, decoder, inputs)
    reconstructed = decoder(encoder(inputs)).numpy()
    np.testing.assert_allclose(reconstructed, projected(inputs.double().numpy(), components), atol=1e-4)


def test_every_channel_has_gradients_after_linear_start():
    encoder, decoder = stage(channels=3, width=9, code_width=4, alone=False)
    inputs = images_of(6, 8, 4)
    init_linear(encoder, decoder, inputs)
    for _ in range(2):  # weights from left-over channels start at zero, so weights into them get gradients a step later
        parameters = [*encoder.parameters(), *decoder.parameters()]
        loss = (decoder(encoder(inputs)) - inputs).square().mean()
        gradients = torch.autograd.grad(loss, parameters)
        with torch.no_grad():
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter -= 0.01 * gradient
    for name, network, gradient in zip(
        [*dict(encoder.named_parameters()), *dict(decoder.named_parameters())], parameters, gradients, strict=True
    ):
        assert gradient.flatten(1).abs().amax(1).gt(0).all() if network.ndim > 1 else gradient.abs().gt(0).all(), name


@torch.no_grad()
def test_linear_start_from_constant_data_is_finite():
    encoder, decoder = stage(channels=1, width=8, code_width=4, alone=True)
    inputs = torch.full((3, 1, 2, 2), 0.25)
    init_linear(encoder, decoder, inputs)
    assert torch.allclose(decoder(encoder(inputs)), inputs)


@pytest.mark.parametrize(("code_width", "components"), [(5, 5), (12, 12), (15, 12)])
@torch.no_grad()
def test_pca_encoder_keeps_distances_between_projections(code_width, components):
    inputs = images_of(6, 8, 4) + 0.5
    encoder = PCAEncoder(3, code_width)
    encoder.init_from_data(inputs)
    encoder.multiply(torch.tensor(3.0))
    projections = projected(inputs.double().numpy(), components).reshape(6, -1)
    distances = np.linalg.norm(projections[:, None] - projections, axis=-1)
    z_e = encoder(inputs)
    assert z_e.shape == (6, code_width, 4, 2)
    assert not z_e[:, components:].any()
    np.testing.assert_allclose(torch.cdist(z_e.flatten(1), z_e.flatten(1)).numpy(), 3 * distances, atol=1e-3)
    np.testing.assert_allclose(z_e.mean((0, 2, 3)), 0, atol=1e-5)


def pca_hqa(kind: type[HQA] = HQA, **more) -> HQA:
    torch.manual_seed(0)
    shape = {"height": 8, "width": 8, "image_channels": 1, "widths": (4, 4, 4), "code_width": 16, "codebook_size": 4}
    return kind(kind.config_class(**{**shape, "principal_encoders": True, "normalize": True, **more}))


@pytest.mark.parametrize("kind", [HQA, HAMs])
def test_stacked_pca_encoders_keep_distances_until_components_are_left_out(kind):
    """Two layers of 16 components keep all of the 64 pixels, the third leaves some out; training does not change this.

    Training changes only the scale of the features.
    """
    images = images_of(40, 8, 8, channels=1)
    distances = torch.pdist(images.flatten(1))
    below = None
    for layers in (1, 2, 3):
        tokenizer = pca_hqa(kind, widths=(4,) * layers)
        if below is not None:
            tokenizer.build_on(below)
        tokenizer.init_from_data(images)
        top = tokenizer.layers[-1]
        before = {name: tensor.clone() for name, tensor in top.state_dict().items()}
        optimizer = torch.optim.Adam([p for p in tokenizer.parameters() if p.requires_grad], lr=0.01)
        for step in range(3):
            losses = tokenizer.train()(images, row_seeds(step, torch.arange(40)), torch.zeros(40)).losses
            optimizer.zero_grad()
            sum(losses.values()).backward()
            optimizer.step()
        moved = {name for name, tensor in top.state_dict().items() if not tensor.equal(before[name])}
        assert {"encoder.log_factor", "decoder.0.weight"} <= moved
        assert not {"encoder.axes", "encoder.shift"} & moved
        ratios = torch.pdist(tokenizer.features(images).detach().flatten(1)) / distances
        spread = float((ratios.max() - ratios.min()) / ratios.mean())
        assert spread < 1e-3 if layers < 3 else spread > 0.05
        below = tokenizer


@torch.no_grad()
def test_pca_features_are_spread_as_widely_as_codewords_and_are_saved(tmp_path):
    images = images_of(64, 8, 8, channels=1)
    tokenizer = pca_hqa(widths=(4,)).eval()
    tokenizer.init_from_data(images)
    vectors = tokenizer.features(images).transpose(0, 1).flatten(1)
    assert float(vectors.var(1).sum().sqrt()) == pytest.approx(START_LENGTH, rel=0.05)
    tokenizer.save(tmp_path / "saved")
    assert load(tmp_path / "saved", "tokenizer").features(images).equal(tokenizer.features(images))


@torch.no_grad()
def test_patchwise_stage_equals_ordinary_stage_on_a_single_patch():
    """With equal inner weights they agree on one position; on two, the ordinary stage depends on the neighbour."""
    patchwise, ordinary = (stage(channels=3, width=8, code_width=5, alone=alone) for alone in (True, False))
    for small, large in zip(patchwise, ordinary, strict=True):
        for inner, weight in zip(small.parameters(), large.parameters(), strict=True):
            if inner.shape == weight.shape:
                weight.copy_(inner)
            else:
                margin = (weight.shape[-1] - inner.shape[-1]) // 2  # between the kernels' sides
                weight[:, :, margin : weight.shape[2] - margin, margin : weight.shape[3] - margin] = inner
    one, two = images_of(4, 2, 2), images_of(4, 2, 4)
    z_e = patchwise[0](one)
    assert torch.allclose(z_e, ordinary[0](one), atol=1e-6)
    assert torch.allclose(patchwise[1](z_e), ordinary[1](z_e), atol=1e-6)
    assert not torch.allclose(patchwise[0](two), ordinary[0](two), atol=1e-3)
    sizes = [sum(weight.numel() for weight in decoder.parameters()) for _, decoder in (patchwise, ordinary)]
    assert sizes[0] < sizes[1] / 3


@torch.no_grad()
def test_linear_start_applies_only_to_layers_of_one_code_that_reconstruct_features():
    """It lowers such a layer's first loss; layers of several codes, and HAMs' that predict codes, ignore it."""
    images = images_of(256, 8, 8)
    small = {"height": 8, "width": 8, "widths": (8, 8, 32), "code_width": 16, "codebook_size": 32}

    def initialized(kind: type[HQA], config: HQAConfig) -> HQA:
        torch.manual_seed(0)
        tokenizer = kind(config)
        tokenizer.init_from_data(images)
        return tokenizer

    def loss(linear_start: bool) -> float:
        tokenizer = initialized(HQA, HQAConfig(**small, linear_start=linear_start, normalize=True))
        return float(tokenizer(images).losses["reconstruction"])

    assert loss(True) < 0.7 * loss(False)
    more = {**small, "widths": (8, 8)}
    for kind, config_class, shape in ((HQA, HQAConfig, more), (HAMs, HAMsConfig, small)):
        on, off = (initialized(kind, config_class(**shape, linear_start=value)) for value in (True, False))
        for weight, other in zip(on.parameters(), off.parameters(), strict=True):
            assert weight.equal(other)
