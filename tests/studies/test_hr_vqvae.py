"""The study of HR-VQVAE, tiny: which tokenizers and priors it trains, what is measured of them, and that it resumes."""

import json
import sys
from dataclasses import asdict, dataclass, replace

import numpy as np
import pytest
import torch
from helpers.image_toys import write_patches
from PIL import Image

from smalti.core.devices import resolve
from smalti.core.models import load
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
from smalti.studies.hr_vqvae import depth, report, samples, samples_report, settings, size, study
from smalti.studies.hr_vqvae.samples import PriorSpec
from smalti.studies.hr_vqvae.samples_report import order
from smalti.studies.hr_vqvae.settings import ReproduceHRVQVAE
from smalti.studies.hr_vqvae.study import (
    RESULT_NAME,
    TokenizerSpec,
    features,
    model_of,
    open_data,
    result,
    specs_by_part,
    trained,
    trial_of,
    usage_images_of,
)
from smalti.training.run_folder import OtherSettingsError

FLAGS = "--images img --seeds 1 --steps 1 --size-steps 1 --curve-steps 1 --batch-size 4 --channels 4 --code-width 3 "
FLAGS += "--num 8 --reference 1000 --usage-images 8 --prior-steps 2 --prior-batch-size 4 --pixelcnn-width 8 "
FLAGS += "--hourglass-width 8"
SHARED = "1steps-seed0-batch_size4-channels4-code_width3"
SHARED_GRID_8 = "1steps-seed0-grid8-batch_size4-channels4-code_width3"
BUDGET = "8wide-2steps-batch4"


class Means(Extractor):
    """Mean of each quarter of the image."""

    name, width, size, resampling = "lite0", 4, 2, "mean"

    def features(self, colour):
        return colour[:, 0].float().unflatten(2, (2, -1)).unflatten(1, (2, -1)).mean((2, 4)).flatten(1)


