"""Fine-tuning by the commands: `--init` and `--freeze` of tokenizers and priors, and what stays valid of old codes."""

import json
import shutil
import sys
from dataclasses import replace

import pytest
import torch
from helpers.build_toys import one_thread, write_images
from helpers.command_toys import run

from smalti.commands.model_paths import load_prior, load_tokenizer
from smalti.core.models import read_config
from smalti.images.decoding import to_float
from smalti.images.image_set import open_images
from smalti.latentsets.conditions import add_conditions
from smalti.latentsets.reader import LatentSet
from smalti.scripts import build_latents, sample, train_prior, train_tokenizer
from smalti.tokenizers.quantizers.residual import ResidualQuantizer
from smalti.tokenizers.vq.hrvq import HRVQ
from smalti.tokenizers.vq.vqvae import VQVAE
from smalti.transfer.weights import take_weights

SIZE = ("--height", "8", "--width", "8", "--device", "cpu")
NETWORK = ("--widths", "6", "8", "--residual-blocks", "1", "--code-width", "6", "--depth", "2", "--branching", "4")
FIT = ("--steps", "3", "--batch-size", "8", "--warmup-steps", "1")
FROZEN = ("--freeze", "encoder", "codebook")
VQGAN = ("--tokenizer", "vqgan", "--widths", "8", "8", "--norm-groups", "4", "--latent-width", "4", "--code-width", "4")
VQGAN += ("--branching", "4", "--perceptual-weight", "0", "--discriminator-width", "4", "--discriminator-layers", "1")
FLAT = ("--tokenizer", "vqvae", *NETWORK[:-4])
PRIOR = ("--model-width", "16", "--heads", "2", "--depth", "0", "1", "0", "--sheet-samples", "4")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Yields a folder with images of two classes, tokenizers, of which `old` made `old.h5`, and its `prior`."""
    folder = tmp_path_factory.mktemp("fine-tuning")
    for seed, label in enumerate(("a", "b")):
        write_images(folder / "img" / label, 30, seed)
    train = ["--images", "img", *SIZE, *FIT]
    commands = [
        (train_tokenizer, [*train, *NETWORK, "--out", "old"]),
        (train_tokenizer, [*train, *FLAT, "--codebook-size", "6", "--out", "flat"]),
        (train_tokenizer, [*train, *FLAT, "--quantizer", "fsq", "--levels", "8", "5", "--out", "fsq"]),
        (train_tokenizer, [*train, *VQGAN, "--discriminator-start", "0", "--out", "gan"]),
        (build_latents, ["--tokenizer", "old", "--out", "old.h5", "--workers", "0", "--device", "cpu"]),
        (train_prior, ["--latents", "old.h5", "--out", "prior", *PRIOR, *FIT, "--device", "cpu"]),
    ]
    with pytest.MonkeyPatch.context() as patch, one_thread():
        patch.chdir(folder)
        for module, arguments in commands:
            patch.setattr(sys, "argv", ["command.py", *arguments])
            module.main()
        yield folder


def tune(capfd, *arguments):
    return run(capfd, train_tokenizer.main, "--images", "img", "--device", "cpu", *FIT, *arguments)


@pytest.mark.parametrize("family", ["tokenizer", "prior"])
def test_a_run_that_starts_from_the_package_by_the_name_of_its_kind_resumes(trained, capfd, family):
    """After its first snapshot, the kind's name stands for the run itself, elsewhere."""
    kind, module = ("hrvq", train_tokenizer) if family == "tokenizer" else ("hourglass", train_prior)
    source = ("--images", "img", "--batch-size", "4") if family == "tokenizer" else ("--latents", "package.h5")
    if family == "prior":
        build = ("--tokenizer", "portraits", "--images", "img", "--workers", "0", "--device", "cpu")
        assert run(capfd, build_latents.main, *build, "--out", "package.h5")[0] == 0
    command = (*source, "--init", kind, "--device", "cpu")
    assert run(capfd, module.main, *command, "--steps", "1")[0] == 0
    status, printed, err = run(capfd, module.main, *command, "--steps", "1")
    assert (status, "is finished: 1 steps" in printed) == (0, True), err
    assert run(capfd, module.main, *command, "--steps", "2")[0] == 0
    own = f"runs/{family}s/{kind}"
    run_json = json.loads((trained / own / "run.json").read_text())
    package = (load_tokenizer if family == "tokenizer" else load_prior)("portraits")
    assert run_json["settings"]["init_digest"] == package.digest()
    status, _, err = run(capfd, module.main, *source, "--device", "cpu", "--out", own, "--init", own)
    assert (status, "is the folder of this run itself" in err) == (2, True)


