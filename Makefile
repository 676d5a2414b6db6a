# make demo and make test do everything a fresh machine needs, once. PYTHON chooses the interpreter (3.11 or newer).
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
export HF_HUB_OFFLINE ?= 1

.PHONY: demo test test-arviz1 lint types docs check benchmark clean

demo: $(VENV)/.installed
	$(BIN)/bayeslora demo --output runs/demo

test: $(VENV)/.installed
	$(BIN)/python -m pytest --numprocesses logical --maxprocesses 8 --dist worksteal

check: lint types docs test

ARVIZ1_TESTS := $(patsubst %,tests/analysis/test_%.py,inference_data streaming comparison_table plots plots_of_draws \
	plots_of_uncertainty uncertainty variance)

# the analysis without torch, under ArviZ 1.x and a Python 3.12 or 3.13, where one is found (ARVIZ1_PYTHON names it)
test-arviz1:
	@python=$${ARVIZ1_PYTHON:-$$(for candidate in python3.13 python3.12 "$$HOME"/.pyenv/versions/3.1[32]*/bin/python; \
		do "$$candidate" -c 'import sys; print(sys.executable)' 2>/dev/null && break; done)}; \
	if [ -z "$$python" ]; then echo 'test-arviz1: SKIPPED, as ArviZ 1.x needs Python 3.12 or 3.13 and there is none'; exit; fi; \
	$(MAKE) --no-print-directory .venv-arviz1/.installed ARVIZ1_PYTHON="$$python" && \
	MPLBACKEND=Agg .venv-arviz1/bin/python -m pytest --noconftest -p no:cacheprovider $(ARVIZ1_TESTS)

.venv-arviz1/.installed: constraints-arviz1.txt
	$(ARVIZ1_PYTHON) -m venv .venv-arviz1
	.venv-arviz1/bin/pip install --quiet --requirement constraints-arviz1.txt
	touch $@

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# mypy and import-linter see the folders as one package only when they lie as they are installed
types: $(VENV)/.installed
	rm -rf build/typed
	$(BIN)/pip install --quiet --no-deps --no-build-isolation --target build/typed .
	cd build/typed && $(abspath $(BIN))/mypy --config-file $(abspath pyproject.toml) -p bayeslora
	cd build/typed && PYTHONPATH=. $(abspath $(BIN))/lint-imports --no-cache $(abspath pyproject.toml)

# the site, in build/docs/index.html; a warning fails it
docs: $(VENV)/.installed
	$(BIN)/sphinx-build --quiet --fail-on-warning --keep-going docs build/docs

benchmark: $(VENV)/.installed
	$(BIN)/python benchmarks/training_cost.py

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "bayeslora needs Python 3.11 or newer: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

clean:
	rm -rf build dist *.egg-info $(VENV) .venv-arviz1
