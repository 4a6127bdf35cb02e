# `make demo` and `make test` set everything up in .venv and then do their job.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
# One thread a process by default: Ray runs one process a core.
export TOKENIZERS_PARALLELISM ?= false

.DEFAULT_GOAL := help
.PHONY: help setup demo test check lint fast slow faults bench constraints clean

help:  ## List what can be made
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

setup: $(VENV)/.ready  ## Make .venv with the pinned dependencies

# The project itself is not installed: its code is used where it lies, as on a cluster.
$(VENV)/.ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Python 3.11 or newer is needed, got $$($(PYTHON) -V): set PYTHON=python3.x" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(RUN) -c 'import tomllib; p = tomllib.load(open("pyproject.toml", "rb")); \
	  print(*p["project"]["dependencies"], *p["dependency-groups"]["dev"], sep="\n")' \
	  > $(VENV)/requirements.txt
	$(VENV)/bin/pip install --quiet --constraint constraints.txt --requirement $(VENV)/requirements.txt
	@touch $@

demo: setup  ## Train and evaluate a small DELLA on Python's own documentation (about 5 minutes)
	$(RUN) jobs/run.py job=demo

test: lint fast slow  ## Lint, types and the whole test suite

check: lint fast  ## Lint, types, import contracts and the fast tests (under two minutes)

lint: setup
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports

# A process a core, each with one thread: the models of these tests are too small to share.
fast: setup
	OMP_NUM_THREADS=1 $(RUN) -m pytest -m "not slow and not faults" -n auto

# Two files at a time: most of their time goes to Rays that start and stop.
slow: setup
	OMP_NUM_THREADS=1 $(RUN) -m pytest -m "slow and (not faults or short)" -n 2 --dist loadfile --durations=30

# Workers, drivers and nodes killed, files damaged, disks filled: one after the other.
faults: setup  ## Kill, starve and damage runs for real (longer than the rest of the suite)
	$(RUN) -m pytest -m faults --durations=20

bench: setup  ## Benchmarks' tables: make bench TEXT=FILE TOKENIZER=FOLDER
	@test -n "$(TEXT)" -a -n "$(TOKENIZER)" || { echo "make bench measures on real text: give \
	TEXT=FILE (a document a line) and TOKENIZER=FOLDER (GPT-2's vocab.json and merges.txt)" >&2; exit 2; }
	PYTHONPATH=. $(RUN) benchmarks/preprocess.py --text $(TEXT) --tokenizer $(TOKENIZER)
	PYTHONPATH=. $(RUN) benchmarks/step_time.py --text $(TEXT) --tokenizer $(TOKENIZER)
	PYTHONPATH=. $(RUN) benchmarks/training_overhead.py --text $(TEXT)
	$(RUN) benchmarks/evaluation.py likelihood --text $(TEXT)
	$(RUN) benchmarks/evaluation.py information
	$(RUN) benchmarks/evaluation.py workers --text $(TEXT) --draws 10

constraints: setup  ## Write constraints.txt from what .venv holds
	$(VENV)/bin/pip freeze | sed 's/+cpu$$//' > constraints.txt

clean:  ## Remove .venv and caches; runs/ stays
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache
