# make demo: set up, try all four domains, write demo/report.html.  make test: set up and run the test suite.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export PYTHONSAFEPATH := 1

.PHONY: demo test slow-test gpu-test lint style types bench docs release-check clean

$(VENV)/.stamp: pyproject.toml setup.py
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check --no-compile -e ".[dev]"  # Python compiles what is imported
	mkdir -p .links && ln -sfn .. .links/omnissm
	touch $@

demo: $(VENV)/.stamp
	$(BIN)/omnissm demo --out demo

test: $(VENV)/.stamp
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 -q --durations=15 -m "not slow"

slow-test: $(VENV)/.stamp
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 -q --durations=15 -m slow --timeout 900

gpu-test:
	mkdir -p .links && ln -sfn .. .links/omnissm
	PYTHONPATH=.links $(PYTHON) -m pytest -q tests/kernels

lint: style types

style: $(VENV)/.stamp
	$(BIN)/ruff check . && $(BIN)/ruff format --check .
	$(BIN)/python tests/house/metrics.py

types: $(VENV)/.stamp
	$(BIN)/mypy

bench: $(VENV)/.stamp
	$(BIN)/python benchmarks/run.py

docs: $(VENV)/.stamp
	$(BIN)/python benchmarks/table.py
	$(BIN)/python docs/build.py --out site

release-check: $(VENV)/.stamp
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python tests/release.py

clean:
	rm -rf build dist site .venv .links *.egg-info .mypy_cache .ruff_cache .pytest_cache
