"""The documentation against the code: commands and their flags, links, paths, and the programs in README and guide."""

import re
import shlex
import sys
from dataclasses import asdict, replace
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from smalti import cli, load_tokenizer
from smalti.commands.train_tokenizer import RESIZABLE, TrainTokenizer
from smalti.core.files import write_json
from smalti.core.models import class_of_kind
from smalti.tokenizers.vq.hrvq import HRVQConfig
from smalti.transfer.weights import take_weights

ROOT = Path(__file__).parents[1]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted(ROOT.glob("docs/**/*.md"))]
README, LIBRARY = ROOT / "README.md", ROOT / "docs" / "guide" / "library.md"
STARTS = ("smalti ", "python scripts/", "accelerate launch ", "torchrun ")

TOY = {
    "train-tokenizer": "--steps 2 --batch-size 8 --height 8 --width 8 --widths 6 8 --residual-blocks 1 --code-width 6"
    " --depth 2 --branching 4 --precision fp32",
    "train-prior": "--steps 2 --batch-size 8 --model-width 16 --heads 2 --depth 1 1 1 --feedforward-mult 2"
    " --precision fp32",
    "train-prior transformer": "--steps 2 --batch-size 8 --model-width 16 --heads 2 --layers 1 --precision fp32",
    "sample": "--num 4 --steps 2",
    "sample transformer": "--num 4",
    "inpaint": "--steps 2 --candidates 2",
}
"""Flags that make the README's commands small, appended to them; those of a transformer have other names."""


def code_lines(text: str) -> list[str]:
    """Returns the lines of fenced and indented blocks, continuation lines joined, without Python programs."""
    text = re.sub(r"```python\n.*?```", "", text, flags=re.DOTALL)
    fenced = "\n".join(re.findall(r"```\w*\n(.*?)```", text, flags=re.DOTALL)).splitlines()
    indented = [line for line in text.splitlines() if line.startswith("    ")]
    return [line.strip() for line in re.sub(r"\\\n\s*", "", "\n".join(fenced + indented)).splitlines()]


def commands(page: Path) -> list[tuple[str, list[str]]]:
    """Returns the commands that a page shows: the name and the arguments of each."""
    words = [shlex.split(line, comments=True) for line in code_lines(page.read_text()) if line.startswith(STARTS)]
    return [name_and_arguments(line) for line in words]


def name_and_arguments(words: list[str]) -> tuple[str, list[str]]:
    """Splits a command line after the name of the command, and drops what launches it."""
    if words[0] == "smalti":
        return words[1], words[2:]
    if "-m" in words:
        module = words.index("-m")
        assert words[module + 1] == "smalti"
        return words[module + 2], words[module + 3 :]
    script = next(place for place, word in enumerate(words) if word.startswith("scripts/"))
    return Path(words[script]).stem.replace("_", "-"), words[script + 1 :]


def main_of(name: str):
    """Returns the `main` of a command."""
    return import_module(f"smalti.scripts.{name.replace('-', '_')}").main


def call(monkeypatch: pytest.MonkeyPatch, name: str, arguments: list[str]) -> int | str | None:
    """Runs a command in this process; returns its exit status."""
    monkeypatch.setattr(sys, "argv", [f"smalti {name}", *arguments])
    try:
        main_of(name)()
    except SystemExit as stopped:
        return stopped.code
    return 0


def values(arguments: list[str], flag: str) -> list[str]:
    """Returns the values that follow a flag."""
    if flag not in arguments:
        return []
    following = arguments[arguments.index(flag) + 1 :]
    return following[: next((place for place, word in enumerate(following) if word.startswith("--")), None)]


def describe_prior(folder: Path) -> None:
    """Writes the `config.json` of a prior, whose flags depend on it; its kind is a part of the folder's name."""
    kinds = [kind for kind in ("pixelcnn", "transformer", "maskgit", "realnvp") if kind in folder.name]
    folder.mkdir(parents=True, exist_ok=True)
    kind = (*kinds, "hourglass")[0]
    network = asdict(class_of_kind("prior", kind).config_class())
    fields = {"family": "prior", "kind": kind, "config": network, "digest": "", "provenance": {}}
    write_json(folder / "config.json", fields)


def describe_tokenizer(folder: Path) -> None:
    """Writes the `config.json` of a tokenizer, whose network the flags of `--init` begin with."""
    folder.mkdir(parents=True, exist_ok=True)
    fields = {"family": "tokenizer", "kind": "hrvq", "config": asdict(HRVQConfig()), "digest": "", "provenance": {}}
    write_json(folder / "config.json", fields)


