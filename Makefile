# `make demo` runs the sample from nothing. `make test` runs lint, type check and the tests that guard
# behaviour; `make test-all` adds those that are slow by nature: a browser, a Ray cluster, random
# kills. Each makes the virtual environment first, once. `make bench` measures speed and precision on
# a CPU, in less than ten minutes; precision on the sample's models, so after `make demo`.
# `make mutations` puts deliberate faults in, one at a time, and says which test finds each.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RUNTIME := $(VENV)/.installed
DEV := $(VENV)/.installed-dev

# Many short processes import the project: the first one's bytecode serves the others.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test test-all mutations lint bench clean

demo: $(RUNTIME)
	$(BIN)/colorfilter run --recipe sample

# Tests write to memory where it has 4 GiB free: they flush a lot to disk and keep nothing.
IN_MEMORY := $(shell df -Pk /dev/shm 2>/dev/null | awk 'NR == 2 && $$4 > 4194304 { print "TMPDIR=/dev/shm" }')
# A file's tests stay in one process, which makes once what they share. The longest come first.
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
		{ echo "error: Python 3.11 to 3.13 is needed; name one: make PYTHON=/path/to/python3.12" >&2; exit 2; }
	@$(PYTHON) install.py $(VENV) $(patsubst .installed%,%,$(subst -,,$(notdir $@)))

clean:
	rm -rf $(VENV) .colorfilter
