"""Comparisons of two sets of images: equal to torch-fidelity's and torchmetrics' numbers with the same features."""

import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from helpers.toys import TINY
from PIL import Image

from smalti.core.errors import UserError
from smalti.core.models import class_of_kind
from smalti.core.randomness import Stream, generator_for
from smalti.evaluation import image_sets
from smalti.evaluation.config import EvaluationSettings, ImagesEvaluation, TokenizerEvaluation
from smalti.evaluation.image_sets import evaluate_images, write_samples
from smalti.evaluation.report import evaluate
from smalti.evaluation.sample_size import too_few_images
from smalti.images.decoding import to_float
from smalti.images.image_set import ImageRows, open_images
from smalti.images.reading import Reading
from smalti.metrics.extractors import Extractor
from smalti.metrics.image_errors import mse
from smalti.tokenizers.vqgan.perceptual import Lite0Distance

WIDTH, CLASSES = 5, 7
KERNELS = torch.randn(WIDTH, 3, 3, 3, generator=torch.Generator().manual_seed(0))
HEAD = torch.randn(WIDTH, CLASSES, generator=torch.Generator().manual_seed(1))


def random_features(colour: torch.Tensor) -> torch.Tensor:
    """Computes the features of a random network."""
    return torch.nn.functional.conv2d(colour.float() / 99, KERNELS).relu().mean((2, 3))


class Pixels(torch.utils.data.Dataset):
    """Images as torch-fidelity takes them."""

    def __init__(self, pixels: torch.Tensor) -> None:
        self.pixels = pixels

    def __len__(self):
        return len(self.pixels)

    def __getitem__(self, index):
        return self.pixels[index]


class Random(Extractor):
    """An extractor with random weights, which stands in for Inception, whose weights are a download."""

    name, width, size, resampling = "inception", WIDTH, 8, "none"

    def features(self, colour):
        return random_features(colour)

    def logits(self, features):
        return features @ HEAD


@pytest.fixture(autouse=True)
def extractor(monkeypatch):
    monkeypatch.setattr(image_sets, "find_extractor", lambda _name, device: Random(device))


@pytest.fixture
def folders(tmp_path):
    """Returns two folders of 24 and 30 images of 8x8 pixels, and their pixels."""
    rng, pixels = np.random.default_rng(0), {}
    for name, count, low in (("a", 24, 0), ("b", 30, 60)):
        pixels[name] = rng.integers(low, 256, (count, 8, 8, 3)).astype(np.uint8)
        (tmp_path / name).mkdir()
        for number, image in enumerate(pixels[name]):
            Image.fromarray(image).save(tmp_path / name / f"{number:02}.png")
    tensors = [torch.from_numpy(pixels[name]).permute(0, 3, 1, 2) for name in "ab"]
    return str(tmp_path / "a"), str(tmp_path / "b"), tensors


def score(images, reference, **settings):
    scores, conditions = evaluate_images(ImagesEvaluation(images, reference, **settings))
    return {name: values["images"] for name, values in scores.items()}, conditions


def import_torch_fidelity(monkeypatch):
    """Imports torch-fidelity with a stand-in for torchvision, of which it uses nothing for tensors."""
    if find_spec("torchvision") is None:
        modules = {name: ModuleType(name) for name in ("torchvision", "torchvision.datasets", "torchvision.transforms")}
        modules["torchvision.transforms.functional"] = ModuleType("torchvision.transforms.functional")
        for name, module in modules.items():
            monkeypatch.setitem(sys.modules, name, module)
        modules["torchvision.datasets"].__dict__.update(CIFAR10=object, STL10=object, CIFAR100=object)
        modules["torchvision"].__dict__.update(
            datasets=modules["torchvision.datasets"], transforms=modules["torchvision.transforms"]
        )
        modules["torchvision.transforms"].__dict__["functional"] = modules["torchvision.transforms.functional"]
    return pytest.importorskip("torch_fidelity")


