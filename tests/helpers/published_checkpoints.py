"""Writes checkpoints in the formats that people have, with random weights of the networks in `published_vqgans.py`.

Each writer takes a folder and a function that may change the weights of the tokenizer; it returns the path to convert
and the network.
"""

import json

import numpy as np
import torch
import yaml
from helpers import published_vqgans
from helpers.parity import random_weights
from safetensors.torch import load_file, save_file

LATENT, WIDTH, CODES = 8, 6, 40


def network(**changes):
    """Returns the `ddconfig` of `taming()` at 16x16 images."""
    sizes = {"double_z": False, "z_channels": LATENT, "resolution": 16, "in_channels": 3, "out_ch": 3, "ch": 32}
    return {**sizes, "ch_mult": [1, 2], "num_res_blocks": 1, "attn_resolutions": [8], "dropout": 0.0, **changes}


def params(**changes):
    return {"embed_dim": WIDTH, "n_embed": CODES, "ddconfig": network(**changes), "lossconfig": {"target": "none"}}


def write(folder, state, description, *, name="last.ckpt", **more):
    """Saves a checkpoint as Lightning does, with weights of the training loss, and its description."""
    state = {**state, "loss.discriminator.main.0.weight": torch.zeros(2)}
    torch.save({"state_dict": state, "global_step": 5, **more}, folder / name)
    (folder / name).with_suffix(".yaml").write_text(yaml.safe_dump(description))
    return folder / name


