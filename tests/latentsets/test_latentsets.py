"""The latent set's file: what is written is read, wholly or not at all. Not here: files that are refused."""

import hashlib
import json
import pickle
import re
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.latents import GRID, LEVELS, PROVENANCE, make_codes, make_columns, opened, small_set, write
from hypothesis import given, settings
from hypothesis import strategies as st

from smalti.core.codes import Layout, Level
from smalti.core.errors import UserError
from smalti.images.splits import held_out
from smalti.latentsets.format import number_sources
from smalti.latentsets.reader import LatentSet, perplexity, require_tokenizer
from smalti.latentsets.summary import describe
from smalti.latentsets.writer import LatentSetWriter


@settings(max_examples=25)
@given(
    levels=st.lists(st.sampled_from(LEVELS), min_size=1, max_size=3),
    rows=st.integers(2, 30),
    seed=st.integers(0, 2**16),
    data=st.data(),
)
def test_what_is_written_in_any_order_of_blocks_is_read(tmp_path_factory, levels, rows, seed, data):
    layout = Layout(tuple(levels))
    path = tmp_path_factory.mktemp("set") / "latents.h5"
    codes = make_codes(layout, rows, seed)
    cuts = data.draw(st.sets(st.integers(1, rows - 1)).map(lambda cuts: [0, *cuts]).flatmap(st.permutations))
    write(path, layout, codes, cuts)
    latent_set = LatentSet(path)
    asked = data.draw(st.lists(st.integers(0, rows - 1), min_size=1, max_size=20))
    for found, expected, level in zip(latent_set.batch(asked), codes, layout.levels, strict=True):
        assert found.dtype == (torch.float32 if level.channels else torch.int64)
        assert torch.equal(found, expected[asked])
    for name, expected in make_columns(rows).items():
        assert torch.equal(getattr(latent_set, name), expected)
    assert (len(latent_set), latent_set.layout, latent_set.provenance) == (rows, layout, PROVENANCE)
    latent_set.verify()
    one_block = path.with_name("one.h5")
    write(one_block, layout, codes, [0])
    assert LatentSet(one_block).content_digest == latent_set.content_digest


def test_the_digest_follows_from_the_documented_recipe(tmp_path):
    codes = small_set(tmp_path / "latents.h5")
    columns = {name: column.numpy() for name, column in make_columns(60).items()}
    parts = [
        b"codes/0 <u2 60 3 4\n" + codes[0].numpy().astype("<u2").tobytes(),
        b"labels <i8 60\n" + columns["labels"].tobytes(),
        b"source_ids <i8 60\n" + columns["source_ids"].tobytes(),
        b"held_out |u1 60\n" + columns["held_out"].tobytes(),
        b"flipped |u1 60\n" + columns["flipped"].tobytes(),
    ]
    assert LatentSet(tmp_path / "latents.h5").content_digest == hashlib.sha256(b"".join(parts)).hexdigest()


def test_the_documented_program_computes_the_digest(tmp_path, capsys):
    text = (Path(__file__).parents[2] / "docs" / "latent-format.md").read_text()
    small_set(tmp_path / "latents.h5")
    exec(text.split("```python\n")[1].split("```")[0].replace("runs/latents/hrvq.h5", str(tmp_path / "latents.h5")), {})
    assert capsys.readouterr().out == "True\n"


def test_plain_h5py_reads_everything(tmp_path):
    codes = small_set(tmp_path / "latents.h5")
    with opened(tmp_path / "latents.h5", "r") as file:
        stored = file["codes/0"]
        assert (stored.dtype, stored.chunks, stored.compression) == (np.uint16, None, None)
        assert np.array_equal(stored[:], codes[0].numpy())
        for name, column in make_columns(60).items():
            assert np.array_equal(file[name][:], column.numpy())
        assert file.attrs["tokenizer_digest"].decode() == PROVENANCE.tokenizer_digest
        assert json.loads(file.attrs["layout"])[0]["radices"] == [8, 8, 8]


def test_labels_names_and_configs_beyond_64_kib_are_kept(tmp_path):
    names = tuple(f"class {number:06d} ö" for number in range(22_000))
    provenance = replace(PROVENANCE, label_names=names, preprocessing={"x": "y" * 100_000})
    write(tmp_path / "latents.h5", GRID, make_codes(GRID, 4), [0], provenance)
    assert LatentSet(tmp_path / "latents.h5").provenance == provenance