def test_two_folders_score_as_torch_fidelity_scores_them(folders, monkeypatch):
    fidelity = import_torch_fidelity(monkeypatch)
    from torch_fidelity.feature_extractor_base import FeatureExtractorBase  # pyright: ignore[reportMissingImports]

    class Registered(FeatureExtractorBase):
        def __init__(self, name, features_list, **_):
            super().__init__(name, features_list)

        @staticmethod
        def get_provided_features_list():
            return "features", "logits"

        @staticmethod
        def get_default_feature_layer_for_metric(metric):
            return "logits" if metric == "isc" else "features"

        @staticmethod
        def can_be_compiled():
            return False

        def forward(self, input):
            outputs = {"features": (known := random_features(input)), "logits": known @ HEAD}
            return tuple(outputs[name] for name in self.features_list)

    fidelity.register_feature_extractor("random", Registered)
    a, b, (pixels, real) = folders
    order = torch.randperm(len(pixels), generator=generator_for(0, Stream.EVALUATION_HELD_OUT))
    expected = fidelity.calculate_metrics(
        **{"input1": Pixels(pixels[order]), "input2": Pixels(real), "feature_extractor": "random", "cuda": False},
        **{"fid": True, "kid": True, "prc": True, "isc": True, "samples_shuffle": False, "verbose": False},
        **{"kid_subset_size": 24, "kid_subsets": 400, "cache": False, "save_cpu_ram": True},
    )
    values, _ = score(a, b)
    names = {
        "frechet": "frechet_inception_distance",
        "inception_score": "inception_score_mean",
        "precision": "precision",
        "recall": "recall",
    }
    for name, theirs in names.items():
        assert values[name] == pytest.approx(expected[theirs], rel=1e-5), name
    error = expected["kernel_inception_distance_std"] / 400**0.5
    assert values["kernel_distance"] == pytest.approx(expected["kernel_inception_distance_mean"], abs=4 * error)


def test_a_result_is_not_replaced_by_that_of_another_reference(folders, tmp_path, monkeypatch):
    """Neither if the files of the reference changed, nor the statistics in a file of the same name."""
    monkeypatch.chdir(tmp_path)
    a, b, (_, real) = folders
    results = Path("runs/evaluations")
    for _ in range(2):
        evaluate(ImagesEvaluation(a, b))
    assert len([*results.iterdir()]) == 1
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(Path(b) / "00.png")
    evaluate(ImagesEvaluation(a, b))
    assert len([*results.iterdir()]) == 2
    features = random_features(real).double().numpy()
    for shift in (0, 0, 1):
        np.savez("stored.npz", mu=features.mean(0) + shift, sigma=np.cov(features, rowvar=False))
        evaluate(ImagesEvaluation(a, "stored.npz"))
    assert len([*results.iterdir()]) == 4


def test_inception_score_of_images_that_are_sorted_by_class(folders, tmp_path):
    """In the order of the folder each of the ten parts would have one image, and a score of 1."""
    colours = torch.randint(0, 256, (10, 3, 1, 1), generator=torch.Generator().manual_seed(0))
    for number, colour in enumerate(colours.repeat_interleave(4, 0)):
        image = colour.expand(3, 8, 8).permute(1, 2, 0).numpy().astype(np.uint8)
        (tmp_path / "sorted").mkdir(exist_ok=True)
        Image.fromarray(image).save(tmp_path / "sorted" / f"{number:02}.png")
    values, _ = score(str(tmp_path / "sorted"), folders[1])
    other, _ = score(str(tmp_path / "sorted"), folders[1], seed=1)
    assert values["inception_score"] > 1.01
    assert values["inception_score"] != other["inception_score"]
    assert values["frechet"] == other["frechet"]


def test_stored_statistics_score_as_their_images(folders, tmp_path):
    """In the format of pytorch-fid, and of ADM's reference batches, which also hold images."""
    a, b, (_, real) = folders
    features = random_features(real).double().numpy()
    statistics = {"mu": features.mean(0), "sigma": np.cov(features, rowvar=False)}
    expected, conditions = score(a, b)
    np.savez(tmp_path / "stats.npz", **statistics)
    values, stored = score(a, str(tmp_path / "stats.npz"))
    assert values == {name: pytest.approx(expected[name], rel=1e-6) for name in ("frechet", "inception_score")}
    assert too_few_images({"frechet": {}}, {**stored, "images": 99}) == []
    np.savez(tmp_path / "batch.npz", **statistics, arr_0=real.permute(0, 2, 3, 1).numpy())
    values, _ = score(a, str(tmp_path / "batch.npz"))
    assert values == pytest.approx(expected, rel=1e-6)
    assert conditions["reference_images"] == 30


