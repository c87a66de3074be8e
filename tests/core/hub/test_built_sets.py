"""Latent sets as `build-latents` writes them: no local folders where the content digest covers them."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from helpers import command_toys
from helpers.build_toys import FLAGS, run, save_tokenizer, write_images

from smalti.latentsets.copies import copy_set
from smalti.latentsets.reader import LatentSet
from smalti.scripts import train_prior


@pytest.mark.parametrize("shards", [[], ["--shard-rows", "24"]])
def test_a_set_records_held_out_images_without_their_folder_where_its_digest_covers_them(
    capfd, monkeypatch, tmp_path, shards
):
    """A set of a former version, whose preprocessing has the whole path, still counts as built."""
    monkeypatch.chdir(tmp_path)
    save_tokenizer(Path("tokenizer"))
    write_images(Path("img"), 20)
    write_images(Path("client/test"), 4, seed=1)
    path, flags = tmp_path / "client/test", [*FLAGS, *shards, "--held-out", str(tmp_path / "client/test")]
    assert run(capfd, *flags, "--out", "latents")[0] == 0
    built = LatentSet("latents")
    built.verify()
    assert built.provenance.preprocessing["held_out"] == "test"
    assert built.provenance.held_out_source == str(path)
    assert built.count_images()["held_out"] == 4
    if not shards:
        former = replace(built.provenance, preprocessing={**built.provenance.preprocessing, "held_out": str(path)})
        copy_set(built, former, tmp_path / "latents")
    status, out, _ = run(capfd, *flags, "--out", "latents")
    assert (status, "latents already holds these codes" in out) == (0, True)
    assert run(capfd, *flags, "--out", "latents", "--overwrite")[0] == 0
    assert LatentSet("latents").content_digest == built.content_digest
    small = "--model-width 16 --heads 2 --depth 1 1 1 --sheet-samples 2 --steps 1 --batch-size 4 --device cpu"
    assert command_toys.run(capfd, train_prior.main, "--latents", "latents", "--out", "prior", *small.split())[0] == 0
    described = json.loads(Path("prior/config.json").read_text())["provenance"]
    assert (described["held_out"], described["preprocessing"]["held_out"]) == (str(path), "test")
