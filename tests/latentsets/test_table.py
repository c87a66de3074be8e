"""Latent sets as tables of `datasets` and Parquet files: the round trip changes nothing; other tables are refused."""

import sys

import datasets
import pytest
import torch
from helpers.latents import GRID, LEVELS, PROVENANCE, make_codes, make_columns, small_set, write

from smalti.core.codes import Layout
from smalti.core.errors import UserError
from smalti.latentsets.provenance import Provenance
from smalti.latentsets.reader import LatentSet
from smalti.latentsets.table import DESCRIPTION, from_dataset, from_parquet, to_dataset, to_parquet
from smalti.scripts import convert_latents

NAMED = Provenance(**{**vars(PROVENANCE), "label_names": ("cat", "dög", "emu", "fox"), "skipped": ({"row": 3},)})


@pytest.fixture(scope="module")
def latent_set(tmp_path_factory):
    path, layout = tmp_path_factory.mktemp("set") / "latents.h5", Layout(tuple(LEVELS))
    write(path, layout, make_codes(layout, 1500), [0], NAMED)  # two batches
    return LatentSet(path)


def test_parquet_round_trip_keeps_the_set(latent_set, tmp_path):
    to_parquet(latent_set, tmp_path / "x.parquet")
    assert [path.name for path in tmp_path.iterdir()] == ["x.parquet"]
    again = from_parquet(str(tmp_path / "x.parquet"), tmp_path / "again.h5")
    assert again.content_digest == latent_set.content_digest
    assert again.provenance == latent_set.provenance
    again.verify()


def test_table_has_the_columns_of_the_set(latent_set, tmp_path):
    table = to_dataset(latent_set, cache=tmp_path)
    row = table.with_format("torch")[7]
    for index, codes in enumerate(latent_set.batch([7])):
        assert row[f"codes_{index}"].to(codes.dtype).equal(codes[0])
    assert table.features["label"].names == ["cat", "dög", "emu", "fox"]
    plain = table[7]
    assert (plain["label"], plain["source_id"], plain["held_out"], plain["flipped"]) == (1, 3, False, True)
    hub = datasets.Features._from_yaml_list(table.features._to_yaml_list())  # the form in a data set's card
    assert hub == table.features


def test_columns_are_read_once_however_many_batches_there_are(latent_set, tmp_path, monkeypatch):
    labels, read = LatentSet.labels, []
    monkeypatch.setattr(LatentSet, "labels", property(lambda self: read.append(1) or labels.__get__(self)))
    assert to_dataset(latent_set, cache=tmp_path)["label"][:] == latent_set._columns["labels"].tolist()
    assert read == [1]


def test_selection_of_rows_converts_to_a_set(latent_set, tmp_path):
    rows = [900, 4, 901, 17]
    some = from_dataset(to_dataset(latent_set, cache=tmp_path).select(rows), tmp_path / "some.h5")
    for grid, expected in zip(some.batch(range(4)), latent_set.batch(rows), strict=True):
        assert torch.equal(grid, expected)
    assert some.source_ids.tolist() == [0, 1, 0, 2]
    for name in ("labels", "held_out", "flipped"):
        assert torch.equal(getattr(some, name), getattr(latent_set, name)[rows])


def changed(table, **names):
    return table.cast_column(DESCRIPTION, datasets.ClassLabel(names=[names.get("text", "{}")]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda table: table.remove_columns(DESCRIPTION), "the table has no column 'latent_set' of one class"),
        (lambda table: table.remove_columns("codes_0"), "the table has no column 'codes_0'"),
        (lambda table: table.remove_columns("flipped"), "the table has no column 'flipped'"),
        (lambda table: changed(table), "the table's 'latent_set' is damaged"),
        (lambda table: changed(table, text="none"), "the table's 'latent_set' is damaged"),
        (lambda table: table.select([]), "the table has 0 rows"),
        (
            lambda table: table.map(lambda row: {"codes_0": [[999] * 4] * 3}),
            "level 0 has codes from 0 to 511, not from",
        ),
        (lambda table: table.map(lambda row: {"label": 2}), "some were changed"),
        (lambda table: table.select(range(59, -1, -1)), "rows were reordered, or vectors or captions removed"),
        (lambda table: table.map(lambda row: {"held_out": row["flipped"]}), "on both sides of the held-out split"),
    ],
)
def test_other_tables_are_refused(tmp_path, change, message):
    small_set(tmp_path / "latents.h5")
    table = change(to_dataset(LatentSet(tmp_path / "latents.h5"), cache=tmp_path / "cache"))
    with pytest.raises(UserError, match=message):
        from_dataset(table, tmp_path / "again.h5")
    assert not (tmp_path / "again.h5").exists()


def convert(monkeypatch, capsys, latents, out):
    monkeypatch.setattr(sys, "argv", ["convert_latents.py", "--latents", str(latents), "--out", str(out)])
    try:
        convert_latents.main()
    except SystemExit as error:
        return error.code, capsys.readouterr().err.splitlines()[-1]
    return 0, capsys.readouterr().out


def test_command_converts_in_both_directions(tmp_path, monkeypatch, capsys):
    small_set(tmp_path / "a.h5")
    digest = LatentSet(tmp_path / "a.h5").content_digest
    for source, out in [("a.h5", "a.parquet"), ("a.parquet", "b.h5")]:
        status, output = convert(monkeypatch, capsys, tmp_path / source, tmp_path / out)
        assert status == 0
        assert f"60 rows, 3×4 of 8·8·8, digest {digest}" in output
    assert make_columns(60)["labels"].equal(LatentSet(tmp_path / "b.h5").labels)
    assert LatentSet(tmp_path / "b.h5").layout == GRID
    for source, out, expected in [
        ("a.h5", "c.h5", "exactly one of the two must end in .parquet"),
        ("none.parquet", "c.h5", "cannot be opened as Parquet"),
        ("none.h5", "c.parquet", "there is no latent set at"),
    ]:
        status, output = convert(monkeypatch, capsys, tmp_path / source, tmp_path / out)
        assert (status, expected in output) == (2, True)


def test_default_output_is_named_after_the_input_and_nothing_is_replaced(tmp_path, monkeypatch, capsys):
    small_set(tmp_path / "photos.h5")
    convert_latents.convert(convert_latents.ConvertLatents(str(tmp_path / "photos.h5")))
    assert (tmp_path / "photos.parquet").exists()
    for latents in ("photos.h5", "photos.parquet"):
        with pytest.raises(UserError, match=r"exists and this command did not make it .* or pass --overwrite"):
            convert_latents.convert(convert_latents.ConvertLatents(str(tmp_path / latents)))
    convert_latents.convert(convert_latents.ConvertLatents(str(tmp_path / "photos.parquet"), overwrite=True))
    assert len(LatentSet(tmp_path / "photos.h5")) == 60
