"""Evaluations of tiny untrained models: scores equal those computed by other means, and repeat exactly."""

import io
import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.command_toys import run, save_pair
from helpers.image_toys import Projections
from PIL import Image, ImageFilter
from skimage.metrics import structural_similarity

from smalti.commands.model_paths import load_prior, load_tokenizer
from smalti.evaluation import real_images, report
from smalti.evaluation import tokenizer as tokenizer_evaluation
from smalti.evaluation.scores import SPEEDS
from smalti.images.decoding import to_float, to_uint8
from smalti.images.image_set import ImageRows, open_images
from smalti.images.sheets import GAP
from smalti.metrics.baselines import telea_is_installed
from smalti.metrics.extractors import Lite0
from smalti.metrics.frechet import Moments, frechet_distance
from smalti.metrics.image_errors import mse
from smalti.scripts import evaluate

QUICK = ["--images", "img", "--num", "50", "--reference", "12", "--precision", "fp32"]
FILLS = ["--candidates", "2", "--fills", "2", "--no-match-colour"]


@pytest.fixture(scope="module", autouse=True)
def folder(tmp_path_factory):
    """Changes to a folder with a prior `pair` and 80 images of 16x8 pixels."""
    patch = pytest.MonkeyPatch()
    for module in (real_images, tokenizer_evaluation):  # Lite0's features take most of an evaluation's time
        patch.setattr(module, "find_extractor", lambda _, device: Projections(device))
    folder = tmp_path_factory.mktemp("evaluate")
    save_pair(folder / "pair")
    (folder / "img").mkdir()
    random = np.random.default_rng(0)
    for index in range(80):
        coarse = random.integers(0, 256, (2, 4, 3)).astype(np.uint8)
        Image.fromarray(coarse).resize((16, 8)).save(folder / "img" / f"{index}.png")
    before = Path.cwd()
    os.chdir(folder)
    yield folder
    os.chdir(before)
    patch.undo()


@pytest.fixture(scope="module")
def results(folder):
    """Maps kinds of evaluations to the JSON of their results."""
    for of in ("tokenizer", "prior", "inpainting"):
        flags = {
            "tokenizer": ["--tokenizer", "pair/tokenizer"],
            "prior": ["--prior", "pair", "--steps", "2"],
            "inpainting": ["--prior", "pair", "--steps", "2", *FILLS],
        }[of]
        sys.argv = ["evaluate.py", "--of", of, *flags, *QUICK, "--out", f"{of}.json"]
        evaluate.main()
    return {of: json.loads(Path(f"{of}.json").read_text()) for of in ("tokenizer", "prior", "inpainting")}


def held_out():
    rows = ImageRows(open_images("img", height=8, width=16), split="held_out", flips=False)
    return rows.__getitems__(range(len(rows)))["images"]


def test_tokenizer_scores_equal_those_of_its_reconstructions(results):
    """All held-out images are reconstructed and scored here, with SSIM by scikit-image."""
    scores, images = results["tokenizer"]["scores"], held_out()
    assert results["tokenizer"]["conditions"]["images"] == len(images) > 5
    tokenizer = load_tokenizer("pair/tokenizer")
    codes = tokenizer.encode(to_float(images))
    reconstructions = to_uint8(tokenizer.decode(codes))
    assert scores["mse"]["model"] == pytest.approx(float(mse(to_float(reconstructions), to_float(images)).mean()))
    assert scores["codes_used"]["model"] == len(codes[0].unique()) / 9
    extractor = Projections(torch.device("cpu"))
    a, b = (Moments(extractor.width).update(extractor(each)) for each in (reconstructions, images))
    assert scores["frechet_to_originals"]["model"] == pytest.approx(frechet_distance(a, b), rel=1e-4)
    pairs = zip(reconstructions.permute(0, 2, 3, 1).numpy(), images.permute(0, 2, 3, 1).numpy(), strict=True)
    expected = np.mean([structural_similarity(x, y, channel_axis=2, data_range=255) for x, y in pairs])
    assert scores["ssim"]["model"] == pytest.approx(expected)
    assert scores["psnr_db"]["model"] < 30
    assert scores["images_per_second"]["model"] > 0


