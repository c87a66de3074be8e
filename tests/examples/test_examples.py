"""Every program in examples/ runs, at toy size, and does what its docstring says."""

import shutil
import sys

import pytest
import torch
from helpers.command_toys import EXAMPLES, example, run, save_pair
from helpers.image_toys import write_patches
from PIL import Image

from smalti import LatentSet, load_tokenizer
from smalti.core.models import _CLASSES
from smalti.scripts import build_latents, train_tokenizer
from smalti.tokenizers.quantizers.registry import QUANTIZERS

MOST_LINES = 79


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_patches(tmp_path / "img", 40)
    return tmp_path


def test_examples_are_short():
    lengths = {file.name: len(file.read_text().splitlines()) for file in EXAMPLES.glob("*.py")}
    assert {name for name, length in lengths.items() if length > MOST_LINES} == set()


def test_quantizer_alone_learns():
    module = example("quantizer_in_your_model")
    assert module.main(steps=40) < module.main(steps=1)


def test_training_and_sampling_from_python(folder):
    example("train_and_sample").main(folder / "out", images="img", steps=1, batch_size=4)
    sizes = [Image.open(folder / "out" / f"{number}.png").size for number in range(4)]
    assert sizes == [(32, 32)] * 4


def test_folder_is_inpainted(folder):
    save_pair(folder / "pair")
    for file in sorted((folder / "img").glob("*.png"))[2:]:
        file.unlink()
    example("inpaint_folder").main("pair", "img", "filled")
    assert len(list((folder / "filled").glob("*.png"))) == 3 * 2
    before, after = (Image.open(path).convert("RGB") for path in ("img/0.png", "filled/0-0.png"))
    assert after.size == before.size == (28, 28)
    assert after.getpixel((0, 0)) == before.getpixel((0, 0))  # outside the ellipse


def test_custom_quantizer_is_used_by_a_kind(folder, monkeypatch):
    monkeypatch.setattr("smalti.core.models._CLASSES", dict(_CLASSES))
    monkeypatch.setitem(QUANTIZERS, "product", None)  # what the example puts there is removed after the test
    latents = LatentSet(example("custom_quantizer").main(folder / "product", images="img", steps=2))
    assert latents.layout.levels[0].radices == (64, 64)
    (codes,) = latents.batch([0, 1])
    tokenizer = load_tokenizer(folder / "product")
    quantizer = tokenizer.quantizer
    vectors = quantizer.lookup(codes)
    assert torch.equal(quantizer.lookup(quantizer.encode(vectors)), vectors)  # of equal codewords it takes the first
    halves = quantizer.lookup(codes, digits=1), quantizer.lookup(codes, digits=slice(1, 2))
    torch.testing.assert_close(halves[0] + halves[1], vectors)
    images = tokenizer.decode((codes,))
    assert images.shape == (2, 3, 32, 32)
    tokenizer(images).losses["codebook"].backward()
    assert quantizer.codebooks.grad.any()


def test_custom_tokenizer_is_a_kind(folder, monkeypatch):
    monkeypatch.setattr("smalti.core.models._CLASSES", dict(_CLASSES))
    latents = LatentSet(example("custom_tokenizer").main(folder / "fsq", images="img", steps=2))
    assert len(latents) == 80  # with the mirror images
    assert latents.layout.levels[0].radices == (7, 5, 5, 5)
    tokenizer = load_tokenizer(folder / "fsq")
    (codes,) = latents.batch([0, 1])
    assert tokenizer.decode((codes,)).shape == (2, 3, 32, 32)
    assert tokenizer.decode((codes,), digits=1).shape == (2, 3, 32, 32)


def test_commands_know_kinds_of_modules_that_the_environment_names(folder, monkeypatch, capfd):
    """Commands train and encode with the module; without it, or if it is not there, one line says what to do."""
    shutil.copy(EXAMPLES / "custom_tokenizer.py", folder / "own_tokenizer.py")
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr("smalti.core.models._CLASSES", dict(_CLASSES))
    train = ["--tokenizer", "fsq", "--images", "img", "--steps", "1", "--batch-size", "4", "--out", "own"]
    build = ["--tokenizer", "own", "--out", "own.h5"]
    assert "there is no tokenizer of kind 'fsq'" in run(capfd, train_tokenizer.main, *train)[2]
    monkeypatch.setenv("SMALTI_IMPORT", "own_tokenizer")
    assert run(capfd, train_tokenizer.main, *train)[0] == 0
    assert run(capfd, build_latents.main, *build)[0] == 0
    assert LatentSet("own.h5").layout.levels[0].radices == (7, 5, 5, 5)
    monkeypatch.delitem(sys.modules, "own_tokenizer")
    monkeypatch.setattr("smalti.core.models._CLASSES", dict(_CLASSES))
    monkeypatch.setenv("SMALTI_IMPORT", "lost")
    status, _, error = run(capfd, build_latents.main, *build)
    assert (status, error.split(";")[0]) == (2, "error: SMALTI_IMPORT=lost: there is no module 'lost'")
    monkeypatch.delenv("SMALTI_IMPORT")
    status, _, error = run(capfd, build_latents.main, *build)
    assert status == 2
    assert error.startswith("error: own: there is no tokenizer of kind 'fsq' in smalti itself; name the module")
