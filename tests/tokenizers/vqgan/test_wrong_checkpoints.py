"""Checkpoints that no reader takes: each is refused in one line that names the weight or the field."""

import json

import pytest
import torch
import yaml
from helpers.command_toys import run
from helpers.published_checkpoints import CHAMELEON, FORMATS, params, write

from smalti import VQGAN, UserError, VQGANConfig
from smalti.scripts import convert
from smalti.tokenizers.vqgan.convert import import_checkpoint

of_every_format = pytest.mark.parametrize("name", FORMATS)


def refusal(source, description=None):
    with pytest.raises(UserError) as caught:
        import_checkpoint(source, description)
    message = str(caught.value)
    assert message.isprintable()
    assert len(message) < 500
    return message


def without(state, name):
    return {key: tensor for key, tensor in state.items() if key != name}


@of_every_format
def test_missing_and_unknown_weights_are_named(name, tmp_path):
    writer, recognised = FORMATS[name]
    source, _ = writer(tmp_path, lambda state: without(state, "decoder.norm_out.bias"))
    assert "it lacks decoder.norm_out.bias" in (message := refusal(source))
    assert f" was recognised as {recognised}; for " in message
    source, _ = writer(tmp_path, lambda state: {**state, "encoder.extra.weight": torch.zeros(2)})
    assert "it also has encoder.extra.weight" in refusal(source)
    source, _ = writer(tmp_path, lambda state: {**without(state, "decoder.conv_in.bias"), "decoder.b": torch.zeros(2)})
    assert "lacks decoder.conv_in.bias and also has decoder.b" in refusal(source)


@of_every_format
def test_wrong_shapes_are_named_with_the_right_ones(name, tmp_path):
    writer, _ = FORMATS[name]
    source, theirs = writer(tmp_path, lambda state: {**state, "decoder.norm_out.weight": torch.ones(31)})
    assert "decoder.norm_out.weight is (31,), not (32,)" in refusal(source)
    wide, right = theirs.decoder.conv_in.weight.transpose(0, 1).contiguous(), tuple(theirs.decoder.conv_in.weight.shape)
    source, _ = writer(tmp_path, lambda state: {**state, "decoder.conv_in.weight": wide})
    assert f"decoder.conv_in.weight is {tuple(wide.shape)}, not {right}" in refusal(source)


@pytest.mark.parametrize("name", ["llamagen", "janus", "maskgit", "mage"])
@pytest.mark.parametrize("missing", ["encoder.conv_in.weight", "quantize.embedding.weight"])
def test_missing_weights_that_decide_sizes_are_named(name, missing, tmp_path):
    source, _ = FORMATS[name][0](tmp_path, lambda state: without(state, missing))
    assert f"lacks {missing}" in refusal(source)
    source, _ = FORMATS[name][0](tmp_path, lambda state: {**state, missing: torch.zeros(3)})
    assert f"{missing} is (3,), not of" in refusal(source)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["tok_embeddings.weight", "layers.0.attention.wqkv.weight"], "its weights are layers.0.attention.wqkv.weight"),
        (["encoder.transformer.0.ln_1.weight", "latent_tokens"], "its weights are encoder.transformer.0.ln_1.weight"),
        (["encoder.0.weight", "quantizer.codebook_0"], "is smalti's already; use it as --tokenizer"),
        ([], "its weights are missing"),
    ],
    ids=["LlamaGen's transformer", "TiTok", "smalti", "empty"],
)
def test_weights_of_other_models_are_refused(names, message, tmp_path):
    torch.save({"model": {name: torch.zeros(2) for name in names}}, tmp_path / "a.pt")
    assert message in refusal(tmp_path / "a.pt")