def test_result_holds_the_floor_of_real_images(results):
    """The floor is the distance of held-out images to training images; untrained models score worse.

    Fills keep most of the image, so that they can be as near as real images.
    """
    rows = ImageRows(open_images("img", height=8, width=16), split="train", flips=False)
    extractor = Projections(torch.device("cpu"))
    floors = {of: result["scores"]["frechet"]["real"] for of, result in results.items()}
    assert len({f"{floor:.6g}" for floor in floors.values()}) == 1  # the same images in every evaluation
    for of, result in results.items():
        least = 0.99 if of == "inpainting" else 1
        assert result["scores"]["frechet"]["model"] > least * result["scores"]["frechet"]["real"] > 0
        assert result["conditions"]["reference_images"] == 12
        assert result["conditions"]["extractor"] == "lite0"
    training = rows.__getitems__(range(len(rows)))["images"]
    distances = [
        frechet_distance(Moments(48).update(extractor(held_out())), Moments(48).update(extractor(training[block])))
        for block in (slice(0, 12), slice(12, 24))
    ]
    assert min(distances) / 2 < floors["prior"] < 2 * max(distances)  # the reference set is another 12 of them


def test_prior_scores_of_noise_are_worse_than_the_floor(results, folder):
    scores = results["prior"]["scores"]
    for name in ("precision", "recall", "share_too_near"):
        assert set(scores[name]) == {"model", "real"}
        assert all(0 <= value <= 1 for value in scores[name].values())
    assert scores["precision"]["model"] < scores["precision"]["real"]
    assert scores["nearest_training_image"]["model"] > scores["nearest_training_image"]["real"]
    assert 0 < scores["share_too_near"]["real"] < 0.2
    assert scores["share_too_near"]["model"] == 0  # noise is near no image
    assert Image.open(folder / "prior-neighbours.png").size[0] == len(held_out()) * (96 + 2 * GAP)
    assert results["prior"]["conditions"]["prior_digests"] == [load_prior("pair").digest()]


def test_fills_are_compared_with_originals_and_baselines(results):
    scores = results["inpainting"]["scores"]
    installed = {"telea"} if telea_is_installed() else set()
    assert set(scores["frechet"]) == {"model", "real", "mean_colour", "biharmonic", *installed}
    assert scores["mse_in_mask"]["real"] == 0
    assert scores["seam_steps_to_real"]["real"] == 1
    assert scores["mse_in_mask_best_of_2"]["model"] < scores["mse_in_mask"]["model"]
    assert scores["mse_in_mask"]["biharmonic"] < scores["mse_in_mask"]["mean_colour"]  # the images are smooth
    assert scores["seam_steps"]["biharmonic"] < scores["seam_steps"]["mean_colour"]
    assert scores["diversity"]["model"] > 0
    assert 0.1 < results["inpainting"]["conditions"]["share_masked"] < 0.4


def test_fills_of_plain_images_have_no_relative_seam(results, folder, capfd):
    (folder / "plain").mkdir()
    for index in range(80):
        Image.new("RGB", (16, 8), (index, 3 * index, 90)).save(folder / "plain" / f"{index}.png")
    flags = ["--of", "inpainting", "--prior", "pair", "--steps", "2", *FILLS, *QUICK, "--images", "plain"]
    assert run(capfd, evaluate.main, *flags, "--out", "plain.json")[0] == 0
    scores = json.loads(Path("plain.json").read_text())["scores"]
    assert scores["seam_steps"]["real"] == 0
    assert "seam_steps_to_real" not in scores


@pytest.mark.parametrize("of", ["tokenizer", "prior", "inpainting"])
def test_repeated_evaluation_gives_the_same_scores(results, capfd, of):
    status, out, _ = run(capfd, evaluate.main, "--again", f"{of}.json", "--out", f"again-{of}.json")
    assert status == 0
    assert f"the same as {of}.json, except for speeds" in out
    again = json.loads(Path(f"again-{of}.json").read_text())
    assert {k: v for k, v in again["scores"].items() if k not in SPEEDS} == {
        k: v for k, v in results[of]["scores"].items() if k not in SPEEDS
    }
    lines = out.splitlines()
    columns = {column: None for values in results[of]["scores"].values() for column in values}
    assert [cell.strip() for cell in lines[0].split("|")[1:-1]] == ["score", *columns]
    shown = {line.split("|")[1].strip(): line.split("|")[2].strip() for line in lines[2:] if line.startswith("|")}
    assert shown == {name: f"{values['model']:.4g}" for name, values in again["scores"].items()}
    assert "extractor lite0" in out
    assert (again["settings"], again["conditions"]) == (results[of]["settings"], results[of]["conditions"])


