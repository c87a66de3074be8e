"""Reading images as commands do: what is printed about images of other proportions, and what is kept of the check."""

import pytest
from helpers.image_toys import png
from PIL import Image

from smalti.core.errors import UserError
from smalti.images import checks
from smalti.images.formats.opening import BadImageError
from smalti.images.image_set import ImageRows
from smalti.images.reading import Reading, held_out_rows, read_images, read_images_for

SIZE = {"height": 8, "width": 8, "channels": 3}
FORM = {"channels": 3, "depth": 8, "limit": None}


@pytest.fixture
def folder(tmp_path):
    """A folder of three portraits, one landscape, and six images that are square or nearly so."""
    for number, size in enumerate([(30, 40)] * 3 + [(64, 48)] + [(8, 8)] * 5 + [(100, 101)]):
        Image.new("RGB", size, "teal").save(tmp_path / f"{number}.png")
    return tmp_path


@pytest.mark.parametrize(
    ("fit", "expected"),
    [
        (
            None,
            "images: 4 of 10 images are not square: the centre is kept (--fit pad keeps all, in white borders)",
        ),
        ("pad", "images: 4 of 10 images are not square: they get white borders"),
        ("squash", "images: 4 of 10 images are not square: they are squashed"),
    ],
)
def test_images_of_other_proportions_are_counted(folder, capfd, fit, expected):
    for _ in range(2):  # the second time from the kept check
        read_images(str(folder), Reading(fit=fit), **SIZE)
        assert capfd.readouterr().err.splitlines()[-1] == expected


def test_proportions_are_those_of_the_model(folder, capfd):
    read_images(str(folder), Reading(), height=6, width=8, channels=3)
    start = "images: 9 of 10 images are not of the proportions 8:6: "
    assert capfd.readouterr().err.splitlines()[-1].startswith(start)
    for number in range(4):
        (folder / f"{number}.png").unlink()
    read_images(str(folder), Reading(), **SIZE)
    assert "of 6 images" not in capfd.readouterr().err


def test_a_trained_model_keeps_its_fit(folder, capfd):
    trained = read_images(str(folder), Reading(fit="squash"), **SIZE)
    provenance = {"image_source": str(folder), "preprocessing": trained.preprocessing}
    for source in (None, str(folder)):
        images = read_images_for(provenance, "it", source, Reading(), **SIZE)
        assert images.preprocessing["fit"] == trained.preprocessing["fit"]
        assert capfd.readouterr().err.endswith("they are squashed (as in the training)\n")
    images = read_images_for(provenance, "it", None, Reading(fit="pad"), **SIZE)
    assert images.preprocessing["fit"] == "longer side, white borders"
    old = read_images_for({"image_source": str(folder)}, "it", None, Reading(), **SIZE)
    assert old.preprocessing["fit"] == "shorter side, centre crop"
    with pytest.raises(UserError, match="it does not record which images it was trained on; give --images"):
        read_images_for({}, "it", None, Reading(), **SIZE)


def test_images_left_out_are_counted_in_no_sum(folder, capfd):
    (folder / "0.png").write_bytes(png("red")[:40])
    with pytest.raises(BadImageError, match=r"0\.png, row 0: .* or leave out such images with --on-bad-image skip"):
        read_images(str(folder), Reading(), **SIZE)
    images = read_images(str(folder), Reading(on_bad_image="skip"), **SIZE)
    lines = capfd.readouterr().err.splitlines()
    assert lines[-2].startswith("images: 1 left out: ")
    assert lines[-1].startswith("images: 3 of 9 images are not square")
    assert len(ImageRows(images, split="all", flips=False)) == 9


def test_held_out_rows_are_refused_if_there_are_none(folder):
    images = [read_images(str(folder), Reading(held_out=share), **SIZE) for share in ("0.5", "none")]
    assert len(held_out_rows(images[0])) == images[0].held_out.sum() > 0
    with pytest.raises(UserError, match="has no held-out images; give more --images"):
        held_out_rows(images[1])


def test_a_check_that_cannot_be_kept_is_made_again(folder, monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setattr(checks, "HF_DATASETS_CACHE", str(tmp_path / "file" / "below"))
    first, again = (read_images(str(folder), Reading(), **SIZE).check() for _ in range(2))
    assert first.sizes == again.sizes
    assert not checks.load_checks("a fingerprint", FORM)


def test_an_unreadable_file_is_checked_again(folder):
    """Its bytes are not part of the fingerprint, so a kept result could be of another file."""
    (folder / "0.png").unlink()
    (folder / "0.png").symlink_to(folder / "nowhere.png")
    images = read_images(str(folder), Reading(on_bad_image="skip"), **SIZE)
    assert images.left_out.sum() == 1
    assert checks.load_checks(images.fingerprint, FORM) is None


@pytest.mark.parametrize(("recorded", "source", "shares"), [("0.5", "0.5", True), ("0.5", "folds/0.5", False)])
def test_held_out_images_in_a_folder_named_like_a_number_are_no_share(folder, recorded, source, shares):
    """Latent sets record the last part of its path; other images then have the usual share."""
    provenance = {"preprocessing": {"held_out": recorded}, "held_out": source}
    images = read_images_for(provenance, "it", str(folder), Reading(), **SIZE)
    usual = read_images(str(folder), Reading(), **SIZE)
    assert images.held_out.equal(usual.held_out) != shares
