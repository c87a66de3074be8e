"""The arrows of the design and the bans of the house, read from the source. What the code does is not for here."""

import ast
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
LINKED = (*WINGS, "scripts")
LARGEST_FILE_LINES = 350

# Who stands on whom: a layer may use those of a lower rank, and itself. The wings share a rank, so they never meet.
RANKS = {"spine": 0, **dict.fromkeys(WINGS, 1), "pipeline": 2, "facade": 3, "scripts": 4}


def layer(name: str) -> str:
    """The layer of a module or of an object in one; what is no module is the façade's, `smalti/__init__.py`."""
    first = name.split(".")[1] if "." in name else "__init__"
    if first in RANKS:
        return first
    module = PACKAGE / first
    return "spine" if first != "__init__" and (module.is_dir() or module.with_suffix(".py").exists()) else "facade"


def sources() -> dict[str, Path]:
    """Dotted name of every module of the product, and its file."""
    files = [file for file in PACKAGE.glob("**/*.py") if file.relative_to(PACKAGE).parts[0] not in LINKED]
    modules = {file.relative_to(PACKAGE): file for file in files}
    modules |= {file.relative_to(ROOT): file for folder in LINKED for file in (ROOT / folder).glob("**/*.py")}
    names = {".".join(("smalti", *path.with_suffix("").parts)): file for path, file in modules.items()}
    return {name.removesuffix(".__init__"): file for name, file in names.items()}


def imports(source: str) -> set[str]:
    """The modules, or objects in them, that a source imports: by a statement, or by `import_module` of a plain name."""
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
    """The imports that go up, or from wing to wing."""
    rank = RANKS[layer(module)]
    used = [name for name in sorted(imports(source)) if name.split(".")[0] == "smalti" and layer(name) != layer(module)]
    return [name for name in used if RANKS[layer(name)] >= rank]


def banned(source: str) -> list[str]:
    """What is never written: handlers that swallow bugs, late annotations, relative imports, lax loads, unpickling."""
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
            if lax or unpickles:
                found.append(f"{node.lineno}: {ast.unparse(node)}")
    return found


MODULES = sources()


@pytest.mark.parametrize("module", sorted(MODULES))
def test_arrows_point_one_way(module):
    assert forbidden_arrows(module, MODULES[module].read_text()) == []


@pytest.mark.parametrize("module", sorted(MODULES))
def test_nothing_banned(module):
    assert banned(MODULES[module].read_text()) == []


@pytest.mark.parametrize(
    ("module", "source", "arrows"),
    [
        ("smalti.priors.a", "from smalti.tokenizers.vq.hrvq import X", ["smalti.tokenizers.vq.hrvq.X"]),
        ("smalti.priors.a", "from smalti import latentsets", ["smalti.latentsets"]),
        ("smalti.priors.a", "import_module('smalti.tokenizers.vq.hrvq')", ["smalti.tokenizers.vq.hrvq"]),
        ("smalti.priors.a", "def f():\n    from smalti.pipeline import p", ["smalti.pipeline.p"]),
        ("smalti.core.codes", "import smalti.priors.head", ["smalti.priors.head"]),
        ("smalti.core.codes", "from smalti import load", ["smalti.load"]),
        ("smalti.core.codes", "import smalti", ["smalti"]),
        ("smalti.pipeline.a", "from smalti.scripts.sample import main", ["smalti.scripts.sample.main"]),
        ("smalti.priors.a", "from smalti.priors.b import c\nfrom smalti import codes\nimport torch", []),
        ("smalti.pipeline.a", "from smalti.priors.b import c\nfrom smalti.pipeline.d import e", []),
        (
            "smalti.scripts.a",
            "from smalti import load\nfrom smalti.pipeline.b import c\nimport smalti.latentsets.d",
            [],
        ),
        ("smalti", "from smalti.core.models import load\nfrom smalti.priors import sundae", []),
    ],
)
def test_a_planted_arrow_is_seen(module, source, arrows):
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
    ],
)
def test_a_planted_ban_is_seen(source):
    assert len(banned(source)) == 1


def test_what_is_allowed_is_not_taken_for_banned():
    reraised = "try:\n    f()\nexcept BaseException:\n    g()\n    raise"
    assert banned(f"zip(a, b, strict=False)\ntorch.load(p, weights_only=True)\n{reraised}") == []


def test_every_linked_folder_is_a_link_without_init():
    """An `__init__.py` in tokenizers/ would hide Hugging Face's `tokenizers` from whoever has the root on the path."""
    for folder in LINKED:
        assert (PACKAGE / folder).readlink() == Path("..", "..", folder)
        assert not (ROOT / folder / "__init__.py").exists()


def test_shapes_are_checked_in_these_tests():
    """The hook of conftest.py is on, in the spine and through the links."""
    with pytest.raises(jaxtyping.TypeCheckError):
        Level(2, 2, (4,)).split(torch.zeros(1, 2, 2))
    with pytest.raises(jaxtyping.TypeCheckError):
        FactorizedHead((4,), 8).nll(torch.zeros(1, 3, 8), torch.zeros(1, 2, dtype=torch.int64))


def test_files_are_small():
    lengths = {
        str(file.relative_to(ROOT)): len(file.read_text().splitlines())
        for file in (*MODULES.values(), *ROOT.glob("tests/*.py"))
    }
    assert {name: length for name, length in lengths.items() if length > LARGEST_FILE_LINES} == {}


def test_what_is_imported_is_what_is_required():
    """Both ways: an unlisted import breaks on a clean machine, and a requirement that nobody imports is dead weight."""
    tops = {name.split(".")[0] for file in MODULES.values() for name in imports(file.read_text())}
    owners = packages_distributions()
    tops -= sys.stdlib_module_names | {"smalti"}
    imported = {canonicalize_name(owners.get(top, [top])[0]) for top in tops}  # the extra `lpips` may not be installed
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    wanted = ("metrics", "app", "bench", "lpips")
    required = [*project["dependencies"], *(line for extra in wanted for line in extras[extra])]
    assert imported == {canonicalize_name(Requirement(line).name) for line in required}
