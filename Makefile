# Commands for a checkout. Each does its own set-up, so it works as the first command on a machine with Python 3.11 or newer, make and git.
# DEV_EXTRAS is a variable because its comma would separate the arguments of a call.
# Versions are pinned in constraints.txt. pip's own configuration (PIP_FIND_LINKS, PIP_EXTRA_INDEX_URL, ...) selects the package index.

.DEFAULT_GOAL := help
.NOTPARALLEL: # the set-ups below write to one environment
.PHONY: help setup demo lint type test lowest bench gpu docs clean

unexport PYTHONDONTWRITEBYTECODE # with it, every process would compile its imports again, which takes seconds

VENV := .venv
PYTHON := $(VENV)/bin/python
# These stamps are written last, so each exists only after a finished install. After an interrupted install, which leaves no $(RUNTIME), the next one
# starts from an empty environment, because pip takes packages with half of their files for installed. Downloads are in pip's cache.
RUNTIME := $(VENV)/.installed
DEV := $(VENV)/.installed-dev
DOCS := $(VENV)/.installed-docs
LOWEST := .venv-lowest
DEV_EXTRAS := .[dev,metrics,app,bench,entropy]
ifeq ($(wildcard $(RUNTIME)),)
$(shell rm -f $(DEV) $(DOCS))
endif

define FIND_PYTHON
for python in python3 python3.13 python3.12 python3.11 python3.14 python; do \
    if $$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then exec $$python -m venv --clear $(VENV); fi; \
done; \
echo 'smalti needs Python 3.11 or newer, and none is on PATH: install one, then run make again' >&2; exit 1
endef

define INSTALL
@test -e $(RUNTIME) || { $(FIND_PYTHON); }
@rm -f $(RUNTIME)
$(PYTHON) -m pip install --disable-pip-version-check --no-compile --constraint constraints.txt --editable $(1)
@touch $(RUNTIME)
endef

$(RUNTIME): pyproject.toml constraints.txt
	$(call INSTALL,.)

$(DEV): pyproject.toml constraints.txt
	$(call INSTALL,'$(DEV_EXTRAS)')
	@touch $@

$(DOCS): pyproject.toml constraints.txt
	$(call INSTALL,'.[docs]')
	@touch $@

help: ## list these targets
	@sed -n 's/^\([a-z]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 10

setup: $(DEV) ## install smalti and the tools of its developers into .venv

# glibc keeps memory for the next step instead of returning it to the system; other C libraries ignore these
demo: export MALLOC_MMAP_THRESHOLD_ = 4294967296
demo: export MALLOC_TRIM_THRESHOLD_ = 8589934592
demo: $(RUNTIME) ## train on the embedded portraits, sample and inpaint, into runs/demo
	$(PYTHON) scripts/demo.py

lint: $(DEV) ## check the code's style
	$(PYTHON) -m ruff check
	$(PYTHON) -m ruff format --check

type: $(DEV) ## check the code's types
	$(PYTHON) -m pyright

test: $(DEV) ## run the tests
	$(PYTHON) -m pytest -n 2 --dist loadfile --no-loadscope-reorder

# torch keeps its pinned version: on Linux the others come with gigabytes of CUDA
lowest: $(RUNTIME) ## run the tests with the lowest versions that pyproject.toml allows, in .venv-lowest
	$(PYTHON) -m venv --clear $(LOWEST)
	grep -oE '"[a-z][A-Za-z0-9_-]*(\[[a-z]+\])?>=[0-9.]+"' pyproject.toml | sed -E 's/"|\[[a-z]+\]//g; s/>=/==/; /^torch==/d' > $(LOWEST)/versions.txt
	grep '^torch==' constraints.txt >> $(LOWEST)/versions.txt
	$(LOWEST)/bin/python -m pip install --no-compile --constraint $(LOWEST)/versions.txt --editable '$(DEV_EXTRAS)'
	$(LOWEST)/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

bench: $(RUNTIME) ## measure the speeds that the documentation states
	$(PYTHON) scripts/benchmark.py

gpu: export MINUTES ?=
gpu: $(RUNTIME) ## measure and train what needs a GPU: the commands of docs/gpu.md
	$(PYTHON) -m smalti.benchmarks.gpu

docs: export NO_MKDOCS_2_WARNING = 1
docs: $(DOCS) ## build the documentation as a site, into site/
	$(PYTHON) -m mkdocs build --strict

clean: ## remove the environment and the caches; runs/ stays
	rm -rf $(VENV) $(LOWEST) dist site .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -prune -exec rm -rf {} +
