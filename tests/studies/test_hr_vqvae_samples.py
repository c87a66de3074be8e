"""Table 3 of HR-VQVAE's paper, tiny: which priors are trained, what is measured of their samples, what is written."""

import json
import sys
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from helpers.image_toys import write_patches
from PIL import Image

from smalti import load
from smalti.core.randomness import Stream, choose
from smalti.evaluation.code_likelihood import count_bits
from smalti.images.decoding import to_float, to_uint8
from smalti.images.image_set import ImageRows
from smalti.latentsets.reader import LatentSet
from smalti.metrics.extractors import Extractor
from smalti.metrics.frechet import Moments, frechet_distance
from smalti.priors.methods.sundae import SundaeSampling
from smalti.priors.networks.hourglass import Hourglass
from smalti.scripts import reproduce as command
from smalti.studies.hr_vqvae import samples, samples_report, study
from smalti.studies.hr_vqvae.samples_report import order
from smalti.studies.hr_vqvae.study import open_data

FLAGS = "--images img --parts distances samples heads --seeds 1 --steps 1 --batch-size 4 --channels 4 --code-width 3 "
FLAGS += "--num 8 --reference 1000 --usage-images 8 --prior-steps 2 --prior-batch-size 4 "
FLAGS += "--pixelcnn-width 8 --hourglass-width 8"
SHARED = "1steps-seed0-grid8-batch_size4-channels4-code_width3"
BUDGET = "8wide-2steps-batch4"


class Means(Extractor):
    """Mean of each quarter of the image."""

    name, width, size, resampling = "lite0", 4, 2, "mean"

    def features(self, colour):
        return colour[:, 0].float().unflatten(2, (2, -1)).unflatten(1, (2, -1)).mean((2, 4)).flatten(1)


