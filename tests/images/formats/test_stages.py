"""Commands on images in containers, of five channels and of 16 bits: killed and resumed, and through every stage."""

import json
import os
import signal
from pathlib import Path

import numpy as np
import pytest
from helpers.build_toys import FLAGS, Builders, save_tokenizer
from helpers.command_toys import run
from helpers.container_toys import CONTAINERS, labelled_images
from PIL import Image

from smalti.core.models import read_config
from smalti.images.image_set import ImageSet
from smalti.latentsets.reader import LatentSet
from smalti.scripts import (
    build_latents,
    compress,
    evaluate,
    inpaint,
    sample,
    train_prior,
    train_tokenizer,
)

FILES = labelled_images(40)
SMALL = "--height 8 --width 8 --widths 6 8 --residual-blocks 1 --code-width 6 --depth 2 --branching 4"
TRAIN = f"{SMALL} --steps 4 --batch-size 4 --warmup-steps 0 --precision fp32 --device cpu".split()
SMALL_PRIOR = "--latents latents.h5 --model-width 16 --heads 2 --depth 1 1 1 --sheet-samples 2 --warmup-steps 0"
PRIOR = [*SMALL_PRIOR.split(), "--steps", "2", "--batch-size", "4", "--out", "prior", "--device", "cpu"]