def test_descriptions_that_would_not_be_read_are_refused(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    VQGAN(VQGANConfig(height=8, width=8, widths=(32, 32))).save(tmp_path / "ours")
    (tmp_path / "plain.yaml").write_text("codebook_l2_norm")
    for name in ("llamagen", "maskgit"):
        (tmp_path / name).mkdir()
    sources = {name: FORMATS[name][0](tmp_path / name)[0] for name in ("llamagen", "maskgit")}
    for arguments, message in (
        ((sources["llamagen"], "--description", "nothing.json"), ". has no nothing.json, which describes the network"),
        ((sources["llamagen"], "--description", "plain.yaml"), "plain.yaml is not JSON"),
        ((sources["maskgit"], "--description", "plain.yaml"), "leave --description plain.yaml out"),
        (("ours", "--to", "diffusers", "--description", "nothing.yaml"), "leave --description nothing.yaml out"),
    ):
        status, _, err = run(capfd, convert.main, "--source", *arguments, "--out", "out")
        assert (status, message in err, (tmp_path / "out").exists()) == (2, True, False), err


def test_smalti_folders_are_refused(tmp_path):
    VQGAN(VQGANConfig(widths=(32,))).save(tmp_path)
    assert "is smalti's already" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"target": "ldm.models.autoencoder.AutoencoderKL"}, "describes a AutoencoderKL; convert reads VQModel, "),
        (
            {"target": "taming.models.vqgan.GumbelVQ"},
            "was recognised as GumbelVQ; for the network in last.yaml, it lacks",
        ),
        ({"class_path": "src.Open_MAGVIT2.models.lfqgan.LFQ", "init_args": {}}, "describes a LFQ; convert reads"),
        ({"class_path": "src.IBQ.models.ibqgan.IBQ", "init_args": {}}, "lacks ddconfig, embed_dim, n_embed"),
        ({"params": {"first_stage_config": {"target": "x"}}}, "lacks params"),
        ({"params": {"first_stage_config": 5}}, "lacks the fields of Model"),
        ({"params": {**params(), "l2_normalize": True}}, "describes a VQModel with l2_normalize"),
        ({"params": {**params(), "remap": "a.npy"}}, "remaps codes by a file that is not in the checkpoint"),
        ({"params": params(attn_type="linear")}, "describes linear attention"),
        ({"params": params(use_linear_attn=True)}, "describes linear attention"),
        ({"params": params(attn_type="none")}, "also has decoder.mid.attn_1.k.bias"),
        ({"params": params(ch_mult=[2, 2])}, "ch_mult must begin with 1"),
        ({"params": params(out_ch=1)}, "in_channels must equal out_ch"),
        ({"params": params(double_z=True)}, "double_z and tanh_out must be false"),
        ({"params": params(tanh_out=True)}, "double_z and tanh_out must be false"),
        ({"params": params(ch_mult=None)}, "ch_mult is None, which is not tuple"),
        ({"params": params(num_res_blocks=2)}, "it lacks decoder.up.0.block.2.conv1.bias"),
    ],
)
def test_descriptions_of_other_networks_are_refused(model, message, tmp_path):
    source, _ = FORMATS["taming"][0](tmp_path)
    description = {"model": {"target": "taming.models.vqgan.VQModel", "params": params(), **model}}
    source.with_suffix(".yaml").write_text(yaml.safe_dump(description))
    assert message in refusal(source)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "janus_vqgan"}, "describes a janus_vqgan; convert reads chameleon_vqgan"),
        ({"double_latent": True}, "double_z and tanh_out must be false"),
        ({"num_embeddings": 30}, "quantize.embedding.weight is (40, 6), not"),
        ({"resolution": None}, "resolution is None, which is not int"),
    ],
)
def test_other_networks_of_transformers_are_refused(change, message, tmp_path):
    source, _ = FORMATS["chameleon"][0](tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**CHAMELEON, **change}))
    assert message in refusal(source)


def test_chameleon_without_decoder_is_refused(tmp_path):
    def encoder(state):
        return {name: tensor for name, tensor in state.items() if not name.startswith("decoder.")}

    assert "holds Chameleon's encoder alone" in refusal(FORMATS["chameleon"][0](tmp_path, encoder)[0])


def test_llamagen_config_that_contradicts_its_weights_is_refused(tmp_path):
    source, _ = FORMATS["llamagen_folder"][0](tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"codebook_size": 60}))
    assert "config.json does not match model.safetensors: branching is 60, not 50" in refusal(source)


def test_some_averages_are_not_enough(tmp_path):
    source, theirs = FORMATS["ibq_without_averages"][0](tmp_path)
    state = {**theirs.state_dict(), "model_ema.quant_convbias": torch.zeros(6), "model_ema.decay": torch.zeros(())}
    write(tmp_path, state, yaml.safe_load(source.with_suffix(".yaml").read_text()))
    assert "lacks the averages of decoder.conv_in.bias, decoder.conv_in.weight" in refusal(source)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ({"weight_map": {"lm_head.weight": "a.safetensors"}}, "lists no weights of a tokenizer"),
        ({"weight_map": {"model.vqmodel.x": "../a.safetensors"}}, "names the file ../a.safetensors, which is not in"),
        ({"weight_map": {"model.vqmodel.x": "a.safetensors"}}, "a.safetensors does not exist"),
        ({"weight_map": {"model.vqmodel.x": 5}}, "has no weight_map of the files of all weights"),
        ([], "has no weight_map of the files of all weights"),
    ],
)
def test_wrong_indices_of_parts_are_refused(index, message, tmp_path):
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert message in refusal(tmp_path)


def test_folders_without_weights_are_refused(tmp_path):
    assert "has no weights: none of model.safetensors" in refusal(tmp_path)
    (tmp_path / "model_index.json").write_text("{}")
    assert "is a pipeline of diffusers; name the folder of its VQModel" in refusal(tmp_path)


def test_missing_files_are_named(tmp_path):
    assert "a.pt does not exist" in refusal(tmp_path / "a.pt")
    assert "a.safetensors does not exist" in refusal(tmp_path / "a.safetensors")
    source, _ = FORMATS["taming"][0](tmp_path)
    source.with_suffix(".yaml").unlink()
    assert "last.yaml does not exist; use --description" in refusal(source)


def test_many_views_of_few_values_are_refused(tmp_path):
    """A pickle of 5 MB could otherwise ask for a network of gigabytes."""
    source, theirs = FORMATS["maskgit"][0](tmp_path)
    values = torch.zeros(64 * 64 * 9)
    state = {name: values[: tensor.numel()].view(tensor.shape) for name, tensor in theirs.state_dict().items()}
    torch.save(state, source)
    assert "declares" in (message := refusal(source))
    assert "more than it has" in message


def test_command_prints_one_line_and_fails(tmp_path, capfd):
    source, _ = FORMATS["maskgit"][0](tmp_path, lambda state: without(state, "encoder.mid.0.conv1.weight"))
    status, out, err = run(capfd, convert.main, "--source", str(source), "--out", str(tmp_path / "converted"))
    problem = "was recognised as MaskGIT-VQGAN; for this network, it lacks encoder.mid.0.conv1.weight"
    assert (status, out, err) == (2, "", f"error: {source} {problem}\n")
    assert not (tmp_path / "converted").exists()
