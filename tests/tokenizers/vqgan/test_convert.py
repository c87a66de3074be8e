"""Conversion from and to diffusers, and the command; the other formats are in test_readers.py, wrong files in
test_wrong_checkpoints.py."""

import json

import pytest
import torch
from helpers import build_toys
from helpers.command_toys import run
from helpers.parity import agree, random_weights
from safetensors.torch import load_file, save_file

from smalti import VQGAN, LatentSet, UserError, VQGANConfig
from smalti.commands.model_paths import load_tokenizer
from smalti.scripts import build_latents, convert, train_tokenizer
from smalti.scripts.convert import Convert
from smalti.tokenizers.vqgan.convert import import_checkpoint
from smalti.tokenizers.vqgan.readers.diffusers import to_diffusers

# width, multipliers, blocks, size, sizes with attention, latent width, code width, codes, attention in the middle
NETWORKS = {
    "f4": (32, (1, 1, 2), 2, 16, (4,), 16, 16, 400, True),
    "f2 with two attentions and another code width": (32, (1, 3), 1, 16, (16, 8), 8, 5, 30, True),
    "aMUSEd, without attention": (32, (1, 1, 2), 1, 16, (), 32, 32, 64, False),
}
of_every_network = pytest.mark.parametrize("network", NETWORKS.values(), ids=NETWORKS)


def diffusers_of(network):
    """Returns diffusers' model with the same settings."""
    ch, ch_mult, blocks, resolution, attention, z, d, k, middle = network
    attends = ["Attn" * (resolution // 2**i in attention) for i in range(len(ch_mult))]
    return pytest.importorskip("diffusers").VQModel(
        down_block_types=tuple(f"{attn}DownEncoderBlock2D" for attn in attends),
        up_block_types=tuple(f"{attn}UpDecoderBlock2D" for attn in reversed(attends)),
        block_out_channels=tuple(ch * multiplier for multiplier in ch_mult),
        layers_per_block=blocks,
        latent_channels=z,
        vq_embed_dim=d,
        num_vq_embeddings=k,
        sample_size=resolution,
        norm_num_groups=8,
        mid_block_add_attention=middle,
    )


def passing(model):
    """Returns a function from images to diffusers' codes and images, for `agree`."""

    @torch.no_grad()
    def run(images):
        z_e = model.encode(images).latents
        codes = model.quantize(z_e)[2][2].view(len(images), *z_e.shape[2:])
        return codes, model.decode(z_e).sample

    return run


@of_every_network
def test_diffusers_import_and_export_compute_the_same(tmp_path, network):
    """Imports a folder of diffusers, exports it again, and loads it in diffusers."""
    theirs = random_weights(diffusers_of(network))
    theirs.save_pretrained(tmp_path / "theirs")
    convert.convert(Convert(tmp_path / "theirs", out=tmp_path / "ours"))
    agree(load_tokenizer(str(tmp_path / "ours")), passing(theirs))
    convert.convert(Convert(tmp_path / "ours", to="diffusers", out=tmp_path / "again"))
    again, notes = type(theirs).from_pretrained(tmp_path / "again", output_loading_info=True)
    assert not any(notes.values())
    agree(load_tokenizer(str(tmp_path / "ours")), passing(again))


def test_folders_of_old_diffusers_are_imported(tmp_path):
    """They have other names of attention layers, and the weights are a pickle."""
    theirs = random_weights(diffusers_of(NETWORKS["f4"]))
    theirs.save_pretrained(tmp_path)
    state = load_file(tmp_path / "diffusion_pytorch_model.safetensors")
    (tmp_path / "diffusion_pytorch_model.safetensors").unlink()
    for new, old in {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}.items():
        state = {name.replace(f".{new}.", f".{old}."): tensor for name, tensor in state.items()}
    torch.save(state, tmp_path / "diffusion_pytorch_model.bin")
    agree(import_checkpoint(tmp_path), passing(theirs))


SMALL = {"widths": (32, 64), "code_width": 6, "latent_width": 7, "branching": 9, "residual_blocks": 1}


@pytest.fixture
def folder(tmp_path):
    """A folder in diffusers' format, written without diffusers."""
    to_diffusers(VQGAN(VQGANConfig(**SMALL)), tmp_path / "vq")
    return tmp_path / "vq"


def test_export_and_import_are_inverse(folder):
    torch.manual_seed(1)
    model = VQGAN(VQGANConfig(**SMALL, norm_groups=16, attention_stages=(1,)))
    to_diffusers(model, folder.with_name("other"))
    again = import_checkpoint(folder.with_name("other"))
    for name, tensor in again.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]), name
    assert (again.config.norm_groups, again.config.attention_stages) == (16, (1,))


def test_the_folder_of_the_weights_may_be_the_current_one(folder, monkeypatch, capfd):
    monkeypatch.chdir(folder)
    assert run(capfd, convert.main, "--source", ".", "--out", "../ours")[0] == 0
    assert (folder.parent / "ours" / "model.safetensors").exists()


