"""The hourglass against a block and patches computed by hand, and against known mistakes.

Those are: heads without positions, patches that are not square, grids that must be square.
"""

import copy
import itertools
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers.hourglass import (
    SHAPES,
    codes_of,
    every_position_sees_every_other,
    model_of,
    positions_share_patches,
    resampling_of,
    stage_of,
)
from helpers.toys import untrained_pair
from torch import Tensor, nn

from smalti.core import models
from smalti.core.errors import UserError
from smalti.priors.networks.hourglass import Blocks, Hourglass, from_patches, to_patches
from smalti.priors.networks.positions import ROTARY_THETA


def by_hand(model: Hourglass, codes: Tensor) -> Tensor:
    """Computes one block and the output norm, with rotations as complex numbers."""
    b, h, w = codes.shape
    d, heads = model.config.model_width, model.config.heads
    layers: Any = model.body.before.encoder.layers
    (_, attention, _), (_, feedforward, _) = layers
    attention_gain, feedforward_gain = (norms[0].gamma + 1 for norms, *_ in layers)
    x = model.head.embed(codes)

    frequencies = ROTARY_THETA ** -(torch.arange(0, d // heads // 2, 2) / (d // heads // 2))
    rows, columns = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
    angles = torch.cat([rows.flatten()[:, None] * frequencies, columns.flatten()[:, None] * frequencies], -1)

    def split(projection: nn.Linear) -> Tensor:
        return projection(F.layer_norm(x, (d,)) * attention_gain).view(b, h * w, heads, -1).transpose(1, 2)

    def rotated(t: Tensor) -> Tensor:
        pairs = torch.view_as_complex(t.reshape(*t.shape[:-1], -1, 2).contiguous())
        return torch.view_as_real(pairs * torch.polar(torch.ones_like(angles), angles)).flatten(-2)

    queries, keys = split(attention.to_q), split(attention.to_k)
    if model.config.qk_norm:
        queries, keys = (
            F.rms_norm(vectors, vectors.shape[-1:], eps=0) * (norm.gamma + 1)
            for vectors, norm in ((queries, attention.q_rmsnorm), (keys, attention.k_rmsnorm))
        )
    scores = rotated(queries) @ rotated(keys).mT / (d // heads) ** 0.5
    x = x + attention.to_out((scores.softmax(-1) @ split(attention.to_v)).transpose(1, 2).flatten(2))
    first, last = (layer for layer in feedforward.modules() if isinstance(layer, nn.Linear))
    x = x + last(F.gelu(first(F.layer_norm(x, (d,)) * feedforward_gain)))
    return F.layer_norm(x, (d,), model.norm.weight, model.norm.bias)


@pytest.mark.parametrize("qk_norm", [True, False])
def test_one_block_is_pre_norm_attention_with_axial_rotations(qk_norm):
    model = model_of(depth=(1,), shorten=(), qk_norm=qk_norm)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    codes = codes_of(model, 2, 3, 5)
    assert torch.allclose(model.features(codes), by_hand(model, codes), atol=1e-5)


@pytest.mark.parametrize("part", ["before", "valley.before"])
def test_attention_scores_of_every_head_depend_on_offsets_in_both_axes(part):
    """All codes are equal, so that only positions make scores differ."""
    model = model_of(heads=4)
    h = w = 8
    scores = []

    def record(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        scores.append(inputs[0] @ inputs[1].mT)

    blocks = model.body.get_submodule(part)
    assert isinstance(blocks, Blocks)
    blocks.attends[0].register_forward_pre_hook(record)
    model.features(torch.full((1, h, w), 5))
    side = h if part == "before" else h // 2
    table = scores[0][0].view(4, side, side, side, side)  # head, query's row and column, key's row and column
    for head in table:
        assert head[0, 0, :, 0].std() > 1e-3 * head.abs().max()
        assert head[0, 0, 0, :].std() > 1e-3 * head.abs().max()
        for (row, column), (down, right) in itertools.product([(0, 0), (1, 0), (0, 2)], [(0, 1), (1, 0), (1, 1)]):
            assert torch.allclose(head[row, column, row + down, column + right], head[0, 0, down, right], rtol=1e-4)


def test_patch_has_the_rotary_embedding_of_its_first_code():
    """On a larger grid the embeddings are the same."""
    model, inputs = model_of(depth=(1, 1, 1, 1, 1), shorten=(2, 3)), []
    for part in ("before", "valley.before", "valley.valley.before"):
        model.body.get_submodule(part).register_forward_pre_hook(lambda _, arguments: inputs.append(arguments[1]))
    model.features(codes_of(model, 1, 8, 10))
    codes, patches, outer = inputs
    assert torch.equal(codes.view(8, 10, -1)[:4, :6].flatten(0, 1)[None], model.rotary(4, 6))
    assert torch.equal(patches, codes.view(8, 10, -1)[::2, ::2].flatten(0, 1)[None])
    assert torch.equal(outer, codes.view(8, 10, -1)[::6, ::6].flatten(0, 1)[None])


@pytest.mark.parametrize(("shorten", "h", "w"), [(2, 4, 6), (2, 5, 9), (3, 4, 7), (4, 3, 3)])
def test_resampling_mixes_exactly_the_positions_of_a_patch(shorten, h, w):
    assert positions_share_patches(stage_of(shorten=shorten), shorten, h, w)


@pytest.mark.parametrize("patch", [(2, 2), (1, 4), (3, 2)])
def test_patches_are_split_and_joined(patch):
    x = torch.randn(2, 15, 4)
    patches = to_patches(x, (3, 5), patch)
    assert torch.equal(from_patches(patches, (3, 5), patch), x)
    assert torch.equal(patches[:, 0, 0], x[:, 0])
    assert float(patches.abs().sum()) == pytest.approx(float(x.abs().sum()), rel=1e-5)  # the padding is zero


def test_partial_patches_use_the_positions_that_exist():
    """A 3x3 grid in patches of 2x2, computed by loops over the positions that exist."""
    stage = stage_of()
    x = torch.randn(1, 9, 32)
    resampled = resampling_of(stage, 3, 3)(x).view(3, 3, 32)
    down, up = stage.down.map.weight.view(32, 2, 2, 32), stage.up.map.weight.view(2, 2, 32, 32)
    for row, column in itertools.product(range(3), range(3)):
        valid = [(i, j) for i in (0, 1) for j in (0, 1) if row // 2 * 2 + i < 3 and column // 2 * 2 + j < 3]
        patch = stage.down.map.bias + sum(
            down[:, i, j] @ x[0, (row // 2 * 2 + i) * 3 + column // 2 * 2 + j] for i, j in valid
        )
        upsampled = up[row % 2, column % 2] @ stage.norm(patch) + stage.up.map.bias.view(2, 2, 32)[row % 2, column % 2]
        assert torch.allclose(resampled[row, column], x[0, row * 3 + column] + upsampled, atol=1e-5)


@pytest.mark.parametrize(("depth", "shorten"), SHAPES)
@pytest.mark.parametrize(("h", "w"), [(8, 8), (5, 9), (1, 3)])
def test_every_position_sees_every_other_on_any_grid(depth, shorten, h, w):
    assert every_position_sees_every_other(model_of(depth=depth, shorten=shorten), h, w)


def test_depth_counts_blocks_from_the_outside_in():
    body = model_of(depth=(1, 2, 3, 1, 2), shorten=(2, 3)).body
    stages = (body.before, body.valley.before, body.valley.valley.before, body.valley.after, body.after)
    assert [len(blocks.attends) for blocks in stages] == [1, 2, 3, 1, 2]


def test_rows_are_independent():
    model = model_of()
    codes = codes_of(model, 3, 4, 6)
    assert torch.allclose(model.features(codes)[1:2], model.features(codes[1:2]), atol=1e-5)


def test_half_precision_is_close_with_and_without_fused_attention():
    model = model_of()
    codes = codes_of(model, 2, 4, 6)
    exact = model.features(codes)
    with torch.autocast("cpu", torch.bfloat16):
        trained = model.features(codes)
        assert not model.body.before.attends[0].flash
        with torch.no_grad():
            sampled = model.features(codes)
        assert model.body.before.attends[0].flash
    for half in (trained, sampled):
        assert half.dtype == torch.float32
        assert (half - exact).square().mean().sqrt() < 0.02


def test_a_pickled_model_computes_the_same():
    prior, codes = untrained_pair()[0], torch.randint(9, (2, 4, 8))
    pickled = pickle.loads(pickle.dumps(prior))
    assert torch.equal(pickled.features(codes), prior.features(codes))
    assert pickled.digest() == copy.deepcopy(prior).digest() == prior.digest()


def test_saved_model_computes_the_same(tmp_path):
    model = model_of()
    model.save(tmp_path / "prior")
    loaded = models.load(tmp_path / "prior", "prior")
    codes = codes_of(model, 1, 4, 6)
    assert isinstance(loaded, Hourglass)
    assert loaded.config == model.config
    assert torch.equal(loaded.features(codes), model.features(codes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_width": 100}, "multiple of 4"),
        ({"heads": 0}, "multiple of 4"),
        ({"depth": (2, 4)}, "needs 3 numbers"),
        ({"depth": (2, 4, 2), "shorten": ()}, "needs 1 numbers"),
        ({"depth": (2, 0, 2)}, "the innermost depth must be at least 1"),
        ({"depth": (-1, 2, 2)}, "other depths at least 0"),
        ({"shorten": (1,)}, "and shorten at least 2"),
        ({"feedforward_mult": 0}, "must be at least 1"),
        ({"height": 0}, "empty"),
    ],
)
def test_configs_that_make_no_network_are_refused(changes, message):
    with pytest.raises(UserError, match=message):
        model_of(**changes)
