"""The functions and names that `smalti` exports."""

import subprocess
import sys
from importlib.metadata import version
from io import BytesIO
from pathlib import Path

import jaxtyping
import numpy as np
import pytest
import torch
from helpers.command_toys import save_pair
from helpers.toys import untrained_pair
from PIL import Image

import smalti
from smalti import (
    MaskedSampling,
    SundaeSampling,
    UserError,
    api,
    inpaint,
    load_prior,
    load_tokenizer,
    sample,
)
from smalti.core.hub.ids import parse_target
from smalti.priors.networks.hourglass import Hourglass


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return save_pair(tmp_path_factory.mktemp("api") / "pair")


@pytest.fixture
def image():
    return torch.randint(256, (3, 8, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def mask():
    mask = torch.zeros(8, 16, dtype=torch.bool)
    mask[2:6, 4:10] = True
    return mask


def test_exports_are_what_their_modules_hold():
    for name in smalti.__all__:
        assert getattr(smalti, name) is not None
    assert set(smalti.__all__) <= set(dir(smalti))
    assert sorted(name for names in smalti._MODULES.values() for name in names) == sorted(smalti.__all__)
    with pytest.raises(AttributeError, match="no attribute 'Tesserae'"):
        smalti.Tesserae  # noqa: B018 - asking is the test


def test_version_is_that_of_the_package():
    assert smalti.__version__ == version("smalti")


def test_a_loaded_prior_keeps_its_folder_if_the_working_directory_changes(pair, tmp_path, monkeypatch):
    monkeypatch.chdir(pair.parent)
    prior = load_prior("pair")
    expected = sample(prior, num=1)
    missing = "put it at pair/tokenizer, or"
    (pair / "tokenizer").rename(pair / "moved")
    with pytest.raises(UserError, match=missing):
        sample(prior, num=1)
    (pair / "moved").rename(pair / "tokenizer")
    monkeypatch.chdir(tmp_path)
    assert torch.equal(sample(prior, num=1), expected)
    files = prior.files_to_share(parse_target("me/x", None), tmp_path / "scratch")
    assert "tokenizer/config.json" in files
    assert str(pair).encode() not in files["README.md"]


def test_importing_smalti_loads_nothing():
    code = (
        "import sys, smalti; before = 'torch' in sys.modules; from smalti import Level; print(before, Level.__module__)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "smalti.core.codes"]


def test_samples_do_not_depend_on_their_number(pair):
    prior = load_prior(pair)
    sampling = SundaeSampling(steps=3)
    three = sample(prior, num=3, seed=5, sampling=sampling)
    assert three.shape == (3, 3, 8, 16)
    assert three.dtype == torch.uint8
    assert torch.equal(three[:2], sample(prior, load_tokenizer(pair / "tokenizer"), num=2, seed=5, sampling=sampling))
    assert not torch.equal(three[:2], sample(prior, num=2, seed=6, sampling=sampling))


def test_image_i_has_class_i_modulo_the_number_of_classes(pair, image, mask):
    prior = load_prior(pair)
    options = {"num": 3, "sampling": SundaeSampling(steps=3)}
    ones, zeros = (sample(prior, classes=[number] * 2, **options) for number in (1, 0))
    turns = sample(prior, classes=["1", "1", "0"], **options)
    assert torch.equal(turns, torch.cat([ones[:2], zeros[2:]]))
    assert not torch.equal(turns, ones)
    fills = [inpaint(prior, image, mask, classes=classes, **options) for classes in ([1, 1, 0], [1, 0])]
    assert torch.equal(fills[0][0], fills[1][0])
    assert not torch.equal(fills[0], fills[1])


def test_whole_numbers_of_other_libraries_are_python_integers(pair, image, mask):
    prior, sampling = load_prior(pair), SundaeSampling(steps=2)
    numbers = {"num": np.int64(2), "seed": torch.tensor(3)}
    assert torch.equal(
        sample(prior, batch_size=np.uint8(1), sampling=sampling, **numbers),
        sample(prior, num=2, seed=3, sampling=sampling),
    )
    assert torch.equal(
        inpaint(prior, image, mask, sampling=sampling, **numbers),
        inpaint(prior, image, mask, num=2, seed=3, sampling=sampling),
    )


def test_ambient_autocast_changes_no_pixel(pair):
    prior, options = load_prior(pair), {"num": 2, "sampling": SundaeSampling(steps=2), "precision": "fp32"}
    expected = sample(prior, **options)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(sample(prior, **options), expected)


def test_inpainting_keeps_pixels_outside_the_mask(pair, image, mask):
    fills = inpaint(load_prior(pair), image, mask, num=2)
    assert fills.shape == (2, 3, 8, 16)
    away = torch.nn.functional.max_pool2d(mask[None].float(), 7, 1, 3)[0] == 0
    assert torch.equal(fills[:, :, away], image[:, away].expand(2, -1, -1))
    assert not torch.equal(fills[0], fills[1])


def test_pil_images_are_filled_as_tensors_are(pair, image, mask):
    prior = load_prior(pair)
    pictures = Image.fromarray(image.permute(1, 2, 0).numpy()), Image.fromarray(mask.numpy().astype(np.uint8) * 255)
    assert torch.equal(inpaint(prior, *pictures, num=1), inpaint(prior, image, mask, num=1))


def test_pil_masks_and_images_of_every_mode_are_read_as_files_are(pair, image, mask, monkeypatch):
    seen: list = []

    def fills(_priors, _tokenizer, pixels, masked, **_):
        seen.append((pixels, masked))
        return pixels[None]

    monkeypatch.setattr(api, "fills", fills)
    prior, grey = load_prior(pair), image.float().mean(0)
    deep = np.where(mask.numpy(), 65535, 6000).astype(np.uint16)  # of 16 bits; the dark part is not filled
    pictures = {
        "I;16": Image.fromarray((grey.numpy() * 257).round().astype(np.uint16)),
        "F": Image.fromarray((grey / 255).numpy()),
        "La": Image.fromarray(grey.byte().numpy()).convert("LA").convert("La"),
    }
    for mode, picture in pictures.items():
        assert picture.mode == mode
        inpaint(prior, picture, Image.fromarray(deep))
        pixels, masked = seen.pop()
        assert masked.equal(mask)
        assert (pixels - grey).abs().max() <= 1
    exif = Image.Exif()
    exif[0x0112] = 6
    buffer = BytesIO()
    Image.fromarray(image.permute(1, 2, 0).numpy()).transpose(Image.Transpose.ROTATE_90).save(buffer, "PNG", exif=exif)
    inpaint(prior, Image.open(buffer), mask)
    pixels, masked = seen.pop()
    assert pixels.equal(image)
    assert masked.equal(mask)


@pytest.mark.parametrize(
    ("function", "arguments", "message"),
    [
        (sample, {"num": 0}, "num must be at least 1, not 0"),
        (sample, {"num": -1}, "num must be at least 1, not -1"),
        (sample, {"batch_size": 0}, "batch_size must be at least 1, not 0"),
        (sample, {"seed": 3.7}, "seed must be a whole number, not 3.7"),
        (sample, {"seed": None}, "seed must be a whole number, not None"),
        (inpaint, {"seed": "a"}, "seed must be a whole number, not 'a'"),
        (sample, {"num": 2.0}, "num must be a whole number, not 2.0"),
        (sample, {"batch_size": torch.tensor(2.5)}, "batch_size must be a whole number, not tensor"),
        (sample, {"prior": []}, "there is no prior; give one"),
        (sample, {"sampling": MaskedSampling(steps=1)}, "sampling is MaskedSampling.* the prior; give SundaeSampling"),
        (sample, {"sampling": SundaeSampling}, "does not fit the prior; give SundaeSampling"),
        (inpaint, {"sampling": MaskedSampling(steps=1)}, "does not fit the prior; give SundaeSampling"),
        (inpaint, {"num": 0}, "num must be at least 1, not 0"),
        (inpaint, {"image": torch.rand(3, 8, 16)}, "the image is a torch.float32 tensor .*; give a torch.uint8 tensor"),
        (inpaint, {"image": torch.zeros(1, 8, 16).byte()}, r"of the shape \(1, 8, 16\); give .* the shape \(3, h, w\)"),
        (inpaint, {"image": torch.zeros(8, 16).byte()}, r"of the shape \(8, 16\); give"),
        (inpaint, {"image": "in.png"}, "the image is a str; give a PIL image"),
        (inpaint, {"image": np.zeros((8, 16, 3), np.uint8)}, "the image is a ndarray; give a PIL image"),
        (inpaint, {"mask": Path("m.png")}, "the mask is a PosixPath; give a PIL image"),
        (inpaint, {"mask": torch.rand(8, 16)}, "the mask is a torch.float32 tensor .*; give a torch.bool tensor"),
        (inpaint, {"mask": torch.eye(8, 16)[None] > 0}, r"of the shape \(1, 8, 16\); give a torch.bool tensor"),
        (sample, {"classes": "faces"}, r"classes is the text 'faces'; give a list of names, such as \['faces'\]"),
        (sample, {"prior": "portraits"}, "prior is 'portraits'; give a prior, as load_prior returns"),
        (sample, {"prior": Path("photos")}, "prior is 'photos'; give a prior, as load_prior returns"),
        (sample, {"prior": None}, "prior is a NoneType; give a prior, as load_prior returns"),
        (sample, {"tokenizer": "portraits"}, "tokenizer is 'portraits'; give a tokenizer, as load_tokenizer returns"),
        (sample, {"precision": "half"}, "precision must be one of auto, fp32, bf16, fp16, not 'half'"),
        (
            inpaint,
            {"filling": SundaeSampling()},
            r"filling is a SundaeSampling; give Filling\(...\), and the sampler's",
        ),
    ],
)
def test_wrong_arguments_are_refused_before_sampling(function, arguments, message, pair, image, mask, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # which checks types in tests alone
    monkeypatch.setattr(Hourglass, "features", None)
    right = {"prior": load_prior(pair), **({"image": image, "mask": mask} if function is inpaint else {})}
    with pytest.raises(UserError, match=message):
        function(**right | arguments)


def test_names_of_models_are_texts_or_paths(monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # which checks types in tests alone
    for load in (load_prior, load_tokenizer, Hourglass.load):
        with pytest.raises(UserError, match=r"^a model is named by a text or a Path, not None; give a folder, a name"):
            load(None)


def test_settings_of_the_sampler_change_fills(pair, image, mask):
    cool, hot = (SundaeSampling(steps=3, temperature=(t, t)) for t in (0.01, 9.0))
    assert not torch.equal(*(inpaint(load_prior(pair), image, mask, num=1, sampling=each) for each in (cool, hot)))
    assert inpaint(load_prior(pair), image, mask, num=1, sampling=SundaeSampling(steps=3)).shape == (1, 3, 8, 16)


def test_models_in_half_precision_are_refused(pair, image, mask):
    message = "the weights of the prior are torch.float16; leave them torch.float32, and give precision='bf16' or"
    for function in (sample, lambda prior: inpaint(prior, image, mask)):
        with pytest.raises(UserError, match=message):
            function(load_prior(pair).half())
    with pytest.raises(UserError, match=r"the weights of the tokenizer are torch\.bfloat16"):
        sample(load_prior(pair), load_tokenizer(pair / "tokenizer").bfloat16())


def test_loading_and_sampling_leave_torchs_state_as_it_was(pair, image, mask):
    state = torch.get_rng_state()
    prior = load_prior(pair)
    Hourglass.load(pair)
    load_tokenizer(pair / "tokenizer")
    sample(prior, num=1)
    inpaint(prior, image, mask, num=1)
    assert torch.equal(torch.get_rng_state(), state)
    torch.set_default_dtype(torch.float64)
    try:
        assert load_prior(pair).digest() == prior.digest()
        assert torch.get_default_dtype() == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)


def test_mistakes_are_one_line(pair, image, mask):
    prior = load_prior(pair)
    with pytest.raises(UserError, match=r"the mask is 16x4 but the image is 16x8"):
        inpaint(prior, image, mask[:4])
    for useless in (mask & False, mask | True):
        with pytest.raises(UserError, match="must cover a part of the image"):
            inpaint(prior, image, useless)
    ones = Image.fromarray(mask.numpy().astype(np.uint8))  # values 0 and 1, which are both dark
    with pytest.raises(UserError, match="a part of the image: pixels lighter than mid-grey are filled, and"):
        inpaint(prior, image, ones)
    with pytest.raises(UserError, match="no class is called 'faces'"):
        sample(prior, classes=["faces"])
    unsaved, _ = untrained_pair()
    with pytest.raises(UserError, match="was not loaded from a folder; give its tokenizer too"):
        sample(unsaved)