def test_commands_of_all_pages_parse(monkeypatch, tmp_path, capsys):
    """Each is parsed by its own parser, so that no page names a command or a flag that does not exist, or a tokenizer
    whose settings are refused.
    """
    monkeypatch.chdir(tmp_path)
    parsed, parse = [], cli.run
    monkeypatch.setattr(cli, "run", lambda _, config, **more: parse(parsed.append, config, **more))
    wrong, count = [], 0
    for page in PAGES:
        for name, arguments in commands(page):
            for prior in values(arguments, "--prior"):
                if "/" in prior:
                    describe_prior(Path(prior))
            describe = describe_prior if name == "train-prior" else describe_tokenizer
            for other in values(arguments, "--init"):
                if "/" in other:
                    describe(Path(other))
            count += 1
            if status := call(monkeypatch, name, arguments):
                said = capsys.readouterr().err.strip()
                wrong.append(f"{page.relative_to(ROOT)}: {name} {shlex.join(arguments)}: {status}, {said}")
    assert wrong == []
    assert len(parsed) == count > 80
    trainings = [config for config in parsed if isinstance(config, TrainTokenizer)]
    assert len(trainings) > 20
    with torch.device("meta"):  # without the weights of the large ones
        for config in trainings:
            class_of_kind("tokenizer", config.tokenizer)(config.model)


def test_fine_tuning_of_tokenizers_names_its_images():
    """Without `--images`, the example would train on the embedded portraits."""
    tuned = [args for page in PAGES for name, args in commands(page) if name == "train-tokenizer" and "--init" in args]
    assert len(tuned) >= 4
    assert all("--images" in arguments for arguments in tuned), tuned


def test_the_printed_table_of_new_weights_is_the_real_one():
    portraits = load_tokenizer("portraits")
    grey = type(portraits)(replace(portraits.config, image_channels=1))
    lines = take_weights(grey, portraits, "portraits", resizable=RESIZABLE).lines("portraits", portraits.digest())
    page = (ROOT / "docs" / "guide" / "fine-tune.md").read_text()
    assert "".join(f"    {line}\n" for line in lines) in page


def test_commands_are_found_in_blocks(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "`smalti none`\n\n    smalti sample --num 4 \\\n        --seed 1   # comment\n\n```python\nsmalti = 1\n```\n\n"
        "- item\n\n      accelerate launch --num_processes 8 -m smalti train-prior --steps 2\n\n"
        "```\ntorchrun --nnodes 2 scripts/build_latents.py --workers 1\n```\n"
    )
    assert sorted(commands(page)) == [
        ("build-latents", ["--workers", "1"]),
        ("sample", ["--num", "4", "--seed", "1"]),
        ("train-prior", ["--steps", "2"]),
    ]


@cache
def anchors(page: Path) -> set[str]:
    """Returns the anchors of headings that are the same on GitHub and on the site."""
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    headings = [
        re.sub(r"[`*]", "", heading).strip().lower() for heading in re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    ]
    plain = [re.sub(r"[^\w\s-]", "", heading) for heading in headings]
    return {heading.replace(" ", "-") for heading in plain} & {re.sub(r"[\s-]+", "-", heading) for heading in plain}


def test_links_between_pages_lead_somewhere():
    broken = []
    for page in PAGES:
        prose = re.sub(r"```.*?```|`[^`\n]*`", "", page.read_text(), flags=re.DOTALL)
        for target in re.findall(r"\]\(([^)\s]+)\)", prose):
            if "://" in target or target.startswith("mailto:"):
                continue
            path, _, anchor = target.partition("#")
            file = (page.parent / path).resolve() if path else page
            if not file.exists() or (anchor and anchor not in anchors(file)):
                broken.append(f"{page.relative_to(ROOT)}: {target}")
    assert broken == []


def test_site_lists_every_page():
    """mkdocs refuses others too, but is installed for `make docs` only."""

    def files(entry: object) -> list[str]:
        if isinstance(entry, str):
            return [entry]
        parts = entry.values() if isinstance(entry, dict) else entry
        return [file for part in parts for file in files(part)]

    listed = set(files(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]))
    from_root = {"architecture.md", "changelog.md", "contributing.md"}  # added by docs/hooks.py
    pages = {str(page.relative_to(ROOT / "docs")) for page in ROOT.glob("docs/**/*.md")}
    assert listed == pages | from_root


