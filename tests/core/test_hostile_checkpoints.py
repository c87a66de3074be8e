"""Checkpoint folders that mean harm: absurd sizes, wrong types, headers that contradict their file."""

import dataclasses
import json
import os
import struct
import time
from pathlib import Path

import pytest
import torch
from helpers import toys
from safetensors.torch import load_file, save_file

from smalti.core import models
from smalti.core.checkpoint_checks import read_header
from smalti.core.config import config_from_json
from smalti.core.errors import UserError
from smalti.core.models import CONFIG_NAME, WEIGHTS_NAME, load
from smalti.tokenizers.vqgan.readers.diffusers import to_diffusers
from smalti.tokenizers.vqgan.vqgan import VQGAN, VQGANConfig

WRONG = (10**6, 2**40, 50000, 0, -1, True, "x", "\x1b[2J", None, 0.5, [], [10**9, 10**9], {"a": 1})


def saved(kind: str, family: str, folder: Path) -> dict:
    torch.manual_seed(0)
    models.class_of_kind(family, kind)(toys.TINY[kind]).save(folder)
    return json.loads((folder / CONFIG_NAME).read_text())


def refusal(folder: Path, family: str) -> str:
    start = time.process_time()
    with pytest.raises(UserError) as caught:
        load(folder, family)
    assert time.process_time() - start < 5
    assert str(caught.value).isprintable()
    return str(caught.value)


@pytest.mark.parametrize(("family", "kind"), toys.KINDS, ids=[kind for _, kind in toys.KINDS])
def test_every_wrong_value_of_every_config_field_is_one_line(family, kind, tmp_path):
    described = saved(kind, family, tmp_path)
    for field in described["config"]:
        for value in WRONG:
            config = {**described["config"], field: value}
            if config == described["config"]:
                continue
            (tmp_path / CONFIG_NAME).write_text(json.dumps({**described, "config": config}))
            refusal(tmp_path, family)
    for field in described:
        for value in (None, 1, [], "x", {"a": 1}):
            if field in ("smalti", "provenance"):
                continue
            (tmp_path / CONFIG_NAME).write_text(json.dumps({**described, field: value}))
            refusal(tmp_path, family)


def test_network_of_a_million_layers_is_refused_before_it_is_built(tmp_path):
    described = saved("hrvq", "tokenizer", tmp_path)
    for blocks, message in ((10**6, "size 1000000, larger"), (60000, "larger network than model.safetensors holds")):
        described["config"]["residual_blocks"] = blocks
        (tmp_path / CONFIG_NAME).write_text(json.dumps(described))
        assert message in refusal(tmp_path, "tokenizer")


def test_json_that_is_deep_long_or_not_finite_is_one_line(tmp_path):
    saved("hrvq", "tokenizer", tmp_path)
    for text in ("[" * 10**5, "9" * 5000, '{"a": NaN}', '{"a": 1e999}', " " * (1 << 25), '{"a": "\\ud800"}'):
        (tmp_path / CONFIG_NAME).write_text(text)
        assert "is not JSON" in refusal(tmp_path, "tokenizer")


def test_nan_weights_are_refused_by_name(tmp_path):
    saved("hrvq", "tokenizer", tmp_path)
    weights = load_file(tmp_path / WEIGHTS_NAME)
    name = next(iter(weights))
    weights[name].view(-1)[0] = float("nan")
    save_file(weights, tmp_path / WEIGHTS_NAME)
    assert f"has NaN in {name}" in refusal(tmp_path, "tokenizer")


def test_other_dtype_is_refused(tmp_path):
    saved("hrvq", "tokenizer", tmp_path)
    weights = {name: tensor.bfloat16() for name, tensor in load_file(tmp_path / WEIGHTS_NAME).items()}
    save_file(weights, tmp_path / WEIGHTS_NAME)
    assert "is torch.bfloat16, the config asks for torch.float32" in refusal(tmp_path, "tokenizer")


