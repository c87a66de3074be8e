"""Random access to the files inside tar and zip archives, local or at an `fsspec` URL, by an index built once.

The index of an archive is kept beside what `datasets` caches, under the archive's size and time of change.
Nothing is ever unpacked to disk. Images and labels are selected from the members in `sources.py`.
"""

import hashlib
import json
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import pairwise
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
from datasets.config import HF_DATASETS_CACHE
from fsspec.core import url_to_fs

from smalti.core.errors import UserError, one_line
from smalti.core.files import whole_file
from smalti.core.progress import SLOW_SECONDS, bar
from smalti.images.formats.opening import BadImageError, UnreadableImageError, refuse_expansion
from smalti.images.names import METADATA, is_image_file

_RECIPE = "smalti 1"  # change it whenever the index of an archive has other content
_SIDECARS = {".cls", ".json", ".txt"}
"""Suffixes of the files beside an image in a WebDataset shard that may hold its label."""
_LONGEST_SIDECAR, _LONGEST_METADATA = 2**16, 2**28
"""Bytes of a text that an index holds."""
_ENCRYPTED = 1  # flag of a zip member
_LOCAL_HEADER = struct.Struct("<4s5H3I2H")  # of a zip member: the data follow it, its name and an extra field
_DAMAGED = (OSError, ValueError, EOFError, LookupError, struct.error, zlib.error, tarfile.TarError, zipfile.BadZipFile)
_MARK = "member:"


class Member(NamedTuple):
    """A file inside an archive.

    Attributes:
        archive: the path or URL of the archive.
        name: the file's path in the archive.
        start: the first byte of its data in a tar, of its header in a zip.
        stored: number of bytes in the archive.
        size: number of bytes after decompression.
        method: of compression, as zip numbers it; None in a tar.
        checksum: CRC-32 of the decompressed bytes; None in a tar.
    """

    archive: str
    name: str
    start: int
    stored: int
    size: int
    method: int | None
    checksum: int | None

    def to_path(self) -> str:
        """Returns the member as text, which takes the place of a path in a table of images."""
        return _MARK + json.dumps(self, ensure_ascii=False)


class Text(NamedTuple):
    """A small text in an archive: a label beside an image, or a file of metadata."""

    name: str
    text: str


class Index(NamedTuple):
    """The files in an archive that matter for a set of images, sorted by name, and the number of other files."""

    members: list[Member]
    texts: list[Text]


def member_of(path: str) -> Member | None:
    """Returns the member that `Member.to_path` gave as text; None for the path of a file."""
    if not path.startswith(_MARK):
        return None
    try:
        member = Member(*json.loads(path.removeprefix(_MARK)))
    except (ValueError, TypeError):  # the name of a file, or a table that anyone may have written
        return None
    valid = isinstance(member.archive, str) and isinstance(member.name, str)
    return member if valid and all(type(number) is int and number >= 0 for number in member[2:5]) else None


def suffix_of(archive: str) -> str:
    """Returns the suffix of an archive's path, or of its URL without a query, in lower case."""
    return PurePosixPath(archive.split("?", 1)[0] if "://" in archive else archive).suffix.lower()


def shown_path(path: str) -> str:
    """Returns the path of an image for the user: that of its archive and its path in it, or that of its file."""
    member = member_of(path)
    return path if member is None else f"{member.archive}/{member.name}"