def test_api_pages_name_modules():
    names = [name for page in ROOT.glob("docs/api/*.md") for name in re.findall(r"^::: (\S+)$", page.read_text(), re.M)]
    assert len(names) > 50
    assert [name for name in names if find_spec(name) is None] == []


def test_architecture_names_existing_paths():
    words = re.findall(r"`([\w./]+)`", (ROOT / "ARCHITECTURE.md").read_text() + (ROOT / "CONTRIBUTING.md").read_text())
    paths = {word for word in words if "/" in word and (word.endswith((".py", "/")))}
    examples = {"tokenizers/vq/mine.py"}
    nested = [ROOT, ROOT / "src" / "smalti", ROOT / "tokenizers"]
    assert len(paths) > 50
    assert {path for path in paths - examples if not any((folder / path).exists() for folder in nested)} == set()


def test_architecture_names_existing_symbols():
    """Reads the last two words of a table's cell, such as "`Class.method` in `file`"."""
    text = (ROOT / "ARCHITECTURE.md").read_text()
    pairs = re.findall(r"`(?:\w+\.)?(\w+)`(?: and `\w+\.\w+`)? (?:in |\()`([\w/]+\.py)`", text)
    sources = {file: (ROOT / file).read_text() for _, file in pairs}
    assert len(pairs) > 6
    assert [
        pair for pair in pairs if not re.search(rf"\b(?:def|class) {pair[0]}\b|^{pair[0]}\b", sources[pair[1]], re.M)
    ] == []


def test_code_names_existing_pages():
    """Help texts and docstrings point to pages; studies write theirs where they are."""
    folders = ("src", "scripts", "studies", "benchmarks", "tokenizers", "latentsets", "priors", "examples")
    files = [file for folder in folders for file in ROOT.glob(f"{folder}/**/*.py")]
    named = {name for file in files for name in re.findall(r"\bdocs/[\w/-]+\.md", file.read_text())}
    assert {name for name in named if not (ROOT / name).exists()} == set()


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder in which the README's commands were run at toy size, from training to inpainting."""
    folder = tmp_path_factory.mktemp("readme")
    (folder / "my" / "photos").mkdir(parents=True)
    random = np.random.default_rng(0)
    for index in range(40):
        Image.fromarray(random.integers(0, 256, (8, 8, 3)).astype(np.uint8)).save(folder / f"my/photos/{index}.png")
    Image.fromarray(random.integers(0, 256, (8, 8, 3)).astype(np.uint8)).save(folder / "in.png")
    mask = np.zeros((8, 8), np.uint8)
    mask[1:5, 2:7] = 255
    Image.fromarray(mask).save(folder / "mask.png")
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.chdir(folder)
        for name, arguments in commands(README):
            if name in ("train-tokenizer", "build-latents", "train-prior", "sample", "inpaint"):
                kind = " transformer" if "transformer" in " ".join(arguments) else ""
                assert call(monkeypatch, name, [*arguments, *TOY.get(name + kind, "").split()]) == 0, name
    return folder


def test_readme_path_runs(trained):
    results = ["runs/tokenizers/photos/model.safetensors", "runs/latents/photos.h5", "runs/priors/photos/config.json"]
    results += ["samples.png", "samples-transformer.png", "out.png", "out-2.png", "out-3.png", "out-sheet.png"]
    assert [name for name in results if not (trained / name).exists()] == []


def programs(page: Path) -> list[str]:
    found = re.findall(r"```python\n(.*?)```", page.read_text(), flags=re.DOTALL)
    assert found, page
    return found


def test_readme_programs_run(trained, monkeypatch):
    monkeypatch.chdir(trained)
    for program in programs(README):
        exec(compile(program, "README.md", "exec"), {})


def test_library_programs_run(trained, monkeypatch):
    monkeypatch.chdir(trained)
    for copy, original in {"prior": "priors/photos", "tokenizer": "tokenizers/photos"}.items():
        (trained / "runs/demo").mkdir(exist_ok=True)
        (trained / "runs/demo" / copy).symlink_to(trained / "runs" / original)
    for copy in ("runs/demo/latents.h5", "runs/latents/hrvq.h5"):
        (trained / copy).symlink_to(trained / "runs/latents/photos.h5")
    pixelcnn = "--prior pixelcnn --latents runs/latents/photos.h5 --steps 1 --batch-size 8 --model-width 8 --layers 2"
    assert call(monkeypatch, "train-prior", [*pixelcnn.split(), "--precision", "fp32"]) == 0
    for program in programs(LIBRARY):
        exec(compile(program, "library.md", "exec"), {})
    assert (trained / "fill-2.png").exists()
