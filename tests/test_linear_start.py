"""The linear start of a stage: by numpy's principal components; and stages of one position, by those that see more."""

import numpy as np
import pytest
import torch
from torch import nn

from smalti.tokenizers import blocks
from smalti.tokenizers.hams import HAMs, HAMsConfig
from smalti.tokenizers.hqa import HQA
from smalti.tokenizers.hqa_stage import HQAConfig
from smalti.tokenizers.linear_start import start_linear


def images_of(b: int, h: int, w: int, channels: int = 3) -> torch.Tensor:
    return torch.rand(b, channels, h, w, generator=torch.Generator().manual_seed(1)) * 2 - 1


def stage(*, channels: int, width: int, code_width: int, alone: bool) -> tuple[nn.Sequential, nn.Sequential]:
    torch.manual_seed(0)
    shape = {"image_channels": channels, "widths": (width,), "residual_blocks": 2, "code_width": code_width}
    return blocks.encoder(**shape, alone=alone), blocks.decoder(**shape, alone=alone)


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
        made.start_from(images)
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