def test_a_tuned_decoder_keeps_the_codes_of_a_latent_set_and_its_prior(trained, capfd):
    status, _, err = tune(capfd, "--init", "old", "--freeze", "encoder", "codebook", "--seed", "1", "--out", "tuned")
    assert status == 0
    old, tuned = load_tokenizer("old"), load_tokenizer("tuned")
    assert f"weights from old (digest {old.digest()[:12]}): {len(old.state_dict())} tensors, which is all" in err
    assert "initializing the codebooks" not in err
    images = torch.rand(16, 3, 8, 8) * 2 - 1
    assert torch.equal(old.encode(images)[0], tuned.encode(images)[0])
    assert not torch.equal(old.decode(old.encode(images)), tuned.decode(old.encode(images)))
    assert tuned.digest() != old.digest()
    assert tuned.code_digest() == old.code_digest()
    assert tuned.digests_of_codes() == [tuned.digest(), old.digest()]
    frozen = {name for name, tensor in old.state_dict().items() if torch.equal(tensor, tuned.state_dict()[name])}
    assert frozen == {name for name in old.state_dict() if not name.startswith("decoder.")}
    settings = json.loads((trained / "tuned" / "run.json").read_text())["settings"]
    assert (settings["init"], settings["init_digest"]) == ("old", old.digest())

    common = ("--device", "cpu", "--overwrite")
    assert run(capfd, sample.main, "--prior", "prior", "--tokenizer", "tuned", "--num", "2", *common)[0] == 0
    arguments = ("--latents", "old.h5", "--tokenizer", "tuned", "--out", "tuned-prior", *PRIOR, *FIT, "--device", "cpu")
    assert run(capfd, train_prior.main, *arguments)[0] == 0
    assert run(capfd, sample.main, "--prior", "tuned-prior", "--num", "2", *common)[0] == 0  # with the copy beside it
    build = ("--tokenizer", "tuned", "--out", "tuned.h5", "--workers", "0", "--device", "cpu")
    assert run(capfd, build_latents.main, *build)[0] == 0
    rows = torch.arange(len(LatentSet("old.h5")))
    assert torch.equal(LatentSet("old.h5").batch(rows)[0], LatentSet("tuned.h5").batch(rows)[0])


def test_a_decoder_tuned_twice_still_has_the_first_ones_codes_but_not_if_its_encoder_changed(trained, capfd):
    frozen = ("--freeze", "encoder", "codebook")
    assert tune(capfd, "--init", "old", *frozen, "--out", "once")[0] == 0
    assert tune(capfd, "--init", "once", *frozen, "--out", "twice")[0] == 0
    twice = load_tokenizer("twice")
    assert twice.digests_of_codes()[1:] == [load_tokenizer("once").digest(), load_tokenizer("old").digest()]
    assert tune(capfd, "--init", "twice", "--freeze", "encoder", "--out", "other-codes")[0] == 0
    other = load_tokenizer("other-codes")
    assert other.digests_of_codes() == [other.digest()]
    status, _, err = run(capfd, sample.main, "--prior", "prior", "--tokenizer", "other-codes", "--out", "x.png")
    assert status == 2
    assert "was trained on codes of the tokenizer" in err
    with torch.no_grad():
        next(twice.encoder.parameters()).add_(1)  # the record does not count for other weights
    assert len(twice.digests_of_codes()) == 1


