"""Outputs of every command: they are no inputs, replace nothing of others, are locked, and are checked before the work.

A new command that writes needs an entry in `WRITERS`.
"""

import json
import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from helpers import toys
from helpers.command_toys import run, save_pair
from PIL import Image

from smalti.__main__ import COMMANDS
from smalti.commands.build_latents import BuildLatents, build_latents
from smalti.commands.compress import Compress, compress
from smalti.core import models
from smalti.evaluation.config import TokenizerEvaluation
from smalti.evaluation.result_files import settings_of

NOT_WRITERS = {"app", "benchmark", "reproduce"}
"""The page writes into a temporary folder of its own; the other two write Markdown for this checkout."""
FIT = "--steps 1 --batch-size 4 --warmup-steps 0"
TOKENIZER = f"--images photos --height 8 --width 8 --widths 4 4 --residual-blocks 1 --code-width 4 --depth 2 {FIT}"
PRIOR = f"--latents latents.h5 --model-width 16 --heads 2 --depth 1 1 1 {FIT}"
SAMPLE = "--prior pair --num 2 --steps 1"
PAIR = "--prior pair"


class Writer(NamedTuple):
    """A command line without its output.

    Attributes:
        command: the command's name.
        flags: everything but the output.
        output: the name of its output.
        first: the first file that it writes, if the output is a folder.
        flag: the flag of the output.
    """

    command: str
    flags: str
    output: str
    first: str = ""
    flag: str = "--out"

    def run(self, capfd, output):
        """Returns the exit status, and standard error's last line."""
        main = import_module(f"smalti.scripts.{self.command.replace('-', '_')}").main
        status, _, err = run(capfd, main, *self.flags.split(), self.flag, output)
        return status, err.splitlines()[-1] if err else ""


WRITERS = {
    "demo": Writer("demo", "--tokenizer-steps 1 --prior-steps 1", "demo", "report.md"),
    "tokenizer": Writer("train-tokenizer", TOKENIZER, "run", "model.safetensors"),
    "latents": Writer("build-latents", "--tokenizer pair/tokenizer --images photos --workers 0", "l.h5"),
    "codes": Writer("inspect-latents", "--latents latents.h5", "codes.png", flag="--codes"),
    "plot": Writer("inspect-latents", "--latents latents.h5", "plot.pdf", flag="--plot"),
    "table": Writer("convert-latents", "--latents latents.h5", "table.parquet"),
    "prior": Writer("train-prior", PRIOR, "run", "model.safetensors"),
    "samples": Writer("sample", SAMPLE, "sheet.png"),
    "sample files": Writer("sample", f"{SAMPLE} --files", "many.png"),
    "mode": Writer("sample", "--mode generation --tokenizer trained/selfvae --num 2", "mode.png"),
    "fills": Writer("inpaint", f"{PAIR} --image one.png --mask mask.png --steps 1", "fill.png"),
    "folder of fills": Writer("inpaint", f"{PAIR} --image photos --mask mask.png --steps 1", "fills", "0.png"),
    **{f"{of} evaluated": Writer("evaluate", f"--of {of} {PAIR}", "e.json") for of in ("prior", "inpainting")},
    **{
        f"{of} evaluated": Writer("evaluate", f"--of {of} --tokenizer trained/selfvae", "e.json")
        for of in ("tokenizer", "modes", "likelihood")
    },
    "evaluation again": Writer("evaluate", "--again again.json", "e.json"),
    "compressed": Writer("compress", "--tokenizer pair/tokenizer --images one.png", "c.smalti"),
    "decompressed": Writer("compress", "--tokenizer pair/tokenizer --codes one.smalti", "back", "one.png"),
    "pushed": Writer("push", "pair me/pair", "look", "README.md", flag="--preview"),
    "pushed codes": Writer("push", "latents.h5 me/codes", "codes", "README.md", flag="--preview"),
    "converted": Writer("convert", "--source trained/vqgan --to diffusers", "vqmodel"),
}
EACH = pytest.mark.parametrize("writer", WRITERS.values(), ids=WRITERS)
MADE_FROM_IMAGES = {name: writer for name, writer in WRITERS.items() if name not in ("demo", "converted")}
HOLDER = """
import sys
from contextlib import ExitStack
from pathlib import Path
from smalti.core import locks
with ExitStack() as stack:
    for path, kind in zip(sys.argv[1::2], sys.argv[2::2]):
        stack.enter_context(locks.writing(Path(path), folder=kind == "folder"))
    print("locked", flush=True)
    sys.stdin.read()
"""


