"""Models on the hub, against a local fake: what is pushed is what loads, and every failure is one line."""

import json
import socket
from io import BytesIO

import pytest
import torch
import yaml
from helpers import fake_hub
from helpers.command_toys import save_pair
from helpers.toys import TINY, untrained_pair
from PIL import Image

from smalti.api import load_prior, load_tokenizer, sample
from smalti.core import models
from smalti.core.errors import UserError
from smalti.images.sheets import embedded_settings, save_grid


@pytest.fixture
def hub(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with fake_hub.in_use(monkeypatch, tmp_path / "cache") as served:
        yield served


@pytest.fixture
def pair(tmp_path):
    """A prior with its tokenizer, beside files of its training that must stay."""
    folder = save_pair(tmp_path / "home/jane/pair")
    for path, family in ((folder, "prior"), (folder / "tokenizer", "tokenizer")):
        model = models.load(path, family)
        model.provenance |= {"image_source": str(tmp_path / "home/jane/photos"), "steps": 20, "label_names": ["a", "b"]}
        model.save(path)
    (folder / "states/step_00000020").mkdir(parents=True)
    for name in ("states/step_00000020/optimizer.safetensors", "samples.png", ".lock"):
        (folder / name).write_bytes(b"contents")
    settings = {"seed": 7, "out": str(folder)}
    command = f"train_prior.py --latents {tmp_path}/home/jane/codes.h5 --out {folder}"
    (folder / "run.json").write_text(json.dumps({"command": command, "settings": settings, "versions": {"torch": "9"}}))
    lines = [{"step": 20, "held_out_loss": 2.5, "loss": 1.0}, {"step": 30, "held_out_loss": 9.0}]
    (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return folder


def error_of(source):
    return fake_hub.error_of(load_prior, source)


def test_a_pushed_prior_loads_by_id_revision_commit_and_folder(hub, pair):
    prior = load_prior(pair)
    assert prior.push_to_hub("me/pair", license="mit", message="First") == f"{hub.endpoint}/me/pair"
    assert prior.push_to_hub("me/pair", revision="wip/new") == f"{hub.endpoint}/me/pair/tree/wip/new"
    assert prior.push_to_hub("me/many/level-0") == f"{hub.endpoint}/me/many"
    commit = hub.repos["models/me/pair"].branches["main"]
    for source in ("me/pair", "me/pair@main", "me/pair@wip%2Fnew", f"me/pair@{commit}", "me/many/level-0"):
        loaded = load_prior(source)
        assert loaded.digest() == prior.digest()
        assert load_tokenizer(f"{source}/tokenizer").digest() == prior.provenance["tokenizer_digest"]
    assert type(prior).load("me/pair").digest() == prior.digest()
    assert sample(loaded, num=2).equal(sample(prior, num=2))  # with the tokenizer beside it
    assert hub.repos["models/me/pair"].messages == ["First", "Upload pair with smalti"]
    assert not hub.repos["models/me/pair"].private


def test_only_what_makes_the_model_is_uploaded(hub, pair):
    load_prior(pair).push_to_hub("me/pair")
    files = hub.repos["models/me/pair"].files()
    copy = ["tokenizer/config.json", "tokenizer/model.safetensors"]
    assert sorted(files) == ["README.md", "config.json", "model.safetensors", "samples.png", *copy]
    assert set(hub.large.values()) == {files[name] for name in ("model.safetensors", "samples.png", copy[1])}
    assert files["model.safetensors"] == (pair / "model.safetensors").read_bytes()
    assert not any(b"home" in contents or b"jane" in contents for contents in files.values())
    assert json.loads(files["config.json"])["provenance"]["image_source"] == "photos"
    load_prior(pair).push_to_hub("me/bare", sheet=False)
    assert sorted(hub.repos["models/me/bare"].files()) == ["README.md", "config.json", "model.safetensors", *copy]


def test_pictures_are_uploaded_without_their_embedded_settings(hub, pair):
    pixels = torch.rand(2, 3, 8, 16) * 2 - 1
    save_grid(pair / "samples.png", pixels, settings={"latents": "/home/jane/codes.h5"})
    load_prior(pair).push_to_hub("me/pair")
    uploaded = hub.repos["models/me/pair"].files()["samples.png"]
    assert b"jane" not in uploaded
    with Image.open(BytesIO(uploaded)) as shown, Image.open(pair / "samples.png") as saved:
        assert shown.info == {}
        assert shown.tobytes() == saved.tobytes()
    assert embedded_settings(pair / "samples.png")  # the run's own file keeps them


def test_the_card_says_what_the_run_knows(hub, pair):
    prior = load_prior(pair)
    prior.push_to_hub("me/pair", license="cc-by-4.0")
    card = hub.repos["models/me/pair"].files()["README.md"].decode()
    front = yaml.safe_load(card.split("---\n")[1])
    assert front["license"] == "cc-by-4.0"
    assert (front["library_name"], front["pipeline_tag"]) == ("smalti", "unconditional-image-generation")
    assert front["tags"] == ["smalti", "image-generation", "inpainting", "hourglass"]
    assert "![Samples, not selected](samples.png)" in card
    assert 'prior = load_prior("me/pair")' in card
    assert "smalti train-prior --latents codes.h5 --out pair\n" in card
    assert "| `held_out_loss` | 2.5 |" in card  # of the last step, not of a later one
    for part in ("`photos`", "2: `a`, `b`", prior.digest(), "| steps | 20 |", "torch 9", "The seed is 7"):
        assert part in card
    load_tokenizer(pair / "tokenizer").push_to_hub("me/tokenizer")
    card = hub.repos["models/me/tokenizer"].files()["README.md"].decode()
    assert "license" not in yaml.safe_load(card.split("---\n")[1])
    assert "No licence of the weights is given." in card
    assert "| codes of an image | 4×8 of 3·3 |" in card


@pytest.mark.parametrize("level", [0, 1])
def test_the_card_of_a_prior_of_several_levels_names_the_priors_of_all(hub, level):
    prior, tokenizer = untrained_pair()[0], models.class_of_kind("tokenizer", "vqvae2")(TINY["vqvae2"])
    prior.provenance = {"tokenizer_digest": tokenizer.digest(), "level": level}
    prior.push_to_hub(f"me/pair/level-{level}", tokenizer=tokenizer)
    card = hub.repos["models/me/pair"].files()[f"level-{level}/README.md"].decode()
    names = ["LEVEL-0", "LEVEL-1"]
    names[level] = f"me/pair/level-{level}"
    parts = [
        f"which draws level {level} of the 2 levels of new images and fills masked parts",
        f"smalti sample --prior {names[0]} {names[1]}\n",
        f"smalti inpaint --prior {names[0]} {names[1]} --image",
        f'priors = [load_prior("{names[0]}"), load_prior("{names[1]}")]\nimages = sample(priors, num=16)',
        f"the priors of all levels; `LEVEL-{1 - level}` stands for the ones of the other levels",
    ]
    assert [part for part in parts if part not in card] == []


def test_the_card_of_a_prior_that_cannot_fill_offers_no_inpainting(hub):
    """RealNVP models real-valued latents, of which no part can be given."""
    prior = models.class_of_kind("prior", "realnvp")(TINY["realnvp"])
    tokenizer = models.class_of_kind("tokenizer", "vae")(TINY["vae"])
    prior.provenance = {"tokenizer_digest": tokenizer.digest(), "level": 0}
    prior.push_to_hub("me/flow", tokenizer=tokenizer)
    card = hub.repos["models/me/flow"].files()["README.md"].decode()
    assert "smalti sample --prior me/flow\n" in card
    assert not [word for word in ("inpaint", "fill") if word in card]


def test_the_card_of_changed_weights_has_no_records_of_the_training(hub, pair):
    changed = load_prior(pair)
    changed.head.weight.data.zero_()
    changed.push_to_hub("me/changed")
    files = hub.repos["models/me/changed"].files()
    card = files["README.md"].decode()
    assert changed.digest() in card
    assert "The weights were changed after the training that is recorded beside them." in card
    assert not [part for part in ("Held-out", "2.5", "train-prior", "steps", "samples.png", "torch 9") if part in card]
    assert "samples.png" not in files


def test_a_damaged_tokenizer_beside_a_prior_stays_here(hub, pair):
    prior = load_prior(pair)
    weights = pair / "tokenizer/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + b"\0\0\0\1")
    with pytest.raises(UserError, match="do not belong together"):
        prior.push_to_hub("me/pair")
    assert hub.repos == {}


def test_a_card_beside_the_model_is_kept(hub, pair):
    (pair / "README.md").write_text("---\nlicense: mit\n---\n# Mine\n")
    load_prior(pair).push_to_hub("me/pair")
    assert hub.repos["models/me/pair"].files()["README.md"] == b"---\nlicense: mit\n---\n# Mine\n"
    assert "samples.png" not in hub.repos["models/me/pair"].files()  # the card does not show it
    with pytest.raises(UserError, match="put the licence into its front matter, and leave --license out"):
        load_prior(pair).push_to_hub("me/pair", license="mit")
    (pair / "README.md").write_bytes("# Café\r\n".encode())
    load_prior(pair).push_to_hub("me/pair")
    assert hub.repos["models/me/pair"].files()["README.md"] == "# Café\r\n".encode()
    (pair / "README.md").write_bytes("# Café".encode("latin-1"))
    with pytest.raises(UserError, match=r"README\.md is not UTF-8, which the hub needs of a card; save it as UTF-8"):
        load_prior(pair).push_to_hub("me/pair")


def test_models_that_are_not_saved_are_pushed_as_they_are(hub, pair):
    prior, tokenizer = untrained_pair()
    with pytest.raises(UserError, match="has no tokenizer/ with the tokenizer of the prior"):
        prior.push_to_hub("me/new")
    prior.push_to_hub("me/new", tokenizer=tokenizer)
    assert load_prior("me/new").digest() == prior.digest()
    assert load_tokenizer("me/new/tokenizer").digest() == tokenizer.digest()
    changed = load_prior(pair)
    changed.head.weight.data += 1
    changed.push_to_hub("me/changed")
    assert load_prior("me/changed").digest() == changed.digest() != load_prior(pair).digest()
    changed.provenance["tokenizer_digest"] = "other"
    with pytest.raises(UserError, match="is not the tokenizer that made the codes"):
        changed.push_to_hub("me/changed")


def test_a_tokenizer_that_no_longer_encodes_as_recorded_stays_here(hub, pair):
    """A decoder was trained with the encoder kept; then the encoder was changed too, and the model saved again."""
    prior, tokenizer = load_prior(pair), load_tokenizer(pair / "tokenizer")
    tokenizer.keep_codes_of(load_tokenizer(pair / "tokenizer"))
    next(tokenizer.decoder.parameters()).data += 1
    tokenizer.push_to_hub("me/tuned")
    row = f"| encodes as | `{prior.provenance['tokenizer_digest']}` |"
    assert row in hub.repos["models/me/tuned"].files()["README.md"].decode()
    prior.push_to_hub("me/pair", tokenizer=tokenizer)
    assert sample(load_prior("me/pair"), num=1).shape == (1, 3, 8, 16)
    next(tokenizer.encoder.parameters()).data += 1
    with pytest.raises(UserError, match="is not the tokenizer that made the codes"):
        prior.push_to_hub("me/changed", tokenizer=tokenizer)
    tokenizer.push_to_hub("me/untuned")
    assert "encodes as" not in hub.repos["models/me/untuned"].files()["README.md"].decode()


def test_missing_things_are_named(hub, pair):
    load_prior(pair).push_to_hub("me/pair")
    assert f"{hub.endpoint} has no model me/none, or the token may not read it" in error_of("me/none")
    assert "me/pair has no revision v9; give a branch, a tag or a commit" in error_of("me/pair@v9")
    assert "me/pair has no folder other; give me/pair or me/pair/tokenizer" in error_of("me/pair/other")
    assert "holds a tokenizer (hrvq), but a prior is needed here" in error_of("me/pair/tokenizer")
    hub.repos["models/me/empty"] = fake_hub.Repo()
    assert "me/empty is not smalti's: it lacks config.json or model.safetensors" in error_of("me/empty")


def test_models_of_others_are_refused_before_their_weights_are_downloaded(hub):
    repo = hub.repos["models/me/text"] = fake_hub.Repo()
    repo.files().update({"config.json": b'{"architectures": ["Other"]}', "model.safetensors": b"large"})
    error = error_of("me/text")
    assert "me/text/config.json is not smalti's: it lacks config, digest, family, kind, provenance; give the" in error
    assert not [request for request in hub.requests if "model.safetensors" in request]


def test_private_and_gated_models_need_a_token(hub, pair, monkeypatch, tmp_path):
    prior = load_prior(pair)
    prior.push_to_hub("me/secret", private=True)
    prior.push_to_hub("me/gated")
    hub.repos["models/me/gated"].gated = True
    assert hub.repos["models/me/secret"].private
    fake_hub.use(monkeypatch, hub.endpoint, str(tmp_path / "other"), token=None)
    message = error_of("me/secret")
    assert "it is private, and no token is set; check the name, or log in with `hf auth login`" in message
    assert "access to me/gated must be granted first; ask for it at" in error_of("me/gated")
    fake_hub.use(monkeypatch, hub.endpoint, str(tmp_path / "other"), token="hf_wrong")
    assert f"{hub.endpoint} refuses the token; log in with `hf auth login`, or set HF_TOKEN" in error_of("me/secret")


def test_a_public_repository_never_gets_what_is_private(hub, pair):
    prior = load_prior(pair)
    prior.push_to_hub("me/open", sheet=False)
    before = dict(hub.repos["models/me/open"].files())
    with pytest.raises(UserError, match="me/open exists and is public; make it private on its page"):
        prior.push_to_hub("me/open", private=True)
    assert hub.repos["models/me/open"].files() == before
    prior.push_to_hub("me/closed", private=True)
    prior.push_to_hub("me/closed", private=True)


def test_failed_uploads_change_nothing(hub, pair, monkeypatch, tmp_path):
    prior = load_prior(pair)
    prior.push_to_hub("me/pair", sheet=False)
    before = dict(hub.repos["models/me/pair"].files())
    changed = load_prior(pair)
    changed.head.weight.data += 1

    def refusal():
        with pytest.raises(UserError) as refused:
            changed.push_to_hub("me/pair")
        assert str(refused.value).startswith("nothing was uploaded to me/pair: ")
        assert str(refused.value).isprintable()
        assert hub.repos["models/me/pair"].files() == before
        return str(refused.value)

    hub.refusal = (500, "out of order")
    assert f"{hub.endpoint} answers with status 500 (out of order); try again later" in refusal()
    hub.refusal = None
    for token, reason in [
        ("hf_wrong", f"{hub.endpoint} refuses the token"),
        (fake_hub.READER, "the token may not do this (you need write access); use one with write access to me/pair"),
        (None, "no token is set; log in with `hf auth login`, or set HF_TOKEN"),
    ]:
        fake_hub.use(monkeypatch, hub.endpoint, str(tmp_path / "other"), token=token)
        assert reason in refusal()
    fake_hub.use(monkeypatch, dead_endpoint(), str(tmp_path / "other"))
    assert "cannot be reached (" in refusal()


def dead_endpoint():
    """Returns an address at which nothing answers."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{free.getsockname()[1]}"


def test_without_a_network_the_cache_is_used(hub, pair, monkeypatch, tmp_path):
    prior = load_prior(pair)
    prior.push_to_hub("me/pair")
    load_prior("me/pair")
    endpoint = dead_endpoint()
    fake_hub.use(monkeypatch, endpoint, str(tmp_path / "cache"))
    assert load_prior("me/pair").digest() == prior.digest()
    assert f"{endpoint} cannot be reached (" in error_of("me/other")
    assert "check the network, or HF_ENDPOINT" in error_of("me/other")
    monkeypatch.setattr(fake_hub.constants, "HF_HUB_OFFLINE", True)
    assert load_prior("me/pair").digest() == prior.digest()
    assert "HF_HUB_OFFLINE is set and me/other is not in the cache; unset HF_HUB_OFFLINE" in error_of("me/other")


def test_names_that_are_no_hub_ids_are_not_sent(hub, tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a/file").write_text("no folder")
    for source in ("missing", "/not/there", "./me/pair", "a/file", "n" * 300, "a/../b"):
        assert "there is no such folder, and it is no hub id (owner/name" in error_of(source)
    assert hub.requests == []