@pytest.fixture
def workspace(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def digest(tmp_path_factory):
    """The digest of the latent set of the folder, by a build without interruption."""
    folder = tmp_path_factory.mktemp("folder")
    save_tokenizer(folder / "tokenizer")
    CONTAINERS["folder"](folder / "img", FILES)
    builders = Builders(folder, *FLAGS, "--out", "latents.h5")
    assert builders.join() == [0], (folder / "log").read_text()
    return LatentSet(folder / "latents.h5").content_digest


def killed_and_resumed(folder: Path, source: str) -> str:
    """Returns the digest of a latent set whose first build was killed after two blocks."""
    save_tokenizer(folder / "tokenizer")
    flags = [*FLAGS, "--out", "latents.h5"]
    flags[flags.index("img")] = source
    killed = Builders(folder, *flags, dies_at=("smalti.latentsets.building.blocks", "BlockStore.append", 3))
    assert killed.join() == [-signal.SIGKILL]
    assert not (folder / "latents.h5").exists()
    builders = Builders(folder, *flags)
    assert builders.join() == [0], (folder / "log").read_text()
    return LatentSet(folder / "latents.h5").content_digest


@pytest.mark.parametrize("container", ["tar", "webdataset", "shards", "zip", "metadata.csv", "csv list", "parquet"])
def test_a_killed_and_resumed_build_gives_the_digest_of_the_folder(container, digest, tmp_path):
    assert killed_and_resumed(tmp_path, CONTAINERS[container](tmp_path / "x", FILES)) == digest


def test_a_killed_and_resumed_build_of_arrays_is_that_of_a_folder_of_arrays(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (40, 8, 8, 3), dtype=np.uint8)
    (tmp_path / "img").mkdir()
    for number, image in enumerate(images):
        np.save(tmp_path / "img" / f"{number:02}.npy", image)
    save_tokenizer(tmp_path / "tokenizer")
    builders = Builders(tmp_path, *FLAGS, "--out", "whole.h5")
    assert builders.join() == [0], (tmp_path / "log").read_text()
    np.savez_compressed(tmp_path / "x.npz", images=images.transpose(0, 3, 1, 2))
    digest = killed_and_resumed(tmp_path, str(tmp_path / "x.npz"))
    assert digest == LatentSet(tmp_path / "whole.h5").content_digest


@pytest.mark.parametrize("container", ["shards", "zip"])
def test_a_stopped_and_resumed_training_is_that_of_the_folder(container, workspace, monkeypatch, capfd):
    folder = CONTAINERS["folder"](workspace / "folder", FILES)
    source = CONTAINERS[container](workspace / "x", FILES)
    monkeypatch.setattr(ImageSet, "_fits", lambda self: False)  # every batch is read from the container
    assert run(capfd, train_tokenizer.main, *TRAIN, "--images", folder, "--out", "whole")[0] == 0
    pixels, calls = ImageSet.pixels, iter(range(2))

    def stopping(self, *args, **options):
        if next(calls, None) is None:
            os.kill(os.getpid(), signal.SIGINT)
        return pixels(self, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(ImageSet, "pixels", stopping)
        assert run(capfd, train_tokenizer.main, *TRAIN, "--images", source, "--out", "stopped")[0] == 130
    status, _, err = run(capfd, train_tokenizer.main, *TRAIN, "--images", source, "--out", "stopped")
    assert status == 0, err
    whole, resumed = ((workspace / name / "model.safetensors").read_bytes() for name in ("whole", "stopped"))
    assert whole == resumed


def write_deep_grey(folder):
    folder.mkdir()
    for number, image in enumerate(np.random.default_rng(0).integers(0, 65536, (40, 8, 8), dtype=np.uint16)):
        Image.fromarray(image).save(folder / f"{number:02}.png")
    return "img", 1, ["--image-depth", "16"], "pictures show grey, in 8 of 16 bits"


def write_five_channels(folder):
    np.savez(f"{folder}.npz", x=np.random.default_rng(0).integers(0, 256, (40, 8, 8, 5), dtype=np.uint8))
    return "img.npz", 5, [], "pictures show the first three of 5 channels, as red, green and blue"


@pytest.mark.parametrize("write", [write_deep_grey, write_five_channels])
def test_deep_and_many_channelled_images_go_through_every_stage(write, workspace, capfd):
    source, channels, flags, note = write(workspace / "img")
    status, _, err = run(
        capfd, train_tokenizer.main, *TRAIN, "--images", source, "--image-channels", channels, *flags, "--out", "tok"
    )
    assert status == 0, err
    assert f"images: {note}" in err
    preprocessing = read_config(workspace / "tok")["provenance"]["preprocessing"]
    assert (preprocessing["channels"], preprocessing.get("image_depth", 8)) == (channels, 16 if flags else 8)
    stages = [
        (build_latents.main, ["--tokenizer", "tok", "--workers", "0", "--crops", "2", "--out", "latents.h5"]),
        (train_prior.main, [*PRIOR, "--tokenizer", "tok"]),
        (sample.main, ["--prior", "prior", "--num", "2", "--out", "sample.png"]),
        (compress.main, ["--tokenizer", "tok", "--out", "codes.smalti"]),
        (compress.main, ["--codes", "codes.smalti", "--tokenizer", "tok", "--out", "decoded"]),
        (compress.main, ["--codes", "codes.smalti", "--tokenizer", "tok", "--out", "decoded"]),
    ]
    Image.fromarray(np.eye(8, dtype=np.uint8) * 255).save("mask.png")
    image = np.random.default_rng(1).integers(1, 255, (8, 8, channels), dtype=np.uint8)
    np.save("image.npy", image)
    filled = ["--prior", "prior", "--image", "image.npy", "--mask", "mask.png", "--num", "1", "--out", "filled.png"]
    stages += [(inpaint.main, filled)] * 2  # the second time over the files of the first
    for main, arguments in stages:
        status, _, err = run(capfd, main, *arguments)
        assert status == 0, (main.__module__, err)
    decoded = sorted((workspace / "decoded").iterdir())
    assert len(decoded) == 40 * (2 if channels == 5 else 1)
    if channels == 5:
        result = np.load("filled.npy")
        known = np.eye(8) == 0
        assert (result[known] == image[known]).all()
        assert np.load(next(path for path in decoded if path.suffix == ".npy")).shape == (8, 8, 5)
    pytest.importorskip("efficientnet_lite_pytorch")
    quick = ["--num", "4", "--reference", "4", "--precision", "fp32", "--held-out", "0.5"]
    sampling = ["--prior", "prior", "--steps", "2", "--min-steps", "1"]
    models = {"tokenizer": ["--tokenizer", "tok"], "prior": sampling, "inpainting": [*sampling, "--fills", "1"]}
    for kind, of_model in models.items():
        status, _, err = run(capfd, evaluate.main, "--of", kind, *of_model, *quick, "--out", f"{kind}.json")
        assert status == 0, (kind, err)
        assert json.loads((workspace / f"{kind}.json").read_text())["conditions"]["note"] == note
