"""Scores against other libraries, brute force and closed forms; properties of the feature extractors."""

import itertools
import sys

import jaxtyping
import numpy as np
import pytest
import scipy.linalg
import scipy.special
import scipy.stats
import torch
import torchmetrics.functional.image as torchmetrics_image
from hypothesis import given, settings
from hypothesis import strategies as st
from torchmetrics.image.fid import _compute_fid
from torchmetrics.image.kid import poly_mmd

from smalti.core.errors import UserError
from smalti.images.decoding import to_float
from smalti.metrics.extractors import Inception, Lite0, find_extractor, moments
from smalti.metrics.frechet import (
    Moments,
    frechet_distance,
    inception_score,
    kernel_distance,
    nearest,
    precision_recall,
)
from smalti.metrics.image_errors import MOST_DECIBELS, diversity, masked_mse, mse, mse_of_pixels, psnr, seam_steps

SEEDS = st.integers(0, 999)


def draw(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def images(seed, *shape):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


@given(SEEDS, st.integers(2, 40), st.lists(st.integers(0, 40), max_size=4), st.sampled_from([0.0, 1e6]))
def test_moments_do_not_depend_on_batches(seed, rows, cuts, shift):
    """The moments equal those of numpy, also far from zero, where sums of squares would cancel."""
    features = draw(seed, rows, 5) + shift
    result = Moments(5)
    for batch in features.tensor_split(sorted(cuts)):
        result.update(batch)
    assert result.count == rows
    torch.testing.assert_close(result.mean, features.mean(0), rtol=1e-12, atol=1e-12)
    expected = torch.from_numpy(np.cov(features.numpy(), rowvar=False))
    torch.testing.assert_close(result.covariance, expected, rtol=1e-6, atol=1e-9)


def test_large_sets_are_converted_to_float64_in_parts(monkeypatch):
    """Copies of a whole set would need more memory than the set."""
    features, (pixels, others) = draw(0, 3000, 4).float(), torch.randint(256, (2, 300, 1, 4, 4), dtype=torch.uint8)
    expected = mse(to_float(pixels), to_float(others))
    sizes, double = [], torch.Tensor.double
    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "double", lambda self: (sizes.append(len(self)), double(self))[1])
        result, errors = Moments.of(features), mse_of_pixels(pixels, others)
    assert sizes == [1024, 1024, 952, 64, 64, 64, 64, 44]
    torch.testing.assert_close(result.mean, features.double().mean(0), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(result.covariance, torch.cov(features.double().T), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(errors, expected, rtol=1e-12, atol=0)


@settings(max_examples=30)
@given(SEEDS, st.integers(8, 60), st.integers(8, 60))
def test_frechet_distance_equals_torchmetrics_and_scipy(seed, n, m):
    mixing = draw(seed + 1, 6, 6)
    a, b = Moments(6).update(draw(seed, n, 6)), Moments(6).update(draw(seed + 2, m, 6) @ mixing + 0.5)
    distance = frechet_distance(a, b)
    root = scipy.linalg.sqrtm(a.covariance.numpy() @ b.covariance.numpy()).real
    by_scipy = float((a.mean - b.mean).square().sum() + (a.covariance + b.covariance).trace() - 2 * np.trace(root))
    assert distance == pytest.approx(by_scipy, rel=1e-6)
    assert distance == pytest.approx(float(_compute_fid(a.mean, a.covariance, b.mean, b.covariance)), rel=1e-6)
    assert distance == pytest.approx(frechet_distance(b, a), rel=1e-9)


def test_frechet_distance_with_fewer_images_than_features():
    """A shifted Gaussian has a distance in closed form, also with a singular covariance."""
    few = draw(0, 5, 64)
    distance = frechet_distance(Moments(64).update(few), Moments(64).update(few))
    assert distance == pytest.approx(0, abs=1e-4)  # the traces that cancel are about 64
    for seed in range(5):  # rounding alone makes some of these negative
        same = Moments.of(draw(seed, 20, 64))
        assert frechet_distance(same, same) >= 0
    shifted = frechet_distance(Moments(64).update(few), Moments(64).update(few + 0.5))
    assert shifted == pytest.approx(64 * 0.25, rel=1e-6)
    with pytest.raises(UserError, match="1 image"):
        frechet_distance(Moments(64).update(few[:1]), Moments(64).update(few))


@settings(max_examples=20)
@given(SEEDS, st.integers(1, 4))
def test_precision_and_recall_equal_brute_force(seed, k):
    real, generated = draw(seed, 14, 3), 0.6 * draw(seed + 1, 9, 3) + 0.3

    def inside(points, members):
        hits = 0
        for point in points:
            for index, member in enumerate(members):
                others = sorted(float((member - other).norm()) for i, other in enumerate(members) if i != index)
                if float((point - member).norm()) <= others[k - 1]:
                    hits += 1
                    break
        return hits / len(points)

    assert precision_recall(real, generated, neighbours=k) == (inside(generated, real), inside(real, generated))


def test_dropped_mode_lowers_recall_only():
    """Samples of one of two real modes have high precision and a recall of about one half."""
    modes = torch.tensor([[0.0, 0.0], [100.0, 0.0]]).double()
    real = torch.cat([draw(seed, 50, 2) + mode for seed, mode in enumerate(modes)])
    precision, recall = precision_recall(real, draw(5, 50, 2))
    assert precision > 0.9
    assert 0.4 < recall <= 0.5
    with pytest.raises(UserError, match="more than 3 images, not 3 and 100"):
        precision_recall(real, real[:3])


@given(SEEDS)
def test_nearest_neighbours_equal_brute_force(seed):
    queries, references = draw(seed, 7, 4), draw(seed + 1, 11, 4)
    distances, indices = nearest(queries, references)
    for query, distance, index in zip(queries, distances, indices, strict=True):
        expected = [float((query - reference).norm()) for reference in references]
        assert expected[index] == pytest.approx(min(expected))
        assert float(distance) == pytest.approx(min(expected))


@given(SEEDS, st.integers(2, 30), st.integers(1, 6))
def test_kernel_distance_equals_torchmetrics(seed, n, d):
    a, b = draw(seed, n, d), draw(seed + 1, n, d) * 2 + 0.3
    assert kernel_distance(a, b) == pytest.approx(float(poly_mmd(a, b)), rel=1e-9, abs=1e-9)


def test_kernel_distance_of_sets_of_different_sizes_equals_its_definition():
    a, b = draw(0, 5, 3), draw(1, 7, 3)

    def kernel(x, y):
        return (float(x @ y) / 3 + 1) ** 3

    within = [np.mean([kernel(x, y) for x, y in itertools.permutations(each, 2)]) for each in (a, b)]
    between = np.mean([kernel(x, y) for x, y in itertools.product(a, b)])
    assert kernel_distance(a, b) == pytest.approx(sum(within) - 2 * between, rel=1e-9)
    with pytest.raises(UserError, match="at least 2 images"):
        kernel_distance(a[:1], b)


@given(SEEDS, st.integers(1, 4), st.integers(4, 20))
def test_inception_score_equals_the_entropies_of_its_parts(seed, splits, n):
    """The mean KL divergence is the entropy of the mean minus the mean entropy; scipy computes them."""
    logits = draw(seed, n, 4)
    everything = scipy.special.softmax(logits.numpy(), axis=1)
    sizes = [(part + 1) * n // splits - part * n // splits for part in range(splits)]
    starts = np.cumsum([0, *sizes])
    expected = []
    for start, size in zip(starts[:-1], sizes, strict=True):
        p = everything[start : start + size]
        expected.append(np.exp(scipy.stats.entropy(p.mean(0)) - scipy.stats.entropy(p, axis=1).mean()))
    assert inception_score(logits, splits) == pytest.approx(np.mean(expected), rel=1e-9)
    with pytest.raises(UserError, match="at least 21 images"):
        inception_score(logits[:20], 21)


@given(SEEDS)
def test_pixel_errors_equal_torchmetrics(seed):
    a, b = images(seed, 3, 3, 6, 5), images(seed + 1, 3, 3, 6, 5)
    expected = [torchmetrics_image.peak_signal_noise_ratio(x, y, data_range=2.0) for x, y in zip(a, b, strict=True)]
    torch.testing.assert_close(psnr(mse(a, b)).float(), torch.stack(expected))
    mask = torch.ones(3, 6, 5, dtype=torch.bool)
    torch.testing.assert_close(masked_mse(a, b, mask), mse(a, b))
    assert psnr(mse(a, a)).tolist() == [MOST_DECIBELS] * 3


@given(SEEDS, st.floats(0, 1))
def test_seam_steps_equal_a_loop_over_pixels(seed, share):
    image = images(seed, 1, 3, 5, 4)
    mask = torch.rand(1, 5, 4, generator=torch.Generator().manual_seed(seed)) < share
    steps = []
    for (y, x), (v, u) in itertools.product(itertools.product(range(5), range(4)), repeat=2):
        if abs(y - v) + abs(x - u) == 1 and mask[0, y, x] and not mask[0, v, u]:
            steps.append(float((image[0, :, y, x] - image[0, :, v, u]).abs().mean()) / 2)
    assert float(seam_steps(image, mask)) == pytest.approx(sum(steps) / len(steps) if steps else 0, abs=1e-6)


@given(SEEDS, st.integers(2, 4))
def test_diversity_equals_the_mean_over_pairs_of_fills(seed, k):
    fills = images(seed, 2, k, 3, 4, 4)
    mask = torch.zeros(2, 4, 4, dtype=torch.bool)
    mask[:, 1:3, :2] = True
    pairs = list(itertools.combinations(range(k), 2))
    expected = torch.stack([masked_mse(fills[:, i], fills[:, j], mask) for i, j in pairs]).mean(0).sqrt()
    torch.testing.assert_close(diversity(fills, mask), expected)


@pytest.fixture(scope="module")
def lite0():
    return Lite0(torch.device("cpu"))


def test_lite0_features_do_not_depend_on_channels_or_batches(lite0):
    """A grey image and its copy in three channels have the same features, and rows of a batch do not mix."""
    pixels = torch.randint(256, (3, 1, 20, 30), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    together = lite0(pixels)
    assert together.shape == (3, 1280)
    torch.testing.assert_close(lite0(pixels.expand(-1, 3, -1, -1)), together)
    torch.testing.assert_close(lite0(pixels[1:2]), together[1:2], rtol=1e-4, atol=1e-4)
    both = moments(lite0, pixels.split(2))
    torch.testing.assert_close(both.mean.float(), together.mean(0), rtol=1e-4, atol=1e-4)
    assert lite0(pixels[:0]).shape == (0, 1280)


def test_lite0_has_trained_weights(lite0):
    """A plain grey is farther from a checkerboard than from a grey of nearly the same shade."""
    plain = torch.full((1, 3, 32, 32), 120, dtype=torch.uint8)
    board = ((torch.arange(32)[:, None] // 4 + torch.arange(32) // 4) % 2 * 255).to(torch.uint8).expand(1, 3, 32, 32)
    a, b, c = (lite0(image)[0] for image in (plain, plain + 4, board))
    assert float((a - c).norm()) > 5 * float((a - b).norm())


def test_missing_lite0_package_is_a_user_error(monkeypatch):
    monkeypatch.setitem(sys.modules, "efficientnet_lite_pytorch", None)
    with pytest.raises(UserError, match=r"lite0 is not installed; pip install -e '.\[metrics\]'"):
        Lite0(torch.device("cpu"))


def test_missing_torch_fidelity_is_a_user_error(monkeypatch):
    """The development environment does not include torch-fidelity, because it installs torchvision."""
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    with pytest.raises(UserError, match=r"pip install -e '.\[metrics\]' torch-fidelity .* or use --extractor lite0"):
        find_extractor("inception", torch.device("cpu"))


def test_inception_requests_2048_features_of_colour_images(monkeypatch):
    """A stand-in for the network of torchmetrics records its arguments."""
    arguments = []

    class Network(torch.nn.Module):
        def __init__(self, name, features_list, antialias):
            super().__init__()
            arguments.append((name, features_list, antialias))
            self.fc = torch.nn.Linear(2048, 3)

        def forward(self, x):
            assert (x.dtype, x.shape[1:]) == (torch.uint8, (3, 20, 24))
            return x.double().mean((1, 2, 3))[:, None].expand(-1, 2048)

    monkeypatch.setattr("torchmetrics.image.fid.NoTrainInceptionV3", Network)
    grey = torch.arange(70, dtype=torch.uint8)[:, None, None, None].expand(-1, 1, 20, 24)
    extractor = Inception(torch.device("cpu"))
    features = extractor(grey)
    assert extractor.logits(features).allclose(extractor._network.fc(features) - extractor._network.fc.bias, atol=1e-4)
    assert arguments == [("inception-v3-compat", ["2048"], False)]
    assert features.dtype == torch.float32
    assert features.equal(torch.arange(70.0)[:, None].expand(-1, 2048))


def test_errors_of_integer_pixels_are_refused_and_floats_of_unknown_range_too(monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # which checks types in tests alone
    pixels, mask = torch.full((1, 3, 4, 4), 200, dtype=torch.uint8), torch.eye(4)[None] > 0
    for error in (mse, lambda a, b: masked_mse(a, b, mask), lambda a, _: seam_steps(a, mask)):
        with pytest.raises(UserError, match=r"images are torch.uint8; give floats in \[-1, 1\]"):
            error(pixels, pixels)
    for wrong in (pixels.long(), pixels / 255):
        with pytest.raises(UserError, match=r"pixels are torch\..*; give torch\.uint8 from 0 to 255, or torch.int32"):
            to_float(wrong)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("score", [kernel_distance, nearest, precision_recall, lambda a, b: inception_score(b)])
def test_features_that_are_not_finite_are_refused(score, value):
    good, bad = draw(0, 30, 8), draw(1, 30, 8)
    bad[[7, 20], [3, 0]] = value
    message = r"features of 2 of 30 image\(s\) are not finite, first those of image 7 \(counted from 0\)"
    with pytest.raises(UserError, match=message):
        score(good, bad)
    with pytest.raises(UserError, match=r"of 1 of 10 image\(s\) are not finite, first those of image 20"):
        Moments.of(good[:20]).update(bad[20:])
