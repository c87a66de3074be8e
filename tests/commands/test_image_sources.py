"""Commands and the source of their images: moved or changed images, outputs among them, and bad files."""

import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.build_toys import write_images
from helpers.command_toys import run
from helpers.image_toys import COLOURS, marked, write_folder, write_parquet
from helpers.toys import TINY
from PIL import Image

from smalti.commands import train_tokenizer as training
from smalti.commands.model_paths import find_model, load_tokenizer
from smalti.core import models
from smalti.core.errors import UserError
from smalti.core.models import read_config
from smalti.images.decoding import decode, to_float
from smalti.images.image_set import ImageRows, open_images
from smalti.images.splits import held_out
from smalti.latentsets.reader import LatentSet
from smalti.scripts import build_latents, compress, evaluate, sample, train_prior, train_tokenizer
from smalti.training.end_of_run import print_end

SMALL = "--height 8 --width 8 --widths 6 8 --residual-blocks 1 --code-width 6 --depth 2 --branching 4"
FLAGS = f"{SMALL} --steps 2 --batch-size 4 --warmup-steps 0 --precision fp32 --images img"
TRAIN = FLAGS.split()
SMALL_PRIOR = "--latents latents.h5 --model-width 16 --heads 2 --depth 1 1 1 --sheet-samples 2 --warmup-steps 0"
PRIOR = [*SMALL_PRIOR.split(), "--steps", "2", "--batch-size", "4", "--out", "prior"]
BUILD = ["--tokenizer", "tokenizer", "--workers", "0", "--out", "latents.h5"]


@pytest.fixture
def workspace(tmp_path, monkeypatch):
    """A working folder with thirty images."""
    write_images(tmp_path / "img", 30)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def lines(text: str, start: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith(start)]


def test_commands_begin_with_what_they_read(workspace, capfd):
    (workspace / "img" / "x.HEIC").write_bytes(b"")
    expected = ["images: 30 images from img, without classes", "images: passed over, because the suffix is not of a "]
    for main, flags in ((train_tokenizer.main, [*TRAIN, "--out", "tokenizer"]), (build_latents.main, BUILD)):
        status, _, err = run(capfd, main, *flags)
        assert status == 0
        for line, start in zip(lines(err, "images: "), expected, strict=True):
            assert line.startswith(start)


def test_images_other_than_those_of_the_training_are_not_encoded_by_default(workspace, capfd):
    assert run(capfd, train_tokenizer.main, *TRAIN, "--out", "tokenizer")[0] == 0
    shutil.rmtree(workspace / "img")
    write_images(workspace / "img", 30, seed=1)
    status, _, err = run(capfd, build_latents.main, *BUILD)
    (error,) = lines(err, "error: ")
    assert status == 2
    assert error.startswith("error: img does not hold the images that tokenizer was trained on (fingerprint ")
    assert "give --images PATH" in error
    assert not (workspace / "latents.h5").exists()
    assert run(capfd, build_latents.main, *BUILD, "--images", "img")[0] == 0
    assert LatentSet("latents.h5").provenance.image_fingerprint == open_images("img").fingerprint


def test_a_run_among_its_images_is_refused_before_anything_is_written(workspace, capfd):
    status, _, err = run(capfd, train_tokenizer.main, *TRAIN, "--out", "img/run")
    assert (status, err) == (
        2,
        "error: --out img/run lies inside the input folder img; give a name outside it\n",
    )
    assert not (workspace / "img" / "run").exists()


def test_the_column_of_labels_is_kept_for_the_latent_set(workspace, capfd):
    marked(["red", "lime", "blue", "black"] * 5, cls=[1, 2, 3, 4] * 5).to_parquet("x.parquet")
    flags = [*TRAIN, "--images", "x.parquet", "--label-column", "cls", "--out", "tokenizer"]
    assert run(capfd, train_tokenizer.main, *flags)[0] == 0
    assert read_config(workspace / "tokenizer")["provenance"]["preprocessing"]["label_column"] == "cls"
    assert run(capfd, build_latents.main, *BUILD)[0] == 0
    assert LatentSet("latents.h5").provenance.label_names == ("1", "2", "3", "4")


