"""The inpainting command: files and folders, all kinds of masks, expanded images."""

import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.command_toys import run, save_pair
from PIL import Image, ImageCms

from smalti.commands.inpainting import Filling, fill
from smalti.commands.model_paths import load_priors
from smalti.core.randomness import row_seeds
from smalti.priors.methods.sundae import SundaeSampling
from smalti.scripts import inpaint

QUICK = ["--steps", "2", "--candidates", "2", "--precision", "fp32"]
COMMON = ["--prior", "pair", *QUICK]


@pytest.fixture(scope="module", autouse=True)
def workspace(tmp_path_factory):
    """A working folder with a prior `pair`, an image `in.png` of 20x12 pixels and its mask, a box."""
    folder = tmp_path_factory.mktemp("inpaint")
    save_pair(folder / "pair")
    Image.fromarray(noise(0)).save(folder / "in.png")
    Image.fromarray(box()).save(folder / "mask.png")
    before = Path.cwd()
    os.chdir(folder)
    yield folder
    os.chdir(before)


def noise(seed, height=12, width=20):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3)).astype(np.uint8)


def box(height=12, width=20):
    mask = np.zeros((height, width), np.uint8)
    mask[2:7, 3:9] = 255
    return mask


def read(path):
    return np.array(Image.open(path))


def test_several_fills_and_a_sheet_are_written_with_their_settings(capfd):
    status, out, _ = run(capfd, inpaint.main, *COMMON, "--image", "in.png", "--mask", "mask.png", "--out", "a/out.png")
    assert (status, out) == (0, "a/out.png\n")
    assert sorted(path.name for path in Path("a").iterdir()) == ["out-2.png", "out-3.png", "out-sheet.png", "out.png"]
    fills = [read(f"a/out{end}.png") for end in ("", "-2", "-3")]
    known = box() == 0
    for filled in fills:
        assert np.array_equal(filled[known], noise(0)[known])
        assert not np.array_equal(filled[~known], noise(0)[~known])
    assert not np.array_equal(fills[0], fills[1])
    settings = json.loads(Image.open("a/out-2.png").text["smalti"])
    assert (settings["fill"], settings["mask"], settings["candidates"]) == (1, "mask.png", 2)


def test_the_command_gives_the_functions_result(capfd):
    assert (
        run(capfd, inpaint.main, *COMMON, "--image", "in.png", "--mask", "mask.png", "--num", "1", "--seed", "4")[0]
        == 0
    )
    filled = fill(
        *load_priors(("pair",), None),
        torch.from_numpy(noise(0)).permute(2, 0, 1)[None],
        torch.from_numpy(box() > 0)[None],
        seeds=row_seeds(4, torch.arange(1)),
        sampling=SundaeSampling(steps=2),
        filling=Filling(candidates=2),
    )
    assert np.array_equal(read("runs/inpainted.png"), filled[0].permute(1, 2, 0).numpy())


def test_a_folder_of_images_takes_a_folder_of_masks_or_one_mask(capfd):
    for name in ("pictures", "masks"):
        Path(name).mkdir()
    for index, (kind, mask_kind) in enumerate([("png", "png"), ("jpg", "png"), ("bmp", "tiff")]):
        Image.fromarray(noise(index)).save(f"pictures/{index}.{kind}")
        Image.fromarray(np.roll(box(), index)).save(f"masks/{index}.{mask_kind}")
    Path("pictures/notes.txt").write_text("not a picture")
    common = [*COMMON, "--num", "1", "--image", "pictures"]
    assert run(capfd, inpaint.main, *common, "--mask", "masks", "--out", "many")[:2] == (0, "many\n")
    assert sorted(path.name for path in Path("many").glob("?.png")) == ["0.png", "1.png", "2.png"]
    for index, kind in enumerate(["png", "jpg", "bmp"]):
        known = np.roll(box(), index) == 0
        image = np.array(Image.open(f"pictures/{index}.{kind}"))
        assert np.array_equal(read(f"many/{index}.png")[known], image[known])
    assert run(capfd, inpaint.main, *common, "--mask", "mask.png", "--out", "alike")[0] == 0
    alone = ["--num", "1", "--image", "pictures/1.jpg", "--mask", "mask.png", "--out", "alone.png"]
    assert run(capfd, inpaint.main, *COMMON, *alone)[0] == 0
    assert np.array_equal(read("alike/1.png"), read("alone.png"))  # the folder does not change a fill


