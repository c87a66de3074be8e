"""The hourglass against a block written by hand, and against mistakes made elsewhere.

Those are: heads without positions, buckets that are not patches, squares only.
"""

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any, get_args

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smalti.core import models
from smalti.core.errors import UserError
from smalti.priors.networks.hourglass import Blocks, Hourglass, HourglassConfig, Stage
from smalti.priors.networks.resampling import Buckets, Resampling
from smalti.priors.networks.rotary import ROTARY_THETA, AxialRotary

TINY = HourglassConfig(height=4, width=6, radices=(3, 4), model_width=32, heads=2, depth=(1, 1, 1), shorten=(2,))


def model_of(seed: int = 0, **changes) -> Hourglass:
    torch.manual_seed(seed)
    return Hourglass(HourglassConfig(**{**vars(TINY), **changes})).eval()


def codes_of(model: Hourglass, *shape: int) -> Tensor:
    return torch.randint(model.head.codebook_size, shape)


class PassOn(nn.Module):
    """Stands in for blocks: what is left of a stage is its resampling."""

    def forward(self, x: Tensor, *_: object) -> Tensor:
        return x


def resampling_of(stage: Stage, h: int, w: int) -> Callable[[Tensor], Tensor]:
    """What a stage does between its blocks, on a grid."""
    for part in ("before", "valley", "after"):
        stage.set_submodule(part, PassOn())
    return lambda x: stage(x, (h, w), AxialRotary(16)(h, w))


def stage_of(shorten: int = 2, **changes: Any) -> Stage:
    torch.manual_seed(0)
    return Stage(replace(TINY, **changes), (1, 1, 1), (shorten,))