def test_unsuitable_references_are_refused_in_one_line(folders, tmp_path):
    a, b, _ = folders
    np.savez(tmp_path / "other.npz", mu=np.zeros(3), sigma=np.eye(3))
    with pytest.raises(UserError, match=r"shapes \(3,\) and \(3, 3\), but the extractor has 5 features"):
        score(a, str(tmp_path / "other.npz"))
    (tmp_path / "cut.npz").write_bytes((tmp_path / "other.npz").read_bytes()[:-30])
    with pytest.raises(UserError, match="cannot be read"):
        score(a, str(tmp_path / "cut.npz"))
    with pytest.raises(
        UserError, match=r"nothing at .*none\.npz; give a \.npz file with statistics \(mu and sigma\) or"
    ):
        score(a, str(tmp_path / "none.npz"))
    np.savez(tmp_path / "nan.npz", mu=np.full(5, np.nan), sigma=np.eye(5))
    with pytest.raises(UserError, match="not finite"):
        score(a, str(tmp_path / "nan.npz"))
    Image.new("RGB", (9, 8)).save(f"{b}/wide.png")
    with pytest.raises(UserError, match=r"differ in size \(54 of 8x8, 1 of 9x8\).* give images of one size"):
        score(a, b)
    assert score(a, b, height=8, width=8)[1]["reference_images"] == 31


def test_reconstructions_are_written_and_scored_by_a_perceptual_distance(folders, tmp_path, monkeypatch):
    """The scores are those of the written reconstructions; the distance, the mean over all of them."""
    monkeypatch.undo()
    torch.manual_seed(0)
    config = replace(TINY["hrvq"], height=16, width=16)
    class_of_kind("tokenizer", "hrvq")(config).save(tmp_path / "tokenizer")
    protocol = EvaluationSettings(folders[0], reading=Reading(held_out="0.5", limit=16))
    evaluation = TokenizerEvaluation(
        tokenizer=str(tmp_path / "tokenizer"),
        protocol=protocol,
        perceptual="lite0",
        samples_npz=tmp_path / "rebuilt.npz",
        out=tmp_path / "result.json",
    )
    scores = evaluate(evaluation)
    opened = open_images(folders[0], height=16, width=16, held_out="0.5", limit=16)
    images = ImageRows(opened, split="held_out", flips=False)
    rebuilt = torch.from_numpy(np.load(tmp_path / "rebuilt.npz")["arr_0"]).permute(0, 3, 1, 2)
    originals = images.__getitems__(range(len(images)))["images"]
    assert len(rebuilt) == len(originals)
    distance = Lite0Distance()
    each = [distance(to_float(a[None]), to_float(b[None])) for a, b in zip(rebuilt, originals, strict=True)]
    assert scores["perceptual_lite0"]["model"] == pytest.approx(float(torch.stack(each).mean()), rel=1e-4)
    assert scores["mse"]["model"] == pytest.approx(float(mse(to_float(rebuilt), to_float(originals)).mean()))
    with pytest.raises(UserError, match=r"rebuilt\.npz exists and this command did not make it"):
        evaluate(evaluation)
    class_of_kind("tokenizer", "hrvq")(TINY["hrvq"]).save(tmp_path / "small")
    small = replace(evaluation, tokenizer=str(tmp_path / "small"), samples_npz=None, out=tmp_path / "small.json")
    with pytest.raises(UserError, match="8x12 are too small for a perceptual distance; leave --perceptual out"):
        evaluate(small)


def test_written_samples_are_read_by_numpy_and_score_as_their_images(folders, tmp_path):
    a, b, (pixels, _) = folders
    write_samples(tmp_path / "samples.npz", pixels)
    array = np.load(tmp_path / "samples.npz")["arr_0"]
    assert array.dtype == np.uint8
    assert torch.equal(torch.from_numpy(array), pixels.permute(0, 2, 3, 1))
    assert score(str(tmp_path / "samples.npz"), b)[0] == pytest.approx(score(a, b)[0])
    write_samples(tmp_path / "grey.npz", pixels[:, :1])
    assert np.load(tmp_path / "grey.npz")["arr_0"].shape == (24, 8, 8, 3)
