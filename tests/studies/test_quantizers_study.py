"""The study of quantizers, tiny: what it trains, measures, tabulates and draws."""

import json
import math
from dataclasses import replace

import pytest
import torch
from helpers.image_toys import write_patches
from PIL import Image

from smalti import UserError
from smalti.commands.model_paths import load_prior, load_tokenizer
from smalti.core.codes import Level
from smalti.evaluation.code_likelihood import count_bits
from smalti.images.decoding import to_float
from smalti.images.image_set import ImageRows, open_images
from smalti.latentsets.reader import LatentSet
from smalti.studies.quantizers import scores
from smalti.studies.quantizers import study as quantizers
from smalti.studies.quantizers.report import reproduce_quantizers
from smalti.tokenizers.vq.hrvq import HRVQ, HRVQConfig
from smalti.tokenizers.vq.vqvae import VQVAE
from smalti.training.run_folder import OtherSettingsError


@pytest.fixture(autouse=True)
def small_networks(monkeypatch):
    """Small tokenizers and priors."""
    monkeypatch.setattr(quantizers, "WIDTHS", {8: (6, 6), 16: (6,)})
    monkeypatch.setattr(quantizers, "RESIDUAL_BLOCKS", 0)
    monkeypatch.setattr(quantizers, "SMALLER", {"model_width": 16, "heads": 2, "layers": 1})


def test_quantizers_are_compared_at_equal_bits_with_equal_networks():
    for bits in (9, 12):
        models = [quantizers.model_of(each, side=8, bits=bits, image_channels=1) for each in quantizers.VARIANTS]
        built = [replace(model, widths=(4, 4), residual_blocks=0) for model in models]
        tokenizers = [HRVQ(each) if isinstance(each, HRVQConfig) else VQVAE(each) for each in built]
        assert {math.prod(tokenizer.radices) for tokenizer in tokenizers} == {2**bits}
        assert {str(tokenizer.layout).partition(" ")[0] for tokenizer in tokenizers} == {"8×8"}
    networks = [(model.widths, model.residual_blocks, model.image_channels) for model in models]
    assert len(set(networks)) == 1


def test_quantizers_are_trained_once_and_measured_on_held_out_images(tmp_path):
    write_patches(tmp_path / "img", 60)
    config = quantizers.ReproduceQuantizers(
        "quantizers",
        images=str(tmp_path / "img"),
        quantizers=("linked", "fsq"),
        bits=(9,),
        sides=(8, 16),
        seeds=2,
        steps=1,
        prior_steps=2,
        work=tmp_path / "runs",
        out=tmp_path / "page.md",
    )
    reproduce_quantizers(config)
    text = config.out.read_text()
    for side in ("8×8", "16×16"):
        assert f"`img`, {side} codes of 9 bits" in text
    rows = [line for line in text.splitlines() if line.startswith(("| `linked`", "| `fsq`"))]
    assert [row.split(" | ")[1:3] for row in rows] == [["512", "2"]] * 6
    study = quantizers.Quantizers(config)
    linked = next(each for each in quantizers.VARIANTS if each.quantizer == "linked")
    folder = study.folder(linked, 8, 9, 1)
    result, tokenizer = json.loads((folder / "scores.json").read_text()), load_tokenizer(str(folder))
    held_out = ImageRows(open_images(config.images, height=32, width=32), split="held_out", flips=False)
    images = to_float(held_out.__getitems__(list(range(len(held_out))))["images"])
    (codes,) = tokenizer.encode(images)
    error = ((tokenizer.decode((codes,)) - images) / 2).square().mean().item()
    shares = torch.unique(codes, return_counts=True)[1] / codes.numel()
    assert result["mse"] == pytest.approx(error, rel=1e-5)
    assert result["codes_used"] == len(shares)
    assert result["perplexity"] == pytest.approx(torch.exp(-(shares * shares.log()).sum()).item(), rel=1e-4)
    assert result["seconds"] > 0
    prior = load_prior(str(folder / "transformer-2steps"))
    (per_code,) = count_bits([prior.eval()], LatentSet(folder / "latents.h5")).per_code
    nats = study.result(linked, 8, 9, 1)["nats"]
    assert nats == pytest.approx(per_code * math.log(2) * 64)
    assert sum(f"{nats:.0f}" in row.rpartition(" | ")[2] for row in rows) >= 1
    for side in (8, 16):
        assert f"(page-img-{side}x{side}-9bits.png)" in text
        assert Image.open(tmp_path / f"page-img-{side}x{side}-9bits.png").width > 100
    before = {path: path.stat().st_mtime_ns for path in config.work.rglob("*") if path.is_file()}
    for again in (config, replace(config, quantizers=("fsq",), seeds=1)):  # finished: nothing is trained or measured
        reproduce_quantizers(again)
        assert {path: path.stat().st_mtime_ns for path in config.work.rglob("*") if path.is_file()} == before
        assert config.out.read_text() == text


