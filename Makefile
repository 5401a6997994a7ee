# Every target makes .venv if it is missing, then uses it.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: setup quickstart test test-slow test-gpu check bench soak clean

setup: $(VENV)/ready

$(VENV)/ready: pyproject.toml constraints.txt tests/oracles.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "gptnorm needs Python 3.11 or newer; say which with: make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --requirement tests/oracles.txt
	@touch $@

quickstart: setup  ## compare three strategies over learning rates (minutes)
	$(BIN)/gptnorm quickstart

test: setup  ## the fast suite, in as many processes as there are cores, eight at most
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto --maxprocesses 8 --dist worksteal

test-slow: setup
	$(BIN)/python -m pytest -q -m "slow and not gpu"

test-gpu: setup
	$(BIN)/python -m pytest -q -m gpu

check: setup  ## lint, format, types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

bench: setup  ## step time and memory of every strategy, relative to one
	$(BIN)/python benchmarks/step_time.py laptop/base --relative-to prenorm_qknorm

soak: setup  ## kill a run 200 times and compare it with one that was left alone (a quarter of an hour)
	$(BIN)/python benchmarks/soak.py --kills 200

clean:
	rm -rf $(VENV) dist .pytest_cache .ruff_cache .hypothesis
