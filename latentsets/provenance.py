"""The provenance of a latent set: the models, images and software that made it."""

import dataclasses
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from smalti.core.config import (
    ADDED,
    LARGEST_JSON_BYTES,
    MOST_JSON_VALUES,
    added,
    config_from_json,
    count_json_values,
    parse_json,
)
from smalti.core.errors import UserError
from smalti.core.hub.public_names import public_values
from smalti.core.provenance import command, versions

OPTIONAL = ("held_out_source",)
"""Attributes that a file has only if they are not empty."""
CAPTIONS_DIGEST = "captions_digest"
"""The name of the digest of all captions in the preprocessing of a set that has captions."""
MOST_REASONS = 1000
"""Images left out of a set whose reasons are recorded. Of others only the row is: the attribute must stay readable."""


def shortened(skipped: Iterable[dict[str, Any]]) -> tuple[dict[str, Any], ...]:
    """Returns images that were left out, with the reasons of the first `MOST_REASONS` only."""
    return tuple(image if number < MOST_REASONS else {"row": image["row"]} for number, image in enumerate(skipped))


@dataclass(frozen=True)
class Provenance:
    """The provenance of a latent set: what is needed to trust its codes and to decode them.

    Each field is stored as a root attribute of the same name.

    Attributes:
        tokenizer_kind: The registered kind of the tokenizer.
        tokenizer_config: The fields of its config, as JSON values.
        tokenizer_digest: SHA-256 over its kind, config and weights (`Checkpointed.digest`).
        tokenizer_source: The folder or hub id it was loaded from.
        image_source: The value of `--images`.
        image_fingerprint: A fingerprint that changes if the images change.
        preprocessing: What was done to the images before encoding, as JSON values without local folders, because the
            content digest covers them.
        label_names: The name of each label, from label 0 on; empty if the images have no labels.
        skipped: Images left out because they could not be decoded: `row` in the image source and, for the first
            `MOST_REASONS`, `reason`, in order.
        condition_source: The function or file that the conditions come from, with a digest; empty if there are none.
        held_out_source: The value of `--held-out` if it names other images; otherwise empty.
        command: The command line that made the set.
        created: UTC time of creation, ISO 8601.
        software: Versions of the software that made the set.
    """

    tokenizer_kind: str
    tokenizer_config: dict[str, Any]
    tokenizer_digest: str
    tokenizer_source: str
    image_source: str
    image_fingerprint: str
    preprocessing: dict[str, Any]
    label_names: tuple[str, ...] = ()
    skipped: tuple[dict[str, Any], ...] = ()
    condition_source: str = added(off="")
    held_out_source: str = added(off="")
    command: str = field(default_factory=command)
    created: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))
    software: dict[str, str] = field(default_factory=versions)

    def __post_init__(self) -> None:
        # A round trip through JSON turns tuples into lists, so that a provenance that is read equals the written one.
        for name in ("tokenizer_config", "preprocessing", "software"):
            object.__setattr__(self, name, json.loads(json.dumps(getattr(self, name))))

    def is_met_by(self, other: "Provenance") -> bool:
        """Returns whether another set has the same tokenizer, images and preprocessing, and therefore the same codes.

        It must also have the conditions of this one, if this one has any. Sets of former versions have local folders in
        their preprocessing, which are not compared.
        """
        same = ("tokenizer_digest", "image_fingerprint", "label_names")
        codes_are_equal = all(getattr(self, name) == getattr(other, name) for name in same)
        codes_are_equal &= public_values(self.preprocessing) == public_values(other.preprocessing)
        return codes_are_equal and self.condition_source in ("", other.condition_source)

    def is_rebuild_of(self, other: "Provenance | None") -> bool:
        """Returns whether two sets have the same tokenizer and images, either of which may have changed in place.

        A set without conditions or captions is no rebuild of one with them, which it would lose, unless that one
        already meets it.
        """
        same = (("tokenizer_digest", "tokenizer_source"), ("image_fingerprint", "image_source"))
        if other is None:
            return False
        loses_captions = CAPTIONS_DIGEST in other.preprocessing and CAPTIONS_DIGEST not in self.preprocessing
        if loses_captions or (other.condition_source and not self.condition_source):
            return self.is_met_by(other)
        return all(any(getattr(self, name) == getattr(other, name) for name in names) for names in same)

    def require_readable(self, path: Path, *, indexed: bool = False) -> None:
        """Refuses lists that are so long that the set at `path` could be written, but not read.

        Args:
            path: The set, for messages.
            indexed: Whether the index of a set of several files holds the lists too. They are JSON inside of JSON
                there, up to twice as long, beside an entry for each file. So they may take half of what is read.

        Raises:
            UserError: if there are too many label names or skipped images, or their text is too long.
        """
        remedies = {
            "label_names": ("classes", "choose another column with --label-column, or shorten their names"),
            "skipped": ("images that cannot be decoded", "remove them from the images"),
        }
        texts, share = self.to_attributes(), 2 if indexed else 1
        for name, (what, remedy) in remedies.items():
            size, values = len(texts[name].encode()), count_json_values(texts[name])
            most_bytes, most_values = LARGEST_JSON_BYTES // share, MOST_JSON_VALUES // share
            if size > most_bytes or values > most_values:
                taken = f"take {size} bytes and {values} commas and brackets as JSON"
                most = f"a latent set has at most {most_bytes} and {most_values}"
                raise UserError(f"{path}: its {len(getattr(self, name))} {what} {taken}, but {most}; {remedy}")

    def to_attributes(self) -> dict[str, str]:
        """Returns the attributes as text by name; values that are not text are encoded as JSON."""
        return {
            name: value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
            for name, value in vars(self).items()
            if value or name not in OPTIONAL
        }

    @classmethod
    def from_attributes(cls, texts: Mapping[str, str], source: str) -> "Provenance":
        """Inverts `to_attributes`. `source` is the file of the attributes, for messages.

        Raises:
            ValueError: if a text is not valid JSON, or of another type than its field.
            KeyError: if an attribute is missing.
        """
        described = [each for each in dataclasses.fields(cls) if each.name in texts or ADDED not in each.metadata]
        values = {
            each.name: texts[each.name] if each.type is str else parse_json(texts[each.name]) for each in described
        }
        return config_from_json(cls, values, source)