def test_expanding_an_image_keeps_its_pixels(capfd):
    grow = ["--image", "in.png", "--num", "1", "--expand", "3", "0", "5", "2", "--out", "grown.png"]
    assert run(capfd, inpaint.main, *COMMON, *grow)[0] == 0
    grown = read("grown.png")
    assert grown.shape == (12 + 2, 20 + 3 + 5, 3)
    assert np.array_equal(grown[:12, 3:23], noise(0))
    assert len(np.unique(grown[:, :3].reshape(-1, 3), axis=0)) > 1
    assert run(capfd, inpaint.main, *COMMON, *grow, "--mask", "mask.png", "--out", "both.png")[0] == 0
    both, known = read("both.png")[:12, 3:23], box() == 0
    assert np.array_equal(both[known], noise(0)[known])
    assert not np.array_equal(both[~known], noise(0)[~known])


def test_transparent_pixels_are_masked(capfd):
    Image.fromarray(np.dstack([noise(0), 255 - box()])).save("erased.png")
    assert run(capfd, inpaint.main, *COMMON, "--image", "erased.png", "--num", "1", "--out", "filled.png")[0] == 0
    assert run(capfd, inpaint.main, *COMMON, "--image", "in.png", "--mask", "mask.png", "--num", "1")[0] == 0
    assert np.array_equal(read("filled.png"), read("runs/inpainted.png"))


def test_soft_edges_of_what_was_erased_keep_their_colours(capfd):
    """Fills equal those with a mask, although the image on white has a light rim, which the encoder would see."""
    erased = np.zeros((12, 20), np.uint8)
    erased[1:8, 2:10] = 100  # transparency below the threshold
    erased[box() > 0] = 255
    Image.fromarray(np.dstack([noise(0), 255 - erased])).save("soft-hole.png")
    flags = ["--image", "soft-hole.png", "--num", "1", "--out", "soft-filled.png"]
    assert run(capfd, inpaint.main, *COMMON, *flags)[0] == 0
    assert run(capfd, inpaint.main, *COMMON, "--image", "in.png", "--mask", "mask.png", "--num", "1")[0] == 0
    assert np.array_equal(read("soft-filled.png"), read("runs/inpainted.png"))


