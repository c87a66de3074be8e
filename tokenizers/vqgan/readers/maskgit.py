"""Imports PyTorch ports of MaskGIT's VQGAN: open-muse's, which RAR and TiTok use, and MAGE's. They differ in names.

Sizes follow from the weights' shapes.
"""

import dataclasses
from functools import partial

import torch

from smalti.tokenizers.vqgan.readers.names import matched_maskgit_names
from smalti.tokenizers.vqgan.readers.weights import PUBLISHED_SIZE, Checkpoint, config_of, import_weights
from smalti.tokenizers.vqgan.vqgan import VQGAN


def from_maskgit(checkpoint: Checkpoint) -> VQGAN:
    """Imports a MaskGIT-VQGAN. It was trained on images in [0, 1]; the imported one takes [-1, 1], as all of smalti's.

    Raises:
        UserError: if the weights are not a whole MaskGIT-VQGAN.
    """
    checkpoint = dataclasses.replace(checkpoint, description=checkpoint.source)
    stages = range(checkpoint.count("encoder.down.{}.block.0.conv1.weight"))
    branching, code_width = checkpoint.axes("quantize.embedding.weight", 2)
    config = config_of(
        checkpoint,
        size=PUBLISHED_SIZE,
        image_channels=checkpoint.axes("encoder.conv_in.weight", 4)[1],
        widths=tuple(checkpoint.axes(f"encoder.down.{i}.block.0.conv1.weight", 4)[0] for i in stages),
        residual_blocks=checkpoint.count("encoder.down.0.block.{}.conv1.weight"),
        latent_width=code_width,
        code_width=code_width,
        branching=branching,
        middle_attention=False,
        architecture="maskgit",
    )
    mage = "encoder.mid.block_1.conv1.weight" in checkpoint.state
    names = (
        partial(matched_maskgit_names, middle="mid.block_", first=1, upsample="up.{i}.upsample.conv")
        if mage
        else partial(matched_maskgit_names, middle="mid.", first=0, upsample="up.{i}.upsample_conv")
    )
    model = import_weights(config, checkpoint, names)
    last = model.decoder[-1]
    with torch.no_grad():  # 2 y - 1 of its images y
        last.get_parameter("weight").mul_(2)
        last.get_parameter("bias").mul_(2).sub_(1)
    return model