def test_export_of_images_that_are_not_square_says_that_the_width_is_lost(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    for name, width in (("wide", 32), ("square", 16)):
        VQGAN(VQGANConfig(**SMALL, height=16, width=width)).save(tmp_path / name)
        status, _, err = run(capfd, convert.main, "--source", name, "--to", "diffusers", "--out", f"{name}-vq")
        assert status == 0
        assert ("converted back, it is a tokenizer of 16x16 images" in err) == (name == "wide")
    assert import_checkpoint(tmp_path / "wide-vq").config.width == 16


def test_weights_that_do_not_match_the_description_are_refused(folder):
    path = folder / "diffusion_pytorch_model.safetensors"
    state = load_file(path)
    moved = {name.replace("conv_in", "conv_start"): tensor for name, tensor in state.items()}
    save_file(moved, path)
    with pytest.raises(UserError, match=r"lacks decoder.conv_in.bias, .* and also has decoder.conv_start.bias"):
        import_checkpoint(folder)
    save_file({**state, "quant_conv.bias": torch.zeros(7)}, path)
    with pytest.raises(UserError, match=r"quant_conv.bias is \(7,\), not \(6,\)"):
        import_checkpoint(folder)
    save_file({**state, "decoder.conv_in.weight": state["decoder.conv_in.weight"].transpose(0, 1).contiguous()}, path)
    with pytest.raises(UserError, match=r"decoder.conv_in.weight is \(7, 64, 3, 3\), not \(64, 7, 3, 3\)"):
        import_checkpoint(folder)
    path.write_bytes(b"no weights")
    with pytest.raises(UserError, match="cannot be read"):
        import_checkpoint(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"norm_type": "spatial"}, "does not support norm_type spatial"),
        ({"out_channels": 1}, "needs a decoder that mirrors the encoder"),
        ({"up_block_types": ["AttnUpDecoderBlock2D", "UpDecoderBlock2D"]}, "needs a decoder that mirrors the encoder"),
        ({"down_block_types": ["DownBlock2D"] * 2}, "does not describe a VQModel with DownEncoderBlock2D only"),
        ({"sample_size": None}, "sample_size is None, which is not int"),
    ],
)
def test_unsupported_diffusers_networks_are_refused(folder, change, message):
    described = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**described, **change}))
    with pytest.raises(UserError, match=message):
        import_checkpoint(folder)


def test_export_refuses_unsupported_quantizers_and_existing_folders(tmp_path):
    for more in ({"depth": 2}, {"quantizer": "gumbel"}, {"quantizer": "cosine"}, {"quantizer": "dot"}):
        with pytest.raises(UserError, match="flat codebooks"):
            to_diffusers(VQGAN(VQGANConfig(**SMALL, **more)), tmp_path / "vq")
    VQGAN(VQGANConfig(**SMALL)).save(tmp_path / "vq")
    network = {"architecture": "maskgit", "middle_attention": False, "latent_width": 6}
    with pytest.raises(UserError, match="does not support the architecture maskgit"):
        to_diffusers(VQGAN(VQGANConfig(**{**SMALL, **network})), tmp_path / "vq")
    (tmp_path / "other").mkdir()
    for out, message in (("vq", "would overwrite an input"), ("other", "is a folder; give another name")):
        with pytest.raises(UserError, match=message):
            convert.convert(Convert(tmp_path / "vq", to="diffusers", out=tmp_path / out))


def test_commands_train_convert_and_build_latents(tmp_path, monkeypatch, capfd):
    """Trains with every loss, converts both ways, and builds latent sets with both models, each by its command."""
    monkeypatch.chdir(tmp_path)
    build_toys.write_images(tmp_path / "img", count=30)
    flags = "--tokenizer vqgan --height 16 --width 16 --widths 8 8 --norm-groups 4 --latent-width 8 --code-width 4"
    flags += " --branching 8 --discriminator-start 2 --discriminator-width 8 --discriminator-layers 2"
    fit = "--images img --steps 4 --batch-size 8 --log-steps 1 --precision fp32 --ema-decay 0.5 --out runs/trained"
    status, _, err = run(capfd, train_tokenizer.main, *flags.split(), *fit.split())
    assert status == 0, err
    lines = [json.loads(line) for line in (tmp_path / "runs/trained/metrics.jsonl").read_text().splitlines()]
    assert lines[3]["generator/adaptive_weight"] > 0
    assert {"generator/perceptual", "discriminator/real", "rows_per_second"} <= lines[3].keys()
    assert {"held_out_mse", "held_out_perceptual", "codes_used", "code_perplexity"} <= lines[-1].keys()
    assert (tmp_path / "runs/trained/reconstructions.png").exists()
    status, out, _ = run(capfd, convert.main, "--source", "runs/trained", "--to", "diffusers", "--out", "vq")
    assert (status, out[:43]) == (0, "vq: 16x16 images to 8x8 of 8, digest " + VQGAN.load("runs/trained").digest()[:6])
    assert run(capfd, convert.main, "--source", "vq")[0] == 0
    build = "--images img --batch-size 8 --workers 0 --device cpu"
    for source, out in (
        ("runs/trained", "a.h5"),
        ("vqgan", "b.h5"),
    ):  # the kind stands for the folder to which convert.py writes
        assert run(capfd, build_latents.main, "--tokenizer", source, *build.split(), "--out", out)[0] == 0
    assert LatentSet("a.h5").batch(range(60))[0].equal(LatentSet("b.h5").batch(range(60))[0])
    status, _, err = run(capfd, convert.main, "--source", "img/0001.png", "--out", "nothing")
    assert (status, err) == (
        2,
        "error: img/0001.png was not loaded: it is truncated, or not a file of torch 1.6 or later; download it again, "
        "from a source that you trust\n",
    )


def test_a_conversion_that_stops_leaves_no_folder(tmp_path, monkeypatch):
    random_weights(diffusers_of(NETWORKS["f2 with two attentions and another code width"])).save_pretrained(
        tmp_path / "theirs"
    )

    def stop(_, folder):
        (folder / "model.safetensors").write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(VQGAN, "save", stop)
    with pytest.raises(KeyboardInterrupt):
        convert.convert(Convert(tmp_path / "theirs", out=tmp_path / "ours"))
    assert [path.name for path in tmp_path.iterdir()] == ["theirs"]
