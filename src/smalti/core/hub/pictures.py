"""Pictures in shared files: without the texts that are embedded in them, such as the settings with local paths."""

from collections.abc import Iterator

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_TEXTS = (b"tEXt", b"zTXt", b"iTXt", b"eXIf")
"""The types of the chunks of a PNG that hold texts."""
_AROUND_CONTENTS_BYTES = 12
"""Bytes of a chunk besides its contents: length, type and checksum, four each."""


def without_texts(picture: bytes) -> bytes:
    """Returns a PNG without its embedded texts; every other chunk, and any other file, stays byte for byte."""
    return picture if not picture.startswith(PNG_SIGNATURE) else PNG_SIGNATURE + b"".join(_kept_chunks(picture))


def _kept_chunks(png: bytes) -> Iterator[bytes]:
    start = len(PNG_SIGNATURE)
    while start < len(png):
        end = start + _AROUND_CONTENTS_BYTES + int.from_bytes(png[start : start + 4])
        if png[start + 4 : start + 8] not in _TEXTS:
            yield png[start:end]
        start = end