@pytest.mark.parametrize("changed", ["images", "image_channels", "precision"])
def test_scores_of_quantizers_on_other_images_or_settings_are_not_reported(tmp_path, changed):
    for folder in ("a", "b"):
        write_patches(tmp_path / folder / "img", 40)
    config = quantizers.ReproduceQuantizers(
        "quantizers",
        images=str(tmp_path / "a" / "img"),
        quantizers=("fsq",),
        bits=(9,),
        seeds=1,
        steps=1,
        prior_steps=0,
        precision="fp32",
        work=tmp_path / "runs",
        out=tmp_path / "page.md",
    )
    reproduce_quantizers(config)
    text = config.out.read_text()
    other = {"images": str(tmp_path / "b" / "img"), "image_channels": 1, "precision": "bf16"}[changed]
    with pytest.raises(OtherSettingsError, match=f"with --{changed.replace('_', '-')} .+, not"):
        reproduce_quantizers(replace(config, **{changed: other}))
    assert config.out.read_text() == text


def test_every_variant_has_a_folder_of_its_own(tmp_path):
    study = quantizers.Quantizers(quantizers.ReproduceQuantizers("quantizers", work=tmp_path))
    folders = {study.folder(variant, 8, 9, 0) for variant in quantizers.VARIANTS}
    assert len(folders) == len(quantizers.VARIANTS)


def test_a_study_of_no_quantizer_is_refused():
    with pytest.raises(UserError, match="at least one of each"):
        quantizers.ReproduceQuantizers("quantizers", quantizers=())


def test_priors_over_all_codes_train_for_the_same_time(tmp_path, monkeypatch):
    """A step over bits that takes thrice the time of one over three digits is made a third as often."""
    study = quantizers.Quantizers(quantizers.ReproduceQuantizers("quantizers", prior_steps=30, work=tmp_path))
    monkeypatch.setattr(quantizers, "training_step", lambda _kind, config, *_: math.prod(config.radices[:1]))
    monkeypatch.setattr(quantizers, "cpu_seconds", lambda first, count: {8: 1.0, 2: 3.0, 512: 0.5}[first] * count)
    steps = [study.prior_steps(Level(8, 8, radices)) for radices in ((8, 8, 8), (2,) * 9, (512,))]
    assert steps == [30, 10, 60]


def test_search_is_timed_without_the_encoder(tmp_path, monkeypatch):
    write_patches(tmp_path / "img", 40)
    tokenizer = HRVQ(HRVQConfig(widths=(6, 6), residual_blocks=0)).eval()
    monkeypatch.setattr(scores, "IMAGES_AT_ONCE", 4)
    clock = iter(range(0, 100, 2))
    monkeypatch.setattr(scores.time, "process_time", lambda: next(clock))
    monkeypatch.setattr(tokenizer.quantizer, "encode", lambda z_e: tuple(z_e.shape))
    images = open_images(str(tmp_path / "img"), height=32, width=32)
    assert scores.search_milliseconds(tokenizer, images) == 2 / 4 * 1000


def test_a_negative_number_of_prior_steps_is_refused():
    with pytest.raises(UserError, match="--prior-steps must be at least 0, not -1"):
        quantizers.ReproduceQuantizers("quantizers", prior_steps=-1)
