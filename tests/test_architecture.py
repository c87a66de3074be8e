"""The structure of the code, read from its source: which folder may import which, sizes, and constructs never used."""

import ast
import re
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import jaxtyping
import pytest
import torch
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from smalti.core.codes import Level
from smalti.priors.head import FactorizedHead

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "smalti"
WINGS = ("tokenizers", "latentsets", "priors")
LINKED = (*WINGS, "scripts", "studies", "benchmarks")
LARGEST_FILE_LINES = 350
MOST_FILES_OF_A_FOLDER = 14
ONE_FILE_A_COMMAND = ROOT / "scripts"
"""The only folder without a limit: `smalti --help` lists its files, one for each command."""

RANKS = {
    "core": 0,
    **dict.fromkeys(["flags", "images", "training", "latentsets", "priors", "tokenizers.layers"], 1),
    **dict.fromkeys(["metrics", "tokenizers", "transfer", "tokenizers.quantizers", "priors.methods"], 2),
    **dict.fromkeys(["tokenizers.vq", "tokenizers.hqa", "tokenizers.selfvae", "priors.networks"], 3),
    **dict.fromkeys(["tokenizers.vqgan", "encoding"], 4),
    **dict.fromkeys(["commands", "cli"], 5),
    **dict.fromkeys(["api", "evaluation", "app", "demo", "benchmarks"], 6),
    **dict.fromkeys(["smalti", "studies"], 7),
    "scripts": 8,
    "__main__": 9,
}
"""A folder imports from folders of lower rank and from itself; two folders of one rank never import each other."""


def sources() -> dict[str, Path]:
    """Maps the dotted name of every module of the product to its file."""
    files = [file for file in PACKAGE.glob("**/*.py") if file.relative_to(PACKAGE).parts[0] not in LINKED]
    modules = {file.relative_to(PACKAGE): file for file in files}
    modules |= {file.relative_to(ROOT): file for folder in LINKED for file in (ROOT / folder).glob("**/*.py")}
    names = {".".join(("smalti", *path.with_suffix("").parts)): file for path, file in modules.items()}
    return {name.removesuffix(".__init__"): file for name, file in names.items()}


MODULES = sources()


def folder_of(name: str) -> str:
    """Returns the ranked folder of a module, or of an object in one: the longest one that its name begins with."""
    parts = name.split(".")[1:]
    for length in range(len(parts), 0, -1):
        folder = ".".join(parts[:length])
        if folder in RANKS and (length > 1 or len(parts) > 1 or folder in ("api", "cli", "flags", "demo", "__main__")):
            return folder
        if f"smalti.{folder}" in MODULES and length == 1 and folder not in RANKS:
            raise AssertionError(f"smalti.{folder} has no rank; give it one in RANKS")
    return parts[0] if parts and parts[0] in RANKS else "smalti"


def imports(source: str) -> set[str]:
    """Returns the modules, or objects in them, that a source imports by a statement or by `import_module("name")`."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            names |= {word.value for word in node.args if isinstance(word, ast.Constant)}
    return names


def forbidden_arrows(module: str, source: str) -> list[str]:
    """Returns the imports that go to a folder of the same or a higher rank, other than the module's own."""
    own = folder_of(module)
    used = [name for name in sorted(imports(source)) if name.split(".")[0] == "smalti" and folder_of(name) != own]
    return [name for name in used if RANKS[folder_of(name)] >= RANKS[own]]


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Returns every circle that a depth-first search of the graph closes."""
    found, finished = [], set()

    def visit(node: str, path: list[str]) -> None:
        if node in path:
            found.append([*path[path.index(node) :], node])
        elif node not in finished:
            for following in sorted(graph.get(node, ())):
                visit(following, [*path, node])
            finished.add(node)

    for node in sorted(graph):
        visit(node, [])
    return found


WRITE_TO_STDERR = ("smalti.__main__", "smalti.cli", "smalti.core.progress", "smalti.training.nan_and_stalls")
"""Modules whose lines on standard error name no files, or whose names are escaped already."""


def banned(source: str) -> list[str]:
    """Finds handlers that hide bugs, late annotations, relative imports, lax loading, unpickling, unescaped notes."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ExceptHandler):
            caught = ast.unparse(node.type) if node.type else ""
            passes_on = isinstance(node.body[-1], ast.Raise) and node.body[-1].exc is None
            if caught in ("", "Exception", "BaseException") and not passes_on:
                found.append(f"{node.lineno}: except {caught}")
        elif isinstance(node, ast.ImportFrom) and (node.level or node.module == "__future__"):
            found.append(f"{node.lineno}: {ast.unparse(node)}")
        elif isinstance(node, ast.Call):
            call = ast.unparse(node.func)
            values = {word.arg: ast.unparse(word.value) for word in node.keywords}
            lax = values.get("strict") == "False" and call != "zip"
            unpickles = values.get("weights_only") == "False" or (call == "torch.load" and "weights_only" not in values)
            is_note = values.get("file") == "sys.stderr"  # progress.print_note escapes control characters
            if lax or unpickles or is_note:
                found.append(f"{node.lineno}: {ast.unparse(node)}")
    return found


def test_folders_import_only_lower_folders():
    arrows = {module: forbidden_arrows(module, file.read_text()) for module, file in MODULES.items()}
    assert {module: names for module, names in arrows.items() if names} == {}


def test_no_file_imports_itself_through_others():
    graph = {
        module: {used if used in MODULES else used.rpartition(".")[0] for used in imports(file.read_text())} - {module}
        for module, file in MODULES.items()
    }
    assert circles({module: used & MODULES.keys() for module, used in graph.items()}) == []


