"""`inspect_latents`: the summary, verification, pictures of codes, and plots."""

import sys

import h5py
import numpy as np
import pytest
import torch
from helpers.build_toys import CONFIG
from helpers.latents import PROVENANCE, make_codes, write
from PIL import Image

from smalti.commands import inspect_latents as inspecting
from smalti.commands.inspect_latents import ranking, save_codes
from smalti.core.codes import Layout, Level
from smalti.latentsets.provenance import Provenance
from smalti.latentsets.reader import LatentSet
from smalti.scripts import inspect_latents
from smalti.tokenizers.vq.hrvq import HRVQ


@pytest.fixture
def workspace(tmp_path, monkeypatch):
    """A tokenizer and a set of its codes: code c occurs more often than c + 1, the last two codes never."""
    torch.manual_seed(0)
    tokenizer = HRVQ(CONFIG)
    tokenizer.save(tmp_path / "tokenizer")
    (level,) = tokenizer.layout.levels
    codes = torch.arange(14).repeat_interleave(torch.arange(30, 2, -2))[:236].view(-1, level.height, level.width)
    origin = {"tokenizer_digest": tokenizer.digest(), "tokenizer_source": "tokenizer"}
    write(tmp_path / "latents.h5", tokenizer.layout, (codes,), [0], Provenance(**{**vars(PROVENANCE), **origin}))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(monkeypatch, capsys, *flags):
    monkeypatch.setattr(sys, "argv", ["inspect_latents.py", "--latents", "latents.h5", *flags])
    try:
        inspect_latents.main()
    except SystemExit as left:
        return left.code, capsys.readouterr().err
    return 0, capsys.readouterr().out


def test_summary_picture_and_plot_count_the_codes_once(workspace, monkeypatch, capsys):
    counted, usage = [], LatentSet.usage
    monkeypatch.setattr(LatentSet, "usage", lambda self, level: counted.append(level) or usage(self, level))
    assert run(monkeypatch, capsys, "--codes", "codes.png", "--plot", "plot.png")[0] == 0
    assert counted == [0]


def test_summary_verification_picture_and_plot(workspace, monkeypatch, capsys):
    status, out = run(monkeypatch, capsys, "--verify", "--codes", "codes.png", "--plot", "plot.png")
    assert status == 0
    assert "first digit     4 of 4 used" in out
    assert "first 2 digits  14 of 16 used (87.5%)" in out
    assert "the digests match; codes, labels, sources and splits are valid" in out
    assert Image.open("codes.png").width > 12 * 96
    plot = np.asarray(Image.open("plot.png").convert("RGB"))
    colours = {tuple(colour) for colour in plot.reshape(-1, 3)}
    assert {(31, 119, 180), (255, 127, 14)} <= colours  # a line for each digit


@pytest.mark.parametrize("kind", ["pdf", "svg", "SVG", "PNG"])
def test_plots_of_other_kinds(workspace, monkeypatch, capsys, kind):
    assert run(monkeypatch, capsys, "--plot", f"plot.{kind}")[0] == 0
    begin = {"pdf": b"%PDF-", "svg": b"<?xml", "png": b"\x89PNG\r"}[kind.lower()]
    assert (workspace / f"plot.{kind}").read_bytes()[:5] == begin


def test_a_plot_whose_suffix_is_in_capitals_is_recognised(workspace, monkeypatch, capsys):
    for _ in range(2):
        assert run(monkeypatch, capsys, "--plot", "plot.PNG")[0] == 0


def test_an_unknown_format_is_refused(workspace, monkeypatch, capsys):
    for flag, name, message in (
        ("--plot", "plot.xyz", "plot.xyz cannot be drawn; give a name that ends in .png, .pdf or .svg"),
        ("--codes", "codes.jpg", "--codes codes.jpg is not the name of a PNG"),
    ):
        status, err = run(monkeypatch, capsys, flag, name)
        assert (status, message in err) == (2, True), err
        assert not (workspace / name).exists()


def test_the_most_and_the_least_used_codes_are_decoded(workspace, monkeypatch):
    rows = {}
    monkeypatch.setattr(inspecting, "save_sheet", lambda _, sheet, **more: rows.update(sheet))
    latent_set, tokenizer = LatentSet("latents.h5"), HRVQ.load("tokenizer")
    save_codes(workspace / "x.png", latent_set, tokenizer, latent_set.usage, shown=3)
    most, least = rows.values()
    assert most.equal(tokenizer.decode((torch.tensor([0, 1, 2]).view(3, 1, 1).expand(3, 2, 2),)).detach())
    assert least.equal(tokenizer.decode((torch.tensor([11, 12, 13]).view(3, 1, 1).expand(3, 2, 2),)).detach())
    assert list(rows) == [
        "level 0: the most used codes (13 % to 11 %)",
        "level 0: the least used codes (3.4 % to 0.85 %)",
    ]


def test_other_levels_hold_their_most_used_code(tmp_path):
    layout = Layout((Level(1, 1, (5,)), Level(1, 2, channels=2), Level(2, 2, (3,))))
    codes = make_codes(layout, 40)
    codes[0][:], codes[0][:9] = 4, 1
    write(tmp_path / "latents.h5", layout, codes, [0])
    counts = inspecting._counts(layout, LatentSet(tmp_path / "latents.h5").usage)
    rankings = {index: ranking(each) for index, each in counts.items()}
    coarse, reals, fine = inspecting._uniform_codes(layout, rankings, 2, torch.tensor([2, 0]))
    assert coarse.tolist() == [[[4]], [[4]]]
    assert (reals.shape, reals.dtype, reals.any()) == ((2, 2, 1, 2), torch.float32, False)
    assert fine.tolist() == [[[2, 2], [2, 2]], [[0, 0], [0, 0]]]
    ranked, shares = rankings[0]
    assert (ranked.tolist(), shares.tolist()) == ([4, 1], pytest.approx([31 / 40, 9 / 40]))


def test_a_corrupted_byte_and_another_tokenizer_are_refused(workspace, monkeypatch, capsys):
    torch.manual_seed(1)
    HRVQ(CONFIG).save(workspace / "other")
    status, err = run(monkeypatch, capsys, "--codes", "codes.png", "--tokenizer", "other")
    assert status == 2
    assert "was made by the tokenizer" in err
    with h5py.File("latents.h5") as file:
        offset = file["codes/0"].id.get_offset()
    with open("latents.h5", "r+b") as file:
        file.seek(offset + 3)
        file.write(b"\x01")
    status, err = run(monkeypatch, capsys, "--verify")
    assert status == 2
    assert err.startswith("error: latents.h5 is damaged: its content has digest")
    assert err.count("\n") == 1


@pytest.mark.parametrize("flag", ["--codes", "--plot"])
def test_real_valued_latents_have_no_codes_to_show(workspace, monkeypatch, capsys, flag):
    layout = Layout((Level(2, 2, channels=3),))
    write(workspace / "latents.h5", layout, (torch.zeros(8, 3, 2, 2),), [0], PROVENANCE)
    status, err = run(monkeypatch, capsys, flag, "x.png")
    assert status == 2
    assert "holds no codes but real-valued latents; leave --codes and --plot out" in err
    assert not (workspace / "x.png").exists()