def test_what_fits_is_taken_and_what_is_new_is_named(trained, capfd):
    status, _, err = tune(capfd, "--init", "old", "--image-channels", "1", "--out", "grey")
    assert status == 0
    assert "2 are new and start untrained" in err or "3 are new and start untrained" in err
    assert "  encoder.0.weight 6x1x4x4, in --init 6x3x4x4" in err.splitlines()
    assert "initializing the codebooks" not in err
    status, _, err = tune(capfd, "--init", "old", "--branching", "6", "--out", "more-codes")
    assert status == 0
    assert "quantizer.codebook_0 1x6x6, in --init 1x4x6" in err
    assert "initializing the codebooks" in err
    status, _, err = tune(capfd, "--init", "old", "--branching", "4", "3", "--out", "mixed")
    assert status == 0
    assert "quantizer.codebook_0" not in err
    assert "quantizer.codebook_1 4x3x6, in --init 4x4x6" in err
    assert load_tokenizer("mixed").layout.levels[0].radices == (4, 3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("--init", "old", "--widths", "6", "10"),
            "encoder.2.weight is 8x6x4x4 in --init and 10x6x4x4 in this network; the settings that differ are --widths",
        ),
        (("--init", "old", "--residual-blocks", "2"), "the settings that differ are --residual-blocks"),
        (("--init", "old", "--tokenizer", "vqvae", *SIZE[:4]), "old is a hrvq, not a vqvae"),
        (("--init", "prior"), "holds a prior"),
        (("--init", "absent"), "no checkpoint at absent"),
        (("--init", "old", "--freeze", "encoder", "decoder"), "leaves nothing to train"),
        (("--init", "old", "--freeze", "codebook", "--branching", "6"), "which has no quantizer.codebook_0"),
        (
            ("--init", "old", "--branching", "4", "3", "2"),
            "each of 3 layers, but depth is 2; give 2 values of branching",
        ),
        (("--freeze", "encoder"), "so it needs --init"),
        (("--init", "old", *FROZEN, "--depth", "1"), "keeps the codes of old, which another --depth would change"),
        (("--init", "flat", *FROZEN, "--quantizer", "cosine"), "which another --quantizer would change"),
        (("--init", "fsq", *FROZEN, "--levels", "5", "8"), "which another --levels would change"),
        (("--init", "gan", *FROZEN, "--norm-groups", "2"), "which another --norm-groups would change"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(trained, capfd, arguments, message):
    status, _, err = tune(capfd, *arguments, "--out", "refused")
    assert status == 2
    (error,) = [line for line in err.splitlines() if line.startswith("error:")]
    assert message in error
    assert not (trained / "refused" / "model.safetensors").exists()


def test_layers_of_codebooks_that_fit_stay_and_the_others_start_from_images(trained, capfd):
    status, _, err = tune(capfd, "--init", "old", "--depth", "3", "--out", "deeper")
    assert (status, "initializing the codebooks" in err) == (0, True), err
    assert "2 are new and start untrained" in err  # codebook_2 and counts_2
    old = load_tokenizer("old")
    deeper = HRVQ(replace(old.config, depth=3, codebook_init="uniform"))
    taken = take_weights(deeper, old, "old", resizable=["depth"])
    images = to_float(open_images("img", height=8, width=8, held_out="none").pixels(range(60)))
    deeper.init_new_from_data(images, taken.tensors)
    assert taken.without_changed(deeper, old) == taken
    z_e = old.encoder(images)
    errors = [
        float((z_e.detach() - each.quantizer.lookup(each.quantizer.encode(z_e))).square().mean())
        for each in (old, deeper)
    ]
    assert errors[1] < 0.5 * errors[0]
    mixed = ResidualQuantizer(code_width=6, stages=3, codebook_size=(4, 5, 4))
    before = [book.codebook_0.clone() for book in mixed.books]
    mixed.init_from_data(z_e.detach(), first=1)
    assert torch.equal(mixed.books[0].codebook_0, before[0])
    assert not any(torch.equal(mixed.books[stage].codebook_0, before[stage]) for stage in (1, 2))


def test_codebooks_of_another_size_start_from_images_whatever_the_first_training_did(trained, capfd):
    """Converted checkpoints have uniform random codebooks by their settings, far from what their encoders put out."""
    assert "initializing" not in tune(capfd, *FLAT, *SIZE[:4], "--codebook-init", "uniform", "--out", "uniform")[2]
    fsq = ("--quantizer", "fsq", "--levels", "3", "3")
    assert "initializing" not in tune(capfd, *FLAT, *SIZE[:4], *fsq, "--out", "rounded")[2]
    assert "initializing" not in tune(capfd, "--init", "uniform", "--codebook-size", "8", *fsq, "--out", "to-fsq")[2]
    status, _, err = tune(capfd, "--init", "uniform", "--codebook-size", "20", "--out", "20-codes")
    assert (status, "initializing the codebooks" in err) == (0, True), err
    old = load_tokenizer("uniform")
    more = VQVAE(replace(old.config, codebook_size=20))
    take_weights(more, old, "uniform", resizable=["codebook_size"])
    images = to_float(open_images("img", height=8, width=8, held_out="none").pixels(range(60)))
    assert len(more.encode(images)[0].unique()) < 10
    more.init_new_from_data(images, ())
    assert len(more.encode(images)[0].unique()) == 20


def test_other_settings_that_fit_all_weights_are_noted(trained, capfd):
    """They change what the weights compute, without a tensor that would tell."""
    note = "note: {} has another --{name}; leave --{name} out"
    status, _, err = tune(capfd, "--init", "gan", "--norm-groups", "2", "--out", "other-groups")
    assert (status, note.format("gan", name="norm-groups") in err) == (0, True), err
    command = ("--latents", "old.h5", "--init", "prior", *FIT, "--device", "cpu", "--sheet-samples", "0")
    status, _, err = run(capfd, train_prior.main, *command, "--no-absolute-positions", "--out", "no-positions")
    assert (status, note.format("prior", name="absolute-positions") in err) == (0, True), err
    status, _, err = tune(capfd, "--init", "old", "--height", "16", "--commitment-weight", "0.5", *FROZEN, "--out", "x")
    assert (status, "note:" in err) == (0, False), err
    assert load_tokenizer("old").digest() in load_tokenizer("x").digests_of_codes()


def test_a_run_resumes_only_from_the_weights_it_began_with(trained, capfd):
    shutil.copytree("old", "start", ignore=shutil.ignore_patterns("states"))
    assert tune(capfd, "--init", "start", "--out", "resumed")[0] == 0
    status, _, err = tune(capfd, "--init", "start", "--out", "resumed", "--steps", "4")
    assert status == 0
    assert "weights from start" not in err
    shutil.rmtree("start")
    shutil.copytree("resumed", "start", ignore=shutil.ignore_patterns("states"))
    status, _, err = tune(capfd, "--init", "start", "--out", "resumed", "--steps", "5")
    assert status == 2
    assert "holds a run with initial weights with the digest" in err


def test_discriminators_come_from_the_run_that_has_one(trained, capfd):
    states = ("--init", "gan", "--discriminator-start", "0")
    assert "the discriminator starts from that of the run gan" in tune(capfd, *states, "--out", "gan-2")[2]
    shutil.rmtree(trained / "gan" / "states")
    assert "the discriminator starts untrained" in tune(capfd, *states, "--out", "gan-3")[2]
    status, _, err = tune(capfd, *states, "--freeze", "decoder", "--out", "gan-4")
    assert status == 2
    assert "--freeze decoder needs --adversarial-weight 0" in err


def test_a_prior_starts_from_another_and_finds_its_classes_by_name(trained, capfd):
    for seed, label in enumerate(("b", "c", "d")):
        write_images(trained / "new" / label, 30, seed)
    build = ("--tokenizer", "old", "--images", "new", "--out", "new.h5", "--workers", "0", "--device", "cpu")
    assert run(capfd, build_latents.main, *build)[0] == 0
    arguments = ("--latents", "new.h5", "--init", "prior", *FIT, "--device", "cpu", "--learning-rate", "1e-12")
    status, _, err = run(capfd, train_prior.main, *arguments, "--ema-decay", "0", "--out", "new-prior")
    assert status == 0
    assert "of_class.vectors.weight 4x16, in --init 3x16" in err
    assert {"classes that prior was trained on: b", "new classes, which start without influence: c, d"} <= set(
        err.splitlines()
    )
    old, new = load_prior("prior"), load_prior("new-prior")
    assert new.config.model_width == 16  # taken from the prior, no flag names it
    before, after = old.of_class.vectors.weight, new.of_class.vectors.weight
    assert torch.allclose(after[:2], before[[0, 2]], atol=1e-6)  # no class, b
    assert torch.allclose(after[2:], torch.zeros(2, 16), atol=1e-6)
    assert read_config(trained / "new-prior")["provenance"]["init_digest"] == old.digest()
    for seed, label in enumerate(("b", "c")):  # as many as the other prior has
        write_images(trained / "two" / label, 30, seed)
    build = ("--tokenizer", "old", "--images", "two", "--out", "two.h5", "--workers", "0", "--device", "cpu")
    assert run(capfd, build_latents.main, *build)[0] == 0
    status, _, err = run(capfd, train_prior.main, "--latents", "two.h5", *arguments[2:], "--out", "two-prior")
    assert status == 0
    assert f"weights from prior (digest {old.digest()[:12]}): {len(old.state_dict())} tensors" in err.splitlines()
    assert "new classes, which start without influence: c" in err.splitlines()
    status, _, err = run(capfd, train_prior.main, *arguments, "--model-width", "32", "--out", "wide")
    assert status == 2
    assert "the settings that differ are --model-width" in err


def test_a_prior_takes_the_standardization_of_vectors_only_if_they_are_of_the_same_source(trained, capfd):
    def train(source, offset, *arguments):
        vectors = torch.randn(rows, 3, generator=torch.Generator().manual_seed(0)) + offset
        add_conditions(LatentSet("old.h5"), vectors, "vectors.h5", source)
        options = ("--latents", "vectors.h5", "--condition", "vector", "--sheet-samples", "0", *FIT, "--device", "cpu")
        status, _, err = run(capfd, train_prior.main, *options, *arguments)
        assert status == 0, err
        return load_prior(arguments[-1]), err

    rows = len(LatentSet("old.h5"))
    former, _ = train("an encoder", 0, *PRIOR, "--out", "vector-prior")
    with torch.no_grad():
        former.of_vector.out.weight.fill_(1)
        former.of_vector.none.fill_(2)
    former.save("vector-prior")
    tuning = ("--init", "vector-prior", "--learning-rate", "1e-12", "--ema-decay", "0", "--resume", "never", "--out")
    new, err = train("another encoder", 3000, *tuning, "new-vectors")
    assert "new vectors, which start without influence: another encoder" in err.splitlines()
    assert "which is all" not in err
    assert torch.allclose(new.of_vector.mean, torch.full((3,), 3000.0), atol=1)
    assert torch.allclose(new.of_vector.out.weight, torch.zeros(16, 16), atol=1e-6)
    assert torch.allclose(new.of_vector.none, torch.full((16,), 2.0), atol=1e-6)
    same, err = train("an encoder", 1, *tuning, "same-vectors")
    assert "which is all" in err
    assert torch.equal(same.of_vector.mean, former.of_vector.mean)
    assert torch.allclose(same.of_vector.out.weight, torch.ones(16, 16), atol=1e-6)