@pytest.mark.parametrize(
    "header",
    [
        b"[1]",
        b"{",
        b"[" * 10**5,
        b'{"a": 1}',
        b'{"a": {"dtype": "F32", "shape": [1e9], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "F32", "shape": [1099511627775, 1099511627775], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "F99", "shape": [1], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "F32", "shape": [' + b",".join([b"1"] * 10000) + b'], "data_offsets": [0, 4]}}',
    ],
)
def test_header_that_contradicts_its_file_is_refused(header, tmp_path):
    saved("hrvq", "tokenizer", tmp_path)
    (tmp_path / WEIGHTS_NAME).write_bytes(struct.pack("<Q", len(header)) + header + bytes(4))
    assert "damaged" in refusal(tmp_path, "tokenizer")
    (tmp_path / WEIGHTS_NAME).write_bytes(struct.pack("<Q", 2**62) + header)
    assert "damaged" in refusal(tmp_path, "tokenizer")


def test_unreadable_files_are_not_called_damaged(tmp_path, monkeypatch):
    saved("hrvq", "tokenizer", tmp_path)
    plain_open = Path.open
    for locked in (WEIGHTS_NAME, CONFIG_NAME):

        def refuse(path: Path, *arguments, name: str = locked, **options):
            if path.name == name:
                raise PermissionError(13, "Permission denied", str(path))
            return plain_open(path, *arguments, **options)

        monkeypatch.setattr(Path, "open", refuse)
        message = refusal(tmp_path, "tokenizer")
        assert "Permission denied" in message
        assert "damaged" not in message


@pytest.mark.parametrize("name", [WEIGHTS_NAME, CONFIG_NAME])
def test_named_pipes_are_refused_instead_of_waited_for(name, tmp_path):
    saved("hrvq", "tokenizer", tmp_path)
    (tmp_path / name).unlink()
    os.mkfifo(tmp_path / name)
    assert f"{name} is not a regular file" in refusal(tmp_path, "tokenizer")


@pytest.mark.parametrize(("field", "value"), [("height", 0), ("width", -4), ("height", -8), ("norm_groups", -2)])
def test_impossible_sizes_are_refused_though_the_digest_is_right(field, value, tmp_path):
    """Found by fuzzing: such models were loaded, and encoding ended in a traceback."""
    for kind in ("vqgan",) if field == "norm_groups" else ("hrvq", "selfvae", "hqa"):
        described = saved(kind, "tokenizer", tmp_path)
        described["config"][field] = value
        config_class = models.class_of_kind("tokenizer", kind).config_class
        config = config_from_json(config_class, described["config"], "")
        described["digest"] = models.digest(kind, config, load_file(tmp_path / WEIGHTS_NAME))
        (tmp_path / CONFIG_NAME).write_text(json.dumps(described))
        assert ("--norm-groups" if field == "norm_groups" else "have no pixels") in refusal(tmp_path, "tokenizer")


@pytest.mark.parametrize(("mask", "permissions"), [(0o022, 0o644), (0o027, 0o640), (0o002, 0o664)])
def test_saved_files_follow_the_umask(mask, permissions, tmp_path):
    before = os.umask(mask)
    try:
        saved("vqgan", "tokenizer", tmp_path)
        to_diffusers(VQGAN(VQGANConfig(widths=(32,))), tmp_path / "diffusers")
    finally:
        os.umask(before)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {path.stat().st_mode & 0o777 for path in files} == {permissions}
    assert len(files) == 4


def test_names_of_any_length_are_one_line(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for source in ("n" * 300, "n" * 5000, "a\0b", "", "n/" * 3000):
        with pytest.raises(UserError, match=r"no checkpoint at|is not a smalti checkpoint") as caught:
            load(source, "prior")
        assert str(caught.value).isprintable()
        assert len(str(caught.value)) < 1100


def test_header_is_read_without_the_weights(tmp_path):
    saved("hrvq", "tokenizer", tmp_path)
    header, weights = read_header(tmp_path / WEIGHTS_NAME), load_file(tmp_path / WEIGHTS_NAME)
    assert {name: (each.shape, each.dtype) for name, each in header.items()} == {
        name: (tuple(tensor.shape), tensor.dtype) for name, tensor in weights.items()
    }
    assert dataclasses.is_dataclass(next(iter(header.values())))
