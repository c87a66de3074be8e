"""HR-VQVAE as a tokenizer: sizes, layout, determinism, partial decoding, mixed precision, training.

Codebooks and their losses are tested in quantizers/test_linked.py.
"""

import dataclasses
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from smalti.core.codes import Layout, Level
from smalti.core.config import config_from_json
from smalti.core.errors import UserError
from smalti.images.decoding import to_float
from smalti.tokenizers.reconstruction import Reconstruction
from smalti.tokenizers.vq.hrvq import HRVQ, HRVQConfig

SMALL = {"widths": (8, 12), "residual_blocks": 1, "code_width": 6, "depth": 3, "branching": 3}
GRADIENT = {"codebook_learning": "gradient", "revive_below": 0.0}


def tokenizer_of(**changes) -> HRVQ:
    torch.manual_seed(0)
    return HRVQ(HRVQConfig(**{"height": 16, "width": 16, **SMALL, **changes})).eval()


def images_of(b: int = 2, c: int = 3, h: int = 16, w: int = 16, seed: int = 0) -> Tensor:
    return torch.rand(b, c, h, w, generator=torch.Generator().manual_seed(seed)) * 2 - 1


@given(rows=st.integers(1, 6), columns=st.integers(1, 6), stages=st.integers(1, 3), channels=st.sampled_from([1, 3]))
@settings(max_examples=15)
def test_accepts_any_size_divisible_by_the_downsampling(rows, columns, stages, channels):
    tokenizer = tokenizer_of(widths=(4,) * stages, image_channels=channels)
    images = images_of(c=channels, h=rows * 2**stages, w=columns * 2**stages)
    (codes,) = tokenizer.encode(images)
    output = tokenizer(images)
    assert codes.shape == (2, rows, columns)
    assert tokenizer.layout.resized([(rows, columns)]).check((codes,)) is None
    assert output.codes[0].equal(codes)
    assert output.reconstruction.shape == tokenizer.decode((codes,)).shape == images.shape


@pytest.mark.parametrize(("height", "width"), [(18, 16), (16, 18), (2, 2)])
def test_refuses_sizes_not_divisible_by_the_downsampling(height, width):
    for use in (tokenizer_of().encode, tokenizer_of()):
        with pytest.raises(UserError, match=f"{height}x{width} are not divisible by 4"):
            use(images_of(h=height, w=width))
    with pytest.raises(UserError, match="are not divisible by 4"):
        tokenizer_of(height=height, width=width)


@pytest.mark.parametrize("widths", [(), (8, 0)])
def test_refuses_widths_without_stages_or_channels(widths):
    with pytest.raises(UserError, match="widths"):
        tokenizer_of(widths=widths)


def test_layout_has_one_digit_per_layer():
    tokenizer = tokenizer_of(height=32, width=24, depth=2, branching=5)
    assert tokenizer.layout == Layout((Level(8, 6, radices=(5, 5)),))
    assert tokenizer_of(branching=(4, 2, 3)).layout == Layout((Level(4, 4, radices=(4, 2, 3)),))
    assert HRVQ(HRVQConfig()).layout == Layout((Level(8, 8, radices=(8, 8, 8)),))
    assert tokenizer.downsampling == 4


def test_a_branching_for_each_layer_sets_the_depth():
    for values in ((64,), (8, 8), (4, 4, 2, 2), (2,) * 6):
        config = HRVQConfig(branching=values)
        assert (config.depth, HRVQ(config).radices) == (len(values), values)
    assert dataclasses.replace(HRVQConfig(branching=(4, 2)), branching=8, depth=3) == HRVQConfig()
    with pytest.raises(UserError, match="branching 4 4 2 2 has one value for each of 4 layers, but depth is 2"):
        HRVQConfig(branching=(4, 4, 2, 2), depth=2)


def test_config_with_values_for_layers_round_trips_through_json():
    config = HRVQConfig(branching=(4, 2, 3), commitment_weight=(0.25, 0.25, 0.1), combined_commitment_weight=0.5)
    fields = json.loads(json.dumps(dataclasses.asdict(config)))
    assert config_from_json(HRVQConfig, fields, "config.json") == config
    with pytest.raises(UserError, match="branching is"):
        config_from_json(HRVQConfig, {**fields, "branching": [4, "2"]}, "config.json")


def test_codes_depend_only_on_their_receptive_field():
    """A wider image has the same codes at positions whose receptive field ends before the added part."""
    tokenizer, wide = tokenizer_of(), images_of(b=1, h=16, w=96)
    codes, narrow_codes = tokenizer.encode(wide)[0], tokenizer.encode(wide[..., :64])[0]
    assert codes[..., :10].equal(narrow_codes[..., :10])
    assert codes.unique().numel() > 1