@dataclass(frozen=True)
class Short(SundaeSampling):
    """A few repairs, in the place of a hundred."""

    steps: int = 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A whole study of codebooks of 8 leaves, in a folder of its own, which is the current one."""
    folder = tmp_path_factory.mktemp("study")
    write_patches(folder / "img", 120)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(study, "LEAVES", 8)
        patch.setattr(samples_report, "LEAVES", 8)
        patch.setattr(samples, "AT_ONCE", 4)
        patch.setattr(Hourglass, "method", replace(Hourglass.method, sampling=Short))
        patch.setattr(samples, "find_extractor", lambda _name, device: Means(device))
        study(patch)
        yield folder


def study(patch):
    AcceleratorState._reset_state(reset_partial_state=True)
    patch.setattr(sys, "argv", ["reproduce.py", "hr-vqvae", *FLAGS.split()])
    command.main()


def work(folder, kind, depth=1):
    return folder / "runs/reproductions/mnist" / f"{kind}-8-depth{depth}-best-{SHARED}"


def read(path):
    return json.loads(path.read_text())


def test_distances_are_of_the_samples_that_were_drawn(folder):
    extractor = Means(torch.device("cpu"))
    config = study.Reproduce("hr-vqvae", "img")
    rows = {side: ImageRows(open_data(config), split=side, flips=False) for side in ("train", "held_out")}
    pixels = {side: of.__getitems__(range(len(of)))["images"] for side, of in rows.items()}
    assert len(pixels["held_out"]) > 8

    def distance(images):
        of_made, of_real = (Moments(4).update(extractor(each)) for each in (images, pixels["train"]))
        return pytest.approx(frechet_distance(of_made, of_real), rel=1e-5)

    for kind, depth in (("vqvae", 1), ("vqvae2", 1), ("hrvq", 3)):
        for prior in ("pixelcnn", "hourglass"):
            of = work(folder, kind, depth) / f"{prior}-{BUDGET}"
            samples = torch.load(of / "samples.pt", weights_only=True)
            assert samples.shape == (8, 1, 32, 32)
            assert len(samples.flatten(1).unique(dim=0)) > 1
            found = read(of / "sampled-lite0-8-of-1000.json")
            assert found["frechet"] == distance(samples)
            assert 0 < found["seconds"] < 60
            levels = [load(of / f"level-{level}", "prior") for level in range(3 if kind == "vqvae2" else 1)]
            assert found["parameters"] == sum(p.numel() for level in levels for p in level.parameters())
            assert all(level.classes == 0 for level in levels)
    floor = read(folder / "runs/reproductions/mnist/real-lite0-8-of-1000.json")
    assert floor["num"] == 8
    assert floor["frechet"] < found["frechet"]


def test_distances_of_reconstructions_are_those_of_what_comes_back(folder):
    extractor, config = Means(torch.device("cpu")), study.Reproduce("hr-vqvae", "img")
    rows = {side: ImageRows(open_data(config), split=side, flips=False) for side in ("train", "held_out")}
    of = folder / "runs/reproductions/mnist" / f"hrvq-8-depth3-plain-{SHARED.replace('-grid8', '')}"
    tokenizer = load(of, "tokenizer")
    chosen = choose(len(rows["held_out"]), 8, 0, Stream.EVALUATION_HELD_OUT)
    images = to_float(rows["held_out"].__getitems__(chosen)["images"])
    with torch.no_grad():
        back = to_uint8(tokenizer.decode(tokenizer.encode(images)))
    real = rows["train"].__getitems__(range(len(rows["train"])))["images"]
    expected = frechet_distance(*(Moments(4).update(extractor(each)) for each in (back, real)))
    found = read(of / "reconstructed-lite0-8-of-1000.json")["frechet"]
    assert found == pytest.approx(expected, rel=1e-3)
    text = (folder / "docs/reproductions/hr-vqvae.md").read_text()
    (row,) = [line for line in text.splitlines() if line.startswith("| HR-VQVAE | 6.1 |")]
    assert f"| {found:.1f} |" in row


def test_bits_of_an_image_are_those_of_all_its_levels(folder):
    of = work(folder, "vqvae2")
    priors = [load(of / f"pixelcnn-{BUDGET}" / f"level-{level}", "prior") for level in range(3)]
    assert [(prior.level.height, prior.upper_levels) for prior in priors] == [(2, 0), (4, 1), (8, 2)]
    found = count_bits(priors, LatentSet(of / "latents.h5"))
    told = read(of / f"pixelcnn-{BUDGET}" / "bits.json")
    assert told["per_image"] == pytest.approx(np.dot(found.per_code, (4, 16, 64)))
    assert told["rows"] == found.rows


def test_both_heads_learn_the_same_numbers(folder):
    of = work(folder, "hrvq", 3)
    digits, flat = (LatentSet(of / name) for name in ("latents.h5", "latents-flat.h5"))
    assert [one.layout.levels[0].radices for one in (digits, flat)] == [(2, 2, 2), (8,)]
    rows = torch.arange(len(digits))
    assert torch.equal(digits.batch(rows)[0], flat.batch(rows)[0])
    assert torch.equal(digits.held_out, flat.held_out)
    told = [read(of / f"pixelcnn{which}-{BUDGET}" / "bits.json")["per_code"][0] for which in ("", "-flat")]
    prior = load(of / f"pixelcnn-flat-{BUDGET}" / "level-0", "prior")
    assert told[1] == pytest.approx(count_bits([prior], flat).per_code[0])
    assert f"| {told[1] - told[0]:+.4f} |" in (folder / "docs/reproductions/hr-vqvae.md").read_text()


def test_the_report_has_the_papers_numbers_and_ours(folder):
    text = (folder / "docs/reproductions/hr-vqvae.md").read_text()
    (row,) = [line for line in text.splitlines() if line.startswith("| HR-VQVAE | 1 | 11.75 |")]
    assert f"| {read(work(folder, 'hrvq', 3) / study.RESULT_NAME)['mse']:.5f} |" in row
    for prior in ("pixelcnn", "hourglass"):
        found = read(work(folder, "hrvq", 3) / f"{prior}-{BUDGET}" / "sampled-lite0-8-of-1000.json")
        assert f"| {found['frechet']:.1f} |" in row
        assert f"| {found['parameters']:,} |" in row
    assert "The paper's order is HR-VQVAE < VQ-VAE-2 < VQ-VAE." in text
    assert "not run" not in text
    assert Image.open(folder / "docs/reproductions/hr-vqvae-mnist-samples.png").height > 6 * 100


def test_a_finished_study_trains_and_measures_nothing_again(folder):
    def kept():
        return {path: path.stat().st_mtime_ns for path in folder.glob("runs/**/*") if path.is_file()}

    before = kept()
    with pytest.MonkeyPatch.context() as patch:
        study(patch)
    assert kept() == before


def test_the_order_is_judged_seed_by_seed():
    said = order({"vqvae": [9.0, 9.5], "vqvae2": [5.0, 6.0], "hrvq": [4.0, 5.5]})
    assert said.startswith("HR-VQVAE < VQ-VAE-2 < VQ-VAE, by the means: confirmed")
    assert "HR-VQVAE is below VQ-VAE-2 in 2 of 2 seed(s), less apart than the seeds are;" in said
    assert said.endswith("VQ-VAE-2 is below VQ-VAE in 2 of 2 seed(s).")
    said = order({"vqvae": [5.0, 6.0], "vqvae2": [9.0], "hrvq": [7.0]})
    assert said.startswith("VQ-VAE < HR-VQVAE < VQ-VAE-2, by the means: refuted")
    assert said.endswith("VQ-VAE-2 is below VQ-VAE in 0 of 1 seed(s).")
    assert order({"vqvae": [1.0], "vqvae2": [], "hrvq": [1.0]}) == "not run."