@pytest.mark.parametrize("rows_per_image", [1, 2])
@pytest.mark.parametrize(("level", "rows"), [(Level(16, 16, (1024,)), 2_000), (Level(8, 8, (512,)), 8_000)])
def test_the_file_is_within_one_percent_of_its_codes(tmp_path, level, rows, rows_per_image):
    """With labels, a split drawn at random and provenance, of which a real set has some 4 KiB."""
    ids = torch.arange(rows) // rows_per_image
    provenance = replace(PROVENANCE, preprocessing={"some": "x" * 2000})
    columns = {"labels": ids * 100 // rows, "source_ids": ids, "held_out": held_out(ids)}
    path, layout = tmp_path / "latents.h5", Layout((level,))
    flipped = torch.arange(rows) % rows_per_image == 1
    with LatentSetWriter(path, layout, **columns, flipped=flipped, provenance=provenance) as writer:
        writer.write(0, make_codes(layout, rows))
    codes_bytes = rows * level.positions * level.dtype.itemsize
    assert codes_bytes < path.stat().st_size < 1.01 * codes_bytes


@pytest.mark.parametrize(
    ("start", "codes", "message"),
    [
        (0, [512], "level 0 holds codes from 0 to 511"),
        (0, [65536], "level 0 holds codes from 0 to 511"),
        (0, [-1], "level 0 holds codes from 0 to 511"),
        (3, [0], "row 3 was already written"),
        (59, [0, 0], "rows 59 to 60 do not fit a latent set of 60"),
        (-1, [0], "rows -1 to -1 do not fit a latent set of 60"),
    ],
)
def test_wrong_blocks_are_refused_and_leave_no_trace(tmp_path, start, codes, message):
    grid = torch.tensor(codes).view(-1, 1, 1).expand(-1, 3, 4)

    def write_both() -> None:
        with LatentSetWriter(tmp_path / "latents.h5", GRID, **make_columns(60), provenance=PROVENANCE) as writer:
            writer.write(2, make_codes(GRID, 2))
            writer.write(start, (grid,))

    with pytest.raises(UserError, match=message):
        write_both()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("labels", [0, -2, 0, 0], "-2 is no label: they are -1 for none, or from 0 to 1"),
        ("labels", [0, 1, 2, 0], "2 is no label"),
        ("source_ids", [0, 0, 2, 2], "source ids are not 0, 1, ... in order of first appearance"),
        ("source_ids", [1, 1, 0, 0], "source ids are not 0, 1, ..."),
        ("source_ids", [-1, 0, 1, 1], "source ids are not 0, 1, ..."),
        ("held_out", [0, 1, 0, 0], "rows of one source image are on both sides"),
    ],
)
def test_columns_that_contradict_each_other_are_refused(tmp_path, name, values, message):
    names = {"label_names": ("cat", "dog")}
    columns = {**make_columns(4), "labels": torch.tensor([0, 1, -1, 0]), "held_out": torch.zeros(4, dtype=torch.bool)}
    columns[name] = torch.tensor(values).to(columns[name].dtype)
    with pytest.raises(UserError, match=f"latents.h5 was not written: {re.escape(message)}"):
        LatentSetWriter(tmp_path / "latents.h5", GRID, **columns, provenance=replace(PROVENANCE, **names))


@given(ids=st.lists(st.integers(-5, 5), max_size=30))
def test_sources_are_numbered_in_order_of_first_appearance(ids):
    first = list(dict.fromkeys(ids))
    assert number_sources(np.array(ids, np.int64)).tolist() == [first.index(source) for source in ids]


def test_missing_rows_are_refused(tmp_path):
    writer = LatentSetWriter(tmp_path / "latents.h5", GRID, **make_columns(60), provenance=PROVENANCE)
    with pytest.raises(UserError, match="row 10 and 49 others were never written"), writer as entered:
        entered.write(0, make_codes(GRID, 10))
    with pytest.raises(UserError, match="0 rows would be empty"):
        LatentSetWriter(tmp_path / "latents.h5", GRID, **make_columns(0), provenance=PROVENANCE)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, RuntimeError])
def test_an_interrupted_writer_leaves_the_target_as_it_was(tmp_path, interruption):
    small_set(tmp_path / "latents.h5")
    before = (tmp_path / "latents.h5").read_bytes()

    def write_half() -> None:
        with LatentSetWriter(tmp_path / "latents.h5", GRID, **make_columns(10), provenance=PROVENANCE) as writer:
            writer.write(0, make_codes(GRID, 5))
            assert (tmp_path / "latents.h5").read_bytes() == before
            raise interruption

    with pytest.raises(interruption):
        write_half()
    assert (tmp_path / "latents.h5").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["latents.h5"]


