"""Commands and the source of their images: moved or changed images, outputs among them, and bad files."""

import shutil

import pytest
import torch
from accelerate.state import AcceleratorState
from helpers.build_toys import write_images
from helpers.command_toys import run
from helpers.image_toys import marked

from smalti.core.errors import UserError
from smalti.core.models import read_config
from smalti.images.image_set import ImageRows, open_images
from smalti.images.splits import held_out
from smalti.latentsets.reader import LatentSet
from smalti.scripts import build_latents, sample, train_prior, train_tokenizer

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
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield tmp_path
    torch.set_num_threads(before)
    AcceleratorState._reset_state(reset_partial_state=True)


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
        "error: --out img/run is inside the folder of images img; give an --out outside of it\n",
    )
    assert not (workspace / "img" / "run").exists()


def test_the_column_of_labels_is_kept_for_the_latent_set(workspace, capfd):
    marked(["red", "lime", "blue", "black"] * 5, cls=[1, 2, 3, 4] * 5).to_parquet("x.parquet")
    flags = [*TRAIN, "--images", "x.parquet", "--label-column", "cls", "--out", "tokenizer"]
    assert run(capfd, train_tokenizer.main, *flags)[0] == 0
    assert read_config(workspace / "tokenizer")["provenance"]["label_column"] == "cls"
    assert run(capfd, build_latents.main, *BUILD)[0] == 0
    assert LatentSet("latents.h5").provenance.label_names == ("1", "2", "3", "4")


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
