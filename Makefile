# The commands of a clone. Each does its own set-up, so it works as the first thing typed on a machine that has Python 3.11 or newer, make and git.
# DEV_EXTRAS has a name because its comma would part the arguments of a call.
# What is installed is pinned in constraints.txt. Where packages come from is pip's own configuration (PIP_FIND_LINKS, PIP_EXTRA_INDEX_URL, ...).

.DEFAULT_GOAL := help
.NOTPARALLEL: # the two set-ups below write to one environment
.PHONY: help setup demo lint type test bench clean

unexport PYTHONDONTWRITEBYTECODE # where it is set, every process would compile anew all that it imports: seconds each

VENV := .venv
PYTHON := $(VENV)/bin/python
# Written last, so that each exists only beside a finished install. An install that was cut short starts from an empty environment (what was
# downloaded is in pip's cache): pip takes a package whose files are half there for installed.
RUNTIME := $(VENV)/.installed
DEV := $(VENV)/.installed-dev
DEV_EXTRAS := .[dev,metrics,app,bench]

define FIND_PYTHON
for python in python3 python3.13 python3.12 python3.11 python3.14 python; do \
    if $$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then exec $$python -m venv --clear $(VENV); fi; \
done; \
echo 'smalti needs Python 3.11 or newer, and none is on PATH: install one, then run make again' >&2; exit 1
endef

define INSTALL
@test -e $(RUNTIME) || { $(FIND_PYTHON); }
@rm -f $(RUNTIME) $(DEV)
$(PYTHON) -m pip install --disable-pip-version-check --no-compile --constraint constraints.txt --editable $(1)
@touch $(RUNTIME)
endef

$(RUNTIME): pyproject.toml constraints.txt
	$(call INSTALL,.)

$(DEV): pyproject.toml constraints.txt
	$(call INSTALL,'$(DEV_EXTRAS)')
	@touch $@

help: ## list these targets
	@sed -n 's/^\([a-z]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 10

setup: $(DEV) ## install smalti and the tools of its developers into .venv

# glibc keeps memory for the next step, in place of giving it back to the system each time; elsewhere nothing reads these
demo: export MALLOC_MMAP_THRESHOLD_ = 4294967296
demo: export MALLOC_TRIM_THRESHOLD_ = 8589934592
demo: $(RUNTIME) ## train on the embedded emoji, sample and inpaint, into runs/demo
	$(PYTHON) scripts/demo.py

lint: $(DEV) ## check the code's style
	$(PYTHON) -m ruff check
	$(PYTHON) -m ruff format --check

type: $(DEV) ## check the code's types
	$(PYTHON) -m pyright

test: $(DEV) ## run the tests
	$(PYTHON) -m pytest -n 2 --dist loadfile --no-loadscope-reorder

bench: $(RUNTIME) ## measure the speeds that the documentation states
	$(PYTHON) scripts/benchmark.py

clean: ## remove the environment and the caches; runs/ stays
	rm -rf $(VENV) dist .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -prune -exec rm -rf {} +
