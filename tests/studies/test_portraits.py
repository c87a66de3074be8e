"""The recipe of the models in the package: trains, exports in half precision, and writes the card."""

import json
from dataclasses import replace

import torch
from helpers.image_toys import write_patches

from smalti.commands.model_paths import load_prior_with_tokenizer
from smalti.studies.portraits import card, recipe


def test_recipe_exports_models_in_half_precision_and_writes_their_card(tmp_path, monkeypatch):
    for label in ("a", "b"):
        write_patches(tmp_path / "img" / label, 40)
    monkeypatch.setattr(card, "SAMPLES", 20)
    monkeypatch.setattr(card, "SHOWN", 8)
    small = replace(recipe.TOKENIZER, widths=(8, 8), residual_blocks=1, branching=2)
    monkeypatch.setattr(recipe, "TOKENIZER", small)
    monkeypatch.setattr(recipe, "PRIOR", replace(recipe.PRIOR, model_width=16, heads=2, depth=(0, 1, 0)))
    package, images = tmp_path / "package", str(tmp_path / "img")
    steps = {"tokenizer_steps": 2, "prior_steps": 2}
    config = recipe.ReproducePortraits("portraits", images=images, **steps, out=tmp_path / "runs", package=package)
    card.reproduce_portraits(config)
    prior, tokenizer = load_prior_with_tokenizer(str(package), None)
    assert all(each.equal(each.half().float()) for each in prior.state_dict().values() if each.dtype == torch.float32)
    numbers = json.loads((package / "card.json").read_text())
    assert (numbers["tokenizer"]["digest"], numbers["prior"]["digest"]) == (tokenizer.digest(), prior.digest())
    text = (package / "README.md").read_text()
    assert f"MSE {numbers['tokenizer']['mse']:.5f}" in text
    assert (package / "neighbours.png").exists()
    before = (package / "model.safetensors").read_bytes()
    card.reproduce_portraits(config)  # finished: nothing is trained or measured again
    assert (package / "model.safetensors").read_bytes() == before
