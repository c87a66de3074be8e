"""Hooks of the documentation's build (`mkdocs.yml`): a package that mkdocstrings can read, and pages from the root."""

import re
import shutil
import tempfile
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.plugins import event_priority
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
ROOT_PAGES = {f"{name.upper()}.md": f"{name}.md" for name in ("architecture", "contributing", "changelog")}
PACKAGE_COPY = tempfile.TemporaryDirectory(prefix="smalti-docs-")  # removed when Python exits


@event_priority(100)  # before mkdocstrings reads its paths
def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Points mkdocstrings to a copy of the package in which every folder has an `__init__.py`.

    Its parser skips folders without one, and the folders in the root must have none (ARCHITECTURE.md gives the reason).
    """
    folder = Path(PACKAGE_COPY.name)
    ignored = shutil.ignore_patterns("__pycache__", "*.parquet")
    shutil.copytree(ROOT / "src" / "smalti", folder / "smalti", ignore=ignored, dirs_exist_ok=True)
    for directory in [path for path in folder.glob("smalti/**/") if path.is_dir()]:
        (directory / "__init__.py").touch()
    config.plugins["mkdocstrings"].config.handlers["python"]["paths"] = [str(folder)]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds pages of the repository's root, with their links rewritten for the site."""
    for name, page in ROOT_PAGES.items():
        text = re.sub(r"\]\(docs/", "](", (ROOT / name).read_text(encoding="utf-8"))
        for other, target in ROOT_PAGES.items():
            text = text.replace(f"]({other}", f"]({target}")
        files.append(File.generated(config, page, content=text))
    return files
