"""Writes one set of images in every container that smalti reads."""

import csv
import io
import json
import tarfile
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

CLASSES = ("cat", "dog")


def write_tar(path: Path, files: Mapping[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def write_zip(path: Path, files: Mapping[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def write_files(folder: Path, files: Mapping[str, bytes]) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def labelled_images(count: int = 12, size: int = 8, seed: int = 0) -> dict[str, bytes]:
    """Returns encoded images of random pixels by name, in folders of two classes; the names are sorted."""
    random = np.random.default_rng(seed)
    files = {}
    for number in range(count):
        file = io.BytesIO()
        Image.fromarray(random.integers(0, 256, (size, size, 3), dtype=np.uint8)).save(file, "PNG")
        files[f"{CLASSES[number * 2 // count]}/{number:03}.png"] = file.getvalue()
    return files


def _label(name: str) -> str:
    return name.split("/")[0]


def _flat(files: Mapping[str, bytes]) -> dict[str, bytes]:
    return {Path(name).name: content for name, content in files.items()}


def _with_sidecars(files: Mapping[str, bytes], suffix: str) -> dict[str, bytes]:
    """Returns samples in the layout of WebDataset, in the order of their writing: image, then label."""
    samples = {}
    for name, content in files.items():
        samples[Path(name).name] = content
        label = _label(name) if suffix == "cls" else json.dumps({"label": _label(name), "width": 8})
        samples[f"{Path(name).stem}.{suffix}"] = label.encode()
    return samples


def _shards(folder: Path, files: Mapping[str, bytes]) -> str:
    names = list(files)
    for number in range(3):
        part = {name: files[name] for name in names[number * len(names) // 3 : (number + 1) * len(names) // 3]}
        write_tar(folder / f"shards-{number:04}.tar", _with_sidecars(part, "cls"))
    return f"{folder}/shards-{{0000..0002}}.tar"


def _table(columns: list[str], rows: list[tuple[str, ...]]) -> bytes:
    text = io.StringIO()
    csv.writer(text).writerows([columns, *rows])
    return text.getvalue().encode()


def _csv_list(folder: Path, files: Mapping[str, bytes]) -> str:
    write_files(folder / "in", _flat(files))
    rows = [(f"in/{Path(name).name}", _label(name), "x") for name in files]
    write_files(folder, {"list.csv": _table(["path", "label", "other"], rows)})
    return str(folder / "list.csv")


def _metadata_csv(folder: Path, files: Mapping[str, bytes]) -> str:
    rows = [(Path(name).name, _label(name)) for name in reversed(files)]
    return str(write_files(folder, {**_flat(files), "metadata.csv": _table(["file_name", "label"], rows)}))


def _metadata_jsonl(folder: Path, files: Mapping[str, bytes]) -> str:
    rows = [json.dumps({"file_name": Path(name).name, "label": _label(name)}) for name in files]
    return str(write_zip(folder / "x.zip", {**_flat(files), "metadata.jsonl": "\n".join(rows).encode()}))


def _text_list(folder: Path, files: Mapping[str, bytes]) -> str:
    write_files(folder, files)
    return str(write_files(folder, {"list.txt": "\n".join(files).encode()}) / "list.txt")


def _parquet(folder: Path, files: Mapping[str, bytes]) -> str:
    folder.mkdir(parents=True)
    pq.write_table(pa.table({"image": [*files.values()], "label": [*map(_label, files)]}), folder / "x.parquet")
    return str(folder / "x.parquet")


CONTAINERS: dict[str, Callable[[Path, Mapping[str, bytes]], str]] = {
    "folder": lambda folder, files: str(write_files(folder, files)),
    "parquet": _parquet,
    "tar": lambda folder, files: str(write_tar(folder / "x.tar", files)),
    "tar of the folder": lambda folder, files: str(
        write_tar(folder / "pets.tar", {f"./pets/{name}": content for name, content in reversed(files.items())})
    ),
    "webdataset": lambda folder, files: str(write_tar(folder / "x.tar", _with_sidecars(files, "cls"))),
    "webdataset with json": lambda folder, files: str(write_tar(folder / "x.tar", _with_sidecars(files, "json"))),
    "shards": _shards,
    "zip": lambda folder, files: str(write_zip(folder / "x.zip", files)),
    "stored zip": lambda folder, files: str(write_zip(folder / "x.zip", files, zipfile.ZIP_STORED)),
    "metadata.csv": _metadata_csv,
    "metadata.jsonl in a zip": _metadata_jsonl,
    "csv list": _csv_list,
    "text list": _text_list,
}
"""Writers of images in folders of classes, by container; each returns the source that names it."""
