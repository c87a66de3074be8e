"""The text summary of a latent set."""

from dataclasses import replace

import pytest
import torch
from helpers.latents import PROVENANCE, write

from smalti.core.codes import Layout, Level
from smalti.latentsets.reader import LatentSet
from smalti.latentsets.summary import describe, size_text


def test_summary_states_provenance_contents_and_usage(tmp_path):
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


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0 bytes"), (1023, "1023 bytes"), (3000, "2.9 KiB"), (2**22, "4.0 MiB")],
)
def test_no_size_is_rounded_to_zero(size, text):
    assert size_text(size) == text
