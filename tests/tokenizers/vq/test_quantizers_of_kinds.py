"""Every quantizer of every kind by the commands: training, resuming, latent set, prior, samples, --init, --freeze.

The quantizers themselves are tested in tests/tokenizers/quantizers/.
"""

import shutil
from contextlib import ExitStack
from typing import get_args, get_type_hints

import pytest
import torch
from helpers.build_toys import one_thread, write_images
from helpers.command_toys import run

from smalti.commands.codebook_usage import CodebookAlarm
from smalti.commands.model_paths import load_tokenizer
from smalti.core import models
from smalti.images.image_set import ImageRows, open_images
from smalti.latentsets.reader import LatentSet
from smalti.scripts import build_latents, sample, train_prior, train_tokenizer
from smalti.tokenizers.quantizers.registry import QUANTIZERS

FIT = ("--steps", "2", "--batch-size", "8", "--warmup-steps", "1", "--device", "cpu")
NETWORK = ("--images", "img", "--height", "8", "--width", "8", "--residual-blocks", "1", "--code-width", "6")
PRIOR = ("--model-width", "16", "--heads", "2", "--depth", "0", "1", "0", "--sheet-samples", "0")
OF_KIND = {
    "vqvae": ("--widths", "6", "8"),
    "hrvq": ("--widths", "6", "8", "--depth", "2"),
    "vqgan": (
        *("--widths", "4", "6", "6", "--norm-groups", "2", "--latent-width", "4"),
        *("--perceptual-weight", "0", "--adversarial-weight", "0"),
    ),
}
SIZE_FLAG = {"vqvae": "--codebook-size", "hrvq": "--branching", "vqgan": "--branching"}
CASES = [
    (kind, name)
    for kind in OF_KIND
    for name in get_args(get_type_hints(models.class_of_kind("tokenizer", kind).config_class)["quantizer"])
]
FIRST_KIND = {name: kind for kind, name in reversed(CASES)}
of_every_case = pytest.mark.parametrize(("kind", "name"), CASES, ids=[f"{kind}-{name}" for kind, name in CASES])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("quantizers")
    write_images(folder / "img", 40, 0)
    with ExitStack() as stack:
        stack.enter_context(one_thread())
        stack.enter_context(pytest.MonkeyPatch.context()).chdir(folder)
        yield folder


def flags(kind, name):
    size = ("--levels", "3", "4") if name == "fsq" else (SIZE_FLAG[kind], "4" if kind == "hrvq" else "16")
    return ("--tokenizer", kind, "--quantizer", name, *NETWORK, *OF_KIND[kind], *size)


def train(capfd, *arguments):
    return run(capfd, train_tokenizer.main, *FIT, *arguments)


def test_every_quantizer_has_a_kind():
    assert {name for _, name in CASES} == set(QUANTIZERS)


@of_every_case
def test_commands_train_resume_and_sample(folder, capfd, kind, name):
    """A run that goes back to its first snapshot trains the same weights again, to the bit.

    A prior sees nothing of a tokenizer but its latent set, so one kind of each quantizer has one.
    """
    out, fit = f"{kind}-{name}", ("--steps", "4", "--save-steps", "2", "--keep-states", "3")
    command = (*flags(kind, name), *fit, "--out", out)
    status, _, err = train(capfd, *command)
    assert status == 0, err
    whole = load_tokenizer(out)
    assert whole.config.quantizer == name
    assert train(capfd, *command, "--resume", "2")[0] == 0
    resumed = load_tokenizer(out)
    assert resumed.digest() == whole.digest()
    common = ("--device", "cpu", "--out")
    assert run(capfd, build_latents.main, "--tokenizer", out, "--workers", "0", *common, f"{out}.h5")[0] == 0
    assert LatentSet(folder / f"{out}.h5").layout == whole.layout
    if FIRST_KIND[name] != kind:
        return
    prior = ("--latents", f"{out}.h5", *PRIOR, *FIT, "--out", f"{out}-prior")
    status, _, err = run(capfd, train_prior.main, *prior)
    assert status == 0, err
    arguments = ("--prior", f"{out}-prior", "--num", "2", "--steps", "2", *common, f"{out}.png")
    status, _, err = run(capfd, sample.main, *arguments)
    assert status == 0, err
    shutil.rmtree(f"{out}-prior")


@of_every_case
def test_codes_survive_saving_and_code_digests_ignore_training_settings(folder, kind, name):
    tokenizer = tiny(kind, name)
    images = torch.rand(4, 3, 8, 8) * 2 - 1
    tokenizer.init_from_data(images)
    tokenizer.save(folder / "saved")
    loaded = load_tokenizer("saved")
    assert loaded.encode(images)[0].equal(tokenizer.encode(images)[0])
    assert loaded.decode(loaded.encode(images)).equal(tokenizer.decode(tokenizer.encode(images)))
    assert loaded.digest() == tokenizer.digest()
    other = tiny(kind, name, commitment_weight=0.5, gradient="rotation")
    other.load_state_dict(tokenizer.state_dict())
    assert other.code_digest() == tokenizer.code_digest()
    assert tokenizer.facts()["quantizer"] == name
    captions = tokenizer.reconstructions(images)
    assert len(captions) == (len(tokenizer.radices) if QUANTIZERS[name].coarse_to_fine else 1)