def test_repeated_evaluation_leaves_the_samples_of_the_result_as_they_are(results, capfd):
    result = json.loads(Path("prior.json").read_text())
    result["settings"]["samples_npz"] = "kept.npz"
    Path("with-samples.json").write_text(json.dumps(result))
    Path("kept.npz").write_bytes(b"samples")
    for more in ([], ["--out", "again-with-samples.json"]):
        status, out, err = run(capfd, evaluate.main, "--again", "with-samples.json", *more)
        assert (status, "the same as with-samples.json" in out) == (0, True), err
    assert Path("kept.npz").read_bytes() == b"samples"


def test_repeated_evaluation_lists_what_changed(results, capfd):
    changed = json.loads(Path("tokenizer.json").read_text())
    changed["scores"]["mse"]["model"] = 0.5
    changed["conditions"]["tokenizer_digest"] = "another"
    Path("changed.json").write_text(json.dumps(changed))
    status, out, _ = run(capfd, evaluate.main, "--again", "changed.json")
    assert status == 0
    assert "tokenizer_digest was another, is" in out
    assert "mse of model was 0.5, is 0." in out
    assert "the same as" not in out


def test_too_few_images_are_warned_about_with_the_number_needed(results, capfd):
    """The 80 images of this file are far too few for every score that has a minimum."""
    for of, names in (("tokenizer", "frechet_to_originals, frechet"), ("prior", "frechet"), ("inpainting", "frechet")):
        warnings, images = results[of]["warnings"], results[of]["conditions"]["images"]
        assert warnings[-1] == (
            f"{names} of {images} images and 12 reference images {'are' if ',' in names else 'is'} unreliable; at "
            "least 48 are needed (--num and --reference, or more --images)"
        )
    assert results["prior"]["warnings"][0].startswith("precision, recall of")
    assert "at least 1000 are needed" in results["prior"]["warnings"][0]
    assert results["prior"]["warnings"][1].startswith("share_too_near of")
    shown = report.table(results["prior"]["scores"], results["prior"]["conditions"])
    assert [line for line in shown.splitlines() if line.startswith("warning: ")] == [
        f"warning: {warning}" for warning in results["prior"]["warnings"]
    ]


