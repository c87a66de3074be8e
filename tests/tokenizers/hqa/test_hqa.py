"""HQA and HAMs: encoding and decoding through all layers against hand computation, losses, frozen layers.

The stochastic quantizer is tested in quantizers/test_stochastic.py, layer-by-layer training in test_hqa_commands.py.
"""

import math
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch
from helpers import toys

from smalti.core.codes import Layout, Level
from smalti.core.errors import UserError
from smalti.core.models import load
from smalti.core.randomness import row_seeds
from smalti.tokenizers.hqa.hams import HAMs, HAMsConfig
from smalti.tokenizers.hqa.hqa import HQA, HQAConfig
from smalti.tokenizers.quantizers.stochastic import START_LENGTH
from smalti.tokenizers.reconstruction import Reconstruction

D, K = 3, 5
SMALL = {"height": 8, "width": 8, "widths": (4, 6, 4), "code_width": D, "codebook_size": K, "image_channels": 1}


def hqa_of(config_class=HQAConfig, **more) -> HQA:
    torch.manual_seed(0)
    tokenizer = {HQAConfig: HQA, HAMsConfig: HAMs}[config_class](config_class(**{**SMALL, **more})).eval()
    for parameter in tokenizer.parameters():
        torch.nn.init.normal_(parameter, std=0.5)  # residual blocks would start as the identity
    return tokenizer


