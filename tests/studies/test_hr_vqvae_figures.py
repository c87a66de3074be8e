"""Figs. 5 and 6 of the study of HR-VQVAE: their tokenizers, and their tables and plots of given results."""

import json

import pytest
from PIL import Image

from smalti.core.errors import UserError
from smalti.studies.hr_vqvae.depth import depth_table
from smalti.studies.hr_vqvae.settings import ReproduceHRVQVAE
from smalti.studies.hr_vqvae.size import size_table
from smalti.studies.hr_vqvae.study import RESULT_NAME, TokenizerSpec, branching_of, model_of, specs_by_part, trial_of
from smalti.tokenizers.vq.vqvae2 import VQVAE2


@pytest.fixture
def config(tmp_path) -> ReproduceHRVQVAE:
    """The settings of a study of two seeds whose page is in a folder of its own."""
    return ReproduceHRVQVAE("hr-vqvae", "img", seeds=2, steps=600, work=tmp_path / "runs", out=tmp_path / "page.md")


def keep_result(spec, config, mse):
    """Writes a result as the study does, with the use and the perplexity of two levels."""
    folder = trial_of(spec, config).folder
    folder.mkdir(parents=True)
    result = {"mse": mse, "used": [0.5, 1.0], "perplexity": [10.0, 30.0]}
    (folder / RESULT_NAME).write_text(json.dumps(result | {"usage_images": config.usage_images}))


def row_of(table, start):
    (row,) = [line for line in table.splitlines() if line.startswith(start)]
    return [cell.strip() for cell in row.strip("|").split("|")]


def test_trees_of_any_depth_have_the_same_leaves(config):
    trees = [branching_of(64, depth) for depth in range(1, 7)]
    assert trees == [(64,), (8, 8), (4, 4, 4), (4, 4, 2, 2), (4, 2, 2, 2, 2), (2,) * 6]
    assert [branching_of(leaves, 3) for leaves in (512, 4096, 32_768)] == [(8,) * 3, (16,) * 3, (32,) * 3]
    mixed = model_of(TokenizerSpec("hrvq", False, 1, leaves=64, depth=4), config)
    assert (mixed.depth, mixed.branching) == (4, (4, 4, 2, 2))
    assert model_of(TokenizerSpec("hrvq", False, 1, leaves=512, depth=3), config).branching == 8


def test_levels_of_the_fifth_figure_end_in_a_single_code(config):
    levels = [spec.levels for spec in specs_by_part(config)["depth"] if spec.kind == "vqvae2"]
    assert levels == 2 * 2 * [2, 3, 4, 5]  # seeds, plain and best
    deepest = TokenizerSpec("vqvae2", True, 1, leaves=64, levels=5)
    assert deepest.name == "vqvae2-64-depth1-plain-1steps-seed0-levels5"
    layout = VQVAE2(model_of(deepest, config)).layout
    assert [(level.height, level.width) for level in layout.levels] == [(size, size) for size in (1, 2, 4, 8, 16)]


def test_fifth_figure_compares_with_one_layer_or_level_less(config):
    specs = specs_by_part(config)["depth"]
    plain = {spec: spec.depth + 10.0 * spec.seed for spec in specs if spec.plain and spec.kind == "hrvq"}
    plain[TokenizerSpec("vqvae2", True, 600, 64, levels=2)] = 0.5
    plain[TokenizerSpec("vqvae2", True, 600, 64, levels=2, seed=1)] = 99.0
    plain[TokenizerSpec("vqvae2", True, 600, 64, levels=3)] = 0.25
    for spec, mse in plain.items():
        keep_result(spec, config, mse)
    table = depth_table(config, specs)
    assert row_of(table, "| HR-VQVAE | 1 | 64 |")[3:5] == ["6.00000 (1.00000 to 11.00000)", ""]
    assert row_of(table, "| HR-VQVAE | 4 | 4·4·2·2 |")[3:5] == ["9.00000 (4.00000 to 14.00000)", "0 of 2"]
    two, three = (row_of(table, f"| VQ-VAE-2 | {n} | {grids}16×16 |") for n, grids in ((2, "8×8, "), (3, "4×4, 8×8, ")))
    assert two[3:7] == ["49.75000 (0.50000 to 99.00000)", "1 of 2", "75% (75% to 75%)", "20 (20 to 20)"]
    assert three[3:5] == ["0.25000", "1 of 1"]
    assert row_of(table, "| VQ-VAE-2 | 5 |")[3:] == ["not run", "", "not run", "not run"] * 2
    assert Image.open(config.picture("depth")).width > 100
    assert f"({config.picture('depth').name})" in table


def test_sixth_figure_has_a_column_for_each_start(config):
    config = ReproduceHRVQVAE("hr-vqvae", "img", starts=("scaled", "kmeans"), work=config.work, out=config.out)
    specs = specs_by_part(config)["size"]
    assert len({spec.name for spec in specs}) == len(specs) == 3 * 3 * 3  # models, leaves, best and two starts
    for number, spec in enumerate(specs):
        if spec.leaves != 4096:
            keep_result(spec, config, float(number))
    table = size_table(config, specs, ideal=lambda leaves: 1 / leaves)
    assert "| leaves | | best | plain, scaled | plain, kmeans |" in table
    expected = [number for number, spec in enumerate(specs) if (spec.kind, spec.leaves) == ("vqvae2", 512)]
    assert row_of(table, "| 512 | VQ-VAE-2 |")[2:] == [f"{mse:.5f} (50%, 100%; 10, 30)" for mse in expected]
    assert row_of(table, "| 4096 | HR-VQVAE |")[2:] == ["not run"] * 3
    assert Image.open(config.picture("size")).width > 100
    starts = {spec.start: model_of(spec, config) for spec in specs if spec.plain}
    assert {start: model.codebook_init for start, model in starts.items()} == {"scaled": "scaled", "kmeans": "kmeans"}


def test_sixth_figure_without_starts_is_refused():
    with pytest.raises(UserError, match="--starts needs at least one start"):
        ReproduceHRVQVAE("hr-vqvae", "img", starts=())
