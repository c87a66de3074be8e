"""`smalti push`: a preview, an upload and a load as a person runs them, and mistakes as one line with exit status 2."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import fake_hub, toys
from helpers.command_toys import run, save_pair
from helpers.latents import small_set

from smalti.core import models
from smalti.core.models import load
from smalti.scripts import inspect_latents, push


@pytest.fixture
def workspace(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_pair(tmp_path / "pair")
    (tmp_path / "pair/tokenizer/reconstructions.png").write_bytes(b"a picture")
    return tmp_path


@pytest.fixture
def hub(monkeypatch, workspace):
    with fake_hub.in_use(monkeypatch, workspace / "cache") as served:
        yield served


def refusal(capfd, *arguments):
    status, out, err = run(capfd, push.main, *arguments)
    assert (status, out, err.count("\n"), err[:7]) == (2, "", 1, "error: "), err
    return err


def test_a_preview_has_what_would_be_uploaded(hub, capfd):
    status, out, _ = run(capfd, push.main, "pair/tokenizer", "me/tokenizer", "--license", "mit", "--preview", "look")
    assert status == 0
    assert hub.requests == []
    assert [line.split()[0] for line in out.splitlines()[:4]] == sorted(os.listdir("look"))
    assert "reconstructions.png shows held-out images; --no-sheet leaves it out" in out
    assert "nothing was uploaded; the files are in look, and README.md is the card" in out
    before = {name: Path("look", name).read_bytes() for name in os.listdir("look")}
    assert "look/README.md exists" in refusal(capfd, "pair/tokenizer", "me/tokenizer", "--preview", "look")
    again = ["--license", "mit", "--preview", "look", "--overwrite"]
    assert run(capfd, push.main, "pair/tokenizer", "me/tokenizer", *again)[0] == 0
    assert {name: Path("look", name).read_bytes() for name in os.listdir("look")} == before
    assert run(capfd, push.main, "pair/tokenizer", "me/tokenizer", "--license", "mit")[0] == 0
    assert hub.repos["models/me/tokenizer"].files() == before
    assert load("look", "tokenizer").digest() == load("me/tokenizer", "tokenizer").digest()


def test_without_the_sheet_that_of_an_earlier_push_is_deleted(hub, capfd):
    """Other files stay, and without --overwrite all files of a preview do."""
    again = ["pair/tokenizer", "me/tokenizer", "--no-sheet"]
    for flags in ([], ["--preview", "look"]):
        assert run(capfd, push.main, "pair/tokenizer", "me/tokenizer", *flags)[0] == 0
    for name in ("notes.txt", "samples.png"):
        hub.repos["models/me/tokenizer"].files()[name] = b"a person's own"
        Path("look", name).write_text("a person's own")
    assert "look/README.md exists" in refusal(capfd, *again, "--preview", "look")
    for flags in ([], ["--preview", "look", "--overwrite"]):
        status, _, err = run(capfd, push.main, *again, *flags)
        assert (status, "deleted, as left from an earlier push: reconstructions.png\n" in err) == (0, True)
    left = ["README.md", "config.json", "model.safetensors", "notes.txt", "samples.png"]
    assert sorted(hub.repos["models/me/tokenizer"].files()) == sorted(os.listdir("look")) == left


def test_a_picture_that_a_persons_card_shows_stays(hub, capfd):
    assert run(capfd, push.main, "pair/tokenizer", "me/tokenizer")[0] == 0
    Path("pair/tokenizer/README.md").write_text("![what it does](reconstructions.png)")
    assert run(capfd, push.main, "pair/tokenizer", "me/tokenizer", "--no-sheet")[0] == 0
    assert "reconstructions.png" in hub.repos["models/me/tokenizer"].files()


def test_the_preview_of_a_set_lies_beside_no_set_of_several_files(hub, capfd):
    Path("look").mkdir()
    index = {"attributes": {"format": "smalti-latents"}, "shards": [{"name": "00000.h5"}, {"name": "notes.txt"}]}
    Path("look/index.json").write_text(json.dumps(index))
    for name in ("00000.h5", "notes.txt", "other.h5"):
        Path("look", name).write_text("contents")
    small_set(Path("codes.h5"))
    error = refusal(capfd, "codes.h5", "me/codes", "--preview", "look", "--overwrite")
    assert "beside another latent set (00000.h5 is there)" in error
    assert sorted(os.listdir("look")) == ["00000.h5", "index.json", "notes.txt", "other.h5"]


def test_a_kind_is_the_one_that_was_trained_here(hub, capfd):
    torch.manual_seed(0)
    models.class_of_kind("tokenizer", "vqvae")(toys.TINY["vqvae"]).save("runs/tokenizers/vqvae")
    status, out, _ = run(capfd, push.main, "vqvae", "me/vqvae", "--private", "--revision", "v1", "--message", "Mine")
    assert status == 0
    assert f"{hub.endpoint}/me/vqvae/tree/v1\nnext: smalti build-latents --tokenizer me/vqvae@v1\n" in out
    assert "the card gives no licence; --license NAME does" in out
    repo = hub.repos["models/me/vqvae"]
    assert (repo.private, repo.messages, repo.files()) == (True, ["Mine"], {})
    assert "config.json" in repo.files("v1")


def test_a_kind_is_not_the_folder_of_its_name(hub, capfd):
    shutil.copytree("pair", "hourglass")
    assert "note:" not in run(capfd, push.main, "hourglass", "me/pair", "--preview", "folder")[2]
    shutil.copytree("pair", "runs/priors/hourglass")
    Path("runs/priors/hourglass/README.md").write_text("of the kind")
    note = (
        "note: 'hourglass' is a kind, so runs/priors/hourglass is pushed, not the folder of this name; for the folder"
    )
    assert note in run(capfd, push.main, "hourglass", "me/pair", "--preview", "kind")[2]
    assert Path("kind/README.md").read_text() == "of the kind"
    assert "note:" not in run(capfd, push.main, "./hourglass", "me/pair", "--preview", "path")[2]
    assert Path("path/README.md").read_bytes() == Path("folder/README.md").read_bytes()


def test_a_snapshot_is_pushed_with_the_tokenizer_of_its_run(hub, capfd):
    snapshot = Path("pair/states/step_00000002")
    load("pair", "prior").save(snapshot)
    status, _, err = run(capfd, push.main, snapshot, "me/snapshot")
    assert status == 0, err
    assert not (snapshot / "tokenizer").exists()
    pushed = hub.repos["models/me/snapshot"].files()
    assert pushed["tokenizer/config.json"] == Path("pair/tokenizer/config.json").read_bytes()


def test_the_next_command_names_the_priors_of_all_levels(hub, capfd):
    tokenizer = models.class_of_kind("tokenizer", "vqvae2")(toys.TINY["vqvae2"])
    prior = load("pair", "prior")
    prior.provenance |= {"tokenizer_digest": tokenizer.digest(), "level": 0}
    prior.save("coarse")
    tokenizer.save("coarse/tokenizer")
    status, out, _ = run(capfd, push.main, "coarse", "me/photos/level-0")
    assert (status, out.splitlines()[-1]) == (0, "next: smalti sample --prior me/photos/level-0 LEVEL-1")
    status, out, _ = run(capfd, push.main, "pair", "me/photos")
    assert (status, out.splitlines()[-1]) == (0, "next: smalti sample --prior me/photos")


def test_a_latent_set_goes_to_a_data_set(hub, capfd):
    small_set(Path("codes.h5"))
    status, out, _ = run(capfd, push.main, "codes.h5", "me/codes", "--tokenizer", "me/tokenizer")
    assert status == 0
    assert out.endswith(f"{hub.endpoint}/datasets/me/codes\nnext: smalti train-prior --latents me/codes\n")
    status, shown, _ = run(capfd, inspect_latents.main, "--latents", "me/codes", "--verify")
    assert status == 0
    assert "the digests match" in shown
    assert "hrvq from me/tokenizer" in shown


def test_mistakes_are_one_line(hub, capfd, workspace):
    small_set(Path("codes.h5"))
    assert "there is no model at nothing (there is nothing); give the folder of" in refusal(capfd, "nothing", "me/x")
    assert "pair is not a hub id; give owner/name" in refusal(capfd, "pair", "pair")
    assert "is not a name such as mit, apache-2.0" in refusal(capfd, "pair", "me/x", "--license", "My Own")
    assert "--tokenizer is for latent sets" in refusal(capfd, "pair", "me/x", "--tokenizer", "me/y")
    assert "a latent set needs a repository of its own" in refusal(capfd, "codes.h5", "me/x/sub")
    assert "--tokenizer pair is not a hub id" in refusal(capfd, "codes.h5", "me/x", "--tokenizer", "pair")
    shutil.copytree("pair", "damaged")
    weights = Path("damaged/tokenizer/model.safetensors")
    weights.write_bytes(weights.read_bytes()[:-4] + b"\0\0\0\1")
    assert "do not belong together (digests differ)" in refusal(capfd, "damaged", "me/x")
    assert hub.requests == []
    assert hub.repos == {}


def test_the_environment_names_the_endpoint_and_the_token(hub, workspace):
    """In new processes, as `huggingface_hub` reads both when it is imported."""
    environment = {**os.environ, "HF_ENDPOINT": hub.endpoint, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    environment |= {"HF_HUB_CACHE": str(workspace / "other"), "HF_TOKEN": fake_hub.TOKEN}
    program = (
        "import sys; from smalti.__main__ import main; sys.argv = ['smalti', 'push', 'pair', 'me/pair']; main()\n"
        "from smalti import load_prior; print(load_prior('me/pair@main').digest())"
    )
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == load("pair", "prior").digest()
    before = dict(hub.repos["models/me/pair"].files())
    done = subprocess.run(
        command, env={**environment, "HF_TOKEN": "hf_wrong"}, capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert done.stderr.startswith(f"error: nothing was uploaded to me/pair: {hub.endpoint} refuses the token; log in")
    assert hub.repos["models/me/pair"].files() == before
