"""Repeated evaluations: where their result is written, and what is listed as different. The scores are made up."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from smalti.evaluation import report
from smalti.evaluation.config import ImagesEvaluation
from smalti.evaluation.report import RepeatEvaluation, evaluate
from smalti.evaluation.result_files import settings_of

CONFIG = ImagesEvaluation(images="a", reference="b")


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """Changes to an empty folder."""
    monkeypatch.chdir(tmp_path)


def conditions(fingerprint="1" * 8, **others):
    return {"images": 40, "images_fingerprint": fingerprint, "reference_fingerprint": fingerprint, **others}


def write(path, scores, conditions):
    result = {"scores": scores, "conditions": conditions, "settings": settings_of(CONFIG)}
    Path(path).write_text(json.dumps(result))


def repeat(monkeypatch, scores, conditions, out=None):
    """Repeats `first.json` with an evaluation that gives these scores."""
    monkeypatch.setattr(report, "_evaluate", lambda *_, **__: (scores, conditions))
    return evaluate(RepeatEvaluation(again=Path("first.json"), out=out and Path(out)))


def test_results_of_other_images_stay(monkeypatch, capsys):
    """The settings are the same, so the images differ only in their fingerprint, which is known at the end."""
    write("first.json", {"frechet": {"images": 1.0}}, conditions())
    write("other.json", {"frechet": {"images": 777.0}}, conditions("2" * 8))
    repeat(monkeypatch, {"frechet": {"images": 5.0}}, conditions(), out="other.json")
    assert json.loads(Path("other.json").read_text())["scores"] == {"frechet": {"images": 777.0}}
    assert json.loads(Path("other-2.json").read_text())["scores"] == {"frechet": {"images": 5.0}}
    assert capsys.readouterr().out.splitlines()[-1] == "other-2.json"


def test_the_repeated_result_stays(monkeypatch):
    Path("x-2.json").symlink_to("first.json")
    write("first.json", {"frechet": {"images": 1.0}}, conditions())
    write("x.json", {"frechet": {"images": 777.0}}, conditions("2" * 8))
    repeat(monkeypatch, {"frechet": {"images": 5.0}}, conditions(), out="x.json")
    assert json.loads(Path("first.json").read_text())["scores"] == {"frechet": {"images": 1.0}}
    assert json.loads(Path("x-3.json").read_text())["scores"] == {"frechet": {"images": 5.0}}


def test_scores_and_conditions_that_are_missing_are_listed(monkeypatch, capsys):
    """Telea's fill, for example, needs OpenCV, which may not be installed any more."""
    write("first.json", {"seam": {"model": 1.0, "telea": 2.0}, "gone": {"model": 3.0}}, conditions(images_left_out=5))
    repeat(monkeypatch, {"seam": {"model": 1.0, "new": 4.0}}, conditions())
    assert capsys.readouterr().out.splitlines()[-1] == (
        "images_left_out was 5, is missing; seam of telea was 2.0, is missing; gone of model was 3.0, is missing; "
        "seam of new was missing, is 4.0"
    )


def test_scores_that_are_not_finite_are_null_in_results_and_equal_themselves(monkeypatch, capsys):
    def constant(name):
        raise AssertionError(f"{name} is not JSON")

    scores = {"bits": {"model": float("nan"), "real": float("inf"), "other": 1.0}}
    monkeypatch.setattr(report, "_evaluate", lambda *_, **__: (scores, conditions()))
    evaluate(replace(CONFIG, out=Path("first.json")))
    written = json.loads(Path("first.json").read_text(), parse_constant=constant)["scores"]
    assert written == {"bits": {"model": None, "real": None, "other": 1.0}}
    evaluate(replace(CONFIG, out=Path("first.json")))  # it is recognised, and replaced
    assert [path.name for path in Path().iterdir()] == ["first.json"]
    repeat(monkeypatch, scores, conditions())
    assert capsys.readouterr().out.splitlines()[-1] == "the same as first.json, except for speeds"
    repeat(monkeypatch, {"bits": {**scores["bits"], "model": 2.0}}, conditions())
    assert capsys.readouterr().out.splitlines()[-1] == "bits of model was not finite, is 2.0"