def tiny(kind, name, **changes):
    """An untrained tokenizer in evaluation mode."""
    torch.manual_seed(0)
    shape = {"height": 8, "width": 8, "residual_blocks": 1, "code_width": 6, "quantizer": name}
    more = {
        "vqvae": {"widths": (6, 8), "codebook_size": 16},
        "hrvq": {"widths": (6, 8), "depth": 2, "branching": 4},
        "vqgan": {"widths": (4, 6, 6), "norm_groups": 2, "latent_width": 4, "branching": 16, "depth": 1},
    }[kind]
    more |= {"levels": (3, 4)} if name == "fsq" else {}
    cls = models.class_of_kind("tokenizer", kind)
    return cls(cls.config_class(**shape, **more, **changes)).eval()


@pytest.mark.parametrize("name", ["fsq", "lfq", "simvq", "residual"])
def test_frozen_codebook_stays_as_it_is(folder, capfd, name):
    kind = "hrvq" if name == "residual" else "vqvae"
    assert train(capfd, *flags(kind, name), "--out", "frozen-source")[0] == 0
    start = ("--init", "frozen-source", "--freeze", "encoder", "codebook", "--images", "img", "--seed", "1")
    assert train(capfd, *start, "--out", "frozen")[0] == 0
    old, new = load_tokenizer("frozen-source"), load_tokenizer("frozen")
    assert old.code_digest() == new.code_digest()
    assert old.digest() != new.digest()
    shutil.rmtree("frozen-source")
    shutil.rmtree("frozen")


def test_init_takes_the_networks_of_another_quantizer(folder, capfd):
    """Encoder and decoder are taken, the quantizer starts untrained."""
    assert train(capfd, *flags("vqvae", "flat"), "--out", "flat-source")[0] == 0
    start = ("--init", "flat-source", "--quantizer", "fsq", "--levels", "3", "4", "--images", "img")
    status, _, err = train(capfd, *start, "--learning-rate", "1e-9", "--ema-decay", "0", "--out", "to-fsq")
    assert status == 0, err
    assert "new and start untrained" in err
    old, new = load_tokenizer("flat-source"), load_tokenizer("to-fsq")
    assert new.layout.levels[0].radices == (3, 4)
    for part in ("encoder", "decoder"):
        for mine, theirs in zip(getattr(new, part).parameters(), getattr(old, part).parameters(), strict=True):
            torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("kind", "name", "more", "message"),
    [
        ("vqvae", "fsq", ("--codebook-size", "64"), "--quantizer fsq does not use --codebook-size; leave it out"),
        ("vqvae", "fsq", ("--commitment-weight", "1"), "fsq does not use --commitment-weight"),
        ("vqvae", "lfq", ("--codebook-init", "scaled"), "lfq does not use --codebook-init"),
        ("vqvae", "gumbel", ("--gradient", "rotation"), "gumbel does not use --gradient"),
        ("vqvae", "flat", ("--levels", "8", "5"), "flat does not use --levels"),
        ("vqvae", "flat", ("--entropy-weight", "1"), "flat does not use --entropy-weight"),
        ("vqvae", "simvq", ("--revive-below", "0"), "simvq does not use --revive-below"),
        ("hrvq", "linked", ("--shared-codebooks",), "linked does not use --shared-codebooks"),
        ("vqgan", "linked", ("--temperature", "2"), "linked does not use --temperature"),
        (
            "vqgan",
            "lfq",
            ("--depth", "2"),
            "lfq needs codes of one layer; use --depth 1 and one",
        ),
        ("vqvae", "lfq", ("--codebook-size", "100"), "lfq needs a power of two codes, such as 128, not 100"),
        ("hrvq", "fsq", (), "invalid choice 'fsq'"),
    ],
)
def test_flags_that_a_quantizer_does_not_use_are_refused(folder, capfd, kind, name, more, message):
    status, _, err = train(capfd, *flags(kind, name), *more, "--out", "refused")
    assert status == 2
    assert message in err
    assert err.count("\n") <= 2


def test_settings_of_a_preset_are_not_refused(folder, capfd):
    """`paper32` sets the decay of codebooks, which FSQ does not have; the person has not given that flag."""
    arguments = ("--preset", "paper32", "--tokenizer", "vqvae", "--quantizer", "fsq", "--levels", "3", "4")
    small = ("--images", "img", "--height", "8", "--width", "8", "--widths", "6", "--code-width", "6")
    assert train(capfd, *arguments, *small, "--residual-blocks", "1", "--out", "preset")[0] == 0


@pytest.mark.parametrize(
    ("kind", "name", "remedy"),
    [
        ("vqvae", "gumbel", "a higher --kl-weight"),
        ("vqgan", "lfq", "a higher --entropy-weight"),
        ("vqgan", "dot", "a higher --entropy-weight"),
        ("vqvae", "fsq", "fewer codes"),
        ("vqvae", "simvq", "fewer codes"),
        ("hrvq", "residual", "--revive-below"),
    ],
)
def test_collapse_warning_names_the_quantizers_remedy(folder, capfd, kind, name, remedy):
    changes = {"revive_below": 0.0} if name == "residual" else {}
    tokenizer = tiny(kind, name, **changes)
    with torch.no_grad():
        for parameter in tokenizer.encoder.parameters():
            parameter.zero_()  # one vector, so one code
    rows = ImageRows(open_images("img", height=8, width=8), split="train", flips=False)
    CodebookAlarm().measure(tokenizer, rows)
    assert f"Try {remedy}" in capfd.readouterr().err
