"""Checkpoint conversion: imported VQ-GANs give the same codes and images as the original; refused files."""

import json
import sys
from types import ModuleType

import pytest
import torch
import yaml
from helpers import build_toys
from helpers.command_toys import run
from safetensors.torch import load_file, save_file
from torch import nn

from smalti import VQGAN, LatentSet, UserError, VQGANConfig
from smalti.commands.model_paths import load_tokenizer
from smalti.scripts import build_latents, convert, train_tokenizer
from smalti.scripts.convert import Convert
from smalti.tokenizers.vqgan.convert import from_diffusers, from_taming, to_diffusers

# ch, ch_mult, num_res_blocks, resolution, attn_resolutions, z_channels, embed_dim, n_embed
NETWORKS = {
    "f8": (32, (1, 1, 2, 4), 2, 32, (4,), 16, 16, 400),
    "f2 with two attentions and another code width": (32, (1, 3), 1, 16, (16, 8), 8, 5, 30),
    "f4 without attention": (64, (1, 1, 2), 1, 16, (), 32, 32, 64),
}
of_every_network = pytest.mark.parametrize("network", NETWORKS.values(), ids=NETWORKS)


def randomized(module):
    """Makes every weight random, since weights of zero or one would hide mistakes."""
    torch.manual_seed(3)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if parameter.ndim > 1 and "embed" not in name:
                parameter.normal_(std=(parameter.numel() / len(parameter)) ** -0.5)
            else:  # norm weights around one, and small codewords of which none is nearest to all vectors
                parameter.normal_(mean=float("norm" in name and "weight" in name), std=0.3)
    return module.eval()


class Taming(nn.Module):
    """VQModel or GumbelVQ built from taming's modules; taming's own classes need pytorch_lightning."""

    def __init__(self, network, gumbel=False):
        super().__init__()
        layers = pytest.importorskip("taming.modules.diffusionmodules.model")
        quantize = pytest.importorskip("taming.modules.vqvae.quantize")
        ch, ch_mult, blocks, resolution, attention, z, d, k = network
        self.ddconfig = {"double_z": False, "z_channels": z, "resolution": resolution, "in_channels": 3, "out_ch": 3}
        self.ddconfig |= {"ch": ch, "ch_mult": list(ch_mult), "num_res_blocks": blocks, "dropout": 0.0}
        self.ddconfig |= {"attn_resolutions": list(attention)}
        self.encoder, self.decoder = layers.Encoder(**self.ddconfig), layers.Decoder(**self.ddconfig)
        self.quantize = quantize.GumbelQuantize(z, d, k) if gumbel else quantize.VectorQuantizer2(k, d, 0.25)
        self.quant_conv, self.post_quant_conv = nn.Conv2d(z, d, 1), nn.Conv2d(d, z, 1)
        self.params = {"embed_dim": d, "n_embed": k, "ddconfig": self.ddconfig}

    @torch.no_grad()
    def forward(self, images):
        """Returns codes and decoded images."""
        h = self.quant_conv(self.encoder(images))
        if hasattr(self.quantize, "proj"):
            codes = self.quantize.proj(h).argmax(1)
            z_q = self.quantize.get_codebook_entry(codes.flatten(), (*codes.shape, None))
        else:
            z_q, _, (_, _, codes) = self.quantize(h)
        return codes.view(len(images), *h.shape[2:]), self.decoder(self.post_quant_conv(z_q))


def save_taming(model, path, target="taming.models.vqgan.VQModel", **more):
    """Saves a checkpoint as Lightning does, with weights of the training loss and a callback's class."""
    path.with_suffix(".yaml").write_text(yaml.safe_dump({"model": {"target": target, "params": model.params}}))
    state = {**model.state_dict(), "loss.discriminator.main.0.weight": torch.zeros(2)}
    torch.save({"state_dict": state, "global_step": 5, **more}, path)


