"""The commands with selfVAE: training, evaluation of bits and modes, a latent set of u, a RealNVP on it, samples."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.build_toys import trained_in
from helpers.command_toys import run
from helpers.image_toys import MeanColours
from PIL import Image
from torch import nn

from smalti import LatentSet
from smalti.commands.generating import generate_codes
from smalti.core.errors import UserError
from smalti.core.models import load
from smalti.core.randomness import Stream, derive, row_seeds
from smalti.evaluation import modes, real_images
from smalti.evaluation.image_likelihood import bits, log_weights
from smalti.images.decoding import to_float, to_uint8
from smalti.images.image_set import ImageRows, open_images
from smalti.priors.grids import continuous_grid
from smalti.priors.networks.realnvp import FlowSampling
from smalti.scripts import build_latents, evaluate, inpaint, reproduce, sample, train_prior
from smalti.studies.selfvae import study
from smalti.tokenizers.selfvae.hierarchical_vae import MODES, VAEConfig
from smalti.tokenizers.selfvae.vae import VAE

NETWORK = "--channels 4 --growth 2 --dense-layers 1 --latent-channels 2 --mixtures 2 --flow-layers 4 --flow-width 4"
FIT = "--steps 20 --batch-size 8 --report-steps 20 --log-steps 1 --precision fp32 --warmup-steps 1 --ema-decay 0"
TRAIN = f"--tokenizer selfvae --images img --height 8 --width 8 --stages 1 {NETWORK} {FIT}".split()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A trained selfVAE in a folder of its own, the current one."""
    with trained_in(tmp_path_factory.mktemp("selfvae"), TRAIN, images=80) as folder:
        yield folder


def held_out():
    rows = ImageRows(open_images("img", height=8, width=8), split="held_out", flips=False)
    return rows.__getitems__(list(range(len(rows))))["images"]