def read_member(member: Member) -> bytes:
    """Reads one file of an archive, without reading the rest.

    Raises:
        UnreadableImageError: if the archive cannot be read, or the member is damaged, is encrypted, is compressed by a
            method other than deflate, or would expand to far more bytes than the archive holds.
    """
    if member.method is not None:
        refuse_expansion(member.size, member.stored)
    try:
        filesystem, path = url_to_fs(member.archive)
        start = member.start
        if member.method is not None:
            header = filesystem.cat_file(path, start=start, end=start + _LOCAL_HEADER.size)
            fields = _LOCAL_HEADER.unpack(header)
            if fields[2] & _ENCRYPTED:
                raise UnreadableImageError("it is encrypted; write the archive without a password")
            start += _LOCAL_HEADER.size + fields[-2] + fields[-1]
        data = filesystem.cat_file(path, start=start, end=start + member.stored) if member.stored else b""
    except UnreadableImageError:
        raise
    except (OSError, ValueError, struct.error) as error:
        raise UnreadableImageError(f"the archive cannot be read ({one_line(error)}); repair or remove it") from error
    if member.method not in (None, zipfile.ZIP_STORED):
        data = _inflated(data, member)
    if len(data) != member.size or (member.checksum is not None and zlib.crc32(data) != member.checksum):
        raise UnreadableImageError("it is damaged in its archive; repair or remove it")
    return data


def _inflated(data: bytes, member: Member) -> bytes:
    if member.method != zipfile.ZIP_DEFLATED:
        raise UnreadableImageError(
            f"its compression (method {member.method}) is not read; write the archive with deflate"
        )
    try:
        return zlib.decompressobj(-zlib.MAX_WBITS).decompress(data, member.size + 1)
    except zlib.error as error:
        raise UnreadableImageError(f"it is damaged in its archive ({error}); repair or remove it") from error


def index_of(archive: str) -> Index:
    """Returns the index of a tar or zip archive, from the cache if the archive has not changed.

    Raises:
        UserError: if the archive cannot be read, is damaged, or holds two files of one name.
    """
    kept = _kept_path(archive)
    index = _load(kept)
    if index is None:
        index = _build(archive)
        with suppress(OSError):  # no room: the next command builds it again
            kept.parent.mkdir(parents=True, exist_ok=True)
            _save(index, kept)
    return index


def stamp(archive: str) -> str:
    """Returns a stamp that changes with an archive's content, as far as its file system says.

    Raises:
        UserError: if the archive is not there, or the file system of its URL is not installed.
    """
    with _named(archive):
        filesystem, path = url_to_fs(archive)
        found = filesystem.info(path)
        known = ("size", "mtime", "ino", "ETag", "etag", "LastModified", "last_modified", "created", "version_id")
        return json.dumps({key: str(found[key]) for key in known if found.get(key) is not None})


def _build(archive: str) -> Index:
    with _named(archive):
        filesystem, path = url_to_fs(archive)
        with filesystem.open(path, "rb") as file:
            read_pairs = _zip_pairs if suffix_of(archive) == ".zip" else _tar_pairs
            pairs = sorted(read_pairs(archive, file), key=lambda pair: pair[0].name)
    for (member, _), (following, _) in pairwise(pairs):
        if member.name == following.name:
            raise UserError(f"{archive} holds two files called {member.name}; give each a name of its own")
    texts = [Text(member.name, text) for member, text in pairs if text is not None]
    return Index([member for member, _ in pairs], texts)


def _tar_pairs(archive: str, file: Any) -> list[tuple[Member, str | None]]:
    pairs, links = list[tuple[Member, str | None]](), list[tuple[str, str]]()
    with tarfile.open(fileobj=file, mode="r:") as tar, _progress(archive) as progress:
        for each in tar:
            tar.members.clear()  # pyright: ignore[reportAttributeAccessIssue] - it would keep every header in memory
            progress.update()
            if not (name := _shown_name(each.name)) or each.isdir():
                continue
            if each.islnk():
                links.append((name, _shown_name(each.linkname) or ""))
            elif each.issym() and is_image_file(PurePosixPath(name)):
                raise UserError(f"{archive} holds {name} as a symbolic link; write the archive with --dereference")
            elif each.isreg() and not each.issparse():
                text = None
                if each.size <= _longest_text(name):
                    file.seek(each.offset_data)
                    text = _text(archive, name, file.read(each.size))
                pairs.append((Member(archive, name, each.offset_data, each.size, each.size, None, None), text))
    targets = {member.name: (member, text) for member, text in pairs} if links else {}
    for name, target in links:  # the second and later names of one file
        if target in targets:
            member, text = targets[target]
            pairs.append((member._replace(name=name), text))
    return pairs


