"""The studies of overfitting, 64x64 pixels and selfVAE, with tiny networks: what they train and write."""

from dataclasses import replace

import pytest
import torch
from helpers.image_toys import MeanColours, write_patches

from smalti.core import models
from smalti.core.provenance import last_metrics
from smalti.studies.overfitting import study as overfitting
from smalti.studies.selfvae import study as selfvae
from smalti.studies.size64 import study as size64

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
