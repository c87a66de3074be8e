"""Conversion of latent sets to tables of Hugging Face `datasets` and back, and so to Parquet files and to the hub.

The conversion is lossless. A table has a column for each level's codes (`codes_0`, ...), and `label`, `source_id`,
`held_out`, `flipped`; `condition` and `caption`, if the set has vectors and captions. The file's attributes are in the
column `latent_set`, a `ClassLabel` with one class whose name is the attributes as JSON. Class names are the only
metadata that every form of a table keeps: memory, Parquet, the hub. The column's values are all zero and compress to
almost nothing.
"""

import json
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, cast

import datasets
import numpy as np
import torch
from datasets.exceptions import DatasetsError

from smalti.core.codes import Codes, Layout, Level
from smalti.core.config import parse_json
from smalti.core.errors import UserError, one_line
from smalti.core.files import whole_file
from smalti.latentsets.hdf5.format import layout_from_json, number_sources
from smalti.latentsets.provenance import Provenance
from smalti.latentsets.reader import LatentSet
from smalti.latentsets.writer import LatentSetWriter

DESCRIPTION = "latent_set"
COLUMN_NAMES = {"labels": "label", "source_ids": "source_id", "held_out": "held_out", "flipped": "flipped"}
ROWS_AT_ONCE = 1024


def to_dataset(latent_set: LatentSet, *, cache: Path | None = None) -> datasets.Dataset:
    """Copies a latent set to a `datasets.Dataset`, which has `.to_parquet(path)` and `.push_to_hub(id)`.

    Args:
        latent_set: The set to copy.
        cache: The folder for the table's files; by default the cache folder of `datasets`.
    """
    texts: dict[str, Any] = {"layout": json.dumps(latent_set.layout.to_json())}
    texts |= {**latent_set.provenance.to_attributes(), "rows": len(latent_set), "content_digest": latent_set.digest()}
    names = latent_set.provenance.label_names
    features = {f"codes_{index}": _feature(level) for index, level in enumerate(latent_set.layout.levels)}
    features["label"] = datasets.ClassLabel(names=list(names)) if names else datasets.Value("int64")
    features["source_id"] = datasets.Value("int64")
    features |= {name: datasets.Value("bool") for name in ("held_out", "flipped")}
    if latent_set.condition_width:  # float32, since not every reader of Parquet knows float16
        features["condition"] = datasets.List(datasets.Value("float32"), length=latent_set.condition_width)
    if len(latent_set.captioned_rows()):
        features["caption"] = datasets.Value("string")
    features[DESCRIPTION] = datasets.ClassLabel(names=[json.dumps(texts, ensure_ascii=False)])
    columns = {column: getattr(latent_set, name).numpy() for name, column in COLUMN_NAMES.items()}
    # The table starts as row numbers on the disk, because `map` keeps its result on the disk only if its input is.
    cache_dir: Any = str(cache) if cache else None  # `datasets` types it as str, with the default None
    numbers = datasets.Dataset.from_generator(_numbers, gen_kwargs={"rows": len(latent_set)}, cache_dir=cache_dir)
    return cast(datasets.Dataset, numbers).map(
        partial(_rows, latent_set, columns, "caption" in features),
        batched=True,
        batch_size=ROWS_AT_ONCE,
        input_columns="row",
        remove_columns="row",
        features=datasets.Features(features),
        desc="rows",
    )


