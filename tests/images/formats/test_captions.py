"""Captions of images: the `.txt` in shards, or a column of any table; the same ones in whatever container."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers.build_toys import one_thread, run, save_tokenizer
from helpers.container_toys import labelled_images, write_files, write_tar

from smalti.core.errors import UserError
from smalti.images.image_set import open_images
from smalti.latentsets.reader import LatentSet

FILES = {f"{number}.png": content for number, content in enumerate(labelled_images().values())}
TEXTS = [f"caption é {number}" if number != 3 else "" for number in range(len(FILES))]
SIZE = {"height": 8, "width": 8}


def shards(folder: Path, *, suffix: str = "txt") -> str:
    samples = {}
    for (name, content), text in zip(FILES.items(), TEXTS, strict=True):
        samples[name] = content
        fields = json.dumps({"text": text, "label": "x"})
        if text:
            samples[name.replace("png", suffix)] = (text + "\n" if suffix == "txt" else fields).encode()
        samples[name.replace("png", "cls")] = b"7"
    return str(write_tar(folder / "x.tar", samples))


def parquet(folder: Path) -> str:
    texts = {"text": [text or None for text in TEXTS], "many": [[text] for text in TEXTS]}
    pq.write_table(pa.table({"image": [*FILES.values()], **texts}), folder / "x.parquet")
    return str(folder / "x.parquet")


def listed(folder: Path, name: str) -> str:
    rows = [json.dumps({"file_name": file, "text": text}) for file, text in zip(FILES, TEXTS, strict=True)]
    write_files(folder, {**FILES, name: "\n".join(rows).encode()})
    return str(folder / name) if name == "list.jsonl" else str(folder)


SOURCES = {
    "txt in shards": (shards, None),
    "json in shards": (lambda folder: shards(folder, suffix="json"), "text"),
    "parquet": (parquet, "text"),
    "list": (lambda folder: listed(folder, "list.jsonl"), "text"),
    "metadata": (lambda folder: listed(folder, "metadata.jsonl"), "text"),
}


@pytest.mark.parametrize("source", SOURCES)
def test_captions_are_those_of_the_images_in_their_order(source, tmp_path):
    write, column = SOURCES[source]
    name = write(tmp_path)
    images = open_images(name, caption_column=column, **SIZE)
    by_content = dict(zip(FILES.values(), TEXTS, strict=True))
    sources = open_images(name, **SIZE).source_ids  # files are in the order of their names: 0, 1, 10, 11, 2, ...
    order = [*FILES.values()] if source in ("parquet", "list") else [FILES[file] for file in sorted(FILES)]
    assert images.captions() == [by_content[content] for content in order]
    assert images.source_ids.equal(sources)
    assert images.preprocessing.get("caption_column") == column


def test_captions_need_a_column_and_are_no_labels(tmp_path):
    name = shards(tmp_path)
    assert open_images(name, label_column="txt", **SIZE).captions() is None
    assert open_images("portraits", limit=2).captions() is None
    with pytest.raises(UserError, match=r"has no column 'text' for captions; its columns are 'cls', 'txt'"):
        open_images(name, caption_column="text", **SIZE)
    assert open_images(parquet(tmp_path), **SIZE).captions() is None
    with pytest.raises(UserError, match=r"column 'many' of .* holds List.*; captions are strings"):
        open_images(parquet(tmp_path), caption_column="many", **SIZE)


def test_a_latent_set_keeps_the_captions_of_kept_images_and_notices_new_ones(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    save_tokenizer(tmp_path / "tokenizer")
    flags = ["--tokenizer", "tokenizer", "--images", shards(tmp_path), "--workers", "0", "--device", "cpu"]
    with one_thread():
        status, out, error = run(capfd, *flags, "--out", "latents.h5")
        assert status == 0, error
        assert "22 of 24 rows have one" in out
        latents = LatentSet("latents.h5")
        assert latents.captions(range(24)) == [TEXTS[int(Path(file).stem)] for file in sorted(FILES) for _ in range(2)]
        assert "already holds these codes" in run(capfd, *flags, "--out", "latents.h5")[1]
        status, _, error = run(capfd, *flags, "--label-column", "txt", "--out", "latents.h5")  # so without captions
        assert (status, "--overwrite" in error) == (2, True)
        assert LatentSet("latents.h5").content_digest == latents.content_digest
        monkeypatch.setitem(globals(), "TEXTS", [*TEXTS[:-1], "another"])
        shards(tmp_path)
        assert run(capfd, *flags, "--out", "latents.h5")[0] == 0
    assert "another" in LatentSet("latents.h5").captions(range(24))
    assert LatentSet("latents.h5").content_digest != latents.content_digest