def images_of(h, w):
    coarse = torch.rand(4, 3, h // 8, w // 8, generator=torch.Generator().manual_seed(1)) * 2 - 1
    return nn.functional.interpolate(coarse, (h, w))  # coarse noise: codes of pixel noise would hardly differ


@torch.no_grad()
def agree(ours, theirs):
    """Asserts equal codes and equal images before clamping, at the network's own size and at a rectangle."""
    size, factor = ours.config.height, ours.downsampling
    for images in (images_of(size, size), images_of(size, size + 8 * factor)):
        codes, expected = theirs(images)
        assert codes.unique().numel() > 5
        assert torch.equal(ours.encode(images)[0], codes)
        decoded = ours.decoder(ours.quantizer.lookup(codes))
        torch.testing.assert_close(decoded, expected, atol=1e-4, rtol=0)
        torch.testing.assert_close(ours(images).reconstruction, expected, atol=1e-4, rtol=0)


@of_every_network
def test_imported_taming_checkpoint_computes_the_same(tmp_path, network, monkeypatch):
    theirs = randomized(Taming(network))
    callbacks = ModuleType("pytorch_lightning.callbacks.model_checkpoint")
    callbacks.ModelCheckpoint = type("ModelCheckpoint", (), {"__module__": callbacks.__name__})
    for name in ("pytorch_lightning", "pytorch_lightning.callbacks", callbacks.__name__):
        monkeypatch.setitem(sys.modules, name, callbacks)
    save_taming(theirs, tmp_path / "last.ckpt", callbacks={callbacks.ModelCheckpoint: {"best": 0.5}})
    convert.convert(Convert(tmp_path / "last.ckpt", out=tmp_path / "converted"))
    agree(load_tokenizer(str(tmp_path / "converted")), theirs)


def test_imported_taming_gumbel_checkpoint_computes_the_same(tmp_path):
    theirs = randomized(Taming(NETWORKS["f8"], gumbel=True))
    save_taming(theirs, tmp_path / "last.ckpt", target="taming.models.vqgan.GumbelVQ")
    agree(from_taming(tmp_path / "last.ckpt", tmp_path / "last.yaml"), theirs)


def diffusers_of(network):
    """Returns diffusers' model with the same settings."""
    ch, ch_mult, blocks, resolution, attention, z, d, k = network
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
    theirs = randomized(diffusers_of(network))
    theirs.save_pretrained(tmp_path / "theirs")
    convert.convert(Convert(tmp_path / "theirs", out=tmp_path / "ours"))
    agree(load_tokenizer(str(tmp_path / "ours")), passing(theirs))
    convert.convert(Convert(tmp_path / "ours", to="diffusers", out=tmp_path / "again"))
    again, notes = type(theirs).from_pretrained(tmp_path / "again", output_loading_info=True)
    assert not any(notes.values())
    agree(load_tokenizer(str(tmp_path / "ours")), passing(again))


def test_folders_of_old_diffusers_are_imported(tmp_path):
    """They have other names of attention layers, and the weights are a pickle."""
    theirs = randomized(diffusers_of(NETWORKS["f8"]))
    theirs.save_pretrained(tmp_path)
    state = load_file(tmp_path / "diffusion_pytorch_model.safetensors")
    (tmp_path / "diffusion_pytorch_model.safetensors").unlink()
    for new, old in {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}.items():
        state = {name.replace(f".{new}.", f".{old}."): tensor for name, tensor in state.items()}
    torch.save(state, tmp_path / "diffusion_pytorch_model.bin")
    agree(from_diffusers(tmp_path), passing(theirs))


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
    again = from_diffusers(folder.with_name("other"))
    for name, tensor in again.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]), name
    assert (again.config.norm_groups, again.config.attention_stages) == (16, (1,))


