"""Tests of compress and decompress: neither writes over a file that it did not make."""

from pathlib import Path

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
