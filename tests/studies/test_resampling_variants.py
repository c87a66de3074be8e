"""The hourglass variants of the study of priors: runs, mean pooling and attention, against computations by hand."""

import itertools

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
    without_blocks,
)
from torch import Tensor

from smalti.core import models
from smalti.priors.networks.positions import ROTARY_THETA
from smalti.studies.priors.resampling_variants import (
    AttentionDown,
    AttentionHourglass,
    AttentionStage,
    MeanHourglass,
    MeanStage,
    RunsHourglass,
)

KINDS = {
    "hourglass-runs": RunsHourglass,
    "hourglass-mean": MeanHourglass,
    "hourglass-attention": AttentionHourglass,
}


@pytest.mark.parametrize("kind", KINDS)
def test_saved_variant_computes_the_same(kind, tmp_path):
    assert models.class_of_kind("prior", kind) is KINDS[kind]
    model = model_of(KINDS[kind])
    model.save(tmp_path / "prior")
    loaded = models.load(tmp_path / "prior", "prior")
    codes = codes_of(model, 1, 4, 6)
    assert type(loaded) is KINDS[kind]
    assert torch.equal(loaded.features(codes), model.features(codes))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("depth", "shorten"), SHAPES)
@pytest.mark.parametrize(("h", "w"), [(8, 8), (5, 9), (1, 3)])
def test_every_position_sees_every_other_on_any_grid(kind, depth, shorten, h, w):
    assert every_position_sees_every_other(model_of(KINDS[kind], depth=depth, shorten=shorten), h, w)


@pytest.mark.parametrize("stage_class", [MeanStage, AttentionStage])
@pytest.mark.parametrize(("shorten", "h", "w"), [(2, 4, 6), (2, 5, 9), (3, 4, 7), (4, 3, 3)])
def test_resampling_mixes_exactly_the_positions_of_a_patch(stage_class, shorten, h, w):
    assert positions_share_patches(stage_of(stage_class, shorten), shorten, h, w)


def test_runs_mix_consecutive_codes_in_raster_order():
    """Through the whole model, without its blocks."""
    model = model_of(RunsHourglass)
    without_blocks(model.body)
    codes = codes_of(model, 1, 3, 5)
    for position in range(15):
        changed = codes.clone().flatten()
        changed[position] = (changed[position] + 1) % 12
        differs = (model.features(changed.view_as(codes)) - model.features(codes)).abs().sum((0, 2)) > 1e-6
        assert differs.tolist() == [other // 4 == position // 4 for other in range(15)]


def test_run_has_the_rotary_embedding_of_its_first_code():
    model, inputs = model_of(RunsHourglass, depth=(1, 1, 1, 1, 1), shorten=(2, 3)), []
    for part in ("before", "valley.before", "valley.valley.before"):
        model.body.get_submodule(part).register_forward_pre_hook(lambda _, arguments: inputs.append(arguments[1]))
    model.features(codes_of(model, 1, 8, 10))
    codes, runs, outer = inputs
    assert torch.equal(codes.view(8, 10, -1)[:4, :6].flatten(0, 1)[None], model.rotary(4, 6))
    assert torch.equal(runs, codes[:, ::4])
    assert torch.equal(outer, codes[:, ::36])


def test_mean_pooling_is_torchs_over_the_positions_that_exist():
    x = torch.randn(1, 15, 32)
    grid = x.mT.reshape(1, 32, 3, 5)
    pooled = F.avg_pool2d(grid, 2, ceil_mode=True).flatten(2).mT  # divides by the number of positions that exist
    stage = stage_of(MeanStage)
    normed = stage.norm(pooled).mT.reshape(1, 32, 2, 3)
    upsampled = normed.repeat_interleave(2, 2).repeat_interleave(2, 3)[..., :3, :5]
    assert torch.allclose(resampling_of(stage, 3, 5)(x), x + upsampled.flatten(2).mT, atol=1e-5)


def test_attention_pooling_is_torchs_attention_masked_to_the_patch():
    """On a 3x5 grid in patches of 2x2, with a rotation by hand."""
    stage, linear, x = stage_of(AttentionStage), stage_of(), torch.randn(1, 15, 32)
    down = stage.down
    assert isinstance(down, AttentionDown)
    linear.down.map.load_state_dict(down.map.state_dict())
    patches = [(0, 0), (0, 2), (0, 4), (2, 0), (2, 2), (2, 4)]  # their first positions
    positions = list(itertools.product(range(3), range(5)))
    mask = torch.tensor([[(i // 2, j // 2) == (y // 2, x // 2) for i, j in positions] for y, x in patches])

    def rotated(vectors: Tensor, places: list[tuple[int, int]]) -> Tensor:
        frequencies = ROTARY_THETA ** -(torch.arange(0, 8, 2) / 8)
        angles = torch.cat([torch.tensor(places)[:, i : i + 1] * frequencies for i in (0, 1)], -1)
        pairs = torch.view_as_complex(vectors.view(1, -1, 2, 8, 2).transpose(1, 2).contiguous())
        return torch.view_as_real(pairs * torch.polar(torch.ones_like(angles), angles)).flatten(-2)

    inputs = []
    for module in (linear, stage):
        module.norm.register_forward_pre_hook(lambda _, arguments: inputs.append(arguments[0]))
        resampling_of(module, 3, 5)(x)
    pooled, attended = inputs
    keys, values = down.to_keys_and_values(down.key_norm(x)).chunk(2, -1)
    values = values.view(1, 15, 2, 16).transpose(1, 2)
    queries = rotated(down.to_query(down.query_norm(pooled)), patches)
    expected = F.scaled_dot_product_attention(queries, rotated(keys, positions), values, attn_mask=mask)
    assert torch.allclose(attended, pooled + down.to_out(expected.transpose(1, 2).flatten(2)), atol=1e-5)
