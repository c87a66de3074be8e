"""Parts of the cards of models and latent sets: YAML front matter, tables, and names in Markdown."""

import re
from collections.abc import Mapping
from typing import Any

import yaml

from smalti.core.errors import UserError, printable

CARD_NAME = "README.md"
MOST_CLASSES = 24
"""Names of classes in a card."""
_LICENSE = re.compile(r"[a-z0-9][a-z0-9.+-]*")


def require_license(license: str | None) -> None:
    """Refuses a licence that is not written as the hub writes it.

    Raises:
        UserError: naming examples.
    """
    if license is not None and not _LICENSE.fullmatch(license):
        raise UserError(f"--license {license} is not a name such as mit, apache-2.0, cc-by-4.0, cc0-1.0 or other")


def front_matter(license: str | None, **fields: Any) -> str:
    """Returns the YAML between two lines `---` that the hub reads a card's licence and tags from."""
    licensed = {"license": license} if license is not None else {}
    return f"---\n{yaml.safe_dump({**licensed, **fields}, sort_keys=False, allow_unicode=True)}---\n"


def table(rows: Mapping[str, str]) -> str:
    """Returns a Markdown table of two columns, without titles."""
    lines = [f"| {title} | {value} |" for title, value in rows.items() if value]
    return "\n".join(["| | |", "|---|---|", *lines])


def code(text: str) -> str:
    """Returns a name from a file as code in Markdown, on one line, also in a table's cell."""
    plain = printable(text).replace("|", "¦")
    return f"`` {plain} ``" if "`" in plain else f"`{plain}`"


def listed(names: list[str]) -> str:
    """Returns names of classes as code, up to a number."""
    more = f" and {len(names) - MOST_CLASSES} more" if len(names) > MOST_CLASSES else ""
    return ", ".join(map(code, names[:MOST_CLASSES])) + more


def license_line(license: str | None, what: str) -> str:
    """Returns the card's sentence about the licence."""
    return f"Licence of the {what}: {code(license)}." if license else f"No licence of the {what} is given."