@pytest.fixture(scope="module", autouse=True)
def workspace(tmp_path_factory):
    """A working folder with models that record `photos` as their training images, and inputs of every command."""
    folder = tmp_path_factory.mktemp("outputs")
    before = Path.cwd()
    os.chdir(folder)
    save_pair(folder / "pair")
    for path in (folder / "pair", folder / "pair/tokenizer"):
        family = "prior" if path.name == "pair" else "tokenizer"
        model = models.load(path, family)
        model.provenance["image_source"] = "photos"
        model.save(path)
    for kind in ("selfvae", "vqgan"):
        torch.manual_seed(0)
        model = models.class_of_kind("tokenizer", kind)(toys.TINY[kind])
        model.provenance = {"image_source": "photos"}
        model.save(folder / "trained" / kind)
    Path("photos").mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (4, 8, 16, 3)).astype(np.uint8)
    for index, image in enumerate(pixels):
        Image.fromarray(image).save(f"photos/{index}.png")
    Image.fromarray(pixels[0]).save("one.png")
    mask = Image.new("L", (16, 8))
    mask.paste(255, (4, 2, 8, 5))
    mask.save("mask.png")
    compress(Compress("pair/tokenizer", images="one.png", out=Path("one.smalti")))
    build_latents(BuildLatents("pair/tokenizer", images="photos", workers=0, out=Path("latents.h5")))
    settings = settings_of(TokenizerEvaluation(tokenizer="trained/selfvae"))
    Path("again.json").write_text(json.dumps({"settings": settings, "scores": {}, "conditions": {}}))
    (folder / "link").symlink_to("photos")
    yield folder
    os.chdir(before)


def files(folder):
    return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def test_every_command_that_writes_is_tested():
    assert {writer.command for writer in WRITERS.values()} | NOT_WRITERS == set(COMMANDS)


@pytest.mark.parametrize("writer", MADE_FROM_IMAGES.values(), ids=MADE_FROM_IMAGES)
def test_outputs_among_the_images_are_refused(workspace, capfd, writer):
    """By another spelling of their folder; a picture there would become an image."""
    before = files(workspace)
    for folder in ("photos", "pair/../link"):
        status, error = writer.run(capfd, f"{folder}/{writer.output}")
        assert status == 2
        assert error.startswith(f"error: {writer.flag} {folder}/{writer.output}")
        assert "lies inside the input folder photos" in error
    assert files(workspace) == before


@EACH
def test_files_of_others_are_not_replaced(workspace, capfd, tmp_path, writer):
    other = tmp_path / writer.output / writer.first
    other.parent.mkdir(parents=True, exist_ok=True)
    other.write_text("mine")
    status, error = writer.run(capfd, tmp_path / writer.output)
    assert (status, error.startswith("error: ")) == (2, True)
    assert str(other) in error or str(tmp_path / writer.output) in error
    assert other.read_text() == "mine"
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [other]


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("latents", "pair/tokenizer/model.safetensors"),
        ("plot", "latents.h5"),
        ("table", "latents.h5"),
        ("prior", "latents.h5"),
        ("fills", "one.png"),
        ("fills", "mask.png"),
        ("evaluation again", "again.json"),
        ("compressed", "one.png"),
        ("converted", "trained/vqgan"),
    ],
)
@pytest.mark.parametrize("link", ["symbolic", "hard"])
def test_an_output_that_links_to_an_input_is_refused(workspace, capfd, tmp_path, name, source, link):
    writer, before = WRITERS[name], files(workspace)
    if link == "symbolic" or Path(source).is_dir():
        (tmp_path / writer.output).symlink_to(workspace / source)
    else:
        (tmp_path / writer.output).hardlink_to(source)
    status, error = writer.run(capfd, tmp_path / writer.output)
    assert status == 2
    assert "would overwrite an input" in error or "exists and this command did not make it" in error
    assert files(workspace) == before


@EACH
def test_outputs_that_cannot_be_written_are_refused_at_once(workspace, capfd, writer):
    before = files(workspace)
    status, error = writer.run(capfd, f"again.json/{writer.output}")
    assert status == 2
    assert "cannot be written: a part of its path is a file" in error
    assert files(workspace) == before


def test_the_second_command_with_an_output_is_told(workspace, capfd):
    """One other process writes all outputs at once."""
    Path("locked").mkdir()
    outputs = {name: f"locked/{number}-{writer.output}" for number, (name, writer) in enumerate(WRITERS.items())}
    arguments = []
    for name, output in outputs.items():
        arguments += [output, "folder" if WRITERS[name].first else "file"]
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout
    assert process.stdout.readline() == "locked\n"
    for name, output in outputs.items():
        status, error = WRITERS[name].run(capfd, output)
        assert (name, status, error) == (
            name,
            2,
            f"error: {output} is being written by another process; wait until it is done, or give another --out",
        )
    process.communicate("")
    assert [path for path in Path("locked").rglob("*") if path.is_file()] == []


def test_training_a_prior_keeps_another_tokenizer_that_is_in_its_folder(workspace, capfd, tmp_path):
    """The folder may be that of a trained or converted tokenizer, in a subfolder called `tokenizer`."""
    torch.manual_seed(1)
    models.class_of_kind("tokenizer", "hrvq")(toys.TINY["hrvq"]).save(tmp_path / "run/tokenizer")
    before = files(tmp_path)
    status, error = WRITERS["prior"].run(capfd, tmp_path / "run")
    assert (status, "run/tokenizer holds another tokenizer than that of the latent set" in error) == (2, True)
    assert files(tmp_path) == before
