"""Perceptual distances against their formulas: Lite0's, and LPIPS's with a stand-in for its optional packages.

If lpips and torchvision are installed, LPIPS is also compared with lpips itself on a random VGG. The perceptual loss in
training is tested in test_losses.py.
"""

import hashlib
import sys
from collections import OrderedDict
from dataclasses import replace
from types import ModuleType, SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from helpers import toys
from torch import nn

from smalti import VQGAN, UserError
from smalti.metrics.extractors import Lite0
from smalti.tokenizers.vqgan.perceptual import TAPS, Lite0Distance, VGGDistance, check_size, find_perceptual

SHIFT, SCALE = 0.1, 0.5  # input scaling of the stand-in; lpips has one per channel


def two_images(seed=0, h=32, w=32):
    return torch.rand(2, 2, 3, h, w, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def test_lite0_distance_equals_its_formula_on_the_networks_features():
    """Records the features of blocks by hooks while the network computes its own features."""
    images, others = two_images()
    distance, network, recorded = find_perceptual("lite0"), Lite0(torch.device("cpu"))._network, []
    assert isinstance(distance, Lite0Distance)
    for tap in TAPS:
        network._blocks[tap].register_forward_hook(lambda _module, _inputs, features: recorded.append(features))
    for batch in (images, others):
        network.extract_features(((batch + 1) * 127.5 - 127) / 128)
    assert [features.shape[2] for features in recorded[: len(TAPS)]] == [16, 8, 4, 2]
    pairs = zip(recorded[: len(TAPS)], recorded[len(TAPS) :], strict=True)
    expected = torch.stack([2 - 2 * F.cosine_similarity(a, b, dim=1).mean() for a, b in pairs]).mean()
    torch.testing.assert_close(distance(images, others), expected, rtol=1e-4, atol=1e-5)
    assert float(distance(images, images)) == 0
    assert_gradients_reach_both(distance)
    assert not any(parameter.requires_grad for parameter in distance._network.parameters())


def assert_gradients_reach_both(distance):
    """Uses grey images, which count as three equal channels."""
    images, others = (batch[:, :1].clone().requires_grad_() for batch in two_images(1))
    value = distance(images, others)
    torch.testing.assert_close(value, distance(images.repeat(1, 3, 1, 1), others.repeat(1, 3, 1, 1)))
    value.backward()
    assert images.grad.abs().sum() > 0
    assert others.grad.abs().sum() > 0


def test_distance_of_many_channels_is_that_of_the_visible_ones():
    pytest.importorskip("efficientnet_lite_pytorch")
    distance, batches = Lite0Distance(), torch.rand(2, 2, 5, 16, 16) * 2 - 1
    assert float(distance(*batches)) == float(distance(*batches[:, :, :3]))
    assert float(distance(*batches[:, :, :2])) == float(distance(*batches[:, :, :1]))


def test_small_images_are_refused():
    check_size(16, 20, "leave it out")
    with pytest.raises(UserError, match="images of 15x20 are too small for a perceptual distance; leave it out"):
        check_size(15, 20, "leave it out")


class Trunk(nn.Module):
    """Stand-in for lpips' VGG: slices whose layers keep VGG's numbers, two instead of five."""

    def __init__(self):
        super().__init__()
        self.slice1 = nn.Sequential(OrderedDict({"0": nn.Conv2d(3, 4, 3, padding=1), "1": nn.ReLU()}))
        self.slice2 = nn.Sequential(
            OrderedDict({"2": nn.MaxPool2d(2), "3": nn.Conv2d(4, 5, 3, padding=1), "4": nn.ReLU()})
        )

    def forward(self, x):
        first = self.slice1(x)
        return first, self.slice2(first)


class FakeLPIPS(nn.Module):
    def __init__(self, net, pnet_rand, verbose):
        assert (net, pnet_rand, verbose) == ("vgg", True, False)
        super().__init__()
        self.net, self.scaling_layer = Trunk(), lambda x: (x - SHIFT) / SCALE
        self.lins = nn.ModuleList(nn.Sequential(nn.Dropout(), nn.Conv2d(width, 1, 1, bias=False)) for width in (4, 5))
        for number, weighted in enumerate(self.lins, start=1):
            nn.init.constant_(weighted[1].weight, number / 8)

    def forward(self, images, others):
        pairs = zip(self.lins, *(self.net(self.scaling_layer(batch)) for batch in (images, others)), strict=True)
        scales = [weighted((F.normalize(a) - F.normalize(b)).square()) for weighted, a, b in pairs]
        return torch.stack([scale.mean((1, 2, 3)) for scale in scales]).sum(0).view(-1, 1, 1, 1)


@pytest.fixture
def vgg(monkeypatch, tmp_path):
    """Replaces lpips and torchvision by stand-ins; returns the weights and the path of their file, not yet written."""
    generator = torch.Generator().manual_seed(0)
    shapes = {name.partition(".")[2]: tensor.shape for name, tensor in Trunk().state_dict().items()}
    weights = {f"features.{name}": torch.randn(shape, generator=generator) * 0.3 for name, shape in shapes.items()}
    torch.save({**weights, "classifier.0.weight": torch.zeros(1)}, tmp_path / "saved")
    digest = hashlib.sha256((tmp_path / "saved").read_bytes()).hexdigest()[:8]
    file = tmp_path / f"vgg16-{digest}.pth"
    models = SimpleNamespace(VGG16_Weights=SimpleNamespace(IMAGENET1K_V1=SimpleNamespace(url=file.as_uri())))
    for name, contents in {
        "lpips": {"LPIPS": FakeLPIPS},
        "torchvision": {},
        "torchvision.models": vars(models),
    }.items():
        module = ModuleType(name)
        vars(module).update(contents)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    return SimpleNamespace(file=file, weights=weights, saved=(tmp_path / "saved").read_bytes())


def by_hand(weights, images, others):
    """Computes the stand-in's LPIPS in float64."""
    scales = []
    for batch in (images, others):
        w = {name.removeprefix("features."): tensor.double() for name, tensor in weights.items()}
        first = F.conv2d((batch.double() - SHIFT) / SCALE, w["0.weight"], w["0.bias"], padding=1).relu()
        second = F.conv2d(F.max_pool2d(first, 2), w["3.weight"], w["3.bias"], padding=1).relu()
        scales.append([x / (x.square().sum(1, keepdim=True).sqrt() + 1e-10) for x in (first, second)])
    pairs = zip((1, 2), *scales, strict=True)
    return sum(number / 8 * (a - b).square().sum(1).mean() for number, a, b in pairs).float()


def test_lpips_equals_its_formula_in_float32_with_downloaded_weights(vgg):
    vgg.file.write_bytes(vgg.saved)
    distance, (images, others) = find_perceptual("lpips-vgg"), two_images()
    vgg.file.unlink()
    VGGDistance()  # weights are downloaded only once
    torch.testing.assert_close(distance(images, others), by_hand(vgg.weights, images, others))
    assert float(distance(images, images)) == 0
    assert_gradients_reach_both(distance)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(distance(images, others), by_hand(vgg.weights, images, others))
        assert distance(images.bfloat16(), others).dtype == torch.float32
    assert not any(parameter.requires_grad for parameter in distance._network.parameters())
    assert not distance._network.training  # in training mode there would be dropout


def test_perceptual_network_is_neither_trained_nor_saved(vgg):
    vgg.file.write_bytes(vgg.saved)
    torch.manual_seed(1)
    model = VQGAN(replace(toys.TINY["vqgan"], height=16, width=20, perceptual="lpips-vgg", perceptual_weight=3.0))
    generator, _ = model.phases(toys.CONFIG)
    objective = generator.objective
    batch = {"images": torch.randint(256, (2, 3, 16, 20), dtype=torch.uint8), "seeds": torch.arange(2)}
    loss, terms = objective(batch)
    images = batch["images"] / 127.5 - 1
    expected = 3 * by_hand(vgg.weights, model(images).reconstruction.detach(), images)
    torch.testing.assert_close(terms["perceptual"], expected)
    loss.backward()
    ours = {id(parameter) for parameter in model.parameters()}
    assert {id(parameter) for parameter in objective.parameters()} == ours
    assert {id(each) for group in generator.optimizer.param_groups for each in group["params"]} == ours
    assert set(objective.state_dict()) == {"steps", "weight", *(f"tokenizer.{name}" for name in model.state_dict())}


def refusal():
    with pytest.raises(UserError) as caught:
        find_perceptual("lpips-vgg")
    assert "\n" not in str(caught.value)
    assert str(caught.value).endswith("or use --perceptual lite0")
    return str(caught.value)


def test_missing_packages_and_weights_are_one_line_errors(vgg, monkeypatch, tmp_path):
    message = refusal()
    assert "the weights of VGG-16 cannot be downloaded" in message
    assert f"or put {vgg.file.as_uri()} into {tmp_path / 'home' / 'hub'}/checkpoints" in message
    vgg.file.write_bytes(vgg.saved[:-9])  # a broken download
    assert "invalid hash value" in refusal()
    monkeypatch.delitem(sys.modules, "torchvision.models")
    assert "needs lpips and a torchvision that fits torch" in refusal()
    monkeypatch.setitem(sys.modules, "lpips", None)
    assert "pip install -e '.[lpips]'" in refusal()
    monkeypatch.delitem(sys.modules, "lpips")
    (tmp_path / "lpips.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')")
    monkeypatch.syspath_prepend(tmp_path)
    assert "operator torchvision::nms does not exist" in refusal()


@pytest.fixture(scope="module")
def real():
    """Returns our distance and lpips' own on the same random VGG, if both packages are installed."""
    lpips = pytest.importorskip("lpips")
    vgg16 = pytest.importorskip("torchvision").models.vgg16
    torch.manual_seed(0)
    network = vgg16(weights=None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.hub, "load_state_dict_from_url", lambda *_, **__: network.state_dict())
        ours = VGGDistance()
        patch.setattr(lpips.pretrained_networks.tv, "vgg16", lambda **_: network)
        return ours, lpips.LPIPS(net="vgg", verbose=False)


@pytest.mark.parametrize("size", [(16, 16), (32, 40)])
def test_lpips_equals_the_lpips_package(real, size):
    ours, theirs = real
    images, others = (batch.requires_grad_() for batch in two_images(h=size[0], w=size[1]))
    value, expected = ours(images, others), theirs(images, others).mean()
    assert value > 0
    torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-7)
    pairs = zip(*(torch.autograd.grad(each, (images, others)) for each in (value, expected)), strict=True)
    for gradient, their_gradient in pairs:
        torch.testing.assert_close(gradient, their_gradient, rtol=1e-3, atol=1e-8)


def test_training_on_grey_images_lowers_lpips(real, monkeypatch):
    ours, _ = real
    monkeypatch.setattr("smalti.tokenizers.vqgan.losses.find_perceptual", {"lpips-vgg": ours}.get)
    torch.manual_seed(1)
    config = replace(toys.TINY["vqgan"], height=16, width=16, image_channels=1, adversarial_weight=0.0)
    (only,) = VQGAN(replace(config, perceptual="lpips-vgg", perceptual_weight=1.0)).phases(toys.CONFIG)
    batch = {"images": torch.randint(256, (4, 1, 16, 16), dtype=torch.uint8), "seeds": torch.arange(4)}
    distances = []
    for _ in range(6):
        loss, terms = only.objective(batch)
        loss.backward()
        only.optimizer.step()
        only.objective.zero_grad()
        distances.append(float(terms["perceptual"]))
    assert 0 < distances[-1] < distances[0]
