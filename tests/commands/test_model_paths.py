"""Names of models: kinds, folders, and the models in the package, which stand in for kinds that are not trained."""

import shutil
from pathlib import Path

import pytest
from helpers import fake_hub
from helpers.command_toys import save_pair
from helpers.toys import TINY

from smalti import load_prior
from smalti.commands import model_paths
from smalti.commands.model_paths import (
    find_model,
    layer_source,
    load_tokenizer,
    prior_class,
    tokenizer_beside,
)
from smalti.core.errors import UserError
from smalti.tokenizers.hqa.hqa import HQA


@pytest.fixture
def shipped(tmp_path, monkeypatch):
    """A package with one model, and a working folder without any."""
    monkeypatch.setattr(model_paths, "SHIPPED", tmp_path / "package")
    save_pair(tmp_path / "package/portraits")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "package/portraits"


def test_models_of_the_package_are_found_by_name(shipped):
    assert model_paths.shipped_models("prior") == model_paths.shipped_models("tokenizer") == ["portraits"]
    assert find_model("portraits", "prior") == shipped
    assert find_model("portraits", "tokenizer") == shipped / "tokenizer"
    prior = load_prior("portraits")
    assert prior_class("portraits") is type(prior)
    assert tokenizer_beside(prior).digest() == load_tokenizer("portraits").digest()


def test_default_kinds_are_those_of_the_package_until_trained(shipped, capsys):
    assert find_model("hourglass", "prior") == shipped
    assert (
        "there is no runs/priors/hourglass yet: using the prior 'portraits' of the package" in capsys.readouterr().err
    )
    assert find_model("hrvq", "tokenizer") == shipped / "tokenizer"
    save_pair(model_paths.PRIORS / "hourglass")
    capsys.readouterr()
    assert find_model("hourglass", "prior") == model_paths.PRIORS / "hourglass"
    assert not capsys.readouterr().err


def test_other_kinds_must_be_trained_first(shipped):
    with pytest.raises(UserError, match=r"runs/priors/pixelcnn does not exist: train it first \(python scripts"):
        find_model("pixelcnn", "prior")
    with pytest.raises(UserError, match=r"runs/tokenizers/vqvae does not exist: train it first \(python"):
        find_model("vqvae", "tokenizer")


def test_a_folder_in_the_working_directory_needs_a_path_if_the_package_has_its_name(shipped, tmp_path):
    save_pair(tmp_path / "portraits")
    assert find_model("portraits", "prior") == shipped
    assert find_model("./portraits", "prior").resolve() == tmp_path / "portraits"


def test_a_path_is_a_folder_and_never_a_name_in_the_package(shipped, tmp_path, capsys):
    model_paths._note_once.cache_clear()
    save_pair(tmp_path / "portraits")
    save_pair(tmp_path / "hourglass")
    assert load_prior(Path("portraits")).folder == Path("portraits").absolute()
    assert load_prior(Path("hourglass")).folder == Path("hourglass").absolute()
    assert load_tokenizer(Path("portraits/tokenizer")).folder == Path("portraits/tokenizer").absolute()
    assert not capsys.readouterr().err
    for name, meant in (("portraits", "the one in the package"), ("hourglass", "a kind")):
        for _ in range(2):
            assert load_prior(name).folder == shipped
        note = f"note: the prior '{name}' is {meant}, not the folder of this name; for the folder, give ./{name}"
        assert capsys.readouterr().err.count(note) == 1
    with pytest.raises(UserError, match="no checkpoint at hrvq: there is no such folder"):
        load_tokenizer(Path("hrvq"))
    HQA(TINY["hqa"]).save("hqa")
    assert layer_source("./hqa", 2) == "./hqa"  # its bare name would be the kind


def test_missing_parts_of_a_local_model_are_not_requested_from_the_hub(tmp_path, monkeypatch):
    """Paths such as models/faces/tokenizer have the form of a hub id."""
    monkeypatch.chdir(tmp_path)
    save_pair(Path("models/faces"))
    shutil.rmtree("models/faces/tokenizer")
    HQA(TINY["hqa"]).save("models/hqa")
    with fake_hub.in_use(monkeypatch, tmp_path / "cache") as hub:
        with pytest.raises(UserError, match="copy of its tokenizer is missing: put it at models/faces/tokenizer, or"):
            tokenizer_beside(load_prior("models/faces"))
        with pytest.raises(
            UserError,
            match=r"models/hqa/layer-1 with the first layers of models/hqa is missing, .*every pushed model; copy",
        ):
            layer_source("models/hqa", 1)
        assert hub.requests == []


def test_a_training_that_was_stopped_is_no_model_yet(tmp_path):
    """The folder of a run has `run.json` from the start; that of a stack of layers has it in the layers."""
    for run in (tmp_path / "run", tmp_path / "stack" / "layer-1"):
        run.mkdir(parents=True)
        (run / "run.json").write_text("{}")
    for folder in ("run", "stack"):
        with pytest.raises(UserError, match="has no trained model yet, only a stopped training; the same"):
            load_tokenizer(tmp_path / folder)
    with pytest.raises(UserError, match="is not a smalti checkpoint"):
        load_tokenizer(tmp_path)