def test_weights_that_do_not_match_the_description_are_refused(folder):
    path = folder / "diffusion_pytorch_model.safetensors"
    state = load_file(path)
    moved = {name.replace("conv_in", "conv_start"): tensor for name, tensor in state.items()}
    save_file(moved, path)
    with pytest.raises(UserError, match=r"lacks decoder.conv_in.bias, .* and also has decoder.conv_start.bias"):
        from_diffusers(folder)
    save_file({**state, "quant_conv.bias": torch.zeros(7)}, path)
    with pytest.raises(UserError, match=r"quant_conv.bias is \(7,\), not \(6,\)"):
        from_diffusers(folder)
    save_file({**state, "decoder.conv_in.weight": state["decoder.conv_in.weight"].transpose(0, 1).contiguous()}, path)
    with pytest.raises(UserError, match=r"decoder.conv_in.weight is \(7, 64, 3, 3\), not \(64, 7, 3, 3\)"):
        from_diffusers(folder)
    path.write_bytes(b"no weights")
    with pytest.raises(UserError, match="cannot be read"):
        from_diffusers(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"norm_type": "spatial"}, "does not support norm_type spatial"),
        ({"out_channels": 1}, "needs a decoder that mirrors the encoder"),
        ({"up_block_types": ["AttnUpDecoderBlock2D", "UpDecoderBlock2D"]}, "needs a decoder that mirrors the encoder"),
        ({"down_block_types": ["DownBlock2D"] * 2}, "does not hold a VQModel of diffusers"),
        ({"sample_size": None}, "sample_size is None, which is not int"),
    ],
)
def test_unsupported_diffusers_networks_are_refused(folder, change, message):
    described = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**described, **change}))
    with pytest.raises(UserError, match=message):
        from_diffusers(folder)


DESCRIPTION = {
    "target": "taming.models.vqgan.VQModel",
    "params": {
        "embed_dim": 6,
        "n_embed": 9,
        "ddconfig": {"z_channels": 7, "resolution": 32, "in_channels": 3, "out_ch": 3, "ch": 32, "ch_mult": [1, 2]}
        | {"num_res_blocks": 1, "attn_resolutions": []},
    },
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ch_mult": [2, 2]}, "ch_mult must begin with 1"),
        ({"out_ch": 1}, "in_channels must equal out_ch"),
        ({"double_z": True}, "double_z must be false"),
        ({"ch_mult": None}, "ch_mult is None, which is not tuple"),
    ],
)
def test_unsupported_taming_descriptions_are_refused(tmp_path, change, message):
    params = {**DESCRIPTION["params"], "ddconfig": {**DESCRIPTION["params"]["ddconfig"], **change}}
    (tmp_path / "a.yaml").write_text(yaml.safe_dump({"model": {**DESCRIPTION, "params": params}}))
    with pytest.raises(UserError, match=message):
        from_taming(tmp_path / "a.ckpt", tmp_path / "a.yaml")


class Harmful:
    def __reduce__(self):
        return print, ("run",)


def test_pickles_that_contain_code_are_refused_and_not_run(tmp_path, capsys):
    (tmp_path / "a.yaml").write_text(yaml.safe_dump({"model": DESCRIPTION}))
    with pytest.raises(UserError, match=r"a\.ckpt does not exist"):
        from_taming(tmp_path / "a.ckpt", tmp_path / "a.yaml")
    torch.save({"state_dict": {}, "other": Harmful()}, tmp_path / "a.ckpt")
    with pytest.raises(UserError, match="holds more than weights") as caught:
        from_taming(tmp_path / "a.ckpt", tmp_path / "a.yaml")
    assert "\n" not in str(caught.value)
    torch.save([torch.zeros(2)], tmp_path / "a.ckpt")
    with pytest.raises(UserError, match="holds a list, not weights by name"):
        from_taming(tmp_path / "a.ckpt", tmp_path / "a.yaml")
    (tmp_path / "a.yaml").write_text("a: [1,\n  b: :")
    with pytest.raises(UserError, match="does not describe a VQ-GAN") as caught:
        from_taming(tmp_path / "a.ckpt", tmp_path / "a.yaml")
    assert "\n" not in str(caught.value)
    assert capsys.readouterr().out == ""


def test_export_refuses_unsupported_quantizers_and_existing_folders(tmp_path):
    for more in ({"depth": 2}, {"quantizer": "gumbel"}, {"quantizer": "cosine"}):
        with pytest.raises(UserError, match="flat codebooks"):
            to_diffusers(VQGAN(VQGANConfig(**SMALL, **more)), tmp_path / "vq")
    VQGAN(VQGANConfig(**SMALL)).save(tmp_path / "vq")
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
        "error: img/0001.yaml does not exist; use --description to name the checkpoint's .yaml file\n",
    )
