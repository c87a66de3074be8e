"""Tests of checkpoints: every kind round-trips, and every damage is refused with a one-line message."""

import dataclasses
import json
import re
import shutil

import pytest
import torch
from helpers import toys
from safetensors.torch import load_file, save_file

from smalti.core import models
from smalti.core.config import added, config_from_json, replacing
from smalti.core.errors import UserError
from smalti.core.models import CONFIG_NAME, WEIGHTS_NAME, digest, load
from smalti.tokenizers.vq.hrvq import HRVQ

of_every_kind = pytest.mark.parametrize(("family", "kind"), toys.KINDS, ids=[kind for _, kind in toys.KINDS])


def make(family, kind, seed=0):
    torch.manual_seed(seed)
    model = models.class_of_kind(family, kind)(toys.TINY[kind]).eval()
    for parameter in model.parameters():  # parameters that start at zero would hide a weight that was not loaded
        torch.nn.init.normal_(parameter, std=0.3)
    model.provenance = {"image_source": "emoji", "nested": {"flips": True}}
    return model


@torch.no_grad()
def output(family, model):
    generator = torch.Generator().manual_seed(1)
    if model.kind == "realnvp":
        return [model.flow.from_base(torch.randn(2, *model.level.shape, generator=generator))]
    if family == "prior":
        config = model.config
        upper = [(2, config.height // factor, config.width // factor) for factor in config.upper_factors]
        codes = torch.randint(9, (2, config.height, config.width), generator=generator)
        return [model.features(codes, upper=tuple(torch.randint(4, grid, generator=generator) for grid in upper))]
    images = torch.rand(2, model.image_channels, 8, 12, generator=generator) * 2 - 1
    codes = model.encode(images)
    return [*codes, model.decode(codes)]


@dataclasses.dataclass(frozen=True)
class Before:
    height: int = 4


@dataclasses.dataclass(frozen=True)
class After(Before):
    sharper: bool = added(off=False)


def test_added_setting_keeps_old_checkpoints_and_digests_valid():
    state = {"w": torch.ones(2)}
    kept = dataclasses.asdict(Before())
    assert config_from_json(After, kept, "kept") == After(sharper=False)
    assert digest("a", After(), state) == digest("a", Before(), state)
    assert digest("a", After(sharper=True), state) != digest("a", Before(), state)
    assert config_from_json(After, {**kept, "sharper": True}, "kept").sharper
    with pytest.raises(UserError, match="kept has unknown fields: sharper"):
        config_from_json(Before, {**kept, "sharper": True}, "kept")
    with pytest.raises(UserError, match="kept lacks height"):
        config_from_json(After, {"sharper": True}, "kept")


@dataclasses.dataclass(frozen=True)
class Switch:
    height: int = 4
    blurred: bool = True


@dataclasses.dataclass(frozen=True)
class Choice:
    height: int = 4
    filter: str = replacing("blurred", on="blur", off="none", default="blur")


@pytest.mark.parametrize(("switch", "choice"), [(True, "blur"), (False, "none")])
def test_setting_in_place_of_a_switch_keeps_old_checkpoints_and_digests_valid(switch, choice):
    state, kept = {"w": torch.ones(2)}, dataclasses.asdict(Switch(blurred=switch))
    assert config_from_json(Choice, kept, "kept") == Choice(filter=choice)
    assert config_from_json(Choice, dataclasses.asdict(Choice(filter=choice)), "kept") == Choice(filter=choice)
    assert digest("a", Choice(filter=choice), state) == digest("a", Switch(blurred=switch), state)
    assert digest("a", Choice(filter="sharpen"), state) not in {
        digest("a", each, state) for each in (Switch(), Switch(blurred=False), Choice(), Choice(filter="none"))
    }
    without = {"without": {"filter"}}
    assert digest("a", Choice(filter=choice), state, **without) == digest("a", Before(), state)
    for damaged in ({"blurred": "yes"}, {"blurred": 1}, {}):
        with pytest.raises(UserError, match="kept lacks filter"):
            config_from_json(Choice, {"height": 4, **damaged}, "kept")
    with pytest.raises(UserError, match="kept has unknown fields: blurred"):
        config_from_json(Choice, {**kept, "filter": choice}, "kept")


@of_every_kind
def test_model_round_trips_through_a_checkpoint(family, kind, tmp_path):
    model = make(family, kind)
    model.save(tmp_path / "model")
    loaded = load(tmp_path / "model", family)
    assert type(loaded) is type(model)
    assert loaded.config == model.config
    assert hash(loaded.config) == hash(model.config)  # lists were converted to tuples
    assert loaded.provenance == model.provenance
    assert loaded.digest() == model.digest() == json.loads((tmp_path / "model" / CONFIG_NAME).read_text())["digest"]
    assert not loaded.training
    saved, restored = model.state_dict(), loaded.state_dict()
    assert saved.keys() == restored.keys()
    assert all(torch.equal(saved[name], restored[name]) for name in saved)
    assert all(torch.equal(a, b) for a, b in zip(output(family, model), output(family, loaded), strict=True))
    assert type(model).load(str(tmp_path / "model")).digest() == model.digest()
    assert sorted(path.name for path in (tmp_path / "model").iterdir()) == [CONFIG_NAME, WEIGHTS_NAME]


@of_every_kind
def test_rounded_model_round_trips_in_half_the_bytes(family, kind, tmp_path):
    model = make(family, kind)
    model.save(tmp_path / "model")
    model.save(tmp_path / "mixed", half=True)  # few weights are float16's by chance, so most stay float32
    assert load(tmp_path / "mixed", family).digest() == model.digest()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.round_to_half()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name].half().to(tensor.dtype) if tensor.is_floating_point() else tensor)
    model.save(tmp_path / "half", half=True)
    loaded = load(tmp_path / "half", family)
    assert loaded.digest() == model.digest() != load(tmp_path / "model", family).digest()
    assert all(tensor.dtype == model.state_dict()[name].dtype for name, tensor in loaded.state_dict().items())
    floats = sum(each.numel() for each in before.values() if each.dtype == torch.float32)
    sizes = {name: (tmp_path / name / WEIGHTS_NAME).stat().st_size for name in ("model", "half")}
    assert sizes["model"] - sizes["half"] == pytest.approx(2 * floats, rel=0.02, abs=100)


