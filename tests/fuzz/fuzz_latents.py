"""Fuzzes latent sets: their HDF5 structure, attributes and bytes, and tables made from them.

$ python tests/fuzz/fuzz_latents.py --seconds 60 --seed 0

Sets are written in HDF5's newest format, whose checksums are corrected after a change, and in its oldest, which has
none.
"""

import json
import math
import random
import sys
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from fuzzing import edit_json, integer, json_value, main, mutate

from smalti.core.codes import Layout, Level
from smalti.latentsets.dataset import LatentRows
from smalti.latentsets.hdf5.format import COLUMNS
from smalti.latentsets.reader import LatentSet
from smalti.latentsets.summary import describe

sys.path.insert(0, str(Path(__file__).parents[1]))
from helpers.latents import make_codes, write

ROWS = 24
MOST_VALUES = 10**5
"""Size of the data sets that are changed further."""
LAYOUTS = (
    Layout((Level(3, 4, (8, 8, 8)),)),
    Layout((Level(2, 2, (200,)), Level(4, 4, (41, 41, 41)))),
    Layout((Level(2, 3, channels=2),)),
)
SUPERBLOCK_BYTES = 44
"""The size of the newest format's first structure, without its checksum."""


@cache
def valid(folder: Path, index: int, oldest: bool) -> bytes:
    """Returns a valid set, as this program writes it or copied to the oldest file format of HDF5."""
    path, copy = folder / "valid.h5", folder / "oldest.h5"
    write(path, LAYOUTS[index], make_codes(LAYOUTS[index], ROWS), [0])
    if oldest:
        with h5py.File(path) as source, h5py.File(copy, "w", libver="earliest") as target:
            for name in source:
                source.copy(name, target)
            for name, value in source.attrs.items():
                target.attrs.create(name, value, dtype=source.attrs.get_id(name).dtype)
    return (copy if oldest else path).read_bytes()


def lookup3(content: bytes) -> int:
    """Returns the checksum of HDF5's metadata: Bob Jenkins' hash `lookup3`."""
    mask = 0xFFFFFFFF

    def turn(value: int, bits: int) -> int:
        return (value << bits | value >> (32 - bits)) & mask

    a = b = c = (0xDEADBEEF + len(content)) & mask
    if not content:
        return c
    padded = content + bytes(-len(content) % 12)
    words = np.frombuffer(padded, "<u4").tolist()
    for start in range(0, len(words), 3):
        a, b, c = (x + y & mask for x, y in zip((a, b, c), words[start : start + 3], strict=True))
        if start + 3 < len(words):
            for bits in (4, 6, 8, 16, 19, 4):
                a = (a - c & mask) ^ turn(c, bits)
                c = c + b & mask
                a, b, c = b, c, a
        else:
            for bits in (14, 11, 25, 16, 4, 14, 24):
                c = (c ^ b) - turn(b, bits) & mask
                a, b, c = b, c, a
            a, b, c = c, a, b
    return c


def checksummed(content: bytes) -> list[tuple[int, int]]:
    """Returns where the structures that a checksum follows begin and end: the superblock and the object headers."""
    if content[8] != 3:
        return []
    found, start = [(0, SUPERBLOCK_BYTES)], content.find(b"OHDR")
    while start >= 0:
        flags = content[start + 5]
        at, size = start + 6 + 16 * bool(flags & 0x20) + 4 * bool(flags & 0x10), 1 << (flags & 3)
        end = at + size + int.from_bytes(content[at : at + size], "little")
        if lookup3(content[start:end]) == int.from_bytes(content[end : end + 4], "little"):
            found.append((start, end))
        start = content.find(b"OHDR", start + 1)
    return found


def change_bytes(content: bytes, rng: random.Random) -> bytes:
    """Returns a set with changed bytes, mostly in HDF5's own structures, whose checksums are corrected."""
    structures = checksummed(content)
    if rng.random() < 0.2 or not structures:
        return mutate(content, rng, most=rng.choice((1, 4, 20)))
    changed = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 6))):
        start, end = rng.choice(structures)
        position, size = rng.randrange(start + 4, end), rng.choice((1, 1, 2, 4, 8))
        if rng.random() < 0.5:
            changed[position] ^= 1 << rng.randrange(8)
        else:
            size = min(size, end - position)
            changed[position : position + size] = integer(rng, size).to_bytes(size, "little")
    for start, end in structures:
        changed[end : end + 4] = lookup3(bytes(changed[start:end])).to_bytes(4, "little")
    return bytes(changed)