def taming(folder, change=dict, *, attends=(1,), search="nearest", target="VQModel", **more):
    theirs = random_weights(published_vqgans.taming(attends=attends, search=search))
    resolutions = [16 // 2**i for i in attends]
    description = {"target": f"taming.models.vqgan.{target}", "params": params(attn_resolutions=resolutions)}
    return write(folder, change(theirs.state_dict()), {"model": description}, **more), theirs


def gumbel(folder, change=dict):
    return taming(folder, change, search="gumbel", target="GumbelVQ")


def segmentation(folder, change=dict):
    """With scores as numpy's scalars among Lightning's extras, and the buffer of colours."""

    def colored(state):
        return change({**state, "colorize": torch.zeros(3, 5, 1, 1)})

    callbacks = {"best": np.float64(0.5), "step": np.int64(3)}
    return taming(folder, colored, target="VQSegmentationModel", callbacks={"checkpoint": callbacks})


def bare(folder, change=dict):
    """A state dict without a training's state, as a `.pth`."""
    source, theirs = taming(folder, change)
    torch.save(change(theirs.state_dict()), source.with_suffix(".pth"))
    return source.with_suffix(".pth"), theirs


def safetensors(folder, change=dict):
    source, theirs = taming(folder, change)
    save_file(change(theirs.state_dict()), source.with_suffix(".safetensors"))
    return source.with_suffix(".safetensors"), theirs


def without_attention(folder, change=dict):
    """A first stage of latent diffusion, such as vq-f4-noattn."""
    theirs = random_weights(published_vqgans.taming(middle=False))
    described = params(attn_type="none", attn_resolutions=[])
    description = {"target": "ldm.models.autoencoder.VQModelInterface", "params": described}
    return write(folder, change(theirs.state_dict()), {"model": description}), theirs


def latent_diffusion(folder, change=dict):
    """The whole model, with the first stage's weights under a prefix and its description nested."""
    theirs = random_weights(published_vqgans.taming(attends=(0,)))
    first_stage = {"target": "ldm.models.autoencoder.VQModelInterface", "params": params(attn_resolutions=[16])}
    description = {"target": "ldm.models.diffusion.ddpm.LatentDiffusion", "params": {"first_stage_config": first_stage}}
    state = {f"first_stage_model.{name}": tensor for name, tensor in change(theirs.state_dict()).items()}
    state |= {"model.diffusion_model.out.0.weight": torch.zeros(3), "betas": torch.zeros(2)}
    state |= {"model_ema.diffusion_modelout0weight": torch.zeros(3), "first_stage_model.loss.logvar": torch.zeros(())}
    return write(folder, state, {"model": description}), theirs


def ibq(folder, change=dict):
    """With the last weights, which differ, and their average, which is the tokenizer."""
    theirs = random_weights(published_vqgans.taming(attends=(1,), search="dot"))
    state = change(theirs.state_dict())
    averages = {f"model_ema.{name.replace('.', '')}": tensor for name, tensor in state.items()}
    averages |= {"model_ema.decay": torch.tensor(0.999), "model_ema.num_updates": torch.tensor(3, dtype=torch.int)}
    averages |= {"model_ema.lossdiscriminatormain0weight": torch.zeros(2)}
    last = {name: tensor + 1 for name, tensor in state.items()}
    return write(folder, {**last, **averages}, {"model": ibq_description()}), theirs


def ibq_without_averages(folder, change=dict):
    theirs = random_weights(published_vqgans.taming(attends=(1,), search="dot"))
    return write(folder, change(theirs.state_dict()), {"model": ibq_description()}), theirs


def ibq_description():
    extra = {"l2_normalize": False, "use_entropy_loss": True, "use_ema": True, "resume_lr": None}
    return {"class_path": "src.IBQ.models.ibqgan.IBQ", "init_args": {**params(), **extra}}


CHAMELEON = {
    **{"model_type": "chameleon_vqgan", "embed_dim": WIDTH, "num_embeddings": CODES, "double_latent": False},
    **{"latent_channels": LATENT, "resolution": 16, "in_channels": 3, "base_channels": 32, "num_res_blocks": 1},
    **{"channel_multiplier": [1, 2], "attn_resolutions": None, "attn_type": "vanilla", "dropout": 0.0},
}


def chameleon(folder, change=dict):
    theirs = random_weights(published_vqgans.taming())
    (folder / "config.json").write_text(json.dumps(CHAMELEON))
    save_file(change(theirs.state_dict()), folder / "model.safetensors")
    return folder, theirs


def whole_chameleon(folder, change=dict):
    """With the language model, and the tokenizer's settings nested."""
    theirs = random_weights(published_vqgans.taming())
    (folder / "config.json").write_text(json.dumps({"model_type": "chameleon", "vq_config": CHAMELEON}))
    state = {f"model.vqmodel.{name}": tensor for name, tensor in change(theirs.state_dict()).items()}
    save_file({**state, "lm_head.weight": torch.zeros(2, 2)}, folder / "model.safetensors")
    return folder, theirs


def chameleon_in_parts(folder, change=dict):
    """Anole's folder: the tokenizer's weights are in two of three files, and there is an index."""
    source, theirs = whole_chameleon(folder, change)
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    files = {}
    for name in state:
        number = 3 if name.startswith("lm_head") else 1 if "encoder" in name else 2
        files[name] = f"model-0000{number}-of-00003.safetensors"
    for file in {*files.values()} - {"model-00003-of-00003.safetensors"}:  # which is not read
        save_file({name: state[name] for name in state if files[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    return source, theirs


def llamagen(folder, change=dict, **sizes):
    theirs = random_weights(published_vqgans.llamagen(**sizes))
    torch.save({"model": change(theirs.state_dict()), "steps": 7}, folder / "vq_ds16_c2i.pt")
    return folder / "vq_ds16_c2i.pt", theirs


def llamagen_folder(folder, change=dict):
    theirs = random_weights(published_vqgans.llamagen())
    described = {"codebook_size": 50, "codebook_embed_dim": 8, "codebook_l2_norm": True, "z_channels": 12}
    (folder / "config.json").write_text(json.dumps(described))
    save_file(change(theirs.state_dict()), folder / "model.safetensors")
    return folder, theirs


def janus(folder, change=dict):
    theirs = random_weights(published_vqgans.llamagen())
    state = {f"gen_vision_model.{name}": tensor for name, tensor in change(theirs.state_dict()).items()}
    torch.save({**state, "language_model.lm_head.weight": torch.zeros(2, 2)}, folder / "pytorch_model.bin")
    return folder / "pytorch_model.bin", theirs


def maskgit(folder, change=dict, **sizes):
    theirs = random_weights(published_vqgans.maskgit(**sizes))
    torch.save(change(theirs.state_dict()), folder / "maskgit-vqgan-imagenet-f16-256.bin")
    return folder / "maskgit-vqgan-imagenet-f16-256.bin", theirs


def mage(folder, change=dict):
    """MAGE's description names the class of taming-transformers, but describes another network."""
    theirs = random_weights(published_vqgans.maskgit(mage=True))
    description = {"target": "taming.models.vqgan.VQModel", "params": params()}
    return write(folder, change(theirs.state_dict()), {"model": description}), theirs


FORMATS = {
    "taming": (taming, "VQModel"),
    "gumbel": (gumbel, "GumbelVQ"),
    "segmentation": (segmentation, "VQSegmentationModel"),
    "bare": (bare, "VQModel"),
    "safetensors": (safetensors, "VQModel"),
    "without_attention": (without_attention, "VQModelInterface"),
    "latent_diffusion": (latent_diffusion, "VQModelInterface, the first stage of a latent-diffusion model"),
    "ibq": (ibq, "IBQ, averaged weights"),
    "ibq_without_averages": (ibq_without_averages, "IBQ"),
    "chameleon": (chameleon, "VQ-GAN of Chameleon"),
    "whole_chameleon": (whole_chameleon, "VQ-GAN of Chameleon, inside a whole model of transformers"),
    "chameleon_in_parts": (chameleon_in_parts, "VQ-GAN of Chameleon, inside a whole model of transformers"),
    "llamagen": (llamagen, "VQ tokenizer of LlamaGen"),
    "llamagen_folder": (llamagen_folder, "VQ tokenizer of LlamaGen"),
    "janus": (janus, "VQ tokenizer of LlamaGen, inside a Janus model"),
    "maskgit": (maskgit, "MaskGIT-VQGAN"),
    "mage": (mage, "MaskGIT-VQGAN"),
}
"""Writers by format, and what `convert` prints that it recognised."""
