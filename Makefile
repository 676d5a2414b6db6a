# make demo and make test do everything a fresh machine needs, once. PYTHON chooses the interpreter (3.11 or newer).
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
export HF_HUB_OFFLINE ?= 1

.PHONY: demo test test-slow test-arviz1 test-newest lint types docs check dist release-check benchmark clean

demo: $(VENV)/.installed
	$(BIN)/bayeslora demo --output runs/demo

PYTEST := $(BIN)/python -m pytest --numprocesses logical --maxprocesses 8 --dist worksteal

test: $(VENV)/.installed
	$(PYTEST) -m "not slow"

# what takes many processes or a whole experiment: kills, launched trainings, the sdist, the studies' scripts
test-slow: $(VENV)/.installed
	$(PYTEST) -m slow

check: lint types docs test test-slow

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

# mypy and import-linter see the folders as one package only when they lie as they are installed; the last line is what
# mypy says to a user, whose Python finds the package, with its py.typed, and all that it needs as installed ones
types: $(VENV)/.installed
	rm -rf build/typed build/user build/lib build/bdist.*
	$(BIN)/pip install --quiet --no-deps --no-build-isolation --target build/typed .
	cd build/typed && $(abspath $(BIN))/mypy --config-file $(abspath pyproject.toml) -p bayeslora
	cd build/typed && PYTHONPATH=. $(abspath $(BIN))/lint-imports --no-cache $(abspath pyproject.toml)
	$(BIN)/python -m venv --without-pip build/user
	(echo $(abspath build/typed); $(BIN)/python -c 'import sys; print(*sys.path, sep="\n")' | grep site-packages) \
		> "$$(echo build/user/lib/python3.*/site-packages)/found.pth"
	$(BIN)/mypy --config-file pyproject.toml --python-executable build/user/bin/python tests/public/typed_user.py

# what a release uploads, in dist/, as a package index would check it
dist: $(VENV)/.installed
	rm -rf dist
	$(BIN)/python -m build --no-isolation --outdir dist .
	$(BIN)/twine check --strict dist/*

# the wheel beside the newest releases that its bounds allow: every public name is imported, away from this folder
release-check: dist .venv-newest/.installed
	.venv-newest/bin/pip install --quiet --no-deps --force-reinstall dist/*.whl
	cd .venv-newest && bin/python -W ignore -c 'from bayeslora import *; from bayeslora.analysis import *; \
		from bayeslora.guides import *; from bayeslora.models import *; from bayeslora.study import *; print(fit.__module__)'

NEWEST_TESTS := tests/test_config.py tests/test_elbo.py tests/test_distributions.py tests/test_module.py \
	tests/analysis/test_calibration.py tests/analysis/test_inference_data.py tests/inference/test_predict.py \
	tests/storage/test_checkpoint.py tests/training/test_trainer_alone.py

# the fast part of the suite on that wheel; warnings of what will change are shown and fail nothing
test-newest: release-check
	.venv-newest/bin/pip list --format freeze | grep -iE \
		'^(accelerate|arviz|datasets|numpy|pandas|peft|pyro-ppl|scipy|torch|transformers)=='
	MPLBACKEND=Agg .venv-newest/bin/pytest --quiet -p no:cacheprovider -o filterwarnings=default --disable-warnings $(NEWEST_TESTS)

# without constraints.txt, but for torch: the newest one comes with some 3 GB of CUDA, and what is tested is the CPU build
.venv-newest/.installed: pyproject.toml
	$(PYTHON) -m venv --clear .venv-newest
	.venv-newest/bin/pip install --quiet $$(grep '^torch==' constraints.txt) . pytest pytest-timeout hypothesis torchmetrics
	touch $@

# the site, in build/docs/index.html; a warning fails it
docs: $(VENV)/.installed
	$(BIN)/sphinx-build --quiet --fail-on-warning --keep-going docs build/docs

# laplace-torch and all that it needs but torchvision, which it lists and does not import, and which breaks beside a torch
# that it was not built for
LAPLACE := laplace-torch asdfghjkl backpack-for-pytorch curvlinops-for-pytorch einconv einops linear_operator opt_einsum unfoldNd

benchmark: $(VENV)/.installed
	$(BIN)/python benchmarks/training_cost.py

# editable_mode=compat: by a path, so that beside a checkout called bayeslora a script finds the package, and not the
# checkout's own folder as an empty namespace
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "bayeslora needs Python 3.11 or newer: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt --config-settings editable_mode=compat --editable '.[dev]'
	$(BIN)/pip install --quiet --constraint constraints.txt --no-deps $(LAPLACE)
	touch $@

clean:
	rm -rf build dist *.egg-info $(VENV) .venv-arviz1 .venv-newest
