"""Writing latent sets: blocks in any order are read back; errors, interruptions and full disks leave no file behind."""

import re
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import jaxtyping
import pytest
import torch
from helpers.latents import GRID, LEVELS, PROVENANCE, make_codes, make_columns, small_set, write
from hypothesis import given, settings
from hypothesis import strategies as st

from smalti.core.codes import Layout
from smalti.core.config import LARGEST_JSON_BYTES, MOST_JSON_VALUES
from smalti.core.errors import UserError
from smalti.latentsets.provenance import MOST_REASONS, shortened
from smalti.latentsets.reader import LatentSet
from smalti.latentsets.writer import LatentSetWriter


@settings(max_examples=25)
@given(
    levels=st.lists(st.sampled_from(LEVELS), min_size=1, max_size=3),
    rows=st.integers(2, 30),
    seed=st.integers(0, 2**16),
    data=st.data(),
)
def test_blocks_written_in_any_order_are_read_back(tmp_path_factory, levels, rows, seed, data):
    layout = Layout(tuple(levels))
    path = tmp_path_factory.mktemp("set") / "latents.h5"
    codes = make_codes(layout, rows, seed)
    cuts = data.draw(st.sets(st.integers(1, rows - 1)).map(lambda cuts: [0, *cuts]).flatmap(st.permutations))
    write(path, layout, codes, cuts)
    latent_set = LatentSet(path)
    requested = data.draw(st.lists(st.integers(0, rows - 1), min_size=1, max_size=20))
    for grid, expected, level in zip(latent_set.batch(requested), codes, layout.levels, strict=True):
        assert grid.dtype == (torch.float32 if level.channels else torch.int64)
        assert torch.equal(grid, expected[requested])
    for name, expected in make_columns(rows).items():
        assert torch.equal(getattr(latent_set, name), expected)
    assert (len(latent_set), latent_set.layout, latent_set.provenance) == (rows, layout, PROVENANCE)
    latent_set.verify()
    one_block = path.with_name("one.h5")
    write(one_block, layout, codes, [0])
    assert LatentSet(one_block).content_digest == latent_set.content_digest


@pytest.mark.parametrize(("character", "most"), [(",", MOST_JSON_VALUES - 1), ("a", LARGEST_JSON_BYTES - 4)])
def test_label_names_are_refused_if_they_could_not_be_read(tmp_path, character, most):
    """The names are JSON: a bracket counts as a value, and brackets and quotes take four bytes."""
    path, codes = tmp_path / "latents.h5", make_codes(GRID, 10)
    columns = {**make_columns(10), "labels": torch.zeros(10, dtype=torch.int64)}
    provenances = [replace(PROVENANCE, label_names=(character * length,)) for length in (most, most + 1)]
    with LatentSetWriter(path, GRID, **columns, provenance=provenances[0]) as writer:
        writer.write(0, codes)
    assert LatentSet(path).provenance == provenances[0]
    with pytest.raises(UserError, match=r"its 1 classes take \d+ bytes .*--label-column"):
        LatentSetWriter(path, GRID, **columns, provenance=provenances[1])


@pytest.mark.parametrize(
    ("start", "codes", "message"),
    [
        (0, [512], "level 0 has codes from 0 to 511, not from"),
        (0, [65536], "level 0 has codes from 0 to 511, not from"),
        (0, [-1], "level 0 has codes from 0 to 511, not from"),
        (3, [0], "row 3 was already written"),
        (59, [0, 0], "rows 59 to 60 do not fit a latent set of 60"),
        (-1, [0], "rows -1 to -1 do not fit a latent set of 60"),
    ],
)
def test_wrong_blocks_are_refused_and_leave_no_file(tmp_path, start, codes, message):
    grid = torch.tensor(codes).view(-1, 1, 1).expand(-1, 3, 4)

    def write_both() -> None:
        with LatentSetWriter(tmp_path / "latents.h5", GRID, **make_columns(60), provenance=PROVENANCE) as writer:
            writer.write(2, make_codes(GRID, 2))
            writer.write(start, (grid,))

    with pytest.raises(UserError, match=message):
        write_both()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("labels", [0, -2, 0, 0], "-2 is not a label: labels are -1 for none, or from 0 to 1"),
        ("labels", [0, 1, 2, 0], "2 is not a label"),
        ("source_ids", [0, 0, 2, 2], "source ids are not 0, 1, ... in order of first appearance"),
        ("source_ids", [1, 1, 0, 0], "source ids are not 0, 1, ..."),
        ("source_ids", [-1, 0, 1, 1], "source ids are not 0, 1, ..."),
        ("held_out", [0, 1, 0, 0], "rows of one source image are on both sides"),
    ],
)
def test_contradicting_columns_are_refused(tmp_path, name, values, message):
    names = {"label_names": ("cat", "dog")}
    columns = {**make_columns(4), "labels": torch.tensor([0, 1, -1, 0]), "held_out": torch.zeros(4, dtype=torch.bool)}
    columns[name] = torch.tensor(values).to(columns[name].dtype)
    with pytest.raises(UserError, match=f"latents.h5 was not written: {re.escape(message)}"):
        LatentSetWriter(tmp_path / "latents.h5", GRID, **columns, provenance=replace(PROVENANCE, **names))