@contextmanager
def file_size_limit(limit_bytes: int) -> Iterator[None]:
    """The kernel refuses larger files, as it refuses writes to a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("reserves", [True, False])
@pytest.mark.parametrize("limit_bytes", [4096, 40_000, 1_128_576, 1_210_000])
def test_a_full_disk_is_one_line_and_the_target_stays(tmp_path, monkeypatch, reserves, limit_bytes):
    if not reserves:
        monkeypatch.delattr("os.posix_fallocate", raising=False)
    small_set(tmp_path / "latents.h5")
    before = (tmp_path / "latents.h5").read_bytes()
    codes = make_codes(GRID, 50_000)
    with file_size_limit(limit_bytes), pytest.raises(UserError, match=r"^no room for .*latents.h5") as caught:
        write(tmp_path / "latents.h5", GRID, codes, [0, 10_000, 20_000, 40_000])
    assert "\n" not in str(caught.value)
    assert (tmp_path / "latents.h5").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["latents.h5"]


def test_a_set_replaced_behind_the_reader_is_noticed(tmp_path):
    codes = small_set(tmp_path / "latents.h5")
    latent_set = LatentSet(tmp_path / "latents.h5")
    pickled = pickle.dumps(latent_set)
    assert torch.equal(pickle.loads(pickled).batch([3, 1])[0], codes[0][[3, 1]])
    write(tmp_path / "latents.h5", GRID, make_codes(GRID, 70, seed=1), [0])
    assert torch.equal(latent_set.batch([3, 1])[0], codes[0][[3, 1]])  # the old file lives on while it is mapped
    for read_again in (lambda: pickle.loads(pickled), latent_set.verify):
        with pytest.raises(UserError, match="was replaced by another latent set"):
            read_again()


def test_rows_outside_the_set_are_refused(tmp_path):
    small_set(tmp_path / "latents.h5")
    with pytest.raises(IndexError):
        LatentSet(tmp_path / "latents.h5").batch([60])


def test_usage_counts_every_prefix(tmp_path, monkeypatch):
    monkeypatch.setattr("smalti.latentsets.reader.BLOCK_VALUES", 100)  # several blocks
    codes = small_set(tmp_path / "latents.h5")[0]
    latent_set = LatentSet(tmp_path / "latents.h5")
    for digits in (1, 2, 3):
        prefixes = codes // 8 ** (3 - digits)
        expected = [(prefixes == code).sum().item() for code in range(8**digits)]
        assert latent_set.usage(0, digits).tolist() == expected
        frequencies = np.array(expected)[np.array(expected) > 0] / codes.numel()
        entropy_bits = -sum(p * np.log2(p) for p in frequencies)
        assert latent_set.perplexity(0, digits) == pytest.approx(2**entropy_bits)
    assert torch.equal(latent_set.usage(), latent_set.usage(0, 3))
    for digits in (0, 4):
        with pytest.raises(UserError, match=f"has 3 digits; {digits} cannot be counted"):
            latent_set.usage(0, digits)


@settings(max_examples=30)
@given(counts=st.lists(st.integers(0, 50), min_size=1, max_size=20).filter(any))
def test_perplexity_lies_between_one_and_the_codes_in_use(counts):
    found = perplexity(torch.tensor(counts))
    assert 1 - 1e-9 <= found <= np.count_nonzero(counts) + 1e-9
    assert perplexity(torch.full((len(counts),), 3)) == pytest.approx(len(counts))


def test_another_tokenizer_is_refused(tmp_path):
    small_set(tmp_path / "latents.h5")
    latent_set = LatentSet(tmp_path / "latents.h5")
    require_tokenizer(latent_set, PROVENANCE.tokenizer_digest)
    with pytest.raises(UserError, match=r"tokenizer abababababab .* the one at hand is cdcdcdcdcdcd") as caught:
        require_tokenizer(latent_set, "cd" * 32)
    assert "\n" not in str(caught.value)


def test_describe_tells_what_the_set_is(tmp_path):
    layout = Layout((Level(1, 2, channels=3), Level(2, 2, (2, 3))))
    codes = (torch.zeros(4, 3, 1, 2), torch.tensor([0, 1, 2, 2]).view(4, 1, 1).expand(4, 2, 2))
    skipped = ({"row": 1, "reason": "a.png is empty"}, {"row": 7, "reason": "b.png is no image"})
    provenance = replace(PROVENANCE, label_names=("cat", "dog", "emu"), skipped=skipped)
    write(tmp_path / "latents.h5", layout, codes, [0], provenance)
    text = describe(LatentSet(tmp_path / "latents.h5"))
    for expected in (
        "4, 1×2 of 3 floats + 2×2 of 2·3",
        "2 source images, 2 rows are mirror images, 2 rows are held out",
        "3 classes (rows of each: cat 1, dog 1, emu 1), 1 rows without",
        "2 images that could not be decoded: a.png is empty; b.png is no image",
        "emoji, fingerprint f00d",
        "hrvq from runs/tokenizers/hrvq, digest " + "ab" * 32,
        "first digit     1 of 2 used (50.0%), perplexity 1.0",
        f"first 2 digits  3 of 6 used (50.0%), perplexity {2**1.5:.1f}",
        LatentSet(tmp_path / "latents.h5").content_digest,
        provenance.created,
        "h5py",
    ):
        assert expected in text