def test_weights_beyond_half_precision_stay_float32(tmp_path):
    model = make("tokenizer", "hrvq")
    name, parameter = next(iter(model.named_parameters()))
    torch.nn.init.constant_(parameter, 1e5)
    model.round_to_half()
    model.save(tmp_path, half=True)
    assert model.get_parameter(name).eq(1e5).all()
    assert load_file(tmp_path / WEIGHTS_NAME)[name].dtype == torch.float32
    assert load(tmp_path, "tokenizer").digest() == model.digest()


@of_every_kind
def test_digest_depends_on_config_and_every_weight(family, kind):
    model = make(family, kind)
    assert model.digest() == make(family, kind).digest()
    digests = {model.digest(), make(family, kind, seed=1).digest()}
    for name, tensor in model.state_dict().items():
        last = (-1,) * tensor.ndim
        before = tensor[last].clone()
        tensor[last] += 1
        digests.add(model.digest())
        tensor[last] = before
        assert model.digest() in digests, name
    assert len(digests) == 2 + len(model.state_dict())
    model.config = dataclasses.replace(model.config, height=model.config.height * 2)
    assert model.digest() not in digests


def edit_json(change):
    def edit(folder):
        described = json.loads((folder / CONFIG_NAME).read_text())
        change(described)
        (folder / CONFIG_NAME).write_text(json.dumps(described))

    return edit


def edit_weights(change):
    def edit(folder):
        weights = load_file(folder / WEIGHTS_NAME)
        change(weights)
        save_file(weights, folder / WEIGHTS_NAME)

    return edit


def flip_last_byte(folder):
    data = bytearray((folder / WEIGHTS_NAME).read_bytes())
    data[-1] ^= 1
    (folder / WEIGHTS_NAME).write_bytes(data)


def cut(bytes_left):
    def edit(folder):
        (folder / WEIGHTS_NAME).write_bytes((folder / WEIGHTS_NAME).read_bytes()[:bytes_left])

    return edit