def test_circle_is_found():
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == [["b", "c", "b"]]


def test_nothing_banned_is_used():
    uses = {module: banned(file.read_text()) for module, file in MODULES.items() if module not in WRITE_TO_STDERR}
    assert {module: found for module, found in uses.items() if found} == {}


@pytest.mark.parametrize(
    ("module", "source", "arrows"),
    [
        ("smalti.priors.base", "from smalti.tokenizers.base import X", ["smalti.tokenizers.base.X"]),
        ("smalti.priors.base", "from smalti.priors.methods.sundae import X", ["smalti.priors.methods.sundae.X"]),
        ("smalti.priors.base", "from smalti import latentsets", ["smalti.latentsets"]),
        ("smalti.priors.base", "import_module('smalti.tokenizers.base')", ["smalti.tokenizers.base"]),
        ("smalti.priors.base", "def f():\n    from smalti.commands import p", ["smalti.commands.p"]),
        (
            "smalti.tokenizers.vq.vqvae",
            "from smalti.tokenizers.vqgan.losses import X",
            ["smalti.tokenizers.vqgan.losses.X"],
        ),
        ("smalti.core.codes", "import smalti.priors.head", ["smalti.priors.head"]),
        ("smalti.core.codes", "from smalti import load_prior", ["smalti.load_prior"]),
        ("smalti.core.codes", "import smalti", ["smalti"]),
        ("smalti.commands.sample", "from smalti.scripts.sample import main", ["smalti.scripts.sample.main"]),
        ("smalti.priors.base", "from smalti.priors.head import c\nfrom smalti.core import codes\nimport torch", []),
        ("smalti.tokenizers.vqgan.vqgan", "from smalti.tokenizers.base import c\nimport smalti.metrics.frechet", []),
        ("smalti.scripts.sample", "from smalti import load_prior\nfrom smalti.commands.sample import c", []),
        ("smalti", "from smalti.core.models import load\nfrom smalti.priors.methods import sundae", []),
    ],
)
def test_planted_arrow_is_found(module, source, arrows):
    assert forbidden_arrows(module, source) == arrows


@pytest.mark.parametrize(
    "source",
    [
        "model.load_state_dict(s, strict=False)",
        "torch.load(p, weights_only=False)",
        "torch.load(p)",
        "try:\n    f()\nexcept:\n    pass",
        "try:\n    f()\nexcept Exception as e:\n    pass",
        "from __future__ import annotations",
        "from .codes import Level",
        "print(f'{name}', file=sys.stderr)",
    ],
)
def test_planted_ban_is_found(source):
    assert len(banned(source)) == 1


def test_allowed_constructs_are_not_banned():
    reraised = "try:\n    f()\nexcept BaseException:\n    g()\n    raise"
    assert banned(f"zip(a, b, strict=False)\ntorch.load(p, weights_only=True)\n{reraised}") == []


def test_docstrings_are_sentences():
    """None begins as a fragment does: a search for it would find half a sentence."""
    fragment = re.compile(r'"{3}(Of|What|So|As|That|How|Where|Whether) ')
    files = [*MODULES.values(), *ROOT.glob("tests/**/*.py"), *ROOT.glob("examples/*.py")]
    found = {str(file.relative_to(ROOT)): fragment.findall(file.read_text()) for file in files}
    assert {name: words for name, words in found.items() if words} == {}


def test_linked_folders_are_links_without_init():
    """An `__init__.py` in tokenizers/ would hide Hugging Face's `tokenizers` from whoever has the root on the path."""
    for folder in LINKED:
        assert (PACKAGE / folder).readlink() == Path("..", "..", folder)
        assert not list((ROOT / folder).glob("**/__init__.py"))


def test_shapes_are_checked_under_pytest():
    """The import hook of conftest.py works in the package and through the links."""
    with pytest.raises(jaxtyping.TypeCheckError):
        Level(2, 2, (4,)).split(torch.zeros(1, 2, 2))
    with pytest.raises(jaxtyping.TypeCheckError):
        FactorizedHead((4,), 8).nll(torch.zeros(1, 3, 8), torch.zeros(1, 2, dtype=torch.int64))


def test_files_and_folders_are_small():
    files = [*MODULES.values(), *ROOT.glob("tests/**/*.py")]
    lengths = {str(file.relative_to(ROOT)): len(file.read_text().splitlines()) for file in files}
    assert {name: length for name, length in lengths.items() if length > LARGEST_FILE_LINES} == {}
    folders = {file.parent for file in files} - {ONE_FILE_A_COMMAND}
    counts = {folder: sum(file.parent == folder for file in files) for folder in folders}
    assert {folder: count for folder, count in counts.items() if count > MOST_FILES_OF_A_FOLDER} == {}


OPTIONAL = {"cv2": "opencv-python-headless"}
"""Packages that may not be installed, or from another package of that name, by the name that is imported."""


def test_imports_match_requirements():
    """An import that is not required breaks on a clean machine; a requirement that nothing imports is dead weight."""
    tops = {name.split(".")[0] for file in MODULES.values() for name in imports(file.read_text())}
    owners = packages_distributions()
    tops -= sys.stdlib_module_names | {"smalti"}
    # the extras `lpips` and `opencv` may not be installed
    names = {top: OPTIONAL.get(top) or owners.get(top, [top])[0] for top in tops}
    imported = {canonicalize_name(name) for name in names.values()}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    wanted = ("metrics", "app", "bench", "entropy", "lpips", "opencv")
    required = [*project["dependencies"], *(line for extra in wanted for line in extras[extra])]
    assert imported == {canonicalize_name(Requirement(line).name) for line in required}
