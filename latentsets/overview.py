"""The columns of a latent set that training needs, in little memory, read from one file after another."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int64, UInt8

from smalti.latentsets.hdf5.format import first_rows


@dataclass(frozen=True)
class Overview:
    """The columns that training needs, in little memory: at most a few bytes a row.

    Attributes:
        labels: The class of each row, -1 for none, in the smallest dtype; it takes no memory if no row has a class.
        held_out: Whether each row is held out, 8 rows a byte (`numpy.packbits`).
        images: The number of source images of each split.
        label_counts: The number of rows of each split without a class, and of each class.
    """

    labels: np.ndarray
    held_out: UInt8[np.ndarray, " bytes"]
    images: dict[str, int]
    label_counts: dict[str, Int64[np.ndarray, " classes"]]

    def rows_of_labels(self) -> list[int]:
        """Returns the number of rows without a class, then of each class, in both splits together."""
        return _sum(*self.label_counts.values()).tolist()


def read_overview(files: Iterable[dict[str, np.ndarray]], rows: int) -> Overview:
    """Reads the columns of one file after another."""
    labels, held_out = [], np.zeros(rows, bool)
    counts = [np.zeros(1, np.int64), np.zeros(1, np.int64)]  # in training, held out; rows without a class first
    images, start, highest = [0, 0], 0, -1
    for columns in files:
        ids, kept = columns["source_ids"], columns["held_out"] > 0
        held_out[start : start + len(kept)] = kept
        smallest = np.min_scalar_type(-2 - int(columns["labels"].max()))  # of a negative number: a signed dtype
        labels.append(columns["labels"].astype(smallest))
        new = kept[first_rows(ids, highest)]
        for side in (False, True):
            counts[side] = _sum(counts[side], np.bincount(columns["labels"][kept == side] + 1))
            images[side] += int((new == side).sum())
        start, highest = start + len(kept), max(highest, int(ids.max()))
    splits = ("training", "held_out")
    unlabelled = all((each == -1).all() for each in labels)
    return Overview(
        np.broadcast_to(np.int8(-1), rows) if unlabelled else np.concatenate(labels),
        np.packbits(held_out),
        dict(zip(splits, images, strict=True)),
        dict(zip(splits, counts, strict=True)),
    )


def _sum(one: Int64[np.ndarray, " n"], other: Int64[np.ndarray, " m"]) -> Int64[np.ndarray, " k"]:
    """Adds two counts, of which the shorter one is continued with zeros."""
    total = np.zeros(max(len(one), len(other)), np.int64)
    total[: len(one)] += one
    total[: len(other)] += other
    return total
