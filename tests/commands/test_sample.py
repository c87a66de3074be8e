"""The sampling command: sheets, single files and animations."""

import json
import os
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.command_toys import run, save_pair
from PIL import Image

from smalti.commands.generating import generate_codes, generate_images
from smalti.commands.model_paths import load_prior_with_tokenizer
from smalti.commands.sample import _write_files
from smalti.images.decoding import to_uint8
from smalti.images.sheets import CAPTION_SIZE, GAP, SMALLEST_SHOWN, save_png
from smalti.priors.methods.sundae import SundaeSampling
from smalti.scripts import sample

FLAGS = ["--prior", "pair", "--num", "11", "--batch-size", "4", "--steps", "3", "--precision", "fp32"]


@pytest.fixture(scope="module", autouse=True)
def workspace(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sample")
    save_pair(folder / "pair")
    before = Path.cwd()
    os.chdir(folder)
    yield folder
    os.chdir(before)


def pictures(sheet, count, height=8, width=16):
    """Returns the images on a sheet at their own size."""
    factor = -(-SMALLEST_SHOWN // max(height, width))
    down, across = height * factor + 2 * GAP, width * factor + 2 * GAP
    columns = sheet.size[0] // across
    images = []
    for index in range(count):
        top, left = index // columns * down + GAP, index % columns * across + GAP
        images.append(np.array(sheet)[top : top + height * factor : factor, left : left + width * factor : factor])
    return np.stack(images)


def test_the_default_name_is_numbered_if_samples_of_another_prior_are_there(capfd):
    prior, tokenizer = load_prior_with_tokenizer("pair", None)
    next(prior.parameters()).data += 1
    prior.save(Path("other"))
    tokenizer.save(Path("other/tokenizer"))
    flags = [*FLAGS[2:], "--num", "1"]
    for prior, name in (("pair", "samples"), ("other", "samples-2"), ("pair", "samples"), ("other", "samples-2")):
        assert run(capfd, sample.main, "--prior", prior, *flags)[:2] == (0, f"runs/{name}.png\n")
    status, _, err = run(capfd, sample.main, "--prior", "other", *flags, "--out", "runs/samples.png")
    assert (status, "runs/samples.png exists" in err) == (2, True)
    assert run(capfd, sample.main, "--prior", "other", *flags, "--overwrite")[:2] == (0, "runs/samples.png\n")


def test_single_files_hold_their_number_and_settings(capfd):
    assert run(capfd, sample.main, *FLAGS, "--files", "--seed", "3", "--out", "many.png")[:2] == (0, "many.png\n")
    names = sorted(path.name for path in Path("many").iterdir())
    assert names == [f"{number:02}.png" for number in range(11)]
    files = [Image.open(Path("many", name)) for name in names]
    assert np.array_equal(np.stack([np.array(file) for file in files]), pictures(Image.open("many.png"), 11))
    settings = [json.loads(file.text["smalti"]) for file in files]
    assert [each["number"] for each in settings] == list(range(11))
    assert settings[4]["seed"] == 3
    prior, tokenizer = load_prior_with_tokenizer("pair", None)
    again = generate_images(
        [prior], tokenizer, num=11, seed=3, sampling=SundaeSampling(steps=settings[0]["steps"]), precision="fp32"
    )
    assert np.array_equal(np.array(files[7]), again[7].permute(1, 2, 0).numpy())


def test_files_of_an_earlier_run_with_more_images_are_named(capfd):
    """Names have as many digits as the largest number, so that the runs would be mixed in one folder."""
    flags = [*FLAGS, "--files", "--out", "fewer.png"]
    assert "of an earlier run" not in run(capfd, sample.main, *flags)[2]
    Image.new("RGB", (2, 2)).save("fewer/mine.png")
    flags[flags.index("11")] = "4"
    assert "note: fewer/00.png and 10 more of an earlier run stayed beside" in run(capfd, sample.main, *flags)[2]
    assert len(list(Path("fewer").iterdir())) == 11 + 4 + 1


def test_a_sheet_shows_the_first_images_if_not_all_fit(capfd, monkeypatch):
    assert run(capfd, sample.main, *FLAGS, "--files", "--out", "all.png")[0] == 0
    monkeypatch.setattr("smalti.images.sheets.MOST_PIXELS", 6 * 104 * 56)
    flags = [*FLAGS, "--animate", "--out", "first.png"]
    status, _, err = run(capfd, sample.main, *flags)
    assert (status, err.count("\n")) == (2, 1)
    assert "11 images of 16x8 do not fit on a sheet; the most is --num 6, or pass --files" in err
    status, _, err = run(capfd, sample.main, *flags, "--files")
    assert (status, "first.png shows the first 6 images" in err) == (0, True)
    every = np.stack([np.array(Image.open(f"all/{number:02}.png")) for number in range(11)])
    assert np.array_equal(np.stack([np.array(Image.open(f"first/{number:02}.png")) for number in range(11)]), every)
    assert np.array_equal(pictures(Image.open("first.png"), 6), every[:6])
    with Image.open("first-steps.png") as moving:
        assert moving.size == Image.open("first.png").size
        moving.seek(moving.n_frames - 1)
        assert np.array_equal(pictures(moving.convert("RGB"), 6), every[:6])


def test_files_are_written_batch_by_batch_and_stay_if_the_command_is_stopped(capfd, monkeypatch):
    written = []

    def stop_at_seventh(path, image, settings):
        written.append(path)
        if len(written) == 7:
            raise KeyboardInterrupt
        save_png(path, image, settings)

    flags = [*FLAGS, "--files", "--out", "begun.png"]
    with monkeypatch.context() as patch:
        patch.setattr("smalti.commands.sample.save_png", stop_at_seventh)
        status, _, err = run(capfd, sample.main, *flags)
    assert (status, "note: 6 of 11 images were written to begun" in err) == (130, True)
    assert sorted(path.name for path in Path("begun").iterdir()) == [f"{number:02}.png" for number in range(6)]
    assert not Path("begun.png").exists()
    assert run(capfd, sample.main, *flags)[0] == 0
    assert len(list(Path("begun").iterdir())) == 11


def test_only_the_images_on_the_sheet_are_kept(tmp_path):
    drawn = []

    def batches():
        for number in range(6):
            pixels = np.full((2, 3, 4, 4), number, dtype=np.uint8)
            drawn.append(weakref.ref(pixels))
            yield torch.from_numpy(pixels)
            assert sum(each() is not None for each in drawn) <= 3  # those of the shown images, and this batch

    shown = _write_files(batches(), [tmp_path / f"{number}.png" for number in range(12)], {}, 3)
    assert shown[:, 0, 0, 0].tolist() == [0, 0, 1]
    assert len(list(tmp_path.iterdir())) == 12


def test_too_many_files_are_refused(capfd):
    status, _, err = run(capfd, sample.main, *FLAGS, "--files", "--num", 10**9)
    assert (status, err.count("\n"), "too many files" in err) == (2, 1, True)


@torch.no_grad()
def test_an_animation_shows_every_sampling_step(capfd):
    assert run(capfd, sample.main, *FLAGS, "--classes", "1", "--animate", "--out", "moving.png")[0] == 0
    with Image.open("moving-steps.png") as moving:
        assert moving.n_frames == 3
        frames = []
        for index in range(3):
            moving.seek(index)
            frames.append(pictures(moving.convert("RGB"), 11))
    prior, tokenizer = load_prior_with_tokenizer("pair", None)
    steps = []
    labels = torch.ones(11, dtype=torch.int64)
    sampling = SundaeSampling(steps=3)
    generate_codes(
        prior, torch.arange(11), labels, seed=0, sampling=sampling, callback=lambda _, codes: steps.append(codes)
    )
    for frame, codes in zip(frames, steps, strict=True):
        assert np.array_equal(frame, to_uint8(tokenizer.decode((codes,))).permute(0, 2, 3, 1).numpy())
    assert not np.array_equal(frames[0], frames[-1])


def test_a_class_that_is_given_twice_is_drawn_twice_in_turn(capfd):
    assert run(capfd, sample.main, *FLAGS, "--classes", "1", "1", "0", "--files", "--out", "turns.png")[0] == 0
    prior, tokenizer = load_prior_with_tokenizer("pair", None)
    options = {"num": 11, "seed": 0, "sampling": SundaeSampling(steps=3), "precision": "fp32"}
    expected = generate_images([prior], tokenizer, conditions=[1, 1, 0], **options).permute(0, 2, 3, 1)
    files = np.stack([np.array(Image.open(path)) for path in sorted(Path("turns").iterdir())])
    assert np.array_equal(files, expected.numpy())
    sheet, turns = Image.open("turns.png"), np.array([1, 1, 0] * 4)[:11]
    down, band = sheet.size[1] // 2, CAPTION_SIZE + 2 * GAP  # a row of the sheet for each class, below its name
    for row, number in enumerate((1, 0)):
        of_class = files[turns == number]
        shown = pictures(sheet.crop((0, row * down + band, sheet.size[0], (row + 1) * down)), len(of_class))
        assert np.array_equal(shown, of_class)


def test_long_animations_keep_the_last_of_every_few_steps(capfd, monkeypatch):
    more = ["--num", "3", "--steps", "7", "--animate"]
    assert run(capfd, sample.main, *FLAGS, *more, "--out", "every.png")[0] == 0
    monkeypatch.setattr("smalti.commands.sample.MOST_FRAMES", 3)
    assert run(capfd, sample.main, *FLAGS, *more, "--out", "few.png")[0] == 0
    with Image.open("every-steps.png") as every, Image.open("few-steps.png") as few:
        assert (every.n_frames, few.n_frames) == (7, 3)
        for frame, step in enumerate((2, 5, 6)):
            every.seek(step)
            few.seek(frame)
            assert np.array_equal(np.array(every.convert("RGB")), np.array(few.convert("RGB")))


def test_only_the_sheet_is_written_by_default(capfd, workspace):
    before = set(workspace.rglob("*"))
    assert run(capfd, sample.main, *FLAGS, "--out", "only.png")[0] == 0
    assert set(workspace.rglob("*")) - before == {workspace / "only.png"}


def test_only_samples_of_the_same_prior_are_replaced(capfd):
    assert run(capfd, sample.main, *FLAGS, "--files", "--animate", "--out", "own.png")[0] == 0
    assert run(capfd, sample.main, *FLAGS, "--files", "--animate", "--seed", "1", "--out", "own.png")[0] == 0
    before = np.array(Image.open("own.png"))
    for name in ("own-steps.png", "own/05.png", "own.png"):
        Image.new("L", (4, 4)).save(name)
        status, _, err = run(capfd, sample.main, *FLAGS, "--files", "--animate", "--out", "own.png")
        assert (status, err.count("\n")) == (2, 1)
        assert f"--out {name} exists and this command did not make it" in err
    again = ["--files", "--animate", "--seed", "1", "--out", "own.png", "--overwrite"]
    assert run(capfd, sample.main, *FLAGS, *again)[0] == 0
    assert np.array_equal(np.array(Image.open("own.png")), before)
    assert np.array(Image.open("own/05.png")).shape == (8, 16, 3)


def test_a_home_folder_after_an_equals_sign_is_expanded(capfd, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert run(capfd, sample.main, *FLAGS, "--num", "1", "--out=~/deep/s.png")[0] == 0
    assert (tmp_path / "deep" / "s.png").exists()
    assert not Path("~").exists()
