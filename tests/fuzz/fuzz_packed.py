"""Fuzzes the files of packed codes that `compress` writes, through `decompress`.

$ python tests/fuzz/fuzz_packed.py --seconds 60 --seed 0
"""

import json
import random
import sys
from functools import cache
from hashlib import sha256
from pathlib import Path
from shutil import rmtree
from typing import Any

import torch
from fuzzing import edit_json, json_value, main, mutate

from smalti.commands.compress import Decompress, decompress
from smalti.core.codes import Layout, Level
from smalti.latentsets.packed_file import ENTROPY_MAGIC, MAGIC, OLD_MAGIC, read_codes, write_codes
from smalti.tokenizers.base import Tokenizer
from smalti.tokenizers.vq.hrvq import HRVQ, HRVQConfig

sys.path.insert(0, str(Path(__file__).parents[1]))
from helpers.toys import TINY

LAYOUTS = (
    None,
    Layout((Level(1, 1, (2,)),)),
    Layout((Level(2, 3, (2**31 - 1,)), Level(3, 5, (3, 7)))),
)


@cache
def tokenizer(folder: Path) -> Tokenizer:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = TINY["hrvq"]
    assert isinstance(config, HRVQConfig)
    saved = HRVQ(config)
    saved.init_from_data(torch.rand(16, 3, config.height, config.width) * 2 - 1)
    saved.eval().save(folder / "tokenizer")
    return saved


@cache
def packed(folder: Path, index: int) -> tuple[dict[str, Any], bytes]:
    """Returns the header and the codes of a valid file."""
    made_by = tokenizer(folder)
    layout, path = LAYOUTS[index] or made_by.layout, folder / "valid.smalti"
    codes = tuple(torch.randint(level.codebook_size, (3, *level.shape)) for level in layout.levels)
    write_codes(path, codes, layout, {"tokenizer_kind": "hrvq", "tokenizer_digest": made_by.digest(), "layer": None})
    line, _, payload = path.read_bytes().partition(b"\n")
    return json.loads(line[len(MAGIC) :]), payload


def make(rng: random.Random, folder: Path) -> Path:
    header, payload = packed(folder, rng.randrange(len(LAYOUTS)))
    magic = rng.choice((MAGIC, MAGIC, OLD_MAGIC, ENTROPY_MAGIC))
    changes = rng.sample(("header", "payload", "bytes", "images"), rng.randint(1, 2))
    edited: Any = {name: value for name, value in header.items() if name != "sha256"}
    if magic == ENTROPY_MAGIC:
        edited |= {"payload_bytes": len(payload), "codes_sha256": "00" * 32, "prior_digests": ["00" * 32]}
    if "header" in changes:
        edited = edit_json(edited, rng)
        edited = edited if isinstance(edited, dict) else {"layout": json_value(rng)}
    if "images" in changes:
        edited["images"] = rng.choice((-1, 0, 1, 2, 10**6, 10**18, 2**63 - 1, True, "3", 3.0))
    if "payload" in changes:
        payload = mutate(payload, rng)
    valid = sha256(payload if magic == OLD_MAGIC else json.dumps(edited, sort_keys=True).encode() + b"\n" + payload)
    edited["sha256"] = valid.hexdigest() if rng.random() < 0.9 else json_value(rng)
    content = magic + json.dumps(edited).encode() + b"\n" + payload
    path = folder / "case.smalti"
    path.write_bytes(mutate(content, rng) if "bytes" in changes else content)
    return path


def read(path: Path) -> None:
    read_codes(path, lambda _: None)
    folder, out = path.parent, path.parent / "out"
    rmtree(out, ignore_errors=True)
    decompress(Decompress(path, tokenizer=str(folder / "tokenizer"), device="cpu", out=out))


if __name__ == "__main__":
    main(make, read)