def test_inverted_thresholded_and_resized_masks_are_equal(capfd):
    Image.fromarray(255 - box()).save("inverted.png")
    Image.fromarray(box() // 5 + 40).save("faint.png")  # 40 and 91
    Image.fromarray(box().repeat(3, 0).repeat(3, 1)).save("large.png")
    results = []
    for name, flags in [
        ("mask.png", []),
        ("inverted.png", ["--invert"]),
        ("faint.png", ["--threshold", "60"]),
        ("large.png", ["--resize-mask"]),
    ]:
        arguments = ["--image", "in.png", "--mask", name, *flags, "--num", "1", "--out", "same.png"]
        assert run(capfd, inpaint.main, *COMMON, *arguments)[0] == 0
        results.append(read("same.png"))
    assert all(np.array_equal(result, results[0]) for result in results)


def test_notes_on_resized_images_and_large_masks(capfd):
    Image.fromarray(noise(1, 41, 61)).save("odd.png")
    Image.fromarray(box(41, 61) ^ 255).save("most.png")
    flags = ["--image", "odd.png", "--mask", "most.png", "--num", "1", "--feather", "2", "--out", "odd-out.png"]
    status, _, err = run(capfd, inpaint.main, *COMMON, *flags)
    assert status == 0
    assert "odd.png is filled at 28x20, as this model's codes are 2 pixels wide and it was trained at 16x8" in err
    assert "the mask covers 99% of odd.png; use --invert if it is the wrong way round" in err
    assert read("odd-out.png").shape == (41, 61, 3)
    Image.fromarray(box(41, 61)).save("few.png")
    flags[3] = "few.png"
    assert run(capfd, inpaint.main, *COMMON, *flags, "--largest", "40")[0] == 0
    changed = (read("odd-out.png") != noise(1, 41, 61)).any(2)
    near = np.zeros_like(changed)
    near[0:9, 1:11] = True  # the box and two pixels around it
    assert not changed[~near].any()
    assert changed[0:2, 1:11].any()


def test_fills_depend_on_classes_and_guidance(capfd):
    results = []
    for flags in (["--classes", "1"], ["--classes", "1", "--guidance", "4"], ["--classes", "0", "1"], []):
        arguments = ["--image", "in.png", "--mask", "mask.png", *flags, "--num", "2", "--out", "class.png"]
        assert run(capfd, inpaint.main, *COMMON, *arguments)[0] == 0
        results.append((read("class.png"), read("class-2.png")))
    one, guided, both, any_class = results
    assert np.array_equal(one[1], both[1])  # classes take turns
    assert not np.array_equal(one[0], both[0])
    assert not np.array_equal(one[0], guided[0])
    assert not np.array_equal(one[0], any_class[0])


def contents(*patterns):
    return {path: path.read_bytes() for pattern in patterns for path in sorted(Path().glob(pattern))}


def test_fills_of_different_images_never_overwrite_each_other(capfd):
    """`img-2` is a picture, and the name of the second fill of `img`."""
    stems = ["img", "img-2", "img-3", "img-sheet", "img--2"]
    Path("photos").mkdir()
    for index, stem in enumerate(stems):
        Image.fromarray(noise(index)).save(f"photos/{stem}.png")
    flags = [*COMMON, "--candidates", "1", "--image", "photos", "--mask", "mask.png", "--out", "distinct"]
    status, _, err = run(capfd, inpaint.main, *flags)
    assert status == 0
    made = [json.loads(Image.open(path).text["smalti"]) for path in Path("distinct").iterdir()]
    assert len(made) == 4 * len(stems)
    fills = sorted((each["image"], each["fill"]) for each in made if "fill" in each)
    assert fills == sorted((f"photos/{stem}.png", fill) for stem in stems for fill in range(3))
    for stem in stems:
        assert json.loads(Image.open(f"distinct/{stem}.png").text["smalti"])["image"] == f"photos/{stem}.png"
        assert f"photos/{stem}.png: filling 12.5% of its pixels" in err


def test_inputs_are_never_overwritten(capfd):
    Path("inputs").mkdir()
    for name in ("a.png", "a-2.png", "mask.png"):
        Image.fromarray(box() if name == "mask.png" else noise(3)).save(f"inputs/{name}")
    Path("inputs/hard.png").hardlink_to("inputs/a-2.png")
    Path("linked").symlink_to("inputs")
    Path("covers").mkdir()
    for path in Path("inputs").iterdir():
        Image.fromarray(box()).save(f"covers/{path.name}")
    before = contents("inputs/*")
    one = ["--image", "inputs/a-2.png", "--mask", "inputs/mask.png", "--overwrite"]
    for flags in [
        [*one, "--out", "inputs/a.png"],  # its second fill is a-2.png
        [*one, "--out", "inputs/../inputs/a-2.png"],
        [*one, "--out", "linked/mask.png"],
        [*one, "--out", "inputs/hard.png"],
        ["--image", "inputs", "--mask", "mask.png", "--out", "linked"],
        ["--image", "inputs", "--mask", "covers", "--out", "covers"],
    ]:
        status, _, err = run(capfd, inpaint.main, *COMMON, *flags)
        assert (status, err.count("\n")) == (2, 1), err
        assert "would overwrite an input" in err
        assert contents("inputs/*") == before


def test_only_fills_of_the_same_image_are_replaced(capfd):
    flags = [*COMMON, "--mask", "mask.png", "--out", "kept/out.png", "--num", "2"]
    assert run(capfd, inpaint.main, *flags, "--image", "in.png")[0] == 0
    assert run(capfd, inpaint.main, *flags, "--image", "in.png", "--seed", "1")[0] == 0
    Image.fromarray(noise(9)).save("other.png")
    before = contents("kept/*")
    status, _, err = run(capfd, inpaint.main, *flags, "--image", "other.png")
    assert (status, err.count("\n")) == (2, 1)
    assert "--out kept/out.png exists and this command did not make it from the same input" in err
    assert contents("kept/*") == before
    assert run(capfd, inpaint.main, *flags, "--image", "other.png", "--overwrite")[0] == 0
    assert contents("kept/*") != before
    Path("kept/notes-2.png").write_text("mine")
    flags[4] = "kept/notes.png"
    assert run(capfd, inpaint.main, *COMMON, *flags[-6:-3], "kept/notes.png", "--image", "in.png")[0] == 2
    assert Path("kept/notes-2.png").read_text() == "mine"


@pytest.mark.parametrize(("image", "out"), [("in.png", "left/out.png"), ("one", "left-folder")])
def test_fills_of_an_earlier_run_with_more_fills_are_named(capfd, image, out):
    Path("one").mkdir(exist_ok=True)
    Image.fromarray(noise(0)).save("one/out.png")
    flags = [*COMMON, "--mask", "mask.png", "--image", image, "--out", out, "--num", "3"]
    assert "of an earlier run" not in run(capfd, inpaint.main, *flags)[2]
    folder = Path(out) if Path(out).is_dir() else Path(out).parent
    Image.fromarray(noise(0)).save(folder / "out-7.png")
    flags[-1] = "2"
    note = f"note: {folder / 'out-3.png'} of an earlier run stayed beside the new files"
    assert note in run(capfd, inpaint.main, *flags)[2]


@pytest.mark.skipif(sys.platform != "linux", reason="other systems take names that differ in case for one file")
def test_names_that_differ_in_case_are_different_files(capfd):
    flags = [*COMMON, "--mask", "mask.png", "--image", "in.png", "--num", "1"]
    assert run(capfd, inpaint.main, *flags, "--out", "case/a.PNG")[0] == 0
    assert run(capfd, inpaint.main, *flags, "--out", "case/a.PNG")[0] == 0  # its own file
    assert run(capfd, inpaint.main, *flags, "--out", "case/b.png")[0] == 0
    Path("case/b.PNG").write_text("mine")
    assert run(capfd, inpaint.main, *flags, "--out", "case/b.PNG")[0] == 2
    assert Path("case/b.PNG").read_text() == "mine"


def test_a_mask_needs_its_image(capfd):
    status, _, err = run(capfd, inpaint.main, *COMMON, "--mask", "mask.png")
    assert status == 2
    assert err.startswith("error: --mask mask.png needs its image; give --image;")


def test_white_paint_on_a_transparent_layer_is_the_mask(capfd):
    layer = np.dstack([np.full((12, 20, 3), 255, np.uint8), box()])
    Image.fromarray(layer).save("layer.png")
    for name in ("layer.png", "mask.png"):
        status, _, err = run(
            capfd, inpaint.main, *COMMON, "--image", "in.png", "--mask", name, "--num", "1", "--out", f"by-{name}"
        )
        assert status == 0
        assert "filling 12.5% of its pixels" in err
        assert ("white paint on a transparent layer" in err) == (name == "layer.png")
    assert np.array_equal(read("by-layer.png"), read("by-mask.png"))


def test_transparency_and_colour_profile_are_kept(capfd):
    alpha = np.linspace(0, 255, 240).astype(np.uint8).reshape(12, 20)
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    Image.fromarray(np.dstack([noise(0), alpha])).save("soft.png", icc_profile=profile)
    flags = [*COMMON, "--image", "soft.png", "--mask", "mask.png", "--num", "1", "--feather", "1"]
    assert run(capfd, inpaint.main, *flags, "--expand", "2", "0", "0", "1", "--out", "soft-out.png")[0] == 0
    filled = Image.open("soft-out.png")
    assert filled.mode == "RGBA"
    assert filled.info["icc_profile"] == profile
    inner, known = np.array(filled)[:12, 2:], box() == 0
    assert (inner[~known, 3] == 255).all()
    assert (np.array(filled)[12:, :, 3] == 255).all()
    opaque = alpha == 255
    assert np.array_equal(inner[known, 3], alpha[known])
    assert np.array_equal(inner[known & ~opaque, :3], noise(0)[known & ~opaque])
    Image.fromarray(noise(0)[..., 0]).save("grey.png", icc_profile=profile)  # a profile of colours on a grey image
    flags[flags.index("soft.png")] = "grey.png"
    assert run(capfd, inpaint.main, *flags, "--out", "grey-out.png")[0] == 0
    assert Image.open("grey-out.png").mode == "RGB"


def test_large_images_are_small_on_the_sheet(capfd):
    Image.fromarray(noise(0, 1030, 20)).save("tall.png")
    Image.fromarray(box(1030, 20)).save("tall-mask.png")
    flags = ["--image", "tall.png", "--mask", "tall-mask.png", "--num", "1", "--out", "tall-out.png"]
    assert run(capfd, inpaint.main, *COMMON, *flags)[0] == 0
    assert read("tall-out.png").shape == (1030, 20, 3)
    assert read("tall-out-sheet.png").shape[0] < 3 * 600


def test_slight_transparency_is_not_a_mask_for_expand(capfd):
    alpha = np.full((12, 20), 255, np.uint8)
    alpha[3, 3] = 200
    Image.fromarray(np.dstack([noise(0), alpha])).save("slight.png")
    flags = [*COMMON, "--image", "slight.png", "--num", "1", "--out", "slight-out.png"]
    assert run(capfd, inpaint.main, *flags, "--expand", "0", "0", "8", "0")[0] == 0
    assert read("slight-out.png").shape == (12, 28, 4)
    assert np.array_equal(read("slight-out.png")[:, :20], read("slight.png"))  # not on white
    assert (read("slight-out.png")[:, 20:, 3] == 255).all()
    status, _, err = run(capfd, inpaint.main, *flags)
    assert (status, "masks nothing: no pixel is transparent" in err) == (2, True)


def test_a_folder_of_fills_may_have_a_dot_in_its_name(capfd):
    Path("two").mkdir()
    Image.fromarray(noise(0)).save("two/a.png")
    flags = [*COMMON, "--image", "two", "--mask", "mask.png", "--num", "1", "--out"]
    assert run(capfd, inpaint.main, *flags, "fills.v3")[0] == 0
    assert Path("fills.v3/a.png").exists()
    status, _, err = run(capfd, inpaint.main, *flags, "fills.png")
    assert (status, "so --out must be a folder, not fills.png" in err) == (2, True)