def change_attribute(file: Any, rng: random.Random) -> None:
    name = rng.choice(list(file.attrs))
    value = file.attrs[name]
    del file.attrs[name]
    text = value.decode(errors="replace") if isinstance(value, bytes) else str(value)
    kind = rng.choice(("json", "json", "json", "text", "bytes", "number", "array", "empty", "gone"))
    if kind == "json":
        try:
            edited = edit_json(json.loads(text), rng)
        except ValueError:
            edited = json_value(rng)
        encoded = json.dumps(edited, ensure_ascii=rng.random() < 0.5).encode(errors="surrogatepass")
        if rng.random() < 0.1:
            encoded = mutate(encoded, rng)
        if len(encoded) < 60000:
            file.attrs.create(name, encoded, dtype=h5py.string_dtype("utf-8", max(1, len(encoded))))
    elif kind in ("text", "bytes"):
        encoded = mutate(text.encode(), rng)
        file.attrs[name] = encoded.replace(b"\0", b"") if kind == "text" else np.frombuffer(encoded[:60000], "u1")
    elif kind == "number":
        file.attrs[name] = rng.choice((0, 1, 2, 3, -1, 2**63 - 1, 2.0, float("nan"), True))
    elif kind == "array":
        file.attrs[name] = np.array([value] * rng.randint(0, 3))
    elif kind == "empty":
        file.attrs[name] = h5py.Empty(rng.choice(("i8", "S5", "f4")))


def change_dataset(file: Any, rng: random.Random) -> None:
    name = rng.choice([*COLUMNS, "codes/0", "codes/0"])
    shape, dtype = file[name].shape, file[name].dtype
    if math.prod(shape) > MOST_VALUES:
        return
    values = file[name][:]
    kind = rng.choice(("values", "values", "shape", "dtype", "storage", "link", "rows", "gone"))
    if kind == "values":
        raw = bytearray(values.tobytes())
        size = values.dtype.itemsize
        for _ in range(rng.choice((1, 5))):
            place = rng.randrange(values.size) * size
            raw[place : place + size] = integer(rng, size).to_bytes(size, "little")
        file[name][...] = np.frombuffer(bytes(raw), dtype).reshape(shape)
        return
    if kind == "rows":
        rows = rng.choice((0, 1, 10**6, 2 * 10**9, 2**40))
        for each in (*COLUMNS, "codes/0"):
            rest, dtype = file[each].shape[1:], file[each].dtype
            del file[each]
            chunks = (rng.choice((64, 1 << 20, 1 << 24)),) if each in COLUMNS else None
            if rows < 10**7 or chunks:
                file.create_dataset(
                    each, (rows, *rest), dtype, chunks=rows and chunks, maxshape=(None, *rest) if chunks else None
                )
        return
    del file[name]
    if kind == "shape":
        wrong = (
            [*shape, rng.randint(0, 3)]
            if rng.random() < 0.5
            else [rng.choice((0, 1, side, 2 * side)) for side in shape]
        )
        file.create_dataset(name, tuple(wrong), dtype)
    elif kind == "dtype":
        compound = np.dtype([("a", "i4"), ("b", "S3")])
        kinds: tuple[Any, ...] = (
            "i1",
            "u2",
            ">i8",
            "f8",
            "S4",
            "c8",
            "?",
            compound,
            h5py.string_dtype(),
            h5py.ref_dtype,
            h5py.vlen_dtype("i4"),
        )
        file.create_dataset(name, shape, rng.choice(kinds))
    elif kind == "storage":
        options: tuple[dict[str, Any], ...] = (
            {"compression": "gzip"},
            {"compression": "lzf"},
            {"fletcher32": True},
            {"scaleoffset": 3},
            {"shuffle": True},
            {"chunks": tuple(max(1, side) for side in shape), "maxshape": (None,) * len(shape)},
            {"external": [("case.h5", rng.randrange(2000), h5py.h5f.UNLIMITED)]},
        )
        option = rng.choice(options)
        file.create_dataset(name, shape, dtype, **option)
        if "external" not in option:
            file[name][...] = values
    elif kind == "link":
        file[name] = rng.choice(
            (h5py.SoftLink("/labels"), h5py.SoftLink(f"/{name}"), h5py.ExternalLink("valid.h5", name))
        )


UNEDITABLE = (KeyError, OSError, ValueError, TypeError, RuntimeError, MemoryError)
"""The exceptions of h5py when an earlier change prevents another."""
CHANGES: tuple[Callable[[Any, random.Random], None], ...] = (change_attribute, change_dataset)


def make(rng: random.Random, folder: Path) -> Path:
    path = folder / "case.h5"
    content = valid(folder, rng.randrange(len(LAYOUTS)), rng.random() < 0.4)
    if rng.random() < 0.5:
        path.write_bytes(content)
        with suppress(*UNEDITABLE), h5py.File(path, "r+") as file:
            for _ in range(rng.choice((1, 1, 2))):
                rng.choice(CHANGES)(file, rng)
        content = path.read_bytes()
    if rng.random() < 0.6:
        content = change_bytes(content, rng)
    path.write_bytes(content)
    return path


def read(path: Path) -> None:
    latent_set = LatentSet(path)
    describe(latent_set)
    for level in range(len(latent_set.layout.levels)):
        rows = LatentRows(latent_set, split="all", level=level)
        rows.__getitems__([0, len(rows) - 1])
        rows.to("cpu")
    latent_set.verify()


if __name__ == "__main__":
    main(make, read)