def trained_on(folder, **provenance):
    """Saves the pair with a record of its training images."""
    save_pair(folder)
    for part in (folder, folder / "tokenizer"):
        config = json.loads((part / "config.json").read_text())
        config["provenance"] |= provenance
        (part / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("of", ["tokenizer", "prior", "inpainting"])
def test_images_default_to_those_of_training(results, capfd, of):
    """The scores are those with `--images img`; the images are printed and recorded."""
    trained_on(Path("known"), image_source="img")
    model = "known/tokenizer" if of == "tokenizer" else "known"
    flags = ["--tokenizer" if of == "tokenizer" else "--prior", model]
    steps = [] if of == "tokenizer" else ["--steps", "2"]
    fills = FILLS if of == "inpainting" else []
    status, _, err = run(capfd, evaluate.main, "--of", of, *flags, *steps, *fills, *QUICK[2:])
    assert status == 0
    result = json.loads(Path(f"runs/evaluations/{of}-known.json").read_text())
    assert result["settings"]["protocol"]["images"] is None
    assert result["conditions"]["image_source"] == "img"
    assert result["conditions"]["images_fingerprint"] == results[of]["conditions"]["images_fingerprint"]
    assert result["scores"]["frechet"] == results[of]["scores"]["frechet"]
    assert f"evaluating on {result['conditions']['images']} held-out images and 12 training images of img" in err


def test_unknown_and_changed_training_images_are_user_errors(folder, capfd):
    trained_on(Path("changed"), image_source="img", image_fingerprint="of other images")
    for tokenizer, message in (
        ("pair/tokenizer", "does not record which images it was trained on; give --images"),
        ("changed/tokenizer", "img does not hold the images that the model was trained on"),
    ):
        status, _, err = run(capfd, evaluate.main, "--of", "tokenizer", "--tokenizer", tokenizer)
        assert status == 2
        assert message in err.splitlines()[-1]


def test_results_are_replaced_by_the_same_evaluation_only(results, folder, capfd):
    """Default names follow from the model; other settings or other weights get another number."""

    def names(model, *flags):
        status, out, _ = run(capfd, evaluate.main, "--of", "tokenizer", "--tokenizer", model, *QUICK, *flags)
        assert status == 0
        return out.splitlines()[-1].replace("\\", "/")

    assert names("pair/tokenizer") == "runs/evaluations/tokenizer-pair.json"
    before = Path("runs/evaluations/tokenizer-pair.json").read_bytes()
    assert names("pair/tokenizer") == "runs/evaluations/tokenizer-pair.json"
    assert names("pair/tokenizer", "--seed", "1") == "runs/evaluations/tokenizer-pair-2.json"
    assert names("pair/tokenizer", "--seed", "1") == "runs/evaluations/tokenizer-pair-2.json"
    result = json.loads(before)
    result["conditions"]["tokenizer_digest"] = "of other weights"
    Path("runs/evaluations/tokenizer-pair.json").write_text(json.dumps(result))
    assert names("pair/tokenizer") == "runs/evaluations/tokenizer-pair-3.json"
    assert json.loads(Path("runs/evaluations/tokenizer-pair.json").read_text()) == result


def test_out_that_holds_something_else_is_refused(results, folder, capfd):
    Path("notes.json").write_text("{}")
    for path in ("prior.json", "notes.json", "img/0.png"):
        before = Path(path).read_bytes()
        status, _, err = run(
            capfd, evaluate.main, "--of", "tokenizer", "--tokenizer", "pair/tokenizer", *QUICK, "--out", path
        )
        assert status == 2
        refusal = (
            "lies inside the input folder img" if path == "img/0.png" else "exists and this command did not make it"
        )
        assert f"error: --out {path} {refusal}" in err.splitlines()[-1]
        assert Path(path).read_bytes() == before


def corrupted(kind, strength, images):
    """Corrupts uint8 images with strength 1, 2 or 3; 0 leaves them as they are."""
    if not strength:
        return images
    if kind == "noise":
        noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0)) * 12 * strength
        return (images + noise).clamp(0, 255).to(torch.uint8)
    changed = []
    for image in images:
        picture = Image.fromarray(image.permute(1, 2, 0).numpy())
        if kind == "blur":
            picture = picture.filter(ImageFilter.GaussianBlur(0.6 * strength))
        else:
            file = io.BytesIO()
            picture.save(file, "JPEG", quality=[0, 60, 25, 5][strength])
            picture = Image.open(file)
        changed.append(torch.from_numpy(np.array(picture)).permute(2, 0, 1))
    return torch.stack(changed)


@pytest.mark.parametrize("kind", ["noise", "blur", "jpeg"])
def test_frechet_distance_grows_with_corruption(kind, emoji):
    images, features, extractor = emoji
    distances = [
        frechet_distance(
            Moments(1280).update(features), Moments(1280).update(extractor(corrupted(kind, strength, images)))
        )
        for strength in range(4)
    ]
    assert distances == sorted(distances)
    assert distances[0] < 0.01 * distances[1]


@pytest.fixture(scope="module")
def emoji():
    images = open_images("emoji").pixels(range(0, 3786, 120))
    extractor = Lite0(torch.device("cpu"))
    return images, extractor(images), extractor


def test_halves_of_real_images_are_nearer_than_a_half_and_blurred_images(emoji):
    images, features, extractor = emoji
    even, odd = Moments(1280).update(features[::2]), Moments(1280).update(features[1::2])
    blurred = Moments(1280).update(extractor(corrupted("blur", 3, images[1::2])))
    assert frechet_distance(even, odd) < frechet_distance(even, blurred)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--of", "nothing"], "--of nothing cannot be evaluated; give one of tokenizer, prior, inpainting"),
        (
            ["--prior", "pair", "--num", "3"],
            "--num and --reference must be at least 4, not 3 and 5000",
        ),
        (["--of", "inpainting", "--fills", "0"], "--fills must be at least 1, not 0"),
        (["--again", "missing.json"], "missing.json cannot be read"),
        (["--again", "img/0.png"], "img/0.png is not a result of evaluate.py"),
        (["--again", "pair/config.json"], "pair/config.json is not a result of evaluate.py"),
        (["--prior", "pair", "--images", "img/0.png"], "img/0.png"),
    ],
)
def test_wrong_arguments_print_one_line(capfd, arguments, message):
    status, out, err = run(capfd, evaluate.main, *arguments)
    assert (status, out) == (2, "")
    line = err.splitlines()[-1]  # after progress bars, if any
    assert line.startswith("error: ")
    assert message in line
