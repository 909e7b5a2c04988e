# Targets set up .venv by themselves; `clients` has an environment of its own. `make test` is what has to pass before anything lands.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: setup demo demo-recovery test test-all lint types imports spec docs bench chaos-save chaos-power chaos-flips chaos-recovery clients clean

setup: $(STAMP)

# torch is pinned for the set-up only: a newer one pulls gigabytes of CUDA packages. The range in pyproject.toml stays open.
$(STAMP): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check "torch==2.13.0"
	$(BIN)/pip install --quiet --disable-pip-version-check --editable ".[test,demo]"
	touch $@

demo: setup
	$(BIN)/python examples/demo.py

demo-recovery: setup
	$(BIN)/python examples/demo_recovery.py

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: setup
	$(BIN)/mypy

imports: setup
	$(BIN)/lint-imports

spec: setup
	$(BIN)/python -m tools.check_spec

test: lint types imports spec
	$(BIN)/python -m pytest -n 2 -m "not long"

test-all: lint types imports spec
	$(BIN)/python -m pytest -n 2

# The site of documentation, in site/: how-tos, and the reference from docstrings.
docs: setup
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --site-dir site

bench: setup
	$(BIN)/pip install --quiet --disable-pip-version-check --editable ".[bench]"
	$(BIN)/python -m tools.bench

# Objects of other libraries, killed and resumed; they have an environment of their own.
CLIENTS := .venv-clients
clients:
	$(PYTHON) -m venv $(CLIENTS)
	$(CLIENTS)/bin/pip install --quiet --disable-pip-version-check "torch==2.13.0" --editable ".[clients]"
	$(CLIENTS)/bin/python -m tools.clients --out tools/clients/results/README.md $(ARGS)

# The longer forms of tests/crash, peers beside us: make chaos-power ARGS="--states 5000 --seed 7"
chaos-save chaos-power chaos-flips chaos-recovery: setup
	$(BIN)/pip install --quiet --disable-pip-version-check --editable ".[bench]"
	$(BIN)/python -m tools.chaos $(@:chaos-%=%) $(ARGS)

clean:
	rm -rf out .mypy_cache .ruff_cache .import_linter_cache