def wide(seed: int) -> list[bytes]:
    """Returns 60 encoded images of two plain halves, twice as wide as high."""
    images = []
    for colours in np.random.default_rng(seed).integers(0, 256, (60, 1, 2, 3), dtype=np.uint8):
        images.append(png_of(Image.fromarray(colours).resize((16, 8), Image.Resampling.NEAREST)))
    return images


def png_of(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def test_fit_and_columns_of_the_training_are_used_by_all_that_follows(workspace, capfd):
    """Also the fingerprint of the images: a prior is not evaluated on others by default."""
    columns = {"other": [b""] * 60, "cls": ["a", "b", "c"] * 20}
    write_parquet(workspace / "x.parquet", image=wide(0), **columns)
    chosen = ["--images", "x.parquet", "--image-column", "image", "--label-column", "cls", "--fit", "pad"]
    assert run(capfd, train_tokenizer.main, *TRAIN, *chosen, "--out", "tokenizer")[0] == 0
    assert run(capfd, build_latents.main, *BUILD, "--no-flips")[0] == 0
    latents, tokenizer = LatentSet("latents.h5"), load_tokenizer("tokenizer")
    padded = torch.stack([decode(image, channels=3, height=8, width=8, fit="pad") for image in wide(0)])
    assert (padded[:, :, :2] == 255).all()
    assert latents.batch(range(60))[0].equal(tokenizer.encode(to_float(padded))[0])
    assert latents.provenance.label_names == ("a", "b", "c")
    assert run(capfd, train_prior.main, *PRIOR)[0] == 0
    quick = ["--num", "4", "--reference", "4", "--precision", "fp32"]
    of_prior = ["--of", "prior", "--prior", "prior", "--steps", "2", "--min-steps", "1", *quick, "--out", "p.json"]
    for flags in (["--of", "tokenizer", "--tokenizer", "tokenizer", *quick, "--out", "t.json"], of_prior):
        status, _, err = run(capfd, evaluate.main, *flags)
        assert status == 0
        assert lines(err, "images: ") == [
            "images: 60 images from x.parquet, in 3 classes: a 20, b 20, c 20",
            "images: 60 of 60 images are not square: they get white borders (as in the training)",
        ]
        conditions = json.loads(Path(flags[-1]).read_text())["conditions"]
        assert conditions["images_fingerprint"] == latents.provenance.image_fingerprint
        assert conditions["preprocessing"]["fit"] == "longer side, white borders"
    write_parquet(workspace / "x.parquet", image=wide(3), **columns)
    status, _, err = run(capfd, evaluate.main, *of_prior)
    (error,) = lines(err, "error: ")
    assert status == 2
    assert error.startswith("error: x.parquet does not hold the images that the model was trained on (fingerprint ")
    assert run(capfd, evaluate.main, *of_prior[:-1], "q.json", "--images", "x.parquet", *chosen[2:6])[0] == 0
    config = json.loads(Path("prior/config.json").read_text())
    del config["provenance"]["image_fingerprint"]  # as priors of before have none
    Path("prior/config.json").write_text(json.dumps(config))
    assert run(capfd, evaluate.main, *of_prior[:-1], "old.json")[0] == 0


def test_every_command_that_reads_images_names_all_bad_ones_or_leaves_them_out(workspace, capfd):
    assert run(capfd, train_tokenizer.main, *TRAIN, "--out", "tokenizer")[0] == 0
    write_images(workspace / "more", 80, seed=2)
    for name in ("0003.png", "0021.png"):
        (workspace / "more" / name).write_bytes((workspace / "more" / name).read_bytes()[:60])
    of_tokenizer = ["--of", "tokenizer", "--num", "4", "--reference", "4", "--precision", "fp32", "--out", "t.json"]
    for main, flags in (
        (build_latents.main, ["--workers", "0", "--out", "latents.h5"]),
        (evaluate.main, of_tokenizer),
        (compress.main, ["--out", "x.smalti"]),
    ):
        reading = ["--tokenizer", "tokenizer", "--images", "more", *flags]
        status, _, err = run(capfd, main, *reading)
        (error,) = lines(err, "error: ")
        assert status == 2
        assert error.startswith("error: 2 images cannot be decoded: ")
        assert "more/0003.png, row 3: " in error
        assert "more/0021.png, row 21: " in error
        assert error.endswith("or leave out such images with --on-bad-image skip")
        assert not Path(flags[-1]).exists()
        status, out, err = run(capfd, main, *reading, "--on-bad-image", "skip")
        assert status == 0
        assert lines(err, "images: 2 left out: ")
        if main is compress.main:
            assert "78 image(s)" in out
    assert json.loads(Path("t.json").read_text())["conditions"]["images_left_out"] == 2


@pytest.mark.parametrize("cache_bytes", [2**30, 0])
def test_all_bad_images_are_named_before_the_training_or_left_out(cache_bytes, workspace, capfd, monkeypatch):
    """Both for sets that are kept in memory and for larger ones, which are decoded again at every step."""
    monkeypatch.setattr("smalti.images.image_set.ImageSet._fits", lambda self: bool(cache_bytes))
    for name in ("0003.png", "0021.png"):
        (workspace / "img" / name).write_bytes((workspace / "img" / name).read_bytes()[:60])
    status, _, err = run(capfd, train_tokenizer.main, *TRAIN, "--out", "tokenizer")
    (error,) = lines(err, "error: ")
    assert status == 2
    assert error.startswith("error: 2 images cannot be decoded: ")
    assert "img/0003.png, row 3: " in error
    assert "img/0021.png, row 21: " in error
    assert error.endswith("or leave out such images with --on-bad-image skip")
    assert not (workspace / "tokenizer").exists()
    skipping = [*TRAIN, "--on-bad-image", "skip", "--out", "tokenizer"]
    status, _, err = run(capfd, train_tokenizer.main, *skipping)
    assert status == 0
    assert "images: 2 left out: 2 images cannot be decoded: " in err
    assert read_config(workspace / "tokenizer")["provenance"]["skipped_images"] == 2


def test_images_that_are_left_out_are_in_no_split(workspace):
    images = open_images("img", height=8, width=8)
    images.leave_out({3: "", 5: ""})
    rows = ImageRows(images, split="all", flips=False)
    assert rows.__getitems__(range(len(rows)))["source_ids"].tolist() == [
        each for index, each in enumerate(images.source_ids.tolist()) if index not in (3, 5)
    ]
    with pytest.raises(UserError, match="none of the 30 images of img can be decoded; the first: broken"):
        images.leave_out(dict.fromkeys(range(30), "broken"))


def test_a_training_ends_with_its_folder_numbers_pictures_and_the_next_command(workspace, capfd):
    status, out, _ = run(capfd, train_tokenizer.main, *TRAIN, "--device", "cpu", "--out", "a tokenizer")
    assert status == 0
    first, pictures, following = out.splitlines()
    assert first.startswith("a tokenizer: 2 steps; held_out_loss ")
    assert pictures == "pictures: a tokenizer/reconstructions.png"
    assert following == "next: python scripts/build_latents.py --tokenizer 'a tokenizer'"
    assert run(capfd, build_latents.main, "--tokenizer", "a tokenizer", "--workers", "0", "--out", "latents.h5")[0] == 0
    status, out, _ = run(capfd, train_prior.main, *PRIOR, "--device", "cpu")
    assert status == 0
    first, pictures, following = out.splitlines()
    assert first.startswith("prior: 2 steps; held_out_loss ")
    assert (pictures, following) == ("pictures: prior/samples.png", "next: python scripts/sample.py --prior prior")


@pytest.mark.parametrize(("name", "typed"), [("vqvae", "./vqvae"), ("portraits", "./portraits"), ("mine", "mine")])
def test_the_next_command_names_the_run_also_if_it_is_called_like_another_model(workspace, capfd, name, typed):
    status, out, _ = run(capfd, train_tokenizer.main, *TRAIN, "--device", "cpu", "--out", name)
    assert (status, out.splitlines()[-1]) == (0, f"next: python scripts/build_latents.py --tokenizer {typed}")
    assert find_model(typed, "tokenizer") == Path(name)


@pytest.mark.parametrize(
    ("losses", "rises"),
    [({1: 3.0, 2: 2.0}, False), ({1: 2.0, 2: 2.03}, False), ({1: 2.0, 2: 2.1}, True), ({1: -1.0, 2: -0.9}, True)],
)
def test_the_end_of_a_training_says_that_the_held_out_loss_rose(losses, rises, tmp_path, capsys):
    described = {"family": "prior", "kind": "hourglass", "config": {}, "digest": ""}
    (tmp_path / "config.json").write_text(json.dumps({**described, "provenance": {"steps": 2}}))
    lines = [json.dumps({"step": step, "held_out_loss": loss}) for step, loss in (losses | {3: 9.0}).items()]
    (tmp_path / "metrics.jsonl").write_text("".join(f"{line}\n" for line in lines))
    (tmp_path / "states/step_00000001").mkdir(parents=True)
    print_end(tmp_path, pictures="samples.png", following="sample", remedies="Remedies: patience")
    text = f"overfitting: the held-out loss rose from {losses[1]:.4g} after step 1 (its weights: {tmp_path}/states"
    assert (text in capsys.readouterr().out) == rises
    print_end(tmp_path, pictures="samples.png", following="sample")
    assert "overfitting" not in capsys.readouterr().out


def test_classes_whose_images_are_all_held_out_are_named(workspace, capfd):
    out = held_out(open_images("img").source_ids)
    assert out.any()
    files = sorted((workspace / "img").iterdir())
    for file, is_out in zip(files, out.tolist(), strict=True):
        (workspace / "classes" / ("unseen" if is_out else "seen")).mkdir(parents=True, exist_ok=True)
        shutil.copy(file, workspace / "classes" / ("unseen" if is_out else "seen"))
    assert run(capfd, train_tokenizer.main, *TRAIN, "--images", "classes", "--out", "tokenizer")[0] == 0
    assert run(capfd, build_latents.main, *BUILD)[0] == 0
    prior = "--latents latents.h5 --model-width 16 --heads 2 --depth 1 1 1 --sheet-samples 2 --warmup-steps 0"
    status, _, err = run(
        capfd, train_prior.main, *prior.split(), *["--steps", "2", "--batch-size", "4", "--out", "prior"]
    )
    assert status == 0
    assert "warning: 1 of 2 classes have no training images" in err
    assert "they cannot be sampled: unseen" in err
    flags = "--prior prior --num 2 --steps 2 --min-steps 1 --out s.png --classes"
    status, _, err = run(capfd, sample.main, *flags.split(), "unseen")
    assert status == 2
    assert "error: the prior was trained on no image of the class 'unseen'; choose another one" in err
    assert run(capfd, sample.main, *flags.split(), "seen")[0] == 0


def test_codebooks_of_a_set_sorted_by_class_start_from_all_its_classes(tmp_path, monkeypatch):
    """The set has more images than are taken, but fewer than twice as many."""
    monkeypatch.setattr(training, "START_IMAGES", 8)
    monkeypatch.setattr(training, "MOST_START_IMAGES", 1)
    classes = [f"{'abc'[index // 4]}/{index:02d}.png" for index in range(len(COLOURS))]
    images = open_images(str(write_folder(tmp_path / "sorted", classes)), height=8, width=8, held_out="none")
    tokenizer, taken = models.class_of_kind("tokenizer", "vqvae")(TINY["vqvae"]), []
    monkeypatch.setattr(tokenizer, "init_from_data", taken.append)
    training._init_from_images(tokenizer, ImageRows(images, split="train", flips=False), None, shown=False)
    pixels = to_float(images.pixels(range(len(images))))
    labels = {int(images.labels[(pixels == one).flatten(1).all(1)].item()) for one in taken[0]}
    assert len(taken[0]) == 8
    assert labels == {0, 1, 2}
