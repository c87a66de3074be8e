"""The hourglass of runs, a variant in the study of priors, against computations by hand."""

import pytest
import torch
from helpers.hourglass import SHAPES, codes_of, every_position_sees_every_other, model_of, without_blocks

from smalti.core import models
from smalti.studies.priors.hourglass_of_runs import RunsHourglass


def test_saved_variant_computes_the_same(tmp_path):
    assert models.class_of_kind("prior", "hourglass-runs") is RunsHourglass
    model = model_of(RunsHourglass)
    model.save(tmp_path / "prior")
    loaded = models.load(tmp_path / "prior", "prior")
    codes = codes_of(model, 1, 4, 6)
    assert type(loaded) is RunsHourglass
    assert torch.equal(loaded.features(codes), model.features(codes))


@pytest.mark.parametrize(("depth", "shorten"), SHAPES)
@pytest.mark.parametrize(("h", "w"), [(8, 8), (5, 9), (1, 3)])
def test_every_position_sees_every_other_on_any_grid(depth, shorten, h, w):
    assert every_position_sees_every_other(model_of(RunsHourglass, depth=depth, shorten=shorten), h, w)


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
