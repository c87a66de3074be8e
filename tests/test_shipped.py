"""The models in the package are what their card says."""

import re
from importlib.resources import files
from pathlib import Path

import pytest
import torch

from smalti import load_tokenizer, open_images
from smalti.images.decoding import to_float
from smalti.images.image_set import ImageRows
from smalti.metrics.image_errors import mse

CODES_OF_THE_FIRST_HELD_OUT_IMAGE = [
    1821,
    3150,
    1933,
    2610,
    225,
    3220,
    1884,
    1821,
    1884,
    3155,
    3941,
    219,
    213,
    2993,
    3083,
    2039,
    3151,
    4095,
    215,
    220,
    132,
    233,
    3311,
    1817,
    3151,
    4090,
    209,
    2731,
    1219,
    221,
    2956,
    2040,
    1810,
    3208,
    1264,
    2685,
    2579,
    2579,
    3149,
    1817,
    1810,
    3180,
    10,
    233,
    46,
    10,
    3284,
    1810,
    1821,
    3110,
    901,
    173,
    901,
    141,
    3285,
    1821,
    3167,
    4091,
    464,
    2518,
    2444,
    2250,
    3311,
    3140,
]


@torch.no_grad()
def test_portraits_tokenizer_has_the_error_and_the_codes_of_its_card():
    tokenizer = load_tokenizer("portraits")
    held_out = ImageRows(open_images("portraits"), split="held_out", flips=False)
    batches = to_float(held_out.__getitems__(range(len(held_out)))["images"]).split(128)
    codes = [tokenizer.encode(images) for images in batches]
    errors = [mse(tokenizer.decode(each), images) for each, images in zip(codes, batches, strict=True)]
    card = (files("smalti") / "shipped/portraits/README.md").read_text()
    stated = float(card.split("| held-out MSE | ")[1].split()[0])
    assert float(torch.cat(errors).mean()) == pytest.approx(stated, rel=0.02)
    first = codes[0][0][0].flatten().tolist()
    equal = sum(a == b for a, b in zip(first, CODES_OF_THE_FIRST_HELD_OUT_IMAGE, strict=True))
    assert equal >= 63  # another machine may round a near tie the other way
    assert tokenizer.digest().startswith("ecae85abd9ed")


def test_models_in_the_package_name_no_folder_of_a_machine():
    for path in Path(str(files("smalti"))).glob("shipped/**/*.json"):
        assert not re.search(r'"/', path.read_text()), "an absolute path"
