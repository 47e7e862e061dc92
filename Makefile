# Needs only Python 3.11 or newer. Everything is installed into $(VENV).
#   make demo PYTHON=python3.12 ARGS="--config.seed=1"

PYTHON ?= python3
VENV ?= .venv
CONFIG ?= configs/fashion.py
ARGS ?=
TEST_PROCESSES ?= 2

BIN := $(VENV)/bin
# Stamps inside the environment: make updates it only if the requirements have changed.
RUN_STAMP := $(VENV)/.installed-run
DEV_STAMP := $(VENV)/.installed-dev

export PIP_DISABLE_PIP_VERSION_CHECK := 1

.DEFAULT_GOAL := help
.PHONY: help demo test test-fast test-system lint docs clean

help:  ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo
	@echo '  PYTHON=python3.12   the interpreter that creates $(VENV) (3.11 or newer)'
	@echo '  CONFIG=configs/x.py the experiment that `make demo` runs'
	@echo '  ARGS="..."          more flags for `make demo`'
	@echo '  TEST_PROCESSES=2    the number of processes that `make test` and `make test-system` run'

demo: $(RUN_STAMP)  ## train, sample and evaluate a small model on this machine
	$(BIN)/python -m vqvae2_jax.main --config=$(CONFIG) $(ARGS)

test: lint  ## ruff, unit tests and tiny pipelines (20 minutes on 2 cores)
	$(BIN)/python -m pytest -m "not system" --numprocesses $(TEST_PROCESSES) --dist worksteal --durations=20

test-fast: lint  ## ruff and the quick tests
	$(BIN)/python -m pytest -m "not slow and not system"

test-system: $(DEV_STAMP)  ## fresh installs, newest Python, notebooks, processes, attacks, the page; needs git, npm, Chromium and a network (40 minutes)
	$(BIN)/python -m pytest -m system --numprocesses $(TEST_PROCESSES) --dist worksteal --durations=40

lint: $(DEV_STAMP)  ## ruff
	$(BIN)/ruff check .

docs: $(DEV_STAMP)  ## the documentation site, in build/site
	$(BIN)/python docs/build_site.py

clean:  ## remove the environment and all caches (runs/ stays)
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .hypothesis .jax_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(RUN_STAMP): requirements.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "vqvae2_jax needs Python 3.11 or newer; PYTHON=$(PYTHON) is: $$($(PYTHON) --version 2>&1 || true)" >&2; \
		echo "Name a newer one, for example: make $(MAKECMDGOALS) PYTHON=python3.12" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@echo "installing this package and requirements.txt into $(VENV) (a few minutes the first time)"
	@$(BIN)/python -m pip install --quiet --editable .
	@touch $@

$(DEV_STAMP): $(RUN_STAMP)
	@echo "installing the development tools into $(VENV)"
	@$(BIN)/python -m pip install --quiet --editable ".[dev]"
	@touch $@