@dataclass(frozen=True)
class Short(SundaeSampling):
    """A few denoising steps instead of a hundred."""

    steps: int = 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with the whole study, of codebooks of 8 leaves; it is the current folder.

    The parts have the same sizes, so that they share most of their tokenizers.
    """
    folder = tmp_path_factory.mktemp("study")
    write_patches(folder / "img", 120)
    small = {"LEAVES": 8, "DEPTHS": (1, 3), "LEVELS": (2, 3), "DEPTH_LEAVES": 8, "SIZES": (8, 8)}
    small |= {"CODES_OF_IMAGES": 8, "SEARCH_BLOCK": 4, "SAMPLES_AT_ONCE": 4}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for module in (study, report, depth, size, samples, samples_report):
            for name in small.keys() & vars(module).keys():
                patch.setattr(module, name, small[name])
        patch.setattr(Hourglass, "method", replace(Hourglass.method, sampling=Short))
        patch.setattr(samples, "find_extractor", lambda _name, device: Means(device))
        run_study(patch)
        yield folder


def run_study(patch):
    patch.setattr(sys, "argv", ["reproduce.py", "hr-vqvae", *FLAGS.split()])
    command.main()


def config_of(**changes) -> ReproduceHRVQVAE:
    settings = {"study": "hr-vqvae", "images": "img", "seeds": 1, "steps": 1, "size_steps": 1, "curve_steps": (1,)}
    settings |= {"usage_images": 8, "batch_size": 4, "channels": 4, "code_width": 3}
    return ReproduceHRVQVAE(**{**settings, **changes})


def kept_times(folder):
    return {path: path.stat().st_mtime_ns for path in folder.glob("runs/**/*") if path.is_file()}


def generating_folder(folder, kind, depth=1):
    return folder / "runs/reproductions/mnist" / f"{kind}-8-depth{depth}-best-{SHARED_GRID_8}"


def read(path):
    return json.loads(path.read_text())


def images_of_split(split):
    rows = ImageRows(open_data(config_of()), split=split, flips=False)
    return rows.__getitems__(range(len(rows)))["images"]


def frechet(pixels):
    extractor = Means(torch.device("cpu"))
    moments = (Moments(4).update(extractor(each)) for each in (pixels, images_of_split("train")))
    return frechet_distance(*moments)


def report_row(folder, start):
    lines = (folder / "docs/reproductions/hr-vqvae.md").read_text().splitlines()
    (row,) = [line for line in lines if line.startswith(start)]
    return row


def test_every_tokenizer_is_trained_and_its_mse_is_that_of_its_model(folder):
    paths = folder.glob(f"runs/reproductions/mnist/*/{RESULT_NAME}")
    results = {path.parent.name: (path, read(path)) for path in paths}
    expected = {trial_of(s, config_of()).folder.name: s for specs in specs_by_part(config_of()).values() for s in specs}
    assert results.keys() == expected.keys()
    # Methods, which the sizes, depth 3 and level 3 share; depth 1; level 2; priors; the curve.
    assert len(results) == 3 * 2 + 2 + 2 + 3 + 1
    batch = to_float(images_of_split("held_out"))
    for name in (f"hrvq-8-depth3-best-{SHARED}", f"vqvae2-8-depth1-plain-{SHARED}"):
        path, measured = results[name]
        assert measured["cell"] == asdict(expected[name])
        tokenizer = load(path.parent, "tokenizer")
        error = ((tokenizer.decode(tokenizer.encode(batch)) - batch) / 2).square().mean().item()
        assert measured["mse"] == pytest.approx(error, rel=1e-4)
        assert len(measured["used"]) == len(tokenizer.layout.levels)


def test_plain_training_changes_only_the_codebook_settings():
    for kind in ("hrvq", "vqvae", "vqvae2"):
        plain, best = (asdict(model_of(TokenizerSpec(kind, plain, 1, 8), config_of())) for plain in (True, False))
        changed = {name for name in plain if plain[name] != best[name]}
        assert changed == {"codebook_learning", "revive_below", "codebook_init"}
        assert plain["codebook_init"] == "uniform"
        other = asdict(model_of(TokenizerSpec(kind, True, 1, 8, start="scaled"), config_of()))
        assert other == plain | {"codebook_init": "scaled"}
    deep = model_of(TokenizerSpec("hrvq", False, 1, leaves=64, depth=6), config_of())
    assert (deep.depth, deep.branching) == (6, 2)


@torch.no_grad()
def test_rows_of_the_first_figure_decode_sums_of_single_layers(folder):
    tokenizer = load(folder / f"runs/reproductions/mnist/hrvq-8-depth3-best-{SHARED}", "tokenizer")
    batch = to_float(images_of_split("held_out"))[:3]
    (codes,), books = tokenizer.encode(batch), [book.flatten(0, 1) for book in tokenizer.quantizer.codebooks]
    layers = [books[0][codes // 4], books[1][codes // 2], books[2][codes]]
    expected = {"1 to 3": (0, 3), "1 to 2": (0, 2), "1": (0, 1), "2 to 3": (1, 3), "3": (2, 3)}
    rows = report.layer_rows(tokenizer, batch)
    names = [f"HR-VQVAE, layer{'s' if ' ' in name else ''} {name}" for name in expected]
    assert list(rows) == names
    for row, (first, end) in zip(rows.values(), expected.values(), strict=True):
        decoded = tokenizer.decoder(sum(layers[first:end]).movedim(-1, 1)).clamp(-1, 1)
        torch.testing.assert_close(row, decoded)


@pytest.mark.parametrize(("part", "rows"), [("depth", 1 + 2 * 2), ("size", 1 + 3 * 2)])  # the original, models, 2 ways
def test_reconstructions_show_every_model(folder, part, rows):
    assert f"(hr-vqvae-mnist-{part}-reconstructions.png)" in (folder / "docs/reproductions/hr-vqvae.md").read_text()
    picture = Image.open(folder / f"docs/reproductions/hr-vqvae-mnist-{part}-reconstructions.png")
    layers = Image.open(folder / "docs/reproductions/hr-vqvae-mnist-layers.png")
    assert picture.width == layers.width
    assert picture.height * 9 == pytest.approx(layers.height * rows, rel=0.05)


def test_finished_study_trains_and_measures_nothing_again(folder):
    before = kept_times(folder)
    with pytest.MonkeyPatch.context() as patch:
        run_study(patch)
    assert kept_times(folder) == before


def test_another_number_of_usage_images_is_measured_again_but_not_trained_again(folder):
    """A result from before the number was kept counts as one of the default number."""
    config, (spec, *_) = config_of(usage_images=7), specs_by_part(config_of())["depth"]
    assert spec.depth == 1
    path = trial_of(spec, config).folder / RESULT_NAME
    before, weights = read(path), path.with_name("model.safetensors").stat().st_mtime_ns
    assert result(spec, config) is None
    trained(spec, config, open_data(config))
    assert result(spec, config)["train_seconds"] == before["train_seconds"]
    assert result(spec, config_of()) is None
    assert path.with_name("model.safetensors").stat().st_mtime_ns == weights
    path.write_text(json.dumps({name: value for name, value in before.items() if name != "usage_images"}))
    default = ReproduceHRVQVAE.usage_images
    assert result(spec, config_of(usage_images=default))["perplexity"] == before["perplexity"]
    path.write_text(json.dumps(before))


def test_seconds_of_a_training_are_those_of_all_its_sessions(folder):
    spec = specs_by_part(config_of())["methods"][0]
    path = trial_of(spec, config_of()).folder / RESULT_NAME
    metrics, result_before = path.with_name("metrics.jsonl"), path.read_text()
    lines = metrics.read_text()
    slow = [json.loads(line) | {"rows_per_second": 0.01} for line in lines.splitlines()]
    metrics.write_text("".join(f"{json.dumps(line)}\n" for line in slow))
    path.unlink()
    trained(spec, config_of(), open_data(config_of()))
    assert read(path)["train_seconds"] == pytest.approx(4 / 0.01)  # one step of four rows
    path.write_text(result_before)
    metrics.write_text(lines)


def test_results_of_other_images_or_another_precision_are_not_reported(folder):
    write_patches(folder / "other", 100)
    other_precision = "fp32" if resolve("auto") == "bf16" else "bf16"
    for changes, problem in (
        ({"images": "other"}, "images with the fingerprint .+, not images"),
        ({"precision": other_precision}, "with --precision .+, not --precision"),
    ):
        config = config_of(parts=("methods",), out=folder / "other.md", **changes)
        spec = PriorSpec(specs_by_part(replace(config, parts=("samples",)))["samples"][0], "pixelcnn")
        with pytest.raises(OtherSettingsError, match=problem):
            report.reproduce_hr_vqvae(config)
        images, evaluator = open_data(config), samples.evaluator_of(config)
        with pytest.raises(OtherSettingsError, match=problem):
            samples.sample_scores(spec, config, images, evaluator)
        with pytest.raises(OtherSettingsError, match=problem):
            samples.reconstruction_scores(spec.tokenizer, config, images, evaluator)
        with pytest.raises(OtherSettingsError, match=problem):
            samples.code_bits(spec, config, images)
        assert not config.out.exists()


def test_real_images_of_another_set_are_measured_anew(folder):
    write_patches(folder / "more", 110)
    config = config_of(generating=settings.Generating(num=8, reference=1000))
    config = replace(config, work=folder / "real")
    for source in ("img", "more"):
        other = replace(config, images=source)
        samples.real_scores(other, open_data(other), samples.evaluator_of(other))
    assert len([*folder.glob("real/mnist/real-*.json")]) == 2


def test_codes_of_large_flat_codebooks_are_counted_over_fewer_images(folder):
    flat, linked = (TokenizerSpec("hrvq", False, 1, leaves=64, depth=depth) for depth in (1, 3))
    assert (usage_images_of(flat, config_of()), usage_images_of(linked, config_of())) == (1, 8)


def test_default_settings_are_not_in_folder_names():
    spec = TokenizerSpec("hrvq", False, 600, 512, 3)
    name = trial_of(spec, ReproduceHRVQVAE("hr-vqvae", "img")).folder.name
    assert name == "hrvq-512-depth3-best-600steps-seed0"


@torch.no_grad()
def test_searched_vectors_have_the_codes_of_the_tokenizer(folder):
    tokenizer = load(folder / f"runs/reproductions/mnist/vqvae2-8-depth1-best-{SHARED}", "tokenizer")
    batch = torch.rand(2, 1, 32, 32) * 2 - 1
    codes = [quantizer.encode(z_e) for quantizer, z_e in features(tokenizer, batch)]
    assert all(a.equal(b) for a, b in zip(codes, tokenizer.encode(batch), strict=True))


def test_sample_scores_are_those_of_the_kept_samples(folder):
    assert len(images_of_split("held_out")) > 8
    for kind, layers in (("vqvae", 1), ("vqvae2", 1), ("hrvq", 3)):
        for prior in ("pixelcnn", "hourglass"):
            path = generating_folder(folder, kind, layers) / f"{prior}-{BUDGET}"
            images = torch.load(path / "samples.pt", weights_only=True)
            assert images.shape == (8, 1, 32, 32)
            assert len(images.flatten(1).unique(dim=0)) > 1
            scores = read(path / "sampled-lite0-8-of-1000.json")
            assert scores["frechet"] == pytest.approx(frechet(images), rel=1e-5)
            assert 0 < scores["seconds"] < 60
            levels = [load(path / f"level-{level}", "prior") for level in range(3 if kind == "vqvae2" else 1)]
            assert scores["parameters"] == sum(p.numel() for level in levels for p in level.parameters())
            assert all(level.classes == 0 for level in levels)
    (real,) = map(read, folder.glob("runs/reproductions/mnist/real-lite0-8-of-1000-*.json"))
    assert real["num"] == 8
    assert real["frechet"] < scores["frechet"]


def test_reconstruction_scores_are_those_of_the_held_out_images_decoded(folder):
    path = folder / "runs/reproductions/mnist" / f"hrvq-8-depth3-plain-{SHARED}"
    tokenizer, pixels = load(path, "tokenizer"), images_of_split("held_out")
    images = to_float(pixels[choose(len(pixels), 8, 0, Stream.EVALUATION_HELD_OUT)])
    with torch.no_grad():
        reconstructions = to_uint8(tokenizer.decode(tokenizer.encode(images)))
    distance = read(path / "reconstructed-lite0-8-of-1000.json")["frechet"]
    assert distance == pytest.approx(frechet(reconstructions), rel=1e-3)
    assert f"| {distance:.1f} |" in report_row(folder, "| HR-VQVAE | 6.1 |")


def test_bits_of_an_image_are_the_sum_over_its_levels(folder):
    path = generating_folder(folder, "vqvae2")
    priors = [load(path / f"pixelcnn-{BUDGET}" / f"level-{level}", "prior") for level in range(3)]
    assert [(prior.level.height, prior.upper_levels) for prior in priors] == [(2, 0), (4, 1), (8, 2)]
    expected = count_bits(priors, LatentSet(path / "latents.h5"))
    bits = read(path / f"pixelcnn-{BUDGET}" / "bits.json")
    assert bits["per_image"] == pytest.approx(np.dot(expected.per_code, (4, 16, 64)))
    assert bits["rows"] == expected.rows


def test_both_heads_learn_the_same_codes(folder):
    path = generating_folder(folder, "hrvq", 3)
    digits, flat = (LatentSet(path / name) for name in ("latents.h5", "latents-flat.h5"))
    assert [latents.layout.levels[0].radices for latents in (digits, flat)] == [(2, 2, 2), (8,)]
    rows = torch.arange(len(digits))
    assert torch.equal(digits.batch(rows)[0], flat.batch(rows)[0])
    assert torch.equal(digits.held_out, flat.held_out)
    prior = load(path / f"pixelcnn-flat-{BUDGET}" / "level-0", "prior")
    bits = [read(path / f"pixelcnn{head}-{BUDGET}" / "bits.json")["per_code"][0] for head in ("", "-flat")]
    assert bits[1] == pytest.approx(count_bits([prior], flat).per_code[0])
    assert f"| {bits[1] - bits[0]:+.4f} |" in (folder / "docs/reproductions/hr-vqvae.md").read_text()


def test_report_has_every_part_with_measured_numbers(folder):
    text = (folder / "docs/reproductions/hr-vqvae.md").read_text()
    assert text.count("<!-- measured: mnist ") == 11
    assert "not run" not in text
    tokenizer = read(folder / "runs/reproductions/mnist" / f"hrvq-8-depth3-best-{SHARED}" / RESULT_NAME)
    assert f"| {tokenizer['mse']:.6f} |" in report_row(folder, "| HR-VQVAE | 0.00011 | 0.27 |")
    path = generating_folder(folder, "hrvq", 3)
    row = report_row(folder, "| HR-VQVAE | 1 | 11.75 |")
    scores = [read(path / f"{prior}-{BUDGET}" / "sampled-lite0-8-of-1000.json") for prior in ("pixelcnn", "hourglass")]
    assert all(f"| {each['frechet']:.1f} |" in row and f"| {each['parameters']:,} |" in row for each in scores)
    for name in ("layers", "depth", "size", "samples", "curve"):
        assert f"(hr-vqvae-mnist-{name}.png)" in text
        assert Image.open(folder / f"docs/reproductions/hr-vqvae-mnist-{name}.png").width > 100


def test_order_is_compared_with_the_papers_seed_by_seed():
    verdict = order({"vqvae": [9.0, 9.5], "vqvae2": [5.0, 6.0], "hrvq": [4.0, 5.5]})
    assert verdict.startswith("HR-VQVAE < VQ-VAE-2 < VQ-VAE, by the means: confirmed")
    assert "HR-VQVAE is below VQ-VAE-2 in 2 of 2 seed(s), less apart than the seeds are;" in verdict
    assert verdict.endswith("VQ-VAE-2 is below VQ-VAE in 2 of 2 seed(s).")
    verdict = order({"vqvae": [5.0, 6.0], "vqvae2": [9.0], "hrvq": [7.0]})
    assert verdict.startswith("VQ-VAE < HR-VQVAE < VQ-VAE-2, by the means: refuted")
    assert verdict.endswith("VQ-VAE-2 is below VQ-VAE in 0 of 1 seed(s).")
    assert order({"vqvae": [1.0], "vqvae2": [], "hrvq": [1.0]}) == "not run."
