"""The queue of studies."""

import shlex
from pathlib import Path

import pytest

from smalti.benchmarks.command_queue import commands
from smalti.core.errors import UserError
from smalti.studies import __main__ as queue

PAGE = Path(__file__).parents[2] / queue.PAGE


def test_names_of_data_become_files_of_the_folder(tmp_path):
    for name in ("mnist-train.parquet", "cifar10-train-25k.parquet"):
        (tmp_path / name).touch()
    assert queue.with_data("smalti x --images mnist-train.parquet --out a.md", tmp_path) == (
        f"smalti x --images {tmp_path}/mnist-train.parquet --out a.md",
        [],
    )
    assert queue.with_data("smalti x cifar10-train.parquet", tmp_path)[0].endswith("/cifar10-train-25k.parquet")
    assert queue.with_data("smalti x mnist-test.parquet", tmp_path)[1] == ["mnist-test.parquet"]
    (tmp_path / "mnist-train-1k.parquet").touch()  # sorts before the exact name
    assert queue.with_data("smalti x mnist-train.parquet", tmp_path)[0].endswith("/mnist-train.parquet")
    spaced = tmp_path / "my data"
    spaced.mkdir()
    (spaced / "a.parquet").touch()
    command, _ = queue.with_data("smalti x --images a.parquet", spaced)
    assert shlex.split(command)[-1] == str(spaced / "a.parquet")  # as `run_all` splits it


def test_studies_without_their_data_are_named_and_left_out(tmp_path, capsys):
    lines = ["smalti reproduce a --images portraits", "smalti reproduce b --images mnist-train.parquet"]
    assert queue.runnable(lines, tmp_path) == lines[:1]
    assert capsys.readouterr().out == (
        f"left out, without mnist-train.parquet in {tmp_path}: smalti reproduce b --images mnist-train.parquet\n"
    )


def test_the_page_runs_every_study_that_has_no_command_of_its_own():
    names = {line.split()[2] for line in commands(PAGE.read_text())}
    assert names == {"sundae", "quantizers", "hr-vqvae", "hqa", "size64", "overfitting", "selfvae"}


def test_impossible_settings_are_refused(tmp_path):
    with pytest.raises(UserError, match="no page"):
        queue.RunStudies("run", page=tmp_path / "none.md")
    with pytest.raises(UserError, match="--hours"):
        queue.RunStudies("run", hours=0.0, page=PAGE)
    with pytest.raises(UserError, match="--processes"):
        queue.RunStudies("run", processes=0, page=PAGE)


def test_the_queue_runs_commands_and_says_what_is_left(tmp_path, monkeypatch, capsys):
    page = tmp_path / "queue.md"
    page.write_text("    smalti reproduce x\n    smalti reproduce y\n")
    ran = []
    monkeypatch.setattr(queue.os, "nice", ran.append)
    monkeypatch.setattr(queue, "run_all", lambda lines, logs, **options: bool(ran.append((lines, options))))
    queue.run_studies(queue.RunStudies("run", page=page, logs=tmp_path, hours=2.0, processes=3))
    assert ran == [19, (["smalti reproduce x", "smalti reproduce y"], {"minutes": 120, "processes": 3})]
    assert capsys.readouterr().out == "not all are finished; run the same command again to go on\n"
