"""Readers of published formats: imported tokenizers give the same codes and images as the networks of the projects."""

import pytest
import torch
from helpers.parity import agree
from helpers.published_checkpoints import FORMATS, llamagen, maskgit, write

from smalti.commands.model_paths import load_tokenizer
from smalti.scripts import convert
from smalti.scripts.convert import Convert
from smalti.tokenizers.vqgan.convert import import_checkpoint


@pytest.mark.parametrize("name", FORMATS)
def test_converted_tokenizer_computes_the_same(name, tmp_path, capsys):
    writer, recognised = FORMATS[name]
    (tmp_path / "published").mkdir()
    source, theirs = writer(tmp_path / "published")
    convert.convert(Convert(source, out=tmp_path / "converted"))
    assert capsys.readouterr().out.splitlines()[0] == f"{source}: recognised as {recognised}"
    agree(load_tokenizer(str(tmp_path / "converted")), theirs, size=16)


@pytest.mark.parametrize("widths", [(32, 64, 64, 32), (32, 32, 32, 64, 32)], ids=["VQ-8", "VQ-16"])
def test_stages_of_llamagen_follow_from_the_weights(widths, tmp_path):
    source, theirs = llamagen(tmp_path, widths=widths)
    ours = import_checkpoint(source)
    assert (ours.config.widths, ours.config.attention_stages) == (widths, (len(widths) - 1,))
    assert (ours.config.quantizer, ours.layout.levels[0].height) == ("cosine", 256 // 2 ** (len(widths) - 1))
    agree(ours, theirs, size=32)


def test_blocks_of_maskgit_follow_from_the_weights(tmp_path):
    source, theirs = maskgit(tmp_path, widths=(32, 64), blocks=3)
    ours = import_checkpoint(source)
    assert (ours.config.widths, ours.config.residual_blocks) == ((32, 64), 3)
    agree(ours, theirs, size=16)


def test_first_stage_alone_may_be_described_by_the_whole_model(tmp_path):
    source, theirs = FORMATS["latent_diffusion"][0](tmp_path)
    write(tmp_path, theirs.state_dict(), {}, name="alone.ckpt")
    agree(import_checkpoint(tmp_path / "alone.ckpt", source.with_suffix(".yaml")), theirs)


def test_half_precision_is_widened(tmp_path):
    source, theirs = llamagen(tmp_path, lambda state: {name: tensor.half() for name, tensor in state.items()})
    ours = import_checkpoint(source)
    assert {tensor.dtype for tensor in ours.state_dict().values()} == {torch.float32}
    agree(ours, theirs.half().float(), size=16)