def test_missing_rows_are_refused(tmp_path):
    writer = LatentSetWriter(tmp_path / "latents.h5", GRID, **make_columns(60), provenance=PROVENANCE)
    with pytest.raises(UserError, match="row 10 and 49 others were never written"), writer as entered:
        entered.write(0, make_codes(GRID, 10))
    with pytest.raises(UserError, match="0 rows would be empty"):
        LatentSetWriter(tmp_path / "latents.h5", GRID, **make_columns(0), provenance=PROVENANCE)
    assert list(tmp_path.iterdir()) == []


ROWS = (2, 3, 4)
"""The shape of the codes of two rows."""


@pytest.mark.parametrize(
    ("added", "codes", "vectors", "message"),
    [
        ({"flipped": torch.zeros(3).bool()}, torch.zeros(ROWS).long(), None, "flipped has shape (3,), not (2,)"),
        (
            {"source_numbers": torch.arange(2)},
            torch.zeros(ROWS).long(),
            None,
            "source_numbers has shape (2,), not (1,)",
        ),
        ({"labels": torch.tensor([0.5, 1])}, torch.zeros(ROWS).long(), None, "labels of float32 has values that are"),
        ({"held_out": torch.tensor([256, 256])}, torch.zeros(ROWS).long(), None, "held_out of int64 has values that"),
        ({"captions": ["one"]}, torch.zeros(ROWS).long(), None, "give 2 captions, a text for each row"),
        ({"captions": ["one", None]}, torch.zeros(ROWS).long(), None, "give 2 captions, a text for each row"),
        ({"condition_width": 3}, torch.zeros(ROWS).long(), None, "vectors of shape (2, 0), not (2, 3)"),
        ({"condition_width": 3}, torch.zeros(ROWS).long(), torch.zeros(2, 2), "vectors of shape (2, 2), not (2, 3)"),
        ({"condition_width": 3}, torch.zeros(ROWS).long(), torch.zeros(1, 3), "vectors of shape (1, 3), not (2, 3)"),
        ({}, torch.zeros(ROWS).long(), torch.zeros(2, 3), "vectors of shape (2, 3), not (2, 0)"),
        ({}, torch.zeros(ROWS), None, "level 0 has codes that are integers, not torch.float32"),
    ],
)
def test_values_that_would_make_a_damaged_set_replace_nothing(tmp_path, monkeypatch, added, codes, vectors, message):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # which checks types in tests alone
    small_set(tmp_path / "latents.h5")
    before = (tmp_path / "latents.h5").read_bytes()

    def write_both() -> None:
        columns: dict[str, Any] = {**make_columns(2), "provenance": PROVENANCE, **added}
        with LatentSetWriter(tmp_path / "latents.h5", GRID, **columns) as writer:
            writer.write(0, (codes,), vectors)

    with pytest.raises(UserError, match=re.escape(message)):
        write_both()
    assert (tmp_path / "latents.h5").read_bytes() == before


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, RuntimeError])
def test_interrupted_writer_leaves_the_target_unchanged(tmp_path, interruption):
    small_set(tmp_path / "latents.h5")
    before = (tmp_path / "latents.h5").read_bytes()

    def write_half() -> None:
        with LatentSetWriter(tmp_path / "latents.h5", GRID, **make_columns(10), provenance=PROVENANCE) as writer:
            writer.write(0, make_codes(GRID, 5))
            assert (tmp_path / "latents.h5").read_bytes() == before
            raise interruption

    with pytest.raises(interruption):
        write_half()
    assert (tmp_path / "latents.h5").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["latents.h5"]


@contextmanager
def file_size_limit(limit_bytes: int) -> Iterator[None]:
    """Limits the size of files; the kernel refuses larger ones as it refuses writes to a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("reserves", [True, False])
@pytest.mark.parametrize("limit_bytes", [4096, 40_000, 1_128_576, 1_210_000])
def test_full_disk_is_one_line_and_leaves_the_target_unchanged(tmp_path, monkeypatch, reserves, limit_bytes):
    if not reserves:
        monkeypatch.delattr("os.posix_fallocate", raising=False)
    small_set(tmp_path / "latents.h5")
    before = (tmp_path / "latents.h5").read_bytes()
    codes = make_codes(GRID, 50_000)
    with file_size_limit(limit_bytes), pytest.raises(UserError, match=r"^no room for .*latents.h5") as caught:
        write(tmp_path / "latents.h5", GRID, codes, [0, 10_000, 20_000, 40_000])
    assert "\n" not in str(caught.value)
    assert (tmp_path / "latents.h5").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["latents.h5"]


def test_a_set_without_very_many_damaged_images_can_be_read(tmp_path):
    """Their reasons would be more than is read of an attribute; those of the first are kept, and all rows."""
    reasons = ({"row": row, "reason": f"{row}.png, row {row}: {'the image is damaged ' * 6}"} for row in range(150_000))
    write(tmp_path / "set.h5", GRID, make_codes(GRID, 30), [0], replace(PROVENANCE, skipped=shortened(reasons)))
    skipped = LatentSet(tmp_path / "set.h5").provenance.skipped
    assert [image["row"] for image in skipped] == [*range(150_000)]
    assert ["reason" in image for image in skipped] == [row < MOST_REASONS for row in range(150_000)]
