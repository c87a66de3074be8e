"""Wrong files, masks, sizes and flags: each gives one line with the problem, and exit status 2."""

import os
from pathlib import Path

import numpy as np
import pytest
from helpers.command_toys import run, save_pair
from PIL import Image

from smalti.scripts import evaluate, inpaint, sample, train_tokenizer

FILL = ["--prior", "pair", "--image", "in.png", "--mask", "mask.png"]


@pytest.fixture(scope="module", autouse=True)
def workspace(tmp_path_factory):
    """A folder with a prior, images, masks, and files that are neither."""
    folder = tmp_path_factory.mktemp("wrong")
    save_pair(folder / "pair")
    picture = np.random.default_rng(0).integers(0, 256, (8, 16, 3)).astype(np.uint8)
    mask = np.zeros((8, 16), np.uint8)
    mask[2:5, 3:8] = 255
    masks = {"mask": mask, "black": mask * 0, "white": mask * 0 + 255, "small": mask[:4], "grey": mask // 4}
    for name, values in masks.items():
        Image.fromarray(values).save(folder / f"{name}.png")
    Image.fromarray(picture).save(folder / "in.png")
    (folder / "cut.png").write_bytes((folder / "in.png").read_bytes()[:200])
    (folder / "empty.png").touch()
    (folder / "text.png").write_text("not an image")
    for name in ("nothing", "pictures", "twins", "masks"):
        (folder / name).mkdir()
    for name in ("pictures/a.png", "pictures/b.png", "twins/a.png", "twins/a.jpg"):
        Image.fromarray(picture).save(folder / name)
    Image.fromarray(mask).save(folder / "masks/a.png")
    before = Path.cwd()
    os.chdir(folder)
    yield folder
    os.chdir(before)


@pytest.mark.parametrize(
    ("main", "arguments", "message"),
    [
        # files
        (
            inpaint.main,
            [*FILL, "--image", "missing.png"],
            "missing.png cannot be read: No such file or directory; check its name",
        ),
        (inpaint.main, [*FILL, "--image", "text.png"], "text.png: these 12 bytes are not an image"),
        (inpaint.main, [*FILL, "--image", "cut.png"], "cut.png: the image cannot be decoded"),
        (inpaint.main, [*FILL, "--image", "empty.png"], "empty.png: the image is empty (0 bytes)"),
        (inpaint.main, [*FILL, "--image", "nothing"], "nothing holds no images"),
        (inpaint.main, [*FILL, "--image", "twins"], "twins has several images called a"),
        (
            inpaint.main,
            ["--prior", "pair", "--image", "pictures", "--mask", "twins"],
            "twins has several masks called a",
        ),
        (inpaint.main, [*FILL, "--prior", "missing"], "no checkpoint at missing"),
        (inpaint.main, [*FILL, "--prior", "pair/tokenizer"], "holds a tokenizer (hrvq), but a prior is needed here"),
        (inpaint.main, [*FILL, "--prior", "pixelcnn"], "runs/priors/pixelcnn does not exist: train it first"),
        (inpaint.main, [*FILL, "--tokenizer", "vqvae"], "runs/tokenizers/vqvae does not exist: train it first"),
        (inpaint.main, [*FILL, "--out", "out.jpg"], "--out out.jpg is not the name of a PNG"),
        (inpaint.main, [*FILL, "--out", "in.png"], "--out in.png would overwrite an input"),
        (inpaint.main, [*FILL, "--image", "pictures", "--out", "x.png"], "is a folder, so --out must be a folder"),
        (inpaint.main, [*FILL, "--image", "pictures", "--out", "pictures"], "would overwrite an input"),
        (sample.main, ["--prior", "pair", "--out", "samples.gif"], "--out samples.gif is not the name of a PNG"),
        (inpaint.main, [*FILL, "--image", "n" * 300], "is too long (300 characters)"),
        (inpaint.main, [*FILL, "--mask", "n" * 300], "is too long (300 characters)"),
        (inpaint.main, [*FILL, "--out", f"{'n' * 250}.png"], "cannot be written: the name is too long"),
        (sample.main, ["--prior", "pair", "--out", f"{'n' * 250}.png"], "cannot be written: the name is too long"),
        (sample.main, ["--prior", "pair", "--out", "text.png/a.png"], "a part of its path is a file"),
        (inpaint.main, [*FILL, "--out", "text.png"], "text.png exists and this command did not make it"),
        (sample.main, ["--prior", "pair", "--out", "text.png"], "text.png exists and this command did not make it"),
        # masks
        (inpaint.main, [*FILL, "--mask", "missing.png"], "missing.png cannot be read"),
        (inpaint.main, [*FILL, "--mask", "text.png"], "text.png: these 12 bytes are not an image"),
        (
            inpaint.main,
            [*FILL, "--mask", "black.png"],
            "black.png masks nothing: no pixel is light; paint what to fill",
        ),
        (inpaint.main, [*FILL, "--mask", "white.png"], "white.png masks the whole image: every pixel is light"),
        (inpaint.main, [*FILL, "--mask", "white.png", "--invert"], "white.png masks nothing: no pixel is dark"),
        (inpaint.main, [*FILL, "--mask", "grey.png"], "grey.png masks nothing"),
        (inpaint.main, [*FILL, "--mask", "masks"], "--mask masks is a folder but --image in.png is not"),
        (inpaint.main, [*FILL, "--image", "pictures", "--mask", "masks"], "masks has no mask called b"),
        (
            inpaint.main,
            ["--prior", "pair", "--image", "in.png"],
            "in.png has no transparent pixels to fill",
        ),
        (
            inpaint.main,
            ["--prior", "pair", "--image", "mask.png", "--mask", "in.png"],
            "swapped; swap --image and --mask",
        ),
        # sizes
        (inpaint.main, [*FILL, "--mask", "small.png"], "small.png is 16x4 but the image is 16x8; pass --resize-mask"),
        (inpaint.main, [*FILL, "--expand", "-1", "0", "0", "0"], "--expand takes pixels to add"),
        (inpaint.main, [*FILL, "--largest", "0"], "--candidates must be at least 1 and --largest above 0"),
        (inpaint.main, [*FILL, "--feather", "-1"], "--dilation and --feather must be at least 0, not 1 and -1"),
        (inpaint.main, [*FILL, "--num", "0"], "--num must be at least 1, not 0"),
        (inpaint.main, [*FILL, "--candidates", "0"], "--candidates must be at least 1"),
        (inpaint.main, [*FILL, "--threshold", "255"], "--threshold must be from 0 to 254, not 255"),
        (sample.main, ["--prior", "pair", "--num", "0"], "--num must be at least 1, not 0"),
        # numbers
        (inpaint.main, [*FILL, "--num", "1" + "0" * 9], "--num must be at most 10000, not 1000000000"),
        (inpaint.main, [*FILL, "--candidates", "1" + "0" * 9], "do not fit in memory; lower --num, --candidates or"),
        (inpaint.main, [*FILL, "--expand", "0", "1" + "0" * 9, "0", "0"], "--expand makes in.png larger than"),
        (inpaint.main, [*FILL, "--dilation", "1001"], "--dilation and --feather must be at most 1000, not 1001 and 0"),
        (inpaint.main, [*FILL, "--feather", "1" + "0" * 9], "--dilation and --feather must be at most 1000"),
        (inpaint.main, [*FILL, "--largest", "inf"], "--largest must be a finite number, not inf"),
        (inpaint.main, [*FILL, "--temperature", "1", "nan"], "--temperature must be a finite number, not nan"),
        (inpaint.main, [*FILL, "--seed", str(2**63)], f"--seed must be from {-(2**63)} to {2**63 - 1}"),
        (sample.main, ["--prior", "pair", "--seed", str(2**64 - 1)], f"--seed must be from {-(2**63)} to {2**63 - 1}"),
        (sample.main, ["--prior", "pair", "--guidance", "inf"], "--guidance must be a finite number, not inf"),
        (sample.main, ["--prior", "pair", "--temperature", "nan", "nan"], "--temperature must be a finite number"),
        (sample.main, ["--prior", "pair", "--num", "1" + "0" * 9], "do not fit on a sheet; the most is --num"),
        (
            sample.main,
            ["--prior", "pair", "--height", "65536", "--width", "65536"],
            "pixels; lower --height and --width",
        ),
        # flags
        (inpaint.main, [*FILL, "--masc", "x.png"], "Unrecognized options: --masc, x.png; did you mean --mask?"),
        (sample.main, ["--temprature", "1"], "; did you mean --temperature?"),
        (inpaint.main, [*FILL, "--num", "three"], "Error parsing --num: invalid literal for int()"),
        (
            inpaint.main,
            [*FILL, "--num"],
            "Expected 1 values; --help lists the flags",
        ),
        (inpaint.main, [*FILL, "--expand", "1", "2"], "Missing value for argument '--expand'. Expected 4 values"),
        (inpaint.main, [*FILL, "--device", "toaster"], "invalid choice 'toaster' for argument '--device'"),
        (inpaint.main, [*FILL, "--temperature", "0", "1"], "temperature must be at least 0.000001, not (0.0, 1.0)"),
        (inpaint.main, [*FILL, "--classes", "cats"], "no class is called 'cats'; there are: 0, 1"),
        (sample.main, ["--prior", "pair", "--guidance", "-1"], "guidance must not be negative, got -1.0"),
        (sample.main, ["--prior", "pair", "--steps", "0"], "--steps must be at least 1, not 0"),
        (evaluate.main, ["--of", "nothing"], "--of nothing cannot be evaluated; give one of tokenizer, prior"),
        (evaluate.main, ["--prior", "pair", "--num", "3"], "--num and --reference must be at least 4, not 3 and 5000"),
    ],
)
def test_wrong_input_gives_one_line(workspace, capfd, main, arguments, message):
    before = sorted(workspace.rglob("*"))
    status, out, err = run(capfd, main, *arguments)
    assert (status, out) == (2, "")
    assert err.count("\n") == 1, err
    assert err.startswith("error: ")
    assert message in err
    assert sorted(workspace.rglob("*")) == before


def test_the_folder_of_a_training_is_no_file(workspace, capfd):
    before = (workspace / "in.png").read_bytes()
    status, _, err = run(capfd, train_tokenizer.main, "--images", "pictures", "--out", "in.png")
    assert status == 2
    assert err.splitlines()[-1] == "error: in.png cannot be written: it is a file, not a folder; give another --out"
    assert (workspace / "in.png").read_bytes() == before
