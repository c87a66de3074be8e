"""Checkpoint conversion: recognises another system's VQ-GAN by the names of its weights and imports it.

The networks compute the same as smalti's under other names; each format has its reader in `readers/`. Every weight must
be matched. Only what inference does not need is left out: training losses, and the rest of a larger model.
"""

from pathlib import Path

from torch import Tensor

from smalti.core.checkpoint_checks import some
from smalti.core.errors import UserError
from smalti.tokenizers.vqgan.readers.diffusers import from_diffusers
from smalti.tokenizers.vqgan.readers.files import read_weights, weights_files
from smalti.tokenizers.vqgan.readers.llamagen import from_llamagen
from smalti.tokenizers.vqgan.readers.maskgit import from_maskgit
from smalti.tokenizers.vqgan.readers.taming import from_chameleon, from_taming
from smalti.tokenizers.vqgan.readers.weights import Checkpoint
from smalti.tokenizers.vqgan.vqgan import VQGAN

_LARGER_MODELS = {
    "first_stage_model.": ", the first stage of a latent-diffusion model",
    "gen_vision_model.": ", inside a Janus model",
    "model.vqmodel.": ", inside a whole model of transformers",
}
"""Prefixes of a tokenizer's weights in the file of a larger model, and what that is."""


def import_checkpoint(source: Path, description: Path | None = None) -> VQGAN:
    """Imports a VQ-GAN of another system. Its `provenance` records the recognised format.

    Args:
        source: the file of the weights, or a folder with weights and a `config.json`.
        description: the file that describes the network, for formats that have one; by default `config.json` in the
            folder, or the weights' file with the suffix `.yaml`.

    Raises:
        UserError: if the format is not recognised, a file cannot be read, `description` is given for a format that has
            none, or the network differs from smalti's VQ-GAN.
    """
    files = weights_files(source, _LARGER_MODELS) if source.is_dir() else [source]
    state, where = _tokenizer({name: tensor for file in files for name, tensor in read_weights(file).items()})
    weights = files[0] if len(files) == 1 else source
    config = files[0].with_name("config.json")

    def checkpoint(path: Path, kind: str = "") -> Checkpoint:
        return Checkpoint(state, weights, sum(file.stat().st_size for file in files), path, f"{kind}{where}")

    if _has(state, "encoder.conv_blocks."):
        beside = config if source.is_dir() and config.exists() else weights
        return from_llamagen(checkpoint(description or beside, "VQ tokenizer of LlamaGen"))
    if _has(state, "encoder.down_blocks."):
        return from_diffusers(checkpoint(description or config, "VQModel of diffusers"))
    if _has(state, "encoder.down.") and not state.keys() & {"encoder.conv_in.bias", "quant_conv.weight"}:
        if description is not None:
            raise UserError(f"the weights of a MaskGIT-VQGAN describe it; leave --description {description} out")
        return from_maskgit(checkpoint(weights, "MaskGIT-VQGAN"))
    if _has(state, "encoder.down."):
        path = description or (config if source.is_dir() else weights.with_suffix(".yaml"))
        return (from_chameleon if path.suffix == ".json" else from_taming)(checkpoint(path))
    if _has(state, "quantizer.codebook"):
        raise UserError(f"{source} is smalti's already; use it as --tokenizer, or export it with --to diffusers")
    raise UserError(f"{weights} holds no VQ-GAN that convert reads: its weights are {some(sorted(state)) or 'missing'}")


def _has(state: dict[str, Tensor], beginning: str) -> bool:
    return any(name.startswith(beginning) for name in state)


def _tokenizer(state: dict[str, Tensor]) -> tuple[dict[str, Tensor], str]:
    """Returns a tokenizer's weights without those of training losses, and the larger model that they were in."""
    where = ""
    for prefix, larger in _LARGER_MODELS.items():
        if _has(state, prefix):
            state = {name.removeprefix(prefix): state[name] for name in state if name.startswith(prefix)}
            where = larger
    return {name: tensor for name, tensor in state.items() if not name.startswith("loss.")}, where
