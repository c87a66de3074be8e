"""The studies of overfitting and of 64x64 pixels, with tiny networks: what they train, measure once and write."""

from dataclasses import replace

from helpers.image_toys import write_patches

from smalti.studies.overfitting import study as overfitting
from smalti.studies.size64 import study as size64

TINY_PRIOR = {"model_width": 16, "heads": 2, "depth": (0, 1, 0)}


def test_overfitting_measures_the_last_and_the_best_state_of_each_run(tmp_path, monkeypatch):
    write_patches(tmp_path / "img", 60)
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
    monkeypatch.setattr(overfitting, "generate_images", None)  # finished: nothing is sampled or measured again
    overfitting.reproduce_overfitting(config)
    assert config.out.read_bytes() == before


def test_size64_trains_every_cell_and_writes_a_section_for_each_set_of_images(tmp_path, monkeypatch):
    write_patches(tmp_path / "faces", 40)
    tiny = {"residual_blocks": 1, "code_width": 8, "branching": 2}
    hrvq = size64.small64("hrvq")

    def preset(_kind):
        return replace(hrvq, model=replace(hrvq.model, **tiny), fit=replace(hrvq.fit, batch_size=4))

    monkeypatch.setattr(size64, "small64", preset)
    monkeypatch.setattr(size64, "CELLS", (size64.Cell("hrvq", 8, (8, 8, 8)), size64.Cell("hrvq", 16, (8, 8))))
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
