"""The studies of overfitting, 64x64 pixels, quantizers and selfVAE, with tiny networks: what they train and write."""

import json
import math
from dataclasses import replace

import pytest
import torch
from helpers.image_toys import MeanColours, write_patches

from smalti import UserError
from smalti.commands.model_paths import load_tokenizer
from smalti.core import models
from smalti.images.decoding import to_float
from smalti.images.image_set import ImageRows, open_images
from smalti.studies.overfitting import study as overfitting
from smalti.studies.quantizers import study as quantizers
from smalti.studies.selfvae import study as selfvae
from smalti.studies.size64 import study as size64
from smalti.tokenizers.vq.hrvq import HRVQ, HRVQConfig
from smalti.tokenizers.vq.vqvae import VQVAE
from smalti.training.run_folder import OtherSettingsError, last_metrics

TINY_PRIOR = {"model_width": 16, "heads": 2, "depth": (0, 1, 0)}


def test_overfitting_measures_the_last_and_the_best_state_of_each_run(tmp_path, monkeypatch):
    write_patches(tmp_path / "img", 60)
    monkeypatch.setattr(overfitting, "find_extractor", lambda _, device: MeanColours(device))
    small = replace(overfitting.TOKENIZER, widths=(8, 8), residual_blocks=1, branching=2)
    monkeypatch.setattr(overfitting, "TOKENIZER", small)
    monkeypatch.setattr(overfitting, "PRIOR", replace(overfitting.PRIOR, **TINY_PRIOR))
    monkeypatch.setattr(overfitting, "REPORT_STEPS", 1)
    config = overfitting.ReproduceOverfitting(
        "overfitting",
        images=str(tmp_path / "img"),
        dropout=(0.1,),
        crops=(0, 1),
        seeds=2,
        tokenizer_steps=1,
        prior_steps=3,
        samples=8,
        work=tmp_path / "runs",
        out=tmp_path / "report.md",
    )
    overfitting.reproduce_overfitting(config)
    study = overfitting.Overfitting(config)
    result = study.result(0.1, 1, 0)
    assert result["best"]["held_out_loss"] <= result["last"]["held_out_loss"]
    assert result["last"]["step"] == 3
    rows = [line for line in config.out.read_text().splitlines() if line.startswith("| 0.1 ")]
    assert [row.split(" | ")[1:3] for row in rows] == [["0", "2"], ["1", "2"]]
    before = config.out.read_bytes()
    monkeypatch.setattr(overfitting, "generate_images", lambda *_, **__: pytest.fail("sampled again"))
    overfitting.reproduce_overfitting(config)
    assert config.out.read_bytes() == before
    for name in ("prior_steps", "tokenizer_steps"):
        other = overfitting.Overfitting(replace(config, **{name: getattr(config, name) + 1}))
        with pytest.raises(pytest.fail.Exception, match="sampled again"):  # from priors of its own
            other.result(0.1, 0, 0)
        folders = [
            each.folder / f"prior-dropout0.1-0crops-{each.config.prior_steps}steps-seed0" for each in (study, other)
        ]
        assert [last_metrics(folder)["step"] for folder in folders] == [3, 4 if name == "prior_steps" else 3]
    assert other.tokenizer_folder != study.tokenizer_folder
    assert other.latents(0) != study.latents(0)
    assert study.result(0.1, 1, 0) == result


def test_size64_trains_every_cell_and_writes_a_section_for_each_set_of_images(tmp_path, monkeypatch):
    write_patches(tmp_path / "faces", 40)
    monkeypatch.setattr(size64, "find_extractor", lambda _, device: MeanColours(device))
    tiny = {"residual_blocks": 1, "code_width": 8, "branching": 2}
    hrvq = size64.small64("hrvq")

    def preset(_kind):
        return replace(hrvq, model=replace(hrvq.model, **tiny), fit=replace(hrvq.fit, batch_size=4))

    monkeypatch.setattr(size64, "small64", preset)
    cells = size64.Cell("hrvq", 8, (8, 8, 8), prior_batch=4), size64.Cell("hrvq", 16, (8, 8), prior_batch=2)
    monkeypatch.setattr(size64, "CELLS", cells)
    monkeypatch.setattr(size64, "PRIOR", replace(size64.PRIOR, **TINY_PRIOR))
    monkeypatch.setattr(size64, "SHOWN_SAMPLES", 4)
    config = size64.ReproduceSize64(
        "size64",
        images=(str(tmp_path / "faces"),),
        tokenizer_steps=1,
        prior_steps=1,
        samples=8,
        work=tmp_path / "runs",
        out=tmp_path / "size64.md",
    )
    size64.reproduce_size64(config)
    text = config.out.read_text()
    assert "| hrvq | 8×8 of 16³ |" in text
    assert "| hrvq | 16×16 of 16³ |" in text
    for side in ("8x8", "16x16"):
        for picture in ("samples", "fills"):
            assert (tmp_path / f"size64-faces-hrvq-{side}-{picture}.png").exists()
    monkeypatch.setattr(size64, "generate_images", None)  # finished: nothing is sampled again
    size64.reproduce_size64(config)
    assert config.out.read_text() == text
    size64.reproduce_size64(replace(config, sides=(16,)))  # the other cell stays
    assert config.out.read_text() == text