def test_training_lowers_the_bits_with_adamax(folder):
    lines = [json.loads(line) for line in (folder / "runs/tokenizers/selfvae/metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["held_out_loss"] < lines[0]["loss"]
    parts = sum(value for name, value in lines[-1].items() if name.startswith("held_out_bits"))
    assert parts == pytest.approx(lines[-1]["held_out_loss"], rel=1e-4)
    assert json.loads((folder / "runs/tokenizers/selfvae/run.json").read_text())["settings"]["optimizer"] == "adamax"
    sheet = Image.open(folder / "runs/tokenizers/selfvae/reconstructions.png")
    assert sheet.height == pytest.approx(128 * (1 + len(MODES)), abs=20)


def test_bits_converge_to_the_integral_over_latents():
    """With one pixel and one latent number, ln p(x) is an integral, computed here on a fine grid."""
    torch.manual_seed(0)
    model = VAE(VAEConfig(1, 1, 1, channels=8, growth=2, dense_layers=1, stages=0, latent_channels=1, flow_layers=4))
    model.eval().init_from_data(torch.rand(64, 1, 1, 1) * 2 - 1)
    for coupling in model.flow.couplings:
        nn.init.normal_(coupling.net[-1].weight, std=0.3)
    head = model.posteriors[0].head  # as wide as the prior everywhere, so that the samples cover it
    nn.init.zeros_(head.length)
    head.bias.data = torch.tensor([0.0, 1.3])
    images = torch.tensor([40, 90, 140, 220], dtype=torch.uint8).view(4, 1, 1, 1)
    u = torch.linspace(-12, 12, 4001)
    with torch.no_grad():
        log_prior = model.flow.log_prob(u.view(-1, 1, 1, 1)).double()
        likelihood = model.likelihoods[0](u.view(-1, 1, 1, 1))
        log_likelihoods = [likelihood.log_prob(x.expand(4001, 1, 1, 1)).double() for x in to_float(images)]
    exact = torch.stack([(each + log_prior).logsumexp(0) + math.log(24 / 4000) for each in log_likelihoods])
    expected = float(-exact.mean()) / math.log(2)
    assert 5 < expected < 12
    before = math.inf
    for samples in (1, 8, 64, 512):  # each with other samples
        repeats = max(1, 64 // samples)
        weights = log_weights(model, images, samples=samples * repeats, seed=samples)
        estimate = bits(weights, images, samples)
        error = 4 * estimate.sampling_error
        assert estimate.per_dimension > expected - error
        assert estimate.per_dimension < before + error
        assert estimate.per_dimension <= bits(weights, images, 1).per_dimension + 1e-9  # at most the ELBO's (Eq. 23)
        before = estimate.per_dimension
    assert abs(before - expected) < error < 0.4
    assert bits(weights, images).standard_error == pytest.approx(float(weights.logsumexp(1).std()) / 2 / math.log(2))


def test_importance_weights_do_not_depend_on_the_batch_size(folder):
    model, batch_sizes = load("runs/tokenizers/selfvae", "tokenizer"), []
    hook = model.likelihoods[0].register_forward_pre_hook(lambda _, inputs: batch_sizes.append(len(inputs[0])))
    weights = log_weights(model, held_out()[:2], samples=10, rows_at_once=4)
    hook.remove()
    assert batch_sizes == [4, 4, 2] * 2
    torch.testing.assert_close(weights[1:], log_weights(model, held_out()[:2], samples=10)[1:], rtol=1e-5, atol=1e-3)


def test_the_likelihood_evaluation_and_its_repetition(folder, capfd):
    flags = "--of likelihood --samples 16 --num 5 --device cpu --out bits.json"
    status, out, err = run(capfd, evaluate.main, *flags.split())
    assert (status, "| bits_per_dim " in out) == (0, True), err
    scores = json.loads((folder / "bits.json").read_text())["scores"]
    assert 1 < scores["bits_per_dim"]["model"] < scores["bound_bits_per_dim"]["model"] < 16
    assert 0 < scores["bits_per_dim_sampling_error"]["model"] < scores["bits_per_dim_standard_error"]["model"]
    status, out, _ = run(capfd, evaluate.main, "--again", "bits.json")
    assert (status, "the same as bits.json" in out) == (0, True)


def test_every_mode_is_evaluated_with_the_bytes_it_transmits(folder, capfd, monkeypatch):
    """The expected numbers are computed by hand."""
    monkeypatch.setattr(modes, "find_extractor", lambda _, device: MeanColours(device))
    flags = "--of modes --images img --num 50 --reference 12 --precision fp32 --out modes.json"
    status, _, err = run(capfd, evaluate.main, *flags.split())
    assert status == 0, err
    scores = json.loads((folder / "modes.json").read_text())["scores"]
    assert set(scores["frechet"]) == {*MODES, "real"}
    u = z = 4 * 4 * 2 * 2  # bytes: 4x4 of 2 numbers of 2
    expected = {"": 0, "y": 48, "yz": 48 + z, "u": u, "uz": u + z}
    assert scores["bytes_sent"] == {mode: expected[what] for mode, what in MODES.items()}
    assert scores["compression_ratio"]["reconstruction-2"] == pytest.approx(192 / (u + z))
    model, images = load("runs/tokenizers/selfvae", "tokenizer"), to_float(held_out())
    seeds = row_seeds(0, torch.arange(len(images)))
    reconstructed = model.decode_from(model.transmit(images, "reconstruction-2", seeds), seeds)
    assert scores["mse"]["reconstruction-2"] == pytest.approx(
        float(((reconstructed - images) / 2).square().mean()), rel=1e-3
    )
    status, _, err = run(capfd, evaluate.main, *flags.split(), "--image-depth", "16", "--out", "deep.json")
    assert status == 0, err
    deep = json.loads((folder / "deep.json").read_text())["scores"]
    assert deep["ssim"] == scores["ssim"]  # the same pixels, as multiples of 257


@pytest.mark.parametrize("mode", list(MODES))
def test_every_mode_writes_a_sheet(folder, capfd, mode):
    status, out, err = run(capfd, sample.main, "--mode", mode, "--num", "4", "--out", f"{mode}.png")
    assert status == 0, err
    picture = Image.open(folder / f"{mode}.png")
    assert json.loads(picture.text["smalti"])["mode"] == mode
    model, images = load("runs/tokenizers/selfvae", "tokenizer"), held_out()
    if mode == "generation":
        expected = model.generation(row_seeds(0, torch.arange(4)))
        assert np.array_equal(np.asarray(picture)[4:100:12, 4:100:12], to_uint8(expected)[0].permute(1, 2, 0).numpy())
    else:
        assert f"{mode}: " in out
        assert len(images) >= 4
        rows = round(picture.height / 128)
        assert rows == {"": 1, "y": 5, "yz": 3, "u": 4, "uz": 2}[MODES[mode]]


def test_a_prior_on_the_latents_u_samples_images(folder, capfd, monkeypatch):
    """Latent set, RealNVP, samples and evaluation, end to end."""
    status, out, err = run(capfd, build_latents.main, *["--tokenizer", "selfvae", "--workers", "0", "--device", "cpu"])
    assert (status, "4×4 of 2 floats" in out) == (0, True), err
    latents = LatentSet("runs/latents/selfvae.h5")
    model = load("runs/tokenizers/selfvae", "tokenizer")
    first_latents = model.encode(to_float(open_images("img", height=8, width=8).pixels([0])))[0]
    torch.testing.assert_close(latents.batch([0])[0], first_latents)
    flags = (
        "--prior realnvp --latents runs/latents/selfvae.h5 --steps 40 --batch-size 8 --report-steps 20 --log-steps 1"
    )
    more = "--layers 4 --model-width 8 --precision fp32 --learning-rate 1e-2 --ema-decay 0"
    status, _, err = run(capfd, train_prior.main, *flags.split(), *more.split())
    assert status == 0, err
    lines = [json.loads(line) for line in Path("runs/priors/realnvp/metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["held_out_loss"] < lines[0]["loss"]
    status, _, err = run(capfd, sample.main, "--prior", "realnvp", "--num", "4", "--precision", "fp32")
    assert status == 0, err
    prior, rows = load("runs/priors/realnvp", "prior"), torch.arange(4)
    sampled = generate_codes(prior, rows, None, seed=0, sampling=FlowSampling())
    images = model.draw((sampled,), derive(row_seeds(0, rows), Stream.IMAGE_DETAILS)).detach()
    picture = np.asarray(Image.open("runs/samples.png"))
    assert np.array_equal(picture[4:100:12, 4:100:12], to_uint8(images)[0].permute(1, 2, 0).numpy())
    colder = generate_codes(prior, rows, None, seed=0, sampling=FlowSampling(temperature=0.0))
    assert colder[0].equal(colder[1])
    monkeypatch.setattr(real_images, "find_extractor", lambda _, device: MeanColours(device))
    flags = "--of prior --prior realnvp --images img --num 50 --reference 12 --precision fp32 --out prior.json"
    assert run(capfd, evaluate.main, *flags.split())[0] == 0
    assert json.loads(Path("prior.json").read_text())["settings"]["sampling"] == {"temperature": 1.0}
    mask = np.zeros((8, 8), np.uint8)
    mask[0, 0] = 255
    Image.fromarray(mask).save("mask.png")
    flags = "--prior realnvp --image img/0000.png --mask mask.png --out filled.png"
    status, _, err = run(capfd, inpaint.main, *flags.split())
    assert (status, "cannot fill in parts; use a prior of codes" in err) == (2, True), err


def test_code_priors_and_latent_priors_refuse_each_others_latent_sets(folder, capfd):
    status, _, err = run(capfd, train_prior.main, "--prior", "hourglass", "--latents", "runs/latents/selfvae.h5")
    assert (status, "--prior realnvp learns" in err) == (2, True), err
    with pytest.raises(UserError, match="--prior hourglass, maskgit, pixelcnn and transformer learn"):
        continuous_grid(LatentSet("runs/latents/selfvae.h5").layout.resized([(4, 4)]).levels * 2, 0)


def test_the_study_reports_every_result_beside_the_papers(folder, capfd, monkeypatch):
    monkeypatch.setattr(modes, "find_extractor", lambda _, device: MeanColours(device))
    tiny = {"latent_channels": 2, "mixtures": 1, "flow_layers": 2, "flow_width": 2}
    models = {name: replace(config, **tiny) for name, config in study.MODELS.items()}
    monkeypatch.setattr(study, "MODELS", models)
    sizes = dict.fromkeys(models, study.NetworkSize(channels=4, growth=2, dense_layers=1))
    monkeypatch.setattr(study, "PAPER_SIZES", {32: sizes, 64: {}})
    flags = "selfvae --images img --models vae selfvae-downscale --size paper --steps 1 --batch-size 4 --num 8"
    flags = [*flags.split(), "--likelihood-num", "2", "--samples", "2", "--out", "study/selfvae.md"]
    assert run(capfd, reproduce.main, *flags)[0] == 0
    text = (folder / "study/selfvae.md").read_text()
    for name, paper in (("vae", "VAE | 3.51 | 41.36"), ("selfvae-downscale", "selfVAE-downscale | 3.65 | 34.71")):
        kept = json.loads(next(folder.glob(f"runs/reproductions/selfvae/cifar10/{name}-4-*/result-*.json")).read_text())
        assert f"| {paper} | {kept['likelihood']['bits_per_dim']['model']:.2f} |" in text
        for what in ("generations", "ladder", "latents"):
            assert Image.open(folder / f"study/selfvae-cifar10-{name}-{what}.png").width > 500
            assert f"(selfvae-cifar10-{name}-{what}.png)" in text
    assert text.count("| reconstruction-1 | 256 | 12.00 |") == 2
    before = {path: path.stat().st_mtime_ns for path in folder.glob("runs/reproductions/**/*") if path.is_file()}
    assert run(capfd, reproduce.main, *flags, "--models", "vae")[0] == 0
    assert {path: path.stat().st_mtime_ns for path in before} == before  # a finished study does not train again


def test_invalid_mode_settings_are_refused(folder, capfd):
    for flags, expected in (
        ("--mode generation --num 0", "--num must be at least 1, not 0"),
        ("--mode sideways", "--mode"),
        ("--mode generation --tokenizer vqvae", "vqvae does not exist"),
    ):
        status, _, err = run(capfd, sample.main, *flags.split())
        assert (status, expected in err) == (2, True), err
