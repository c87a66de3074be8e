"""Tests of compress and decompress: neither writes over a file that it did not make."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import toys
from PIL import Image

from smalti.commands.compress import Compress, Decompress, compress, decompress
from smalti.core import models
from smalti.core.errors import UserError
from smalti.latentsets.packed_file import find_name_error


@pytest.fixture
def tokenizer(tmp_path):
    torch.manual_seed(0)
    models.class_of_kind("tokenizer", "hrvq")(toys.TINY["hrvq"]).save(tmp_path / "tokenizer")
    Image.new("RGB", (16, 16), "red").save(tmp_path / "one.png")
    return str(tmp_path / "tokenizer")


def test_output_is_never_the_picture_nor_another_file(tmp_path, tokenizer):
    picture = tmp_path / "one.png"
    before = picture.read_bytes()
    (tmp_path / "link.png").symlink_to(picture)
    (tmp_path / "notes.txt").write_text("mine")
    for out in ("one.png", "link.png", "notes.txt"):
        with pytest.raises(UserError, match=r"would overwrite an input|exists and this command did not make it"):
            compress(Compress(tokenizer, images=str(picture), out=tmp_path / out))
    assert picture.read_bytes() == before
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_decompress_writes_over_its_own_images_alone(tmp_path, tokenizer):
    codes = compress(Compress(tokenizer, images=str(tmp_path / "one.png"), out=tmp_path / "c.smalti"))
    compress(Compress(tokenizer, images=str(tmp_path / "one.png"), out=codes))  # its own file is replaced
    (tmp_path / "back").mkdir()
    (tmp_path / "back" / "one.png").write_text("mine")
    with pytest.raises(UserError, match=r"back/one\.png exists and this command did not make it"):
        decompress(Decompress(codes, tokenizer, out=tmp_path / "back"))
    assert (tmp_path / "back" / "one.png").read_text() == "mine"
    for _ in range(2):
        decompress(Decompress(codes, tokenizer, out=tmp_path / "new"))
    assert (tmp_path / "new" / "one.png").exists()


def test_decompress_recognises_the_arrays_of_its_images(tmp_path):
    """Images of more than four channels are written as a PNG of the first three, and as an array."""
    five = replace(toys.TINY["hrvq"], image_channels=5)
    models.class_of_kind("tokenizer", "hrvq")(five).save(tmp_path / "five")
    np.save(tmp_path / "one.npy", np.zeros((16, 16, 5), np.uint8))
    codes = compress(Compress(str(tmp_path / "five"), images=str(tmp_path / "one.npy"), out=tmp_path / "c.smalti"))
    settings = Decompress(codes, str(tmp_path / "five"), out=tmp_path / "back")
    for _ in range(2):
        decompress(settings)
    assert np.load(tmp_path / "back" / "one.npy").shape == (8, 12, 5)
    Image.new("RGB", (16, 16)).save(tmp_path / "back" / "one.png")
    (tmp_path / "back" / "one.npy").unlink()
    with pytest.raises(UserError, match=r"back/one\.png exists and this command did not make it"):
        decompress(settings)


def test_codes_of_other_images_are_replaced_with_overwrite_alone(tmp_path, tokenizer, monkeypatch):
    """Default names follow from the input's name."""
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (16, 16), "blue").save("two.png")
    codes = compress(Compress(tokenizer, images="one.png"))
    assert codes == Path("runs/one.smalti")
    assert decompress(Decompress(codes, tokenizer)) == Path("runs/one")
    before = codes.read_bytes()
    with pytest.raises(UserError, match="pass --overwrite"):
        compress(Compress(tokenizer, images="two.png", out=codes))
    assert codes.read_bytes() == before
    compress(Compress(tokenizer, images="two.png", out=codes, overwrite=True))
    assert decompress(Decompress(codes, tokenizer)) == Path("runs/one")
    assert sorted(path.name for path in Path("runs/one").glob("*.png")) == ["one.png", "two.png"]
    Path("runs/one/two.png").write_text("mine")
    with pytest.raises(UserError, match=r"one/two\.png exists .* pass --overwrite"):
        decompress(Decompress(codes, tokenizer))
    decompress(Decompress(codes, tokenizer, overwrite=True))


def test_file_names_are_kept_with_their_folders(tmp_path, tokenizer):
    names = ["a/img.png", "a/img.jpg", "b/IMG.png", "b/öd [1].webp", "c.d.png"]
    for number, name in enumerate(names):
        (tmp_path / "photos" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (16, 16), (40 * number, 0, 0)).save(tmp_path / "photos" / name)
    codes = compress(Compress(tokenizer, images=str(tmp_path / "photos"), out=tmp_path / "c.smalti"))
    out = decompress(Decompress(codes, tokenizer, out=tmp_path / "back"))
    written = sorted(path.relative_to(out).as_posix() for path in out.rglob("*.png"))
    assert written == ["a/img.jpg.png", "a/img.png.png", "b/IMG.png", "b/öd [1].png", "c.d.png"]


@pytest.mark.parametrize("name", ["../a", "/a", "a//b", "a/./b", "", "a\x1b[1m", "c:a", "a\\b", "."])
def test_names_that_leave_the_folder_are_refused(name):
    assert find_name_error([name], 1) is not None


def test_names_must_be_as_many_as_images_and_distinct():
    assert find_name_error(["a", "B/b"], 2) is None
    for names in (["a"], ["a", "A"], "ab", ["a", 1]):
        assert find_name_error(names, 2) is not None


