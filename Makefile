# make demo | make test | make lint; the first of them builds .venv, later ones find it ready.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

# The suite and the demo are offline and draw into files.
export HF_HUB_OFFLINE = 1
export HF_HUB_DISABLE_TELEMETRY = 1
export TOKENIZERS_PARALLELISM = false
export MPLBACKEND = Agg
export PYTHONDONTWRITEBYTECODE = 1

.PHONY: help install demo test lint clean

help:
	@echo "make demo   sample masks for six simulated slices (phantoms) with model_cards/psam-lidc, into demo/"
	@echo "make test   the whole suite"
	@echo "make lint   ruff and mypy"
	@echo "make clean  remove .venv, caches and demo/"

install: $(STAMP)

# The venv is made anew only when missing: a changed pyproject.toml or constraints.txt updates it in place.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  version=`$(PYTHON) --version 2>/dev/null || echo missing`; \
	  echo "error: $(PYTHON) is $$version; accepted: Python 3.11 or newer, as in make PYTHON=python3.11" >&2; exit 2; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $@

demo: $(STAMP)
	@$(BIN)/python training/demo.py --output demo

# Two processes of one thread each: more threads in one process leave the second core idle most of the time.
test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) demo build *.egg-info .pytest_cache .ruff_cache .mypy_cache
