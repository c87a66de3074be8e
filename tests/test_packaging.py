"""The wheel and its commands, the set-up (pins, make), and names that the repository must not hide.

What the commands do is for other tests.
"""

import os
import re
import shutil
import subprocess
import sys
import time
import tomllib
import zipfile
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from smalti.__main__ import COMMANDS

ROOT = Path(__file__).parents[1]
CHECKOUT_ONLY = ("benchmarks", "studies")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def run(*command: str | Path, folder: Path, **variables: str | Path) -> str:
    """Returns the output of a command in `folder`, without our PYTHONPATH and the variables of a `make` around us."""
    hidden = ("PYTHONPATH", "MAKEFLAGS", "MAKELEVEL", "MFLAGS")
    environment = {name: value for name, value in os.environ.items() if name not in hidden} | variables
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def contents(wheel: Path) -> dict[str, bytes]:
    """Every file in a wheel but RECORD, which is only a list of the others."""
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist() if not name.endswith("/RECORD")}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built from the tree, without the network: the build backend is one of the development tools."""
    folder = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder, ROOT, folder=folder)
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    """A folder with the wheel's package and commands in it, ahead of the editable install when it is on PYTHONPATH."""
    folder = tmp_path_factory.mktemp("installed")
    pip = (sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--disable-pip-version-check")
    run(*pip, "--target", folder, wheel, folder=folder)
    return folder


def test_hugging_face_tokenizers_stay_theirs():
    """With the root on the path the folder tokenizers/ is found first, and must still give way to a regular package."""
    code = "import sys; sys.path.insert(0, '.'); import tokenizers, smalti.tokenizers as ours"
    code += "; print(tokenizers.__file__, *ours.__path__)"
    theirs, ours = run(sys.executable, "-c", code, folder=ROOT).split()
    assert "site-packages" in theirs
    assert Path(ours).resolve() == ROOT / "tokenizers"


def test_wheel_holds_the_product_and_nothing_else(wheel):
    package = ROOT / "src" / "smalti"
    product = [folder for folder in package.iterdir() if folder.is_symlink() and folder.name not in CHECKOUT_ONLY]
    folders = [package, *product]
    files = {path for folder in folders for path in folder.glob("**/*") if path.is_file() and path.suffix != ".pyc"}
    files -= {package / "scripts" / f"{name}.py" for name in ("benchmark", "reproduce")}
    information = f"smalti-{PROJECT['version']}.dist-info/"
    named = {f"{information}{name}" for name in ("METADATA", "WHEEL", "entry_points.txt")}
    named |= {f"{information}licenses/{name}" for name in ("LICENSE", "NOTICE")}
    packed = contents(wheel)
    assert set(packed) == named | {str(path.relative_to(ROOT / "src")) for path in files}
    data = Path("smalti/images/data/emoji32.parquet")
    assert packed[str(data)] == (ROOT / "src" / data).read_bytes()


def test_source_distribution_builds_the_same_wheel(wheel, tmp_path):
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", tmp_path, ROOT, folder=tmp_path)
    assert contents(next(tmp_path.glob("*.whl"))) == contents(wheel)


def test_installed_command_runs_outside_the_repository(installed, tmp_path):
    smalti = installed / "bin" / "smalti"
    listed = run(smalti, folder=tmp_path, PYTHONPATH=installed)
    assert "train-tokenizer  Train a tokenizer" in listed
    assert "benchmark" not in listed
    assert "reproduce" not in listed
    printed = run(smalti, "train-tokenizer", "--help", folder=tmp_path, PYTHONPATH=installed)
    assert "usage: smalti train-tokenizer" in printed
    assert "scripts/" not in printed
    code = """
from importlib import import_module
import smalti, smalti.__main__ as entry
from smalti.images.image_set import open_images
for name in entry.available():
    assert callable(import_module(f"smalti.scripts.{name.replace('-', '_')}").main)
print(smalti.__file__, len(open_images("emoji")))
"""
    file, images = run(sys.executable, "-c", code, folder=tmp_path, PYTHONPATH=installed).split()
    assert Path(file).is_relative_to(installed)
    assert int(images) > 1000


def test_every_script_is_a_command():
    scripts = {file.stem.replace("_", "-") for file in ROOT.glob("scripts/*.py")}
    assert scripts == COMMANDS.keys()
    assert PROJECT["scripts"] == {"smalti": "smalti.__main__:main"}


def test_every_package_that_gets_installed_is_pinned():
    """Follows the requirements of the requirements, as pip would; each pin satisfies whoever asks for the package."""
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    assert lines == sorted(lines, key=str.lower)
    pins = {canonicalize_name(name): pinned.split()[0] for name, pinned in (line.split("==") for line in lines)}
    rare = {canonicalize_name(line.split("==")[0]) for line in lines if line.endswith(("# docs", "# ray"))}
    optional = PROJECT["optional-dependencies"]
    names = ("dev", "metrics", "app", "bench", "entropy", "lpips", "docs", "ray")
    extras = [line for extra in names for line in optional[extra]]
    reached, waiting = set(), [*map(Requirement, PROJECT["dependencies"] + extras)]
    while waiting:
        requirement = waiting.pop()
        name = canonicalize_name(requirement.name)
        assert requirement.specifier.contains(pins[name]), requirement
        if (name, *requirement.extras) in reached:
            continue
        reached.add((name, *requirement.extras))
        try:
            further = [Requirement(line) for line in requires(name) or []]
        except PackageNotFoundError:
            continue  # for another platform than this, or installed by other means
        if name == "torch":  # its CUDA build brings libraries that it pins itself, marked with the platform
            further = [each for each in further if not each.marker]
        asked = ("", *requirement.extras)
        waiting += [
            each for each in further if not each.marker or any(each.marker.evaluate({"extra": e}) for e in asked)
        ]
    names = {name for name, *_ in reached}
    assert names - rare == pins.keys() - rare  # the extras docs and ray are rarely installed where tests run
    assert names <= pins.keys()


STAND_IN = """#!/bin/sh
# A Python that only notes what it is asked to do: too old if OLD is set, with an install that fails if BROKEN is.
case "$*" in
    -c*) exit ${OLD:-0} ;;
    *"venv --clear"*) rm -rf .venv; mkdir -p .venv/bin; cp "$0" .venv/bin/python ;;
    *pip*) test -z "$BROKEN" || exit 1 ;;
esac
echo "$*" >> asked
"""


@pytest.fixture
def make(tmp_path):
    """Runs make on a copy of the Makefile, with a stand-in for Python; gives what Python was asked to do."""
    program = shutil.which("make")
    if not program:
        pytest.skip("make is not installed")
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    stand_in = tmp_path / "bin" / "python3"
    stand_in.parent.mkdir()
    stand_in.write_text(STAND_IN)
    stand_in.chmod(0o755)

    def asked(*targets: str, path: str = ":/usr/bin:/bin", **variables: str) -> list[str]:
        (tmp_path / "asked").write_text("")
        run(program, *targets, folder=tmp_path, PATH=f"{stand_in.parent}{path}", **variables)
        return [line.removeprefix("-m ").split()[0] for line in (tmp_path / "asked").read_text().splitlines()]

    return asked


def test_make_installs_once_and_only_what_is_needed(make, tmp_path):
    assert make("demo") == ["venv", "pip", "scripts/demo.py"]
    assert make("demo") == ["scripts/demo.py"]
    assert make("lint", "type", "test") == ["pip", "ruff", "ruff", "pyright", "pytest"]
    assert make("demo", "bench", "test") == ["scripts/demo.py", "scripts/benchmark.py", "pytest"]
    later = time.time() + 10
    os.utime(tmp_path / "constraints.txt", (later, later))
    assert make("test") == ["pip", "pytest"]


def test_make_starts_an_interrupted_install_anew(make):
    with pytest.raises(AssertionError):
        make("test", BROKEN="1")
    assert make("test") == ["venv", "pip", "pytest"]
    with pytest.raises(AssertionError):
        make("--always-make", "setup", BROKEN="1")
    assert make("demo") == ["venv", "pip", "scripts/demo.py"]


def test_make_says_when_python_is_too_old(make):
    with pytest.raises(AssertionError, match=r"smalti needs Python 3\.11 or newer, and none is on PATH"):
        make("setup", OLD="1", path="")


@pytest.mark.skipif(not shutil.which("make"), reason="make is not installed")
def test_bare_make_lists_every_target():
    targets = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert targets
    assert [line.split()[0] for line in run("make", folder=ROOT).splitlines()] == targets[1].split()
