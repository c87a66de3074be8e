"""Latent sets with random crops: which rows there are, whose codes they hold, and what is refused."""

import numpy as np
import pytest
import torch
from helpers.build_toys import CONDITIONS, FLAGS, one_thread, run, write_inputs

from smalti.images.decoding import to_float
from smalti.images.image_set import open_images
from smalti.images.splits import held_out
from smalti.latentsets.reader import LatentSet
from smalti.tokenizers.vq.hrvq import HRVQ


@pytest.fixture
def workspace(tmp_path, monkeypatch):
    write_inputs(tmp_path, count=40)
    (tmp_path / "img" / "0003.png").write_text("no image")
    monkeypatch.chdir(tmp_path)
    with one_thread():
        yield tmp_path


def test_many_crops_are_encoded_in_batches_and_files_have_room_for_them(workspace, capfd, monkeypatch):
    flags = [*FLAGS, "--on-bad-image", "skip", "--crops", "12"]
    assert run(capfd, *flags, "--out", "whole.h5", "--batch-size", "32")[0] == 0
    sizes, encode = [], HRVQ.encode
    monkeypatch.setattr(HRVQ, "encode", lambda self, images: sizes.append(len(images)) or encode(self, images))
    assert run(capfd, *flags, "--out", "parts.h5", "--batch-size", "8")[0] == 0
    assert max(sizes) == 8
    assert LatentSet("parts.h5").content_digest == LatentSet("whole.h5").content_digest
    status, _, err = run(capfd, *flags, "--out", "set", "--batch-size", "8", "--shard-rows", "20")
    assert (status, "an image has 26 rows, so --shard-rows must be at least as many" in err) == (2, True)


@pytest.mark.parametrize("count", [2, None])
@pytest.mark.parametrize("flips", [True, False])
def test_training_images_have_crops_and_held_out_images_have_none(workspace, capfd, flips, count):
    more = [*CONDITIONS, "--on-bad-image", "skip", *(() if flips else ("--no-flips",))]
    status, _, error = run(capfd, *FLAGS, "--out", "crops.h5", *(("--crops", "2") if count else ("--ten-crop",)), *more)
    assert status == 0, error
    latents, images = LatentSet("crops.h5"), open_images("img", height=8, width=8)
    assert latents.provenance.preprocessing.get("crops") == count
    assert ("ten_crop_side" in latents.provenance.preprocessing) == (count is None)
    out, tokenizer, expected = held_out(images.source_ids), HRVQ.load("tokenizer"), []
    for number in range(len(images)):
        if number != 3:
            pixels = images.pixels([number])
            if not out[number]:
                pixels = torch.cat([pixels, images.crops([number], count)[0]])
            rows = [row for each in to_float(pixels) for row in ((each, each.flip(-1)) if flips else (each,))]
            expected.append((rows, bool(out[number])))
    codes = torch.cat([tokenizer.encode(row[None])[0] for rows, _ in expected for row in rows])
    assert np.array_equal(latents.read(0, range(len(latents))), codes)
    assert latents.held_out.tolist() == [held for rows, held in expected for _ in rows]
    assert latents.flipped.tolist() == [bool(flips and n % 2) for rows, _ in expected for n in range(len(rows))]
    vectors = [
        rows[0].mean((1, 2)) / 2 + 0.5 for rows, _ in expected for _ in rows
    ]  # of the image that is not mirrored
    assert torch.allclose(latents.vectors(range(len(latents))), torch.stack(vectors), atol=1e-3)
    numbers = [int(images.source_ids[n]) for n in range(len(images)) if n != 3]
    shared = [numbers[image] for image, (rows, _) in enumerate(expected) for _ in rows]
    same = np.array(shared)[:, None] == np.array(shared)
    assert np.array_equal(same, latents.source_ids[:, None].numpy() == latents.source_ids.numpy())


def test_crops_that_cannot_be_made_are_refused_in_one_line(workspace, capfd):
    for flags, message in (
        (("--crops", "-1"), "--crops must be from 0 to 1000"),
        (("--crops", "1", "--fit", "pad"), "white borders"),
        (("--ten-crop", "--fit", "pad"), "white borders"),
        (("--ten-crop", "--crops", "1"), "--crops and --ten-crop are two choices of crops; leave one out"),
    ):
        status, _, error = run(capfd, *FLAGS, "--out", "crops.h5", "--on-bad-image", "skip", *flags)
        assert status == 2
        assert message in error.splitlines()[-1]
