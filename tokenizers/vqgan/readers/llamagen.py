"""Imports LlamaGen's VQ tokenizers, also those in Janus checkpoints. Their sizes follow from the weights' shapes."""

from dataclasses import dataclass
from functools import partial

from smalti.core.config import added
from smalti.core.errors import UserError
from smalti.tokenizers.vqgan.readers.files import described, read_description
from smalti.tokenizers.vqgan.readers.names import LLAMAGEN, matched_names
from smalti.tokenizers.vqgan.readers.weights import PUBLISHED_SIZE, Checkpoint, config_of, import_weights
from smalti.tokenizers.vqgan.vqgan import VQGAN

_USAGE = "quantize.codebook_used"  # codes of the last training batches


@dataclass(frozen=True)
class _Settings:
    """Fields of the `config.json` that the hub's mixin writes; None where the weights alone say it."""

    codebook_size: int | None = added(None)
    codebook_embed_dim: int | None = added(None)
    z_channels: int | None = added(None)
    codebook_l2_norm: bool = added(True)


def from_llamagen(checkpoint: Checkpoint) -> VQGAN:
    """Imports a VQ-8 or VQ-16, whose vectors and codewords are both scaled to length 1.

    Raises:
        UserError: if the weights are not LlamaGen's, or contradict the `config.json` beside them.
    """
    checkpoint = checkpoint.without(_USAGE)
    stages = range(checkpoint.count("encoder.conv_blocks.{}.res.0.conv1.weight"))
    branching, code_width = checkpoint.axes("quantize.embedding.weight", 2)
    sizes = {
        "code_width": code_width,
        "branching": branching,
        "latent_width": checkpoint.axes("encoder.conv_out.weight", 4)[0],
    }
    settings = _settings(checkpoint)
    declared = {
        "code_width": settings.codebook_embed_dim,
        "branching": settings.codebook_size,
        "latent_width": settings.z_channels,
    }
    for name, size in declared.items():
        if size not in (None, sizes[name]):
            path = checkpoint.description
            raise UserError(f"{path} does not match {checkpoint.source.name}: {name} is {size}, not {sizes[name]}")
    config = config_of(
        checkpoint,
        size=PUBLISHED_SIZE,
        image_channels=checkpoint.axes("encoder.conv_in.weight", 4)[1],
        widths=tuple(checkpoint.axes(f"encoder.conv_blocks.{i}.res.0.conv1.weight", 4)[0] for i in stages),
        residual_blocks=checkpoint.count("encoder.conv_blocks.0.res.{}.conv1.weight"),
        attention_stages=tuple(i for i in stages if f"encoder.conv_blocks.{i}.attn.0.q.weight" in checkpoint.state),
        quantizer="cosine" if settings.codebook_l2_norm else "linked",
        **sizes,
    )
    return import_weights(config, checkpoint, partial(matched_names, names=LLAMAGEN))


def _settings(checkpoint: Checkpoint) -> _Settings:
    if checkpoint.description == checkpoint.source:  # there is none
        return _Settings()
    return described(_Settings, read_description(checkpoint.description), checkpoint.description)