def test_encoding_is_deterministic_in_every_mode_and_keeps_no_graph():
    tokenizer, images = tokenizer_of(), images_of()
    (codes,) = tokenizer.encode(images)
    assert codes.dtype == torch.int64
    torch.manual_seed(5)
    assert tokenizer.train().encode(images)[0].equal(codes)
    with torch.autograd.graph.saved_tensors_hooks(lambda _: pytest.fail("saved for a gradient"), lambda saved: saved):
        tokenizer.encode(images)


def test_partial_decoding_uses_only_the_first_digits():
    """Decoding i digits equals the decoder on the sum of the first i layers' codewords, for any later digits."""
    tokenizer, images = tokenizer_of(), images_of()
    codes = tokenizer.encode(images)
    level = tokenizer.layout.levels[0]
    for digits in (1, 2, 3):
        decoded = tokenizer.decode(codes, digits)
        expected = tokenizer.decoder(tokenizer.quantizer.lookup(codes[0], digits)).clamp(-1, 1)
        torch.testing.assert_close(decoded, expected)
        last_changed = level.prefix(codes[0], digits) * 3 ** (3 - digits)
        assert tokenizer.decode((last_changed,), digits).equal(decoded)
    assert tokenizer.decode(codes).equal(tokenizer.decode(codes, 3))
    assert not tokenizer.decode(codes, 1).allclose(tokenizer.decode(codes))
    with pytest.raises(UserError, match="3 digits; give a number from 1 to 3"):
        tokenizer.decode(codes, 4)


def test_slices_decode_what_single_layers_add():
    """The rows of the paper's Fig. 1: all layers, the second and third, and the third alone."""
    tokenizer, images = tokenizer_of(branching=(4, 2, 3)), images_of()
    (codes,) = tokenizer.encode(images)
    books = [book.flatten(0, 1) for book in tokenizer.quantizer.codebooks]
    layers = [books[0][codes // 6], books[1][codes // 3], books[2][codes]]
    for digits, sums in {(1, 3): layers[1] + layers[2], (2, 3): layers[2], (0, 3): sum(layers)}.items():
        expected = tokenizer.decoder(sums.movedim(-1, 1)).clamp(-1, 1)
        torch.testing.assert_close(tokenizer.decode((codes,), slice(*digits)), expected)
    assert not tokenizer.decode((codes,), slice(2, 3)).allclose(tokenizer.decode((codes,), 1))


def test_decoded_images_equal_the_clamped_reconstruction_of_forward():
    tokenizer, images = tokenizer_of(), images_of()
    with torch.no_grad():
        list(tokenizer.decoder.parameters())[-1].add_(0.9)  # some pixels beyond 1
        raw = tokenizer(images).reconstruction
    decoded = tokenizer.decode(tokenizer.encode(images))
    assert raw.max() > 1
    torch.testing.assert_close(decoded, raw.clamp(-1, 1), atol=1e-5, rtol=0)


def test_losses_and_images_are_float32_under_autocast():
    tokenizer, images = tokenizer_of(), images_of()
    with torch.autocast("cpu", torch.bfloat16):
        output = tokenizer(images)
        assert tokenizer.encoder(images).dtype == torch.bfloat16  # autocast was on
        decoded = tokenizer.decode(output.codes)
    assert {output.reconstruction.dtype, decoded.dtype, *(loss.dtype for loss in output.losses.values())} == {
        torch.float32
    }
    assert all(loss.isfinite() for loss in output.losses.values())


@pytest.mark.parametrize("channels", [1, 3])
def test_training_lowers_the_loss_and_reaches_every_part(channels):
    tokenizer = tokenizer_of(image_channels=channels, **GRADIENT).train()
    objective = Reconstruction(tokenizer)
    batch = {"images": ((images_of(b=8, c=channels) + 1) * 127.5).byte()}
    tokenizer.init_from_data(to_float(batch["images"]))
    optimizer = torch.optim.SGD(tokenizer.parameters(), lr=0.05)
    before, terms = objective(batch)
    assert set(terms) == {"mse", "reconstruction", "codebook", "commitment"}
    torch.testing.assert_close(before.detach(), sum(terms[name] for name in terms if name != "mse"))
    before.backward()
    no_gradient = [name for name, p in tokenizer.named_parameters() if p.grad is None or not p.grad.any()]
    assert all(name.endswith(("first.weight", "first.bias")) for name in no_gradient)  # followed by weights of zero
    optimizer.step()
    assert objective(batch)[0] < before


def test_logged_mse_is_that_of_decoded_images_in_unit_range():
    tokenizer = tokenizer_of()
    pixels = ((images_of(b=4) + 1) * 127.5).byte()
    with torch.no_grad():
        list(tokenizer.decoder.parameters())[-1].add_(0.9)
        _, terms = Reconstruction(tokenizer)({"images": pixels})
    decoded = (tokenizer.decode(tokenizer.encode(to_float(pixels))) + 1) / 2
    torch.testing.assert_close(terms["mse"], (decoded - pixels / 255).square().mean())
