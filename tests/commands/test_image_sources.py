"""What commands do with the source of their images: moved or changed images, outputs among them, and bad files."""

import shutil

import pytest
import torch
from accelerate.state import AcceleratorState
from helpers.build_toys import write_images
from helpers.command_toys import run
from helpers.image_toys import marked

from smalti.core.models import read_config
from smalti.images.image_set import open_images
from smalti.latentsets.reader import LatentSet
from smalti.scripts import build_latents, train_tokenizer

SMALL = "--height 8 --width 8 --widths 6 8 --residual-blocks 1 --code-width 6 --depth 2 --branching 4"
FLAGS = f"{SMALL} --steps 2 --batch-size 4 --warmup-steps 0 --precision fp32 --images img"
TRAIN = FLAGS.split()
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
