# make demo       run the sample recipe from scratch
# make test       lint, type check, and the fast tests
# make test-all   the same plus slow tests: a browser, a Ray cluster, random kills
# make bench      speed and precision on a CPU, under ten minutes; needs the models of `make demo`
# make mutations  inject deliberate faults, one at a time, and print which test finds each
# The virtual environment is created when first needed.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RUNTIME := $(VENV)/.installed
DEV := $(VENV)/.installed-dev

# Many short processes import the project, so let them share the compiled bytecode.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test test-all mutations lint bench clean

demo: $(RUNTIME)
	$(BIN)/colorfilter run --recipe sample

# Tests sync many temporary files, so they write to /dev/shm if it has 4 GiB free.
IN_MEMORY := $(shell df -Pk /dev/shm 2>/dev/null | awk 'NR == 2 && $$4 > 4194304 { print "TMPDIR=/dev/shm" }')
# The tests of a file run in one process, which creates shared fixtures once. Longest files first.
PYTEST := $(IN_MEMORY) $(BIN)/pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

test: lint
	$(PYTEST) -m "not slow"

test-all: lint
	$(PYTEST)

mutations: $(DEV)
	$(BIN)/python benchmarks/mutations.py

lint: $(DEV)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy --num-workers 2

bench: $(DEV)
	$(BIN)/python benchmarks/scoring.py
	$(BIN)/python benchmarks/training.py
	$(BIN)/python benchmarks/selection.py --sequences 3000000
	$(BIN)/python benchmarks/precision.py

$(RUNTIME) $(DEV): pyproject.toml constraints.txt install.py
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "error: Python 3.11 to 3.13 is required; use one: make PYTHON=/path/to/python3.12" >&2; exit 2; }
	@$(PYTHON) install.py $(VENV) $(patsubst .installed%,%,$(subst -,,$(notdir $@)))

clean:
	rm -rf $(VENV) .colorfilter