def _zip_pairs(archive: str, file: Any) -> list[tuple[Member, str | None]]:
    pairs = []
    with zipfile.ZipFile(file) as opened, _progress(archive) as progress:
        for each in opened.infolist():
            progress.update()
            if each.is_dir() or not (name := _shown_name(each.filename)):
                continue
            fields = (each.header_offset, each.compress_size, each.file_size, each.compress_type, each.CRC)
            member = Member(archive, name, *fields)
            text = None
            if each.file_size <= _longest_text(name):
                try:
                    text = _text(archive, name, read_member(member))
                except BadImageError as error:
                    raise UserError(f"{archive}/{name}: {error}") from error
            pairs.append((member, text))
    return pairs


def _shown_name(name: str) -> str | None:
    """Returns a member's name without `./`; None for hidden files, as in folders, and names that are not UTF-8."""
    parts = [part for part in PurePosixPath(name).parts if part not in (".", "/")]
    hidden = not parts or any(part.startswith(".") or part == "__MACOSX" for part in parts)
    return None if hidden or any("\ud800" <= letter <= "\udfff" for letter in name) else "/".join(parts)


def _longest_text(name: str) -> int:
    """Returns the largest size, in bytes, of a file whose text belongs into the index; -1 for any other file."""
    path = PurePosixPath(name)
    if path.name.lower() in METADATA:
        return _LONGEST_METADATA
    return _LONGEST_SIDECAR if path.suffix.lower() in _SIDECARS else -1


def _text(archive: str, name: str, encoded: bytes) -> str:
    try:
        return encoded.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{archive}/{name} is not text in UTF-8; convert or remove it") from error


def _progress(archive: str) -> Any:
    return bar(what=f"indexing {PurePosixPath(archive).name}", total=None, unit="file", delay_seconds=SLOW_SECONDS)


@contextmanager
def _named(archive: str) -> Iterator[None]:
    """Turns errors of an archive or of its file system into one line with the archive's name."""
    try:
        yield
    except UserError:
        raise
    except FileNotFoundError as error:
        raise UserError(f"there is no {archive}; check the name") from error
    except (*_DAMAGED, ImportError, NotImplementedError) as error:  # no package for the URL; an unknown kind of zip
        raise UserError(
            f"{archive} cannot be opened ({one_line(error)}); give a whole, uncompressed tar or a zip"
        ) from error


def _kept_path(archive: str) -> Path:
    name = hashlib.sha256(f"{_RECIPE} {archive} {stamp(archive)}".encode()).hexdigest()[:32]
    return Path(HF_DATASETS_CACHE) / "smalti-archives" / f"{name}.parquet"


def _save(index: Index, kept: Path) -> None:
    texts = dict(index.texts)
    columns: dict[str, Sequence[Any]] = {
        field: [getattr(member, field) for member in index.members] for field in Member._fields
    }
    table = pa.table({**columns, "text": [texts.get(member.name) for member in index.members]}, schema=_SCHEMA)
    with whole_file(kept) as partial:
        pq.write_table(table, partial)


_SCHEMA = pa.schema(
    {
        **dict.fromkeys(("archive", "name"), pa.string()),
        **dict.fromkeys(("start", "stored", "size", "method", "checksum"), pa.int64()),
        "text": pa.large_string(),
    }
)


def _load(kept: Path) -> Index | None:
    """Returns a kept index; None if there is none, or it cannot be read."""
    try:
        rows = pq.read_table(kept, schema=_SCHEMA).to_pylist()
    except (OSError, ValueError):
        return None
    texts = [Text(row["name"], row["text"]) for row in rows if row["text"] is not None]
    return Index([Member(*(row[field] for field in Member._fields)) for row in rows], texts)
