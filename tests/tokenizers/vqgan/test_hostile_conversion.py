"""Checkpoints to convert that mean harm: one line each, without running code or allocating what they declare."""

import io
import json
import os
import pickle
import resource
import time
import zipfile
from pathlib import Path

import pytest
import torch
import yaml
from fuzz.fuzz_checkpoints import CONFIG, WEIGHTS, diffusers, header_of, taming, with_header
from safetensors.torch import load, save

from smalti.core.errors import UserError
from smalti.tokenizers.vqgan.convert import import_checkpoint

WRONG = (None, -1, 0, 10**6, 2**40, 10**30, True, "x", 0.5, [], [10**9], [10**6] * 2, {"a": 1})


def refusal(folder: Path, description, weights: bytes | None, kind: str = "taming") -> str:
    """Writes a checkpoint and returns the error of importing it."""
    text = description if isinstance(description, bytes) else json.dumps(description).encode()
    names = ("a.yaml", "a.ckpt") if kind == "taming" else (CONFIG, WEIGHTS)
    for name, content in zip(names, (text, weights), strict=True):
        (folder / name).unlink(missing_ok=True)
        if content is not None:
            (folder / name).write_bytes(content)
    start, peak = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(UserError) as caught:
        import_checkpoint(folder / "a.ckpt" if kind == "taming" else folder)
    assert (
        time.process_time() - start < 10
    )  # an alias bomb or a declared size takes minutes; the first import two seconds
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 500 * 1024
    message = str(caught.value)
    assert message.isprintable()
    assert "weights_only" not in message
    return message


def test_untouched_checkpoints_are_imported(tmp_path):
    description, weights = taming()
    (tmp_path / "a.yaml").write_text(yaml.safe_dump(description))
    (tmp_path / "a.ckpt").write_bytes(weights)
    (tmp_path / CONFIG).write_text(json.dumps(diffusers()[0]))
    (tmp_path / WEIGHTS).write_bytes(diffusers()[1])
    one, other = import_checkpoint(tmp_path / "a.ckpt"), import_checkpoint(tmp_path)
    assert one.digest() == other.digest()


def test_every_wrong_value_of_every_field_is_one_line(tmp_path):
    described, weights = taming()
    params = described["model"]["params"]
    for fields, put in (
        (params["ddconfig"], lambda x: {"model": {**described["model"], "params": {**params, "ddconfig": x}}}),
        (params, lambda x: {"model": {**described["model"], "params": x}}),
        (described["model"], lambda x: {"model": x}),
    ):
        for name in fields:
            for value in WRONG:
                unused = name in ("dropout", "lossconfig") or (name, value) == ("double_z", None)
                if not unused and value != fields[name]:
                    refusal(tmp_path, put({**fields, name: value}), weights)
    for value in (*WRONG, {"model": [1]}):
        refusal(tmp_path, value, weights)
    described, weights = diffusers()
    for name in described:
        for value in WRONG:
            if name != "_class_name" and value != described[name] and (name, value) not in (("vq_embed_dim", None),):
                refusal(tmp_path, {**described, name: value}, weights, "diffusers")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"[" * 20000, "nested deeper than"),
        (b"a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]\n", "aliases are not read"),
        (b"x" * 10**6, "more than 32768 bytes"),
        (b"model: !!python/object/apply:os.system ['true']", "could not determine a constructor"),
        (b"model: !!timestamp foo", "does not describe a VQ-GAN"),
        (b"model: !!int ''", "does not describe a VQ-GAN"),
        (b"model: 2001-99-99", "does not describe a VQ-GAN"),
        (b"model: " + b"9" * 5000, "does not describe a VQ-GAN"),
        (b"\xff\xfe", "does not describe a VQ-GAN"),
    ],
)
def test_yaml_that_means_harm_is_one_line(tmp_path, text, message):
    assert message in refusal(tmp_path, text, taming()[1])


def saved(value) -> bytes:
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


def with_pickle(content: bytes, change) -> bytes:
    """Returns a checkpoint with its pickle changed and all checksums right."""
    file = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(file, "w") as new:
        for name in old.namelist():
            new.writestr(name, change(old.read(name)) if name.endswith("data.pkl") else old.read(name))
    return file.getvalue()


class Calls:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def test_pickles_that_mean_harm_are_one_line(tmp_path, capsys):
    description, good = taming()
    state = torch.load(io.BytesIO(good), weights_only=True)["state_dict"]
    name = "quant_conv.bias"
    nan, packed = state[name].clone(), io.BytesIO()
    nan.view(-1)[-1] = float("nan")
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/data.pkl", bytes(10**8))
    for weights, message in (
        (None, "a.ckpt does not exist"),
        (b"", "truncated"),
        (good[: len(good) // 2], "truncated"),
        (pickle.dumps(state["quant_conv.bias"].tolist()), "truncated"),
        (packed.getvalue(), "packed entries"),
        (saved({"state_dict": {}, "more": Calls(print, "run")}), "more than weights, __builtin__.print"),
        (saved({"state_dict": {}, "more": Calls(bytearray, 10**12)}), "more than weights, __builtin__.bytearray"),
        (saved({"state_dict": {**state, name: torch.zeros(1).expand(10**9)}}), "larger than the 1 values it has"),
        (saved({"state_dict": {**state, name: nan}}), f"{name} has values that are not finite"),
        (saved({"state_dict": {**state, name: state[name].long()}}), f"{name} has values that are not finite"),
        (saved({"state_dict": {**state, name: "x"}}), "is no tensor"),
        (saved({"state_dict": {**state, 5: nan}}), "does not hold weights by name"),
        (saved({"state_dict": [1]}), "does not hold weights by name"),
        (saved([torch.zeros(2)]), "holds a list"),
        (with_pickle(good, lambda content: content[:-20]), "damaged"),
        (with_pickle(good, lambda content: b"\x80\x02" + b"]" * 10**6 + b"."), "holds a list"),
        (with_pickle(good, lambda content: bytes(3 * 10**6)), "names and shapes take"),
        (with_pickle(good, lambda content: content.replace(b"\x80\x02", b"\x80\x02\x8a\x7f", 1)), "damaged"),
    ):
        assert message in refusal(tmp_path, description, weights), message
    assert capsys.readouterr().out == ""


def test_safetensors_that_mean_harm_are_one_line(tmp_path):
    description, good = diffusers()
    header, state = header_of(good), load(good)
    name = next(iter(header.keys() - {"__metadata__"}))
    huge = {**header, name: {**header[name], "shape": [2**39, 2**39]}}
    nan = {**state, name: torch.full_like(state[name], float("nan"))}
    for weights, message in (
        (good[:-5], "damaged"),
        (with_header(huge, good), "damaged"),
        (with_header([1], good), "damaged"),
        (save(nan), f"{name} has values that are not finite"),
    ):
        assert message in refusal(tmp_path, description, weights, "diffusers")


def test_named_pipes_are_refused_instead_of_waited_for(tmp_path):
    (tmp_path / "a.yaml").write_text(json.dumps(taming()[0]))
    os.mkfifo(tmp_path / "a.ckpt")
    with pytest.raises(UserError, match="is not a regular file"):
        import_checkpoint(tmp_path / "a.ckpt")
    (tmp_path / CONFIG).write_text(json.dumps(diffusers()[0]))
    os.mkfifo(tmp_path / WEIGHTS)
    with pytest.raises(UserError, match="is not a regular file"):
        import_checkpoint(tmp_path)