def jacobian_of(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    jacobian = torch.autograd.functional.jacobian(function, x)
    assert isinstance(jacobian, Tensor)
    return jacobian


def by_hand(model: Hourglass, codes: Tensor) -> Tensor:
    """One block and the output norm, with rotations as complex numbers."""
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

    def turned(t: Tensor) -> Tensor:
        pairs = torch.view_as_complex(t.reshape(*t.shape[:-1], -1, 2).contiguous())
        return torch.view_as_real(pairs * torch.polar(torch.ones_like(angles), angles)).flatten(-2)

    scores = turned(split(attention.to_q)) @ turned(split(attention.to_k)).mT / (d // heads) ** 0.5
    x = x + attention.to_out((scores.softmax(-1) @ split(attention.to_v)).transpose(1, 2).flatten(2))
    first, last = (layer for layer in feedforward.modules() if isinstance(layer, nn.Linear))
    x = x + last(F.gelu(first(F.layer_norm(x, (d,)) * feedforward_gain)))
    return F.layer_norm(x, (d,), model.norm.weight, model.norm.bias)


def test_one_block_is_pre_norm_attention_with_axial_rotations():
    model = model_of(depth=(1,), shorten=())
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    codes = codes_of(model, 2, 3, 5)
    assert torch.allclose(model.features(codes), by_hand(model, codes), atol=1e-5)


@pytest.mark.parametrize("part", ["before", "valley.before"])
def test_every_head_gets_rows_and_columns_and_only_their_offsets(part):
    """The same content everywhere: what differs between scores is position, as each head sees it."""
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


@pytest.mark.parametrize("buckets", get_args(Buckets))
def test_a_bucket_lies_where_its_first_code_does_and_a_canvas_changes_nothing(buckets):
    model, seen = model_of(depth=(1, 1, 1, 1, 1), shorten=(2, 3), buckets=buckets), []
    for part in ("before", "valley.before", "valley.valley.before"):
        model.body.get_submodule(part).register_forward_pre_hook(lambda _, inputs: seen.append(inputs[1]))
    model.features(codes_of(model, 1, 8, 10))
    codes, patches, outer = seen
    assert torch.equal(codes.view(8, 10, -1)[:4, :6].flatten(0, 1)[None], model.rotary(4, 6))
    if buckets == "patches":
        assert torch.equal(patches, codes.view(8, 10, -1)[::2, ::2].flatten(0, 1)[None])
        assert torch.equal(outer, codes.view(8, 10, -1)[::6, ::6].flatten(0, 1)[None])
    else:
        assert torch.equal(patches, codes[:, ::4])
        assert torch.equal(outer, codes[:, ::36])


@pytest.mark.parametrize("how", get_args(Resampling))
@pytest.mark.parametrize(("shorten", "h", "w"), [(2, 4, 6), (2, 5, 9), (3, 4, 7), (4, 3, 3)])
def test_buckets_are_patches_also_where_the_last_are_partial(shorten, h, w, how):
    """Between blocks, a position hears of exactly those in its patch."""
    stage = resampling_of(stage_of(shorten, resampling=how), h, w)
    jacobian = jacobian_of(lambda x: (stage(x) ** 2).sum((0, 2)), torch.randn(1, h * w, 32))
    hears = jacobian[:, 0].abs().sum(-1) > 1e-6
    places = [(i // w // shorten, i % w // shorten) for i in range(h * w)]
    assert torch.equal(hears, torch.tensor([[ours == theirs for theirs in places] for ours in places]))


@pytest.mark.parametrize("how", get_args(Resampling))
def test_buckets_are_runs_where_a_grid_is_read_as_text(how):
    """Through the whole model, whose only block is beyond the valley's resampling."""
    model = model_of(resampling=how, buckets="runs")
    for part in ("before", "valley", "after"):
        model.body.set_submodule(part, PassOn())
    codes = codes_of(model, 1, 3, 5)
    for place in range(15):
        other = codes.clone().flatten()
        other[place] = (other[place] + 1) % 12
        differs = (model.features(other.view_as(codes)) - model.features(codes)).abs().sum((0, 2)) > 1e-6
        assert differs.tolist() == [at // 4 == place // 4 for at in range(15)]


def test_means_are_torch_s_and_of_what_is_there():
    x = torch.randn(1, 15, 32)
    grid = x.mT.reshape(1, 32, 3, 5)
    pooled = F.avg_pool2d(grid, 2, ceil_mode=True).flatten(2).mT  # divides by the cells that exist
    stage = stage_of(resampling="mean")
    back = stage.norm(pooled).mT.reshape(1, 32, 2, 3).repeat_interleave(2, 2).repeat_interleave(2, 3)[..., :3, :5]
    assert torch.allclose(resampling_of(stage, 3, 5)(x), x + back.flatten(2).mT, atol=1e-5)


def test_attention_to_a_bucket_is_attention_to_all_under_a_mask():
    """On a 3x5 grid in patches of 2x2: torch's attention, with the rest masked out, and a hand-made rotation."""
    stage, x = stage_of(resampling="attention"), torch.randn(1, 15, 32)
    down, linear = stage.down, stage_of()
    linear.down.map.load_state_dict(down.map.state_dict())
    where = [(0, 0), (0, 2), (0, 4), (2, 0), (2, 2), (2, 4)]
    places = list(itertools.product(range(3), range(5)))
    mask = torch.tensor([[(i // 2, j // 2) == (y // 2, x // 2) for i, j in places] for y, x in where])

    def at(vectors: Tensor, positions: list[tuple[int, int]]) -> Tensor:
        frequencies = ROTARY_THETA ** -(torch.arange(0, 8, 2) / 8)
        angles = torch.cat([torch.tensor(positions)[:, i : i + 1] * frequencies for i in (0, 1)], -1)
        pairs = torch.view_as_complex(vectors.view(1, -1, 2, 8, 2).transpose(1, 2).contiguous())
        return torch.view_as_real(pairs * torch.polar(torch.ones_like(angles), angles)).flatten(-2)

    inputs = []
    for module in (linear, stage):
        module.norm.register_forward_pre_hook(lambda _, given: inputs.append(given[0]))
        resampling_of(module, 3, 5)(x)
    pooled, found = inputs
    keys, values = down.to_keys_and_values(down.of_positions(x)).chunk(2, -1)
    values = values.view(1, 15, 2, 16).transpose(1, 2)
    queries = at(down.to_query(down.of_bucket(pooled)), where)
    expected = F.scaled_dot_product_attention(queries, at(keys, places), values, attn_mask=mask)
    assert torch.allclose(found, pooled + down.to_out(expected.transpose(1, 2).flatten(2)), atol=1e-5)


def test_partial_patches_count_what_is_there():
    """A 3x3 grid in patches of 2x2, summed in loops over the positions that exist."""
    stage = stage_of()
    x = torch.randn(1, 9, 32)
    found = resampling_of(stage, 3, 3)(x).view(3, 3, 32)
    down, up = stage.down.map.weight.view(32, 2, 2, 32), stage.up.map.weight.view(2, 2, 32, 32)
    for row, column in itertools.product(range(3), range(3)):
        there = [(i, j) for i in (0, 1) for j in (0, 1) if row // 2 * 2 + i < 3 and column // 2 * 2 + j < 3]
        patch = stage.down.map.bias + sum(
            down[:, i, j] @ x[0, (row // 2 * 2 + i) * 3 + column // 2 * 2 + j] for i, j in there
        )
        back = up[row % 2, column % 2] @ stage.norm(patch) + stage.up.map.bias.view(2, 2, 32)[row % 2, column % 2]
        assert torch.allclose(found[row, column], x[0, row * 3 + column] + back, atol=1e-5)


@pytest.mark.parametrize(
    ("depth", "shorten"),
    [
        ((2,), ()),
        ((1, 1, 1), (2,)),
        ((1, 1, 1), (3,)),
        ((1, 1, 2, 1, 1), (2, 2)),
        ((0, 1, 0), (2,)),
        ((0, 0, 1, 1, 0), (2, 2)),
    ],
)
@pytest.mark.parametrize(("h", "w"), [(8, 8), (5, 9), (1, 3)])
@pytest.mark.parametrize("buckets", get_args(Buckets))
def test_every_position_hears_every_other_on_any_grid(depth, shorten, h, w, buckets):
    model = model_of(depth=depth, shorten=shorten, buckets=buckets)
    embedded = model.head.embed(codes_of(model, 1, h, w)).detach()
    probe = torch.randn(32)
    some = [0, h * w // 2, h * w - 1]
    grid = (1, h * w) if buckets == "runs" else (h, w)
    jacobian = jacobian_of(lambda x: model.body(x, grid, model.rotary(h, w))[0, some] @ probe, embedded)
    assert (jacobian[:, 0].abs().sum(-1) > 0).all()


def test_depth_counts_blocks_from_the_outside_in():
    body = model_of(depth=(1, 2, 3, 1, 2), shorten=(2, 3)).body
    found = [len(part.attends) for part in (body.before, body.valley.before, body.valley.valley.before)]
    found += [len(part.attends) for part in (body.valley.after, body.after)]
    assert found == [1, 2, 3, 1, 2]


def test_rows_do_not_see_each_other():
    model = model_of()
    codes = codes_of(model, 3, 4, 6)
    assert torch.allclose(model.features(codes)[1:2], model.features(codes[1:2]), atol=1e-5)


def test_half_precision_is_close_whether_attention_is_fused_or_not():
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


def test_a_saved_model_is_the_same_model(tmp_path):
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
        ({"depth": (2, 0, 2)}, "innermost valley's depth must be at least 1"),
        ({"depth": (-1, 2, 2)}, "other depths 0"),
        ({"shorten": (1,)}, "and shorten 2"),
        ({"feedforward_mult": 0}, "must be at least 1"),
        ({"height": 0}, "empty"),
    ],
)
def test_configs_that_make_no_network_are_refused(changes, message):
    with pytest.raises(UserError, match=message):
        model_of(**changes)
