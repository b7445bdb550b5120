# make demo: the whole pipeline on bundled cells. make test: all tests. Both do the set-up themselves.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SHELL := /bin/bash

.PHONY: help setup demo test test-quick check docs clean

help:
	@echo "make setup   virtual environment in $(VENV) with requirements.txt"
	@echo "make demo    real cells to a trained, exported model (about 5 minutes on 2 cores)"
	@echo "make test    all tests"
	@echo "make test-quick  those that start no process, but the thorough ones"
	@echo "make check   ruff, mypy, links of the documentation"
	@echo "make docs    the documentation as a site, below site/"

setup: $(VENV)/.ready

$(VENV)/.ready: requirements.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "error: python >= 3.11 is needed, $$($(PYTHON) --version) found; set PYTHON=/path/to/python3.12"; exit 1; }
	@command -v g++ >/dev/null || { echo "error: g++ is missing (DeepSpeed compiles with it): apt-get install g++"; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || \
	  { echo "error: $(PYTHON) has no venv module: apt-get install python3-venv"; exit 1; }
	@echo 'int main(){}' | g++ -xc++ -o /dev/null -include Python.h -I"$$($(PYTHON) -c 'import sysconfig; print(sysconfig.get_path("include"))')" - 2>/dev/null || \
	  { echo "error: the headers of $(PYTHON) are missing (DeepSpeed compiles with them): apt-get install python3-dev"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install -r requirements.txt
	$(BIN)/python -m pip install --quiet --no-deps --editable .
	touch $@

$(VENV)/.ready-dev: $(VENV)/.ready requirements-dev.txt
	$(BIN)/python -m pip install --quiet -r requirements-dev.txt
	touch $@

demo: $(VENV)/.ready
	$(BIN)/python -m sclong_ds.demo --out demo_run

# TEST_MINUTES=N starts no test after N minutes, and tells how many that were.
PYTEST := $(BIN)/python -m pytest --durations=25 $(if $(TEST_MINUTES),--minutes $(TEST_MINUTES))
RANKS := distributed or slurm

# Without processes and in minutes: between two changes. MLflow, left in the middle of a start, takes
# no second one.
test-quick: $(VENV)/.ready-dev
	$(BIN)/python -m pytest -q --quick -n 2 --ignore tests/sclong_ds/tracking -m "not ($(RANKS) or thorough)"

# Side by side, since both mostly wait or use one core: what starts ranks or Slurm, in sight, and the
# rest, whose output comes at the end.
test: $(VENV)/.ready-dev
	@rest=$$(mktemp); trap 'kill $$! 2>/dev/null; rm -f $$rest' EXIT; \
	$(PYTEST) -m "not ($(RANKS))" >$$rest 2>&1 & \
	$(PYTEST) -o cache_dir=.pytest_cache/ranks -m "$(RANKS)"; ranks=$$?; \
	echo "the tests that start no ranks (they run since the beginning):"; \
	wait $$!; status=$$?; cat $$rest; exit $$((ranks | status))

check: $(VENV)/.ready-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict --site-dir .mypy_cache/site

docs: $(VENV)/.ready-dev
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict
	@echo "site/index.html; with search: $(PYTHON) -m http.server --directory site"

clean:
	rm -rf demo_run site .pytest_cache .mypy_cache .ruff_cache
