# Everything a developer runs. `make demo` and `make test` do all the setup themselves.
#
# torch: constraints.txt pins the version. On a machine whose package index has no CPU build of it, pip takes
# the default one, with gigabytes of CUDA; to avoid that, give the index of the CPU builds:
#   make setup PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.set-up
# More than two cores have work for: the tests wait for Slurm much of the time. With more cores, make test JOBS=8.
JOBS ?= 3

export PIP_DISABLE_PIP_VERSION_CHECK = 1

.PHONY: help setup demo test check fuzz soak clean

help:  ## Show this.
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 10

setup: $(STAMP)  ## Make .venv with the project and all that it is developed with.

$(STAMP): setup.cfg pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	    { echo "$(PYTHON) is too old or missing: Python 3.10 or later is needed; say which: make setup PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' || \
	    { echo "$(PYTHON) has no venv module; on Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }
	@rm -f $@
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

demo: $(STAMP)  ## Interrupt a small GPT twice, on 2, 1 and 3 ranks, and compare it with an uninterrupted one.
	$(BIN)/python examples/demo.py

test: $(STAMP)  ## Run the whole suite, on a private Slurm cluster too.
	$(BIN)/python -m pytest -n $(JOBS) --dist loadgroup

check: $(STAMP)  ## Lint, types, layers.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

SECONDS ?= 60

fuzz: $(STAMP)  ## Fuzz the readers of manifests and shards for a minute, or SECONDS=N; takes atheris from PyPI.
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[fuzz]'
	$(BIN)/python -m tests.fuzz --seconds $(SECONDS)

INTERRUPTIONS ?= 100
MINUTES ?= 30

soak: $(STAMP)  ## Interrupt ten runs on a private Slurm cluster 100 times, in every way; INTERRUPTIONS=N MINUTES=N.
	@mkdir -p .cache
	$(BIN)/python -m tests.soak --interruptions $(INTERRUPTIONS) --minutes $(MINUTES) --json .cache/soak.json

clean:  ## Remove what the targets above have made, except runs/.
	rm -rf $(VENV) .cache .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache build dist
	rm -rf *.egg-info
