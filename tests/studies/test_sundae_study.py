"""The study of SUNDAE with tiny networks: what it trains in equal time, measures and writes."""

from dataclasses import replace

import pytest
from helpers.image_toys import MeanColours, write_patches

from smalti import UserError
from smalti.studies.sundae import report, study


def test_priors_are_trained_for_equal_time_and_measured_once(tmp_path, monkeypatch):
    write_patches(tmp_path / "img", 60)
    monkeypatch.setattr(study, "TOKENIZER", replace(study.TOKENIZER, widths=(6, 6), residual_blocks=0, branching=2))
    monkeypatch.setattr(study, "find_extractor", lambda _, device: MeanColours(device))
    monkeypatch.setattr(study, "SMALLER", {"model_width": 24})
    seconds = iter((4.0, 2.0, 1.0))
    monkeypatch.setattr(study, "cpu_seconds", lambda _step, _count: next(seconds))
    monkeypatch.setattr(report, "SAMPLERS", dict(list(report.SAMPLERS.items())[1:3]))
    config = study.ReproduceSundae(
        "sundae",
        images=str(tmp_path / "img"),
        unrolled=(2, 1),
        others=("pixelcnn",),
        step_counts=(1, 2),
        seeds=1,
        tokenizer_steps=1,
        prior_steps=2,
        samples=8,
        work=tmp_path / "runs",
        out=tmp_path / "sundae.md",
    )
    monkeypatch.setattr(report, "SHEET_STEPS", 1)
    report.reproduce_sundae(config)
    trained = study.Study(config)
    assert {prior.label: steps for prior, steps in trained.steps.items()} == {
        "SUNDAE, 2 unrolled": 2,
        "SUNDAE, 1 unrolled": 4,
        "`pixelcnn`": 8,
    }
    text = config.out.read_text()
    rows = {line.split(" | ")[0].strip("| "): line for line in text.splitlines() if line.startswith("| ")}
    assert {"SUNDAE, 2 unrolled", "SUNDAE, 1 unrolled", "`pixelcnn`", *report.SAMPLERS} <= rows.keys()
    result = trained.result(config.priors[2], 0, study.prior_class("pixelcnn").method.sampling())
    assert f"| {result['bits']:.3f} |" in rows["`pixelcnn`"]
    for picture in ("samplers", "sheet"):
        assert (tmp_path / f"sundae-img-{picture}.png").exists()
    monkeypatch.setattr(study, "generate_images", None)  # finished: only the sheet is drawn again
    monkeypatch.setattr(report, "sheet", lambda _: None)
    report.reproduce_sundae(config)
    assert config.out.read_text() == text


def test_a_study_of_nothing_is_refused():
    with pytest.raises(UserError, match="--unrolled and --step-counts need at least one number each"):
        study.ReproduceSundae("sundae", unrolled=())