def from_dataset(table: datasets.Dataset, path: str | Path) -> LatentSet:
    """Writes a table that `to_dataset` made, or any selection of its rows, as a latent set.

    A table with as many rows as the set that it was made from must have its content digest, since Parquet has no
    checksums: rows in another order, or without their vectors or captions, are refused. Training shuffles rows anyway.

    Raises:
        UserError: if the table was not made from a latent set, is empty, was changed or reordered, or has values that
            contradict its attributes.
    """
    layout, provenance, digest = _description(table)
    names = [f"codes_{index}" for index in range(len(layout.levels))]
    if missing := [name for name in (*names, *COLUMN_NAMES.values()) if name not in table.features]:
        raise UserError(f"the table has no column {missing[0]!r}; give a complete table made from a latent set")
    if not len(table):
        raise UserError("the table has 0 rows; a latent set needs at least one row")
    values: Any = table.select_columns([*COLUMN_NAMES.values()]).with_format("numpy")[:]
    columns = {name: torch.from_numpy(values[column]) for name, column in COLUMN_NAMES.items()}
    columns["source_ids"] = torch.from_numpy(number_sources(values["source_id"]))  # a selection of rows has gaps
    vectors = ["condition"] if "condition" in table.features else []
    added: dict[str, Any] = {"provenance": provenance}
    if vectors:
        added["condition_width"] = len(table[0]["condition"])
    if "caption" in table.features:
        added["captions"] = table["caption"][:]
    with LatentSetWriter(path, layout, **columns, **added) as writer:
        writer.expected_digest = digest
        start = 0
        batches: Any = table.select_columns([*names, *vectors]).with_format("numpy").iter(ROWS_AT_ONCE)
        for batch in batches:
            codes: Codes = tuple(torch.from_numpy(batch[name]) for name in names)
            writer.write(start, codes, torch.from_numpy(batch["condition"]) if vectors else None)
            start += len(codes[0])
    return LatentSet(path)


def to_parquet(latent_set: LatentSet, path: Path) -> None:
    """Writes a latent set as one Parquet file, whole or not at all."""
    with whole_file(path) as partial_path, tempfile.TemporaryDirectory(dir=path.parent) as cache:
        to_dataset(latent_set, cache=Path(cache)).to_parquet(partial_path)


def from_parquet(source: str, path: Path) -> LatentSet:
    """Writes a Parquet file, or the files of a glob pattern, as a latent set; see `from_dataset`.

    Raises:
        UserError: if there is no such file or it cannot be read, and as `from_dataset` does.
    """
    try:
        table = datasets.load_dataset("parquet", data_files=source, split="train")
    except (OSError, ValueError, RuntimeError, DatasetsError) as error:
        reason = one_line(error.__cause__ or error)
        raise UserError(f"{source} cannot be opened as Parquet ({reason}); give one made from a latent set") from error
    return from_dataset(table, path)


def _numbers(rows: int) -> Iterator[dict[str, int]]:
    for row in range(rows):
        yield {"row": row}


def _rows(latent_set: LatentSet, all_rows: dict[str, np.ndarray], captioned: bool, rows: list[int]) -> dict[str, Any]:
    codes = {f"codes_{i}": latent_set.read_stored(i, rows) for i in range(len(latent_set.layout.levels))}
    columns: dict[str, Any] = {name: column[rows] for name, column in all_rows.items()}
    if latent_set.condition_width:
        columns["condition"] = latent_set.vectors(rows).numpy()
    if captioned:
        columns["caption"] = latent_set.captions(rows)
    return {**codes, **columns, DESCRIPTION: np.zeros(len(rows), np.int64)}


def _feature(level: Level) -> Any:
    array = datasets.Array3D if level.channels else datasets.Array2D
    return array(level.shape, level.dtype.name)


def _description(table: datasets.Dataset) -> tuple[Layout, Provenance, str | None]:
    """Returns the layout and provenance in a table, and the content digest if it has all rows and records one."""
    feature = table.features.get(DESCRIPTION)
    if not isinstance(feature, datasets.ClassLabel) or len(feature.names) != 1:
        raise UserError(f"the table has no column {DESCRIPTION!r} of one class; give one made from a latent set")
    try:
        texts = parse_json(feature.names[0])
        layout = layout_from_json(parse_json(texts["layout"]), "the table")
        digest = str(texts.get("content_digest")) if texts.get("rows") == len(table) else None
        return layout, Provenance.from_attributes(texts, "the table"), digest
    except (TypeError, KeyError, ValueError) as error:
        raise UserError(f"the table's {DESCRIPTION!r} is damaged ({error}); make the table again") from error
