"""Latent sets on the hub, against a local fake: the content digest survives, and local folders do not."""

import dataclasses
import shutil

import pytest
import torch
import yaml
from helpers import fake_hub
from helpers.latents import GRID, LEVELS, PROVENANCE, extended_set, make_codes, make_columns, small_set, write

from smalti.core.codes import Layout
from smalti.core.errors import UserError
from smalti.latentsets.copies import copy_set
from smalti.latentsets.dataset import LatentRows
from smalti.latentsets.hdf5.sharded import write_index
from smalti.latentsets.reader import LatentSet
from smalti.latentsets.writer import LatentSetWriter

LOCAL = dataclasses.replace(
    PROVENANCE,
    tokenizer_source="/home/jane/tokenizer",
    image_source="/home/jane/photos",
    command="build_latents.py --tokenizer /home/jane/tokenizer --images /home/jane/photos",
    label_names=("a", "b", "c", "d"),
    preprocessing={"height": 32, "width": 32, "crops": 2, "smallest_crop": 0.8},
)


@pytest.fixture
def hub(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with fake_hub.in_use(monkeypatch, tmp_path / "cache") as served:
        yield served


def error_of(source):
    return fake_hub.error_of(LatentSet, source)


def test_a_pushed_set_opens_by_its_id(hub, tmp_path):
    codes = make_codes(GRID, 60)
    written = dataclasses.replace(PROVENANCE, command="build_latents.py --images emoji")
    write(tmp_path / "codes.h5", GRID, codes, [0], written)
    latents = LatentSet("codes.h5")
    address = f"{hub.endpoint}/datasets/me/codes"
    assert latents.push_to_hub("me/codes") == address
    assert latents.push_to_hub("me/codes@v1", private=False, message="Again") == f"{address}/tree/v1"
    assert hub.repos["datasets/me/codes"].files()["codes.h5"] == (tmp_path / "codes.h5").read_bytes()
    for source in ("me/codes", "me/codes@v1", "me/codes@main/codes.h5"):
        opened = LatentSet(source)
        opened.verify()
        assert opened.content_digest == latents.content_digest
        assert opened.batch(range(60))[0].equal(codes[0])
        assert len(LatentRows(opened, split="train")) == 40


def test_the_uploaded_copy_has_no_local_folders_and_the_same_digest(hub, tmp_path):
    layout = Layout((GRID.levels[0], LEVELS[-1]))
    write(tmp_path / "codes.h5", layout, make_codes(layout, 60), [0], LOCAL)
    latents = LatentSet("codes.h5")
    latents.push_to_hub("me/codes", tokenizer="me/tokenizer")
    files = hub.repos["datasets/me/codes"].files()
    assert not any(b"home" in contents or b"jane" in contents for contents in files.values())
    opened = LatentSet("me/codes")
    opened.verify()
    assert opened.content_digest == latents.content_digest == opened.digest()
    assert (opened.provenance.image_source, opened.provenance.tokenizer_source) == ("photos", "me/tokenizer")
    assert opened.provenance.command == "build_latents.py --tokenizer tokenizer --images photos"
    assert opened.provenance.created == latents.provenance.created
    assert LatentSet("codes.h5").provenance == latents.provenance
    skipped = dataclasses.replace(LOCAL, skipped=({"row": 1, "reason": "/home/jane/photos/1.png is empty"},))
    write(tmp_path / "skipped.h5", GRID, make_codes(GRID, 60), [0], skipped)
    with pytest.raises(UserError, match=r"records local folders .* in skipped, and its digest"):
        LatentSet("skipped.h5").push_to_hub("me/skipped")
    assert "datasets/me/skipped" not in hub.repos
    held_out = dataclasses.replace(LOCAL, preprocessing={"held_out": "/home/jane/client/test"})
    write(tmp_path / "held_out.h5", GRID, make_codes(GRID, 60), [0], held_out)
    with pytest.raises(UserError, match="in preprocessing, and its digest covers that"):
        LatentSet("held_out.h5").push_to_hub("me/held-out")
    assert "datasets/me/held-out" not in hub.repos


def test_the_sources_of_vectors_and_held_out_images_have_no_local_folders(hub, tmp_path):
    extended_set(tmp_path / "codes.h5")
    latents = LatentSet("codes.h5")
    sources = {"held_out_source": "/home/jane/client/test", "condition_source": "clients/jane/clip.npy, SHA-256 f00d"}
    copy_set(latents, dataclasses.replace(latents.provenance, **sources), tmp_path / "copy.h5")
    LatentSet("copy.h5").push_to_hub("me/codes")
    files = hub.repos["datasets/me/codes"].files()
    assert not any(b"home" in contents or b"jane" in contents for contents in files.values())
    assert "| vectors | 5 numbers for each row, from `clip.npy, SHA-256 f00d` |" in files["README.md"].decode()
    opened = LatentSet("me/codes")
    opened.verify()
    assert opened.content_digest == latents.content_digest
    assert opened.provenance.held_out_source == "test"


def test_the_card_says_which_crops_a_set_has(hub, tmp_path):
    preprocessing = {"height": 32, "width": 32, "ten_crop_side": 0.875}
    write(
        tmp_path / "codes.h5", GRID, make_codes(GRID, 60), [0], dataclasses.replace(LOCAL, preprocessing=preprocessing)
    )
    LatentSet("codes.h5").push_to_hub("me/codes", license="cc0-1.0", tokenizer="me/tokenizer")
    card = hub.repos["datasets/me/codes"].files()["README.md"].decode()
    assert "| crops | the corners and the centre of each training image, of 88% of its side |" in card


def test_the_card_of_a_set(hub, tmp_path):
    write(tmp_path / "codes.h5", GRID, make_codes(GRID, 60), [0], LOCAL)
    latents = LatentSet("codes.h5")
    latents.push_to_hub("me/codes", license="cc0-1.0", tokenizer="me/tokenizer")
    card = hub.repos["datasets/me/codes"].files()["README.md"].decode()
    front = yaml.safe_load(card.split("---\n")[1])
    assert front == {"license": "cc0-1.0", "tags": ["smalti", "latent-set", "hdf5"], "size_categories": ["n<1K"]}
    parts = [
        'latents = LatentSet("me/codes")',
        "smalti train-prior --latents me/codes --tokenizer me/tokenizer",
        'hf_hub_download("me/codes", "codes.h5", repo_type="dataset")',
        "| rows | 60, of which 20 are held out |",
        "| images | `photos`: 20 to train, 10 held out |",
        "by `smalti build-latents --tokenizer tokenizer --images photos` |",
        "| flips | 30 rows are mirror images |",
        "| crops | 2 random crop(s) of each training image, of 80% of its side at least |",
        "| classes | 4: `a`, `b`, `c`, `d`; 12 rows have none |",
        "| layout of the codes | 3×4 of 8·8·8 |",
        latents.content_digest,
        PROVENANCE.tokenizer_digest,
        f"| {latents.perplexity():,.1f} |",
        "Licence of the codes: `cc0-1.0`.",
    ]
    assert [part for part in parts if part not in card] == []


def write_shards(folder, count):
    """Writes a set of several files again."""
    shutil.rmtree(folder, ignore_errors=True)
    for number in range(count):
        columns = {**make_columns(12), "source_numbers": 6 * number + torch.arange(6)}
        with LatentSetWriter(folder / f"{number:05}.h5", GRID, **columns, provenance=LOCAL) as writer:
            writer.write(0, make_codes(GRID, 12, number))
    write_index(folder)
    return LatentSet(folder)


def test_a_set_pushed_again_replaces_all_files_of_a_set_of_several_files(hub, tmp_path):
    write_shards(tmp_path / "set", 3).push_to_hub("me/codes")
    files = hub.repos["datasets/me/codes"].files()
    assert sorted(files) == ["00000.h5", "00001.h5", "00002.h5", "README.md", "index.json"]
    files |= {"notes.txt": b"a person's own", "more/00002.h5": files["00002.h5"]}
    fewer = write_shards(tmp_path / "set", 2)
    fewer.push_to_hub("me/codes")
    own = ["more/00002.h5", "notes.txt"]
    files = hub.repos["datasets/me/codes"].files()
    assert sorted(files) == sorted(["00000.h5", "00001.h5", "README.md", "index.json", *own])
    assert LatentSet("me/codes").content_digest == fewer.content_digest
    write(tmp_path / "codes.h5", GRID, make_codes(GRID, 60), [0], LOCAL)
    before = dict(hub.repos["datasets/me/codes"].files())
    with pytest.raises(UserError, match=r"cannot be read beside another latent set \(00000\.h5 is there\)"):
        LatentSet("codes.h5").push_to_hub("me/codes")
    assert hub.repos["datasets/me/codes"].files() == before


def test_another_latent_set_in_the_repository_stays(hub, tmp_path):
    for name in ("train.h5", "test.h5"):
        write(tmp_path / name, GRID, make_codes(GRID, 60), [0], LOCAL)
        LatentSet(name).push_to_hub("me/codes")
    before = dict(hub.repos["datasets/me/codes"].files())
    assert {"train.h5", "test.h5"} < before.keys()
    with pytest.raises(UserError, match=r"cannot be read beside another latent set \(test\.h5 is there\); remove that"):
        write_shards(tmp_path / "set", 2).push_to_hub("me/codes")
    assert hub.repos["datasets/me/codes"].files() == before


def test_damaged_sets_stay_here(hub, tmp_path):
    small_set(tmp_path / "codes.h5")
    latents = LatentSet("codes.h5")
    stored = bytearray((tmp_path / "codes.h5").read_bytes())
    stored[latents.files.extents[0].offsets[0] + 5] ^= 1
    (tmp_path / "codes.h5").write_bytes(stored)
    with pytest.raises(UserError, match=r"codes\.h5 is damaged"):
        latents.push_to_hub("me/codes")
    assert hub.requests == []


def test_data_sets_that_name_no_set_are_one_line(hub, tmp_path):
    small_set(tmp_path / "codes.h5")
    LatentSet("codes.h5").push_to_hub("me/codes")
    files = hub.repos["datasets/me/codes"].files()
    files["more/other.h5"] = files["codes.h5"]
    choice = "me/codes has several latent sets; give one of me/codes@main/codes.h5, me/codes@main/more/other.h5"
    assert choice in error_of("me/codes")
    assert LatentSet("me/codes@main/more/other.h5").path.name == "other.h5"
    hub.repos["datasets/me/empty"] = fake_hub.Repo()
    assert "me/empty is no latent set: it lacks a file *.h5; check the name" in error_of("me/empty")
    assert "there is no latent set at me/none: there is no such file, and on the hub:" in error_of("me/none")
    assert "me/codes has no revision v9" in error_of("me/codes@v9")
    asked = len(hub.requests)
    for path in ("my/photos.h5", "runs/latents/photos.h5", "/tmp/nothing/x", "codes.hdf5", "a/b/c"):
        assert "there is no latent set at" in error_of(path)
    assert len(hub.requests) == asked


def test_a_set_of_any_file_name_can_be_opened_by_its_id(hub, tmp_path):
    for file in ("codes", "codes.json"):
        write(tmp_path / file, GRID, make_codes(GRID, 60), [0])
        latents = LatentSet(file)
        latents.push_to_hub(f"me/{file}")
        assert LatentSet(f"me/{file}").content_digest == latents.content_digest
        card = hub.repos[f"datasets/me/{file}"].files()["README.md"].decode()
        assert f'hf_hub_download("me/{file}", "{file}.h5", repo_type="dataset")' in card