def images_of(b: int = 2, c: int = 1, h: int = 8, w: int = 8, seed: int = 0) -> torch.Tensor:
    return torch.rand(b, c, h, w, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def seeds_of(count: int, seed: int = 0) -> torch.Tensor:
    return row_seeds(seed, torch.arange(count))


def vectors_of(z_e: torch.Tensor) -> np.ndarray:
    return z_e.detach().double().numpy().transpose(0, 2, 3, 1).reshape(-1, D)


@pytest.mark.parametrize(("config_class", "normalize"), [(HQAConfig, False), (HQAConfig, True), (HAMsConfig, False)])
def test_encoding_and_decoding_equal_algorithm_1(config_class, normalize):
    """Uses the most probable codes at every layer."""
    tokenizer, images = hqa_of(config_class, normalize=normalize), images_of()
    tokenizer.init_from_data(images_of(16))
    features, codes = images, []
    for layer in tokenizer.layers:
        features = layer.encoder((features - layer.mean) / layer.deviation)
        codes.append(layer.quantizer.encode(features))
    for number in (1, 2, 3):
        (encoded,) = tokenizer.encode(images, number)
        assert encoded.equal(codes[number - 1])
        assert tokenizer.layout_of(number).check((encoded,)) is None
        grid = encoded
        for index in range(number - 1, 0, -1):
            layer = tokenizer.layers[index]
            decoded = layer.decoder(layer.quantizer.lookup(grid))
            grid = (
                decoded.argmax(1)
                if config_class is HAMsConfig
                else tokenizer.layers[index - 1].quantizer.encode(decoded * layer.deviation + layer.mean)
            )
        lowest = tokenizer.layers[0]
        expected = lowest.decoder(lowest.quantizer.lookup(grid)).clamp(-1, 1)
        assert tokenizer.decode((encoded,), layer=number).equal(expected)
    assert tokenizer.encode(images)[0].equal(codes[-1])
    assert tokenizer.layout == Layout((Level(1, 1, (K,)),))
    assert (tokenizer.layers[2].deviation != 1).any() == normalize
    for missing in (0, 4):
        with pytest.raises(UserError, match=f"layers 1 to 3; there is no layer {missing}"):
            tokenizer.encode(images, missing)
    with pytest.raises(UserError, match="1 digit; give a number from 1 to 1"):
        hqa_of().decode((codes[-1],), 2)


@torch.no_grad()
def test_seeded_decoding_samples_lower_codes_with_their_probabilities():
    """Enumerates all lower codes of one top code; their frequencies are Eq. 3's (HQA) or the logits' (HAMs)."""
    for config_class in (HQAConfig, HAMsConfig):
        tokenizer, count = hqa_of(config_class, height=4, width=4, widths=(4, 4), codebook_size=3), 3000
        grid = torch.ones(1, 1, 1, dtype=torch.long)
        for parameter in tokenizer.parameters():
            parameter.mul_(0.5)  # so that no combination is nearly certain
        lower, top = tokenizer.layers
        decoded_top = top.decoder(top.quantizer.lookup(grid))
        logits = decoded_top.movedim(1, -1) if config_class is HAMsConfig else lower.quantizer.logits(decoded_top)
        shares = logits.softmax(-1)[0].reshape(4, 3)
        decoded = tokenizer.decode((grid.expand(count, 1, 1),), seeds=seeds_of(count))
        paths = torch.tensor(list(product(range(3), repeat=4)))
        images = lower.decoder(lower.quantizer.lookup(paths.view(-1, 2, 2))).clamp(-1, 1)
        nearest = torch.cdist(decoded.flatten(1), images.flatten(1))
        assert nearest.min(1).values.max() < 0.01
        frequencies = torch.bincount(nearest.argmin(1), minlength=81) / count
        expected = torch.stack([shares[range(4), path].prod() for path in paths])
        assert (frequencies - expected).abs().max() < 4 * math.sqrt(0.25 / count)
        assert expected.max() < 0.95  # several combinations are likely
        torch.testing.assert_close(decoded[:5], tokenizer.decode((grid.expand(5, 1, 1),), seeds=seeds_of(5)))


def test_codes_differ_by_seed_only_if_sampled():
    tokenizer, images = hqa_of(), images_of(64)
    first, again, other = (tokenizer.encode(images, seeds=seeds_of(64, seed))[0] for seed in (0, 0, 1))
    assert first.equal(again)
    assert not first.equal(other)
    torch.manual_seed(3)
    assert tokenizer.train().encode(images)[0].equal(tokenizer.eval().encode(images)[0])


@pytest.mark.parametrize("config_class", [HQAConfig, HAMsConfig])
def test_reconstruction_loss_of_the_top_layer(config_class):
    """HQA uses the squared error to the features below, HAMs the cross-entropy over the codes below."""
    tokenizer, images = hqa_of(config_class), images_of()
    output = tokenizer(images)
    below = tokenizer.features(images, 2)
    decoded = tokenizer.layers[2].decoder(tokenizer.layers[2].quantizer.lookup(tokenizer.encode(images)[0]))
    codes = tokenizer.layers[1].quantizer.encode(below)[:, None]
    expected = (
        -decoded.log_softmax(1).gather(1, codes).mean()
        if config_class is HAMsConfig
        else (decoded - below).square().mean()
    )
    torch.testing.assert_close(output.losses["reconstruction"], expected)
    torch.testing.assert_close(output.reconstruction, tokenizer.decode(output.codes))
    assert tokenizer.train()(images).reconstruction is None


@pytest.mark.parametrize("kind", ["hqa", "hams"])
def test_training_changes_only_the_top_layer(kind, tmp_path):
    """With averaged weights (EMA), lower layers stay bit for bit equal; every parameter of the top layer changes."""
    before = {name: tensor.clone() for name, tensor in toys.make("tokenizer", kind)[0].state_dict().items()}
    model = toys.train(tmp_path, lambda: toys.make("tokenizer", kind))
    model.train()
    assert not any(module.training for module in model.layers[0].modules())
    assert all(module.training for module in model.layers[1].modules())
    for after in (model.state_dict(), load(tmp_path, "tokenizer").state_dict()):
        moved = {name for name, tensor in after.items() if not tensor.equal(before[name])}
        assert moved
        assert all(name.startswith("layers.1.") for name in moved)
    unchanged = [name for name, _ in model.layers[1].named_parameters() if f"layers.1.{name}" not in moved]
    assert not unchanged


def test_training_lowers_the_loss_for_every_combination_of_settings():
    for posterior, target, probabilistic in product(("stochastic", "nearest"), ("features", "codes"), (True, False)):
        choice = {"posterior": posterior, "target": target, "probabilistic": probabilistic}
        tokenizer, images = hqa_of(**choice, widths=(4, 4)).train(), images_of(16)
        tokenizer.init_from_data(images)
        batch = {
            "images": ((images + 1) * 127.5).byte(),
            "seeds": seeds_of(16),
            "progress": torch.full((16,), 0.5),
        }
        objective = Reconstruction(tokenizer)
        optimizer = torch.optim.Adam([p for p in tokenizer.parameters() if p.requires_grad], lr=0.01)
        before, terms = objective(batch)
        assert "mse" not in terms
        for _ in range(10):
            optimizer.zero_grad()
            objective(batch)[0].backward()
            optimizer.step()
        assert objective(batch)[0] < before, choice


@torch.no_grad()
def test_initialization_from_images_changes_only_the_top_layer_or_nothing():
    """Afterwards every codeword of the top layer is used, and z_e is spread as widely as random codewords."""
    for config_class in (HQAConfig, HAMsConfig):
        tokenizer, images = hqa_of(config_class, height=16, width=16), images_of(64, h=16, w=16)
        before = {name: tensor.clone() for name, tensor in tokenizer.state_dict().items()}
        tokenizer.init_from_data(images)
        moved = {name for name, tensor in tokenizer.state_dict().items() if not tensor.equal(before[name])}
        assert all(name.startswith("layers.2.") for name in moved)
        assert tokenizer.encode(images)[0].unique().numel() == K
        if config_class is HQAConfig:
            vectors = vectors_of(tokenizer.features(images))
            assert math.sqrt(vectors.var(0).sum()) == pytest.approx(START_LENGTH, rel=0.05)
        random = hqa_of(config_class, codebook_init="random", linear_start=False)
        before = {name: tensor.clone() for name, tensor in random.state_dict().items()}
        random.init_from_data(images)
        assert all(tensor.equal(before[name]) for name, tensor in random.state_dict().items())


def test_initialization_from_one_vector_is_finite():
    tokenizer = hqa_of(widths=(4, 4, 4))
    tokenizer.init_from_data(images_of(1))
    assert all(parameter.isfinite().all() for parameter in tokenizer.parameters())
    assert max(parameter.abs().max() for parameter in tokenizer.parameters()) < 100


@pytest.mark.parametrize("change", [{"latent_weight": 1.0}, {"temperature": 2.0}, {"probabilistic": True}])
def test_settings_that_nearest_codewords_do_not_use_are_refused(change):
    defaults = HAMsConfig(height=8, width=8, widths=(4, 4))
    HAMs.require_used(defaults, defaults)
    HAMs.require_used(replace(defaults, posterior="stochastic", **change), defaults)
    with pytest.raises(UserError, match="--posterior nearest does not use --"):
        HAMs.require_used(replace(defaults, **change), defaults)


def test_invalid_sizes_and_settings_are_refused():
    with pytest.raises(UserError, match="12x8 are not divisible by 8, the downsampling of 3 layers"):
        hqa_of(height=12)
    with pytest.raises(UserError, match="6x8 are not divisible by 4"):
        hqa_of().features(images_of(h=6), 2)
    assert "--reset-below 0.03" in hqa_of(HAMsConfig).collapse_remedy()
    assert "fewer codes" in hqa_of().collapse_remedy()
    for wrong in ({"widths": ()}, {"widths": (4, 0)}, {"codebook_size": 1}, {"temperature": 0.0}, {"reset_below": 1.0}):
        with pytest.raises(UserError):
            hqa_of(**wrong)
    assert hqa_of().features(images_of(h=16, w=24)).shape == (2, D, 2, 3)


@pytest.mark.parametrize(("switch", "now"), [(True, "kmeans"), (False, "random")])
def test_models_saved_with_the_former_switch_keep_their_digest(switch, now, tmp_path):
    model = hqa_of(codebook_init=now)
    model.save(tmp_path)
    config, setting = tmp_path / "config.json", f'"codebook_init": "{now}"'
    assert setting in config.read_text()
    config.write_text(config.read_text().replace(setting, f'"kmeans_start": {str(switch).lower()}'))
    loaded = load(tmp_path, "tokenizer")
    assert loaded.config.codebook_init == now
    assert loaded.digest() == model.digest()