def save_prior(folder, tokenizer, seed=0, **changes):
    torch.manual_seed(seed)
    level, cls = tokenizer.layout.levels[0], models.class_of_kind("prior", changes.pop("kind", "pixelcnn"))
    grid = {"height": level.height, "width": level.width, "radices": level.radices, "model_width": 8}
    prior = cls(cls.config_class(**grid, heads=2, layers=1, **changes))
    prior.provenance = {"tokenizer_digest": tokenizer.digest(), "level": 0, "label_names": ["blue", "red"]}
    prior.save(folder)
    tokenizer.save(folder / "tokenizer")
    return (str(folder),)


@pytest.fixture
def prior(tmp_path, tokenizer):
    pytest.importorskip("constriction")
    for number in range(6):
        (tmp_path / "photos" / "red").mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (16, 16), (40 * number, 255, 9)).save(tmp_path / "photos" / "red" / f"{number}.png")
    return save_prior(tmp_path / "prior", models.load(tokenizer, "tokenizer"), classes=2)


def pictures(folder):
    return {path.name: Image.open(path).tobytes() for path in folder.rglob("*.png")}


@pytest.mark.parametrize("classes", [False, True])
def test_pictures_are_the_same_with_and_without_a_prior(tmp_path, tokenizer, prior, classes, capsys):
    photos = str(tmp_path / "photos")
    fixed = compress(Compress(tokenizer, images=photos, out=tmp_path / "fixed.smalti"))
    expected = pictures(decompress(Decompress(fixed, tokenizer, out=tmp_path / "fixed")))
    coded = compress(Compress(prior=prior, classes=classes, images=photos, out=tmp_path / "coded.smalti"))
    assert "bits an image under the prior" in capsys.readouterr().out
    assert pictures(decompress(Decompress(coded, prior=prior, out=tmp_path / "coded"))) == expected
    assert len(expected) == 6


def test_entropy_coded_file_is_refused_without_its_prior_or_damaged(tmp_path, tokenizer, prior):
    picture, own = str(tmp_path / "one.png"), models.load(tokenizer, "tokenizer")
    coded = compress(Compress(prior=prior, images=picture, out=tmp_path / "coded.smalti"))
    fixed = compress(Compress(tokenizer, images=picture, out=tmp_path / "fixed.smalti"))
    other = save_prior(tmp_path / "other", own, seed=1, classes=2)
    hourglass = save_prior(tmp_path / "hourglass", own, kind="transformer")
    torch.manual_seed(9)
    models.class_of_kind("tokenizer", "hrvq")(toys.TINY["hrvq"]).save(tmp_path / "foreign")
    for settings, error in (
        (Decompress(coded, tokenizer), r"coded with a prior; pass the prior that encoded it as --prior"),
        (Decompress(fixed, tokenizer, prior), r"written without a prior; leave --prior out"),
        (
            Decompress(coded, tokenizer, other),
            r"coded with the prior \w{12}, but \S+ is \w{12}; pass the prior that encoded it as --prior",
        ),
        (
            Decompress(coded, tokenizer, hourglass),
            r"coded with the prior \w{12}, but \S+ is \w{12}; pass the prior that encoded it as --prior",
        ),
        (Decompress(coded, str(tmp_path / "foreign"), prior), r"was trained on codes of the tokenizer"),
    ):
        with pytest.raises(UserError, match=error):
            decompress(settings)
    whole = coded.read_bytes()
    for damaged in (whole[:-1], whole[:-2] + bytes([whole[-2] ^ 4]) + whole[-1:]):
        coded.write_bytes(damaged)
        with pytest.raises(UserError, match="is damaged"):
            decompress(Decompress(coded, tokenizer, prior))


def test_unsuitable_priors_and_classes_are_refused(tmp_path, tokenizer, prior):
    picture, own = str(tmp_path / "one.png"), models.load(tokenizer, "tokenizer")
    maskgit = toys.TINY["maskgit"]
    unsuited = models.class_of_kind("prior", "maskgit")(maskgit)
    unsuited.provenance = {"tokenizer_digest": own.digest(), "level": 0}
    unsuited.save(tmp_path / "maskgit")
    classless = save_prior(tmp_path / "classless", own)
    for settings, error in (
        (Compress(tokenizer, prior=(str(tmp_path / "maskgit"),), images=picture), "no exact likelihood"),
        (Compress(tokenizer, prior=classless, classes=True, images=picture), "leave --classes out"),
        (Compress(tokenizer, classes=True, images=picture), "leave --classes out"),
        (Compress(prior=prior, classes=True, images=picture), "have no classes; leave --classes out"),
        (Compress(prior=prior, layer=1, images=picture), "--layer needs --tokenizer"),
    ):
        with pytest.raises(UserError, match=error):
            compress(settings)


def test_a_folder_with_the_name_of_a_picture_is_decompressed_by_number(tmp_path, tokenizer):
    (tmp_path / "tree" / "a.png").mkdir(parents=True)
    Image.new("RGB", (16, 16), "red").save(tmp_path / "tree" / "a.jpg")
    Image.new("RGB", (16, 16), "blue").save(tmp_path / "tree" / "a.png" / "in.png")
    codes = compress(Compress(tokenizer, images=str(tmp_path / "tree"), out=tmp_path / "tree.smalti"))
    out = decompress(Decompress(codes, tokenizer, out=tmp_path / "back"))
    assert sorted(path.name for path in out.iterdir()) == ["00000.png", "00001.png"]
    assert find_name_error(["a", "a.png/in"], 2) == "names in its header are those of pictures and of folders at once"