def first(weights):
    return min(weights, key=lambda name: (weights[name].ndim != 1, name))  # a bias: short, and every kind has one


DAMAGES = {
    "missing weight": (edit_weights(lambda w: w.pop(first(w))), "lacks .*"),
    "unknown weight": (edit_weights(lambda w: w.update(stray=torch.zeros(1))), "unknown weights stray"),
    "many unknown": (edit_weights(lambda w: w.update({f"z{i}": torch.zeros(1) for i in range(9)})), "and 6 more"),
    "other shape": (edit_weights(lambda w: w.update({first(w): torch.zeros(1, 1, 77)})), re.escape("(1, 1, 77)")),
    "flipped bit": (flip_last_byte, "do not belong together"),
    "cut weights": (cut(-5), "damaged"),
    "cut header": (cut(20), "damaged"),
    "empty weights": (cut(0), "damaged"),
    "no weights": (lambda folder: (folder / WEIGHTS_NAME).unlink(), "damaged"),
    "no config": (lambda folder: (folder / CONFIG_NAME).unlink(), "no config.json"),
    "cut config": (lambda folder: (folder / CONFIG_NAME).write_text('{"family": '), "not JSON"),
    "binary config": (lambda folder: (folder / CONFIG_NAME).write_bytes(b"\xff\xfe\x00"), "not JSON"),
    "config of a list": (lambda folder: (folder / CONFIG_NAME).write_text("[1]"), "lacks"),
    "alien config": (
        lambda folder: (folder / CONFIG_NAME).write_text('{"model_type": "bert"}'),
        "not smalti's",
    ),
    "missing field": (edit_json(lambda d: d["config"].pop("height")), "lacks height"),
    "unknown field": (edit_json(lambda d: d["config"].update(colour=1)), "unknown fields: colour"),
    "another kind": (edit_json(lambda d: d.update(kind="hrqv")), "no .* of kind 'hrqv'"),
    "another family": (edit_json(lambda d: d.update(family="metric")), "holds a metric"),
}


@pytest.mark.parametrize("damage", DAMAGES)
@of_every_kind
def test_damaged_checkpoint_is_refused_in_one_line(family, kind, damage, tmp_path):
    make(family, kind).save(tmp_path)
    break_it, message = DAMAGES[damage]
    break_it(tmp_path)
    with pytest.raises(UserError, match=message) as caught:
        load(tmp_path, family)
    assert "\n" not in str(caught.value)


@of_every_kind
def test_kill_between_the_two_files_is_detected(family, kind, tmp_path):
    make(family, kind).save(tmp_path / "old")
    make(family, kind, seed=1).save(tmp_path / "new")
    shutil.copy(tmp_path / "new" / WEIGHTS_NAME, tmp_path / "old" / WEIGHTS_NAME)
    with pytest.raises(UserError, match="digests differ"):
        load(tmp_path / "old", family)


def test_checkpoint_of_another_family_or_class_is_refused(tmp_path):
    make("tokenizer", "hrvq").save(tmp_path)
    with pytest.raises(UserError, match=r"holds a tokenizer \(hrvq\), but a prior is needed"):
        load(tmp_path, "prior")

    class Other(HRVQ):
        kind = "other"

    with pytest.raises(UserError, match="holds a hrvq, not a other"):
        Other.load(tmp_path)


@pytest.mark.parametrize("source", ["/not/there/at/all", "not/there", "notthere", "", "a/file.txt"])
def test_missing_checkpoint_is_refused_in_one_line(source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "file.txt").write_text("not a folder")
    with pytest.raises(UserError, match=r"no checkpoint at|no config\.json") as caught:
        load(source, "tokenizer")
    assert "\n" not in str(caught.value)


def test_unknown_kind_is_refused_with_the_nearest_name():
    with pytest.raises(UserError, match="did you mean 'hrvq'"):
        models.class_of_kind("tokenizer", "hrqv")
    with pytest.raises(UserError, match=r"kinds: .*hourglass"):
        models.class_of_kind("prior", "zzzz")
    with pytest.raises(UserError, match="there is no prior of kind 'hrvq'"):
        models.class_of_kind("prior", "hrvq")
