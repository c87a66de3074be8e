"""Finds the columns of images, labels and captions in a table, and names columns that look like labels."""

from collections.abc import Iterable
from typing import Any

import datasets

from smalti.core.errors import UserError

_LABEL_LIKE = ("labels", "cls", "class", "classes", "category", "target")


def find_image_column(features: datasets.Features, source: str, requested: str | None) -> str:
    """Returns the requested column, or the only column of images, or else the only column of bytes.

    Raises:
        UserError: if the requested column is missing or holds no images, or there is none, or several.
    """
    _require_column(features, source, requested)
    byte_columns = [name for name, feature in features.items() if _holds_bytes(feature)]
    image_columns = [name for name, feature in features.items() if isinstance(feature, datasets.Image)]
    if requested is not None and requested not in image_columns + byte_columns:
        kind, names = features[requested], _listed(features)
        raise UserError(f"column {requested!r} of {source} holds {kind}, not images; its columns are {names}")
    candidates = [requested] if requested is not None else image_columns or byte_columns
    if not candidates:
        raise UserError(f"{source} has no column of images; its columns are {_listed(features)}")
    if len(candidates) > 1:
        count, names = len(candidates), _listed(candidates)
        raise UserError(f"{source} has {count} columns of images ({names}); choose one with --image-column NAME")
    return candidates[0]


def find_label_column(features: datasets.Features, source: str, requested: str | None) -> str | None:
    """Returns the requested column, or `label`, or the only column of classes, or None.

    Raises:
        UserError: if the requested column is missing or holds no labels, or there are several columns of classes.
    """
    _require_column(features, source, requested)
    if requested is not None:
        if not _holds_labels(features[requested]):
            kind = features[requested]
            raise UserError(f"column {requested!r} of {source} holds {kind}; labels are classes, integers or strings")
        return requested
    class_columns = [name for name, feature in features.items() if isinstance(feature, datasets.ClassLabel)]
    if "label" in features and _holds_labels(features["label"]):
        return "label"
    if len(class_columns) > 1:
        count, names = len(class_columns), _listed(class_columns)
        raise UserError(f"{source} has {count} columns of classes ({names}); choose one with --label-column NAME")
    return class_columns[0] if class_columns else None


def require_captions(features: datasets.Features, source: str, requested: str) -> None:
    """Checks the requested column of captions.

    Raises:
        UserError: if it is missing, or holds no strings.
    """
    _require_column(features, source, requested)
    feature = features[requested]
    if not (isinstance(feature, datasets.Value) and feature.dtype in ("string", "large_string")):
        raise UserError(f"column {requested!r} of {source} holds {feature}; captions are strings")


def describe_unread_labels(features: datasets.Features) -> tuple[str, ...]:
    """Returns a note for each column that looks like labels, for a table in which no column of labels was found."""
    notes = []
    for name, feature in features.items():
        if name.lower() == "label":
            kind = feature.dtype if isinstance(feature, datasets.Value) else type(feature).__name__
            notes.append(f"column {name!r} is not read: it holds {kind}; labels are integers or strings: convert it")
        elif name.lower() in _LABEL_LIKE:
            advice = f"rename it, or give --label-column {name}" if _holds_labels(feature) else "rename and convert it"
            notes.append(f"found a column {name!r}, which is not read; labels are read from 'label': {advice}")
    return tuple(notes)


def _require_column(features: datasets.Features, source: str, requested: str | None) -> None:
    if requested is not None and requested not in features:
        raise UserError(f"{source} has no column {requested!r}; its columns are {_listed(features)}")


def _holds_bytes(feature: Any) -> bool:
    """Returns whether a Parquet column without `datasets` metadata holds bytes, bare or in a struct."""
    if isinstance(feature, dict):
        return "bytes" in feature and _holds_bytes(feature["bytes"])
    return isinstance(feature, datasets.Value) and feature.dtype in ("binary", "large_binary")


def _holds_labels(feature: Any) -> bool:
    if isinstance(feature, datasets.ClassLabel):
        return True
    return isinstance(feature, datasets.Value) and feature.dtype.startswith(
        ("int", "uint", "string", "large_string", "bool")
    )


def _listed(names: Iterable[str]) -> str:
    return ", ".join(map(repr, names))