def test_quantizers_are_compared_at_equal_bits_with_equal_networks():
    for bits in (9, 12):
        models = [quantizers.model_of(each, side=8, bits=bits, image_channels=1) for each in quantizers.VARIANTS]
        built = [replace(model, widths=(4, 4), residual_blocks=0) for model in models]
        tokenizers = [HRVQ(each) if isinstance(each, HRVQConfig) else VQVAE(each) for each in built]
        assert {math.prod(tokenizer.radices) for tokenizer in tokenizers} == {2**bits}
        assert {str(tokenizer.layout).partition(" ")[0] for tokenizer in tokenizers} == {"8×8"}
    networks = [(model.widths, model.residual_blocks, model.image_channels) for model in models]
    assert len(set(networks)) == 1


def test_quantizers_are_trained_once_and_measured_on_held_out_images(tmp_path, monkeypatch):
    write_patches(tmp_path / "img", 60)
    monkeypatch.setattr(quantizers, "WIDTHS", {8: (6, 6), 16: (6,)})
    monkeypatch.setattr(quantizers, "RESIDUAL_BLOCKS", 0)
    config = quantizers.ReproduceQuantizers(
        "quantizers",
        images=str(tmp_path / "img"),
        quantizers=("linked", "fsq"),
        bits=(9,),
        sides=(8, 16),
        seeds=2,
        steps=1,
        work=tmp_path / "runs",
        out=tmp_path / "page.md",
    )
    quantizers.reproduce_quantizers(config)
    text = config.out.read_text()
    for side in ("8×8", "16×16"):
        assert f"`img`, {side} codes of 9 bits" in text
    rows = [line for line in text.splitlines() if line.startswith(("| `linked`", "| `fsq`"))]
    assert [row.split(" | ")[1:3] for row in rows] == [["512", "2"]] * 4
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
    before = {path: path.stat().st_mtime_ns for path in config.work.rglob("*") if path.is_file()}
    quantizers.reproduce_quantizers(config)  # finished: nothing is trained or measured again
    assert {path: path.stat().st_mtime_ns for path in config.work.rglob("*") if path.is_file()} == before
    assert config.out.read_text() == text


@pytest.mark.parametrize("changed", ["images", "image_channels", "precision"])
def test_scores_of_quantizers_on_other_images_or_settings_are_not_reported(tmp_path, monkeypatch, changed):
    monkeypatch.setattr(quantizers, "WIDTHS", {8: (6, 6)})
    monkeypatch.setattr(quantizers, "RESIDUAL_BLOCKS", 0)
    for folder in ("a", "b"):
        write_patches(tmp_path / folder / "img", 40)
    config = quantizers.ReproduceQuantizers(
        "quantizers",
        images=str(tmp_path / "a" / "img"),
        quantizers=("fsq",),
        bits=(9,),
        seeds=1,
        steps=1,
        precision="fp32",
        work=tmp_path / "runs",
        out=tmp_path / "page.md",
    )
    quantizers.reproduce_quantizers(config)
    text = config.out.read_text()
    other = {"images": str(tmp_path / "b" / "img"), "image_channels": 1, "precision": "bf16"}[changed]
    with pytest.raises(OtherSettingsError, match=f"with --{changed.replace('_', '-')} .+, not"):
        quantizers.reproduce_quantizers(replace(config, **{changed: other}))
    assert config.out.read_text() == text


def test_every_variant_has_a_folder_of_its_own(tmp_path):
    study = quantizers.Quantizers(quantizers.ReproduceQuantizers("quantizers", work=tmp_path))
    folders = {study.folder(variant, 8, 9, 0) for variant in quantizers.VARIANTS}
    assert len(folders) == len(quantizers.VARIANTS)


def test_a_study_of_no_quantizer_is_refused():
    with pytest.raises(UserError, match="at least one of each"):
        quantizers.ReproduceQuantizers("quantizers", quantizers=())


@pytest.mark.parametrize("data", ["cifar10", "celeba"])
def test_models_of_selfvae_have_the_papers_size_and_latents(data):
    config = selfvae.ReproduceSelfVAE("selfvae", data=data, size="paper")
    for name in selfvae.MODELS:
        with torch.device("meta"):
            model = models.class_of_kind("tokenizer", "vae" if name == "vae" else "selfvae")(
                selfvae.model_of(name, config)
            )
        assert 32e6 < sum(weights.numel() for weights in model.parameters()) < 42e6
        (level,) = model.layout.levels
        assert (level.height, level.width, level.channels) == (8, 8, 16)
