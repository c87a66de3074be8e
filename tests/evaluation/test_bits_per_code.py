"""Bits per code of held-out images, as `evaluate --of prior` scores them: given the class, found by its name."""

import math

import pytest
import torch
from helpers.toys import log_probs

from smalti.commands.class_labels import numbers_of
from smalti.evaluation.prior import _bits_per_code
from smalti.images.decoding import to_float
from smalti.priors.networks.pixelcnn import PixelCNN, PixelCNNConfig
from smalti.tokenizers.vq.hrvq import HRVQ, HRVQConfig


def conditional_prior(codes: int) -> PixelCNN:
    prior = PixelCNN(PixelCNNConfig(2, 2, (codes,), classes=2, model_width=8, layers=2)).eval()
    for parameter in prior.parameters():  # classes make no difference in a new prior
        parameter.data.normal_(0, 0.3)
    prior.provenance = {"label_names": ["cat", "dog"]}
    return prior


@torch.no_grad()
def test_bits_are_given_the_class_of_each_image():
    torch.manual_seed(0)
    tokenizer = HRVQ(HRVQConfig(height=4, width=4, widths=(8,), branching=5, depth=1)).eval()
    prior, images = conditional_prior(5), torch.randint(256, (6, 3, 4, 4), dtype=torch.uint8)
    labels = numbers_of(prior, torch.tensor([0, 1, 2, 1, -1, 2]), ("bird", "dog", "cat"))
    assert labels.tolist() == [-1, 1, 0, 1, -1, 0]
    scored = _bits_per_code([prior], tokenizer, images, [labels])["bits_per_code"]["model"]
    (codes,) = tokenizer.encode(to_float(images))
    log_p = [
        log_probs(prior.head, prior.features(grid[None], condition=label[None]))[0].gather(1, grid.flatten()[:, None])
        for grid, label in zip(codes, labels, strict=True)
    ]
    assert scored == pytest.approx(-float(torch.cat(log_p).mean()) / math.log(2), rel=1e-5)
    without = _bits_per_code([prior], tokenizer, images, [None])["bits_per_code"]["model"]
    assert abs(scored - without) > 0.01
