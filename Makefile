# Everything sets itself up: `make demo` and `make test` need only Python 3.11+, make and a compiler.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: help install demo test test-slow check format study bench clean

help:           ## show the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-10s %s\n", $$1, $$2}'

install: $(INSTALLED)  ## make .venv with the exact tested versions (again only when they change)

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "crossgate needs Python 3.11 or newer; set PYTHON=/path/to/python3.11"; exit 2; }
	@echo "installing the tested versions into $(VENV): some minutes, once"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[test,check]'
	@touch $@

demo: $(INSTALLED)  ## the whole road on generated clips: shards, pretraining, search, models, report
	$(BIN)/crossgate demo

test: $(INSTALLED)  ## the test suite (some minutes), in two processes: half of it waits
	$(BIN)/python -m pytest -n 2 --dist loadgroup

test-slow: $(INSTALLED)  ## the slow proofs: kills, job submission, serving
	$(BIN)/python -m pytest -m 'slow and not gpu'

check: $(INSTALLED)  ## formatter, linter, type checker
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(INSTALLED)  ## mend what the formatter and linter can
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

study: $(INSTALLED)  ## what gating is worth, all of docs/gates.md again (hours): study/study.md
	$(BIN)/python benchmarks/study.py

bench: $(INSTALLED)  ## every other benchmark, results to benchmarks/results
	for script in $(filter-out benchmarks/study.py,$(wildcard benchmarks/*.py)); do $(BIN)/python $$script || exit 1; done

clean:          ## remove the environment and made files
	rm -rf $(VENV) build demo .pytest_cache .mypy_cache .ruff_cache .hypothesis
