# make demo   set everything up, compress the built-in teacher, print where the report and the checkpoint are
# make test   set everything up, run the linter, the type checker and the tests (.ci/run calls exactly this)
# make test-lowest  run the tests of models and recipes with the lowest versions that pyproject.toml promises, PyTorch apart
#                   (part of make test); make test-lowest-torch runs all quick tests, with the lowest PyTorch too
# make docs   set everything up, write the documentation site to site/
# make golden write tests/golden/golden.json anew, after a change that is meant to change results, help or a recipe's fields
# make clean  remove what the two made: .venv, runs/demo and caches
#
# Another interpreter: make setup PYTHON=python3.12

PYTHON ?= python3
BIN := .venv/bin
# Adds up in another order than any processor does by itself: no vector instructions beyond SSE, and two threads.
OTHER_ROUNDING := TEST_THREADS=2 ATEN_CPU_CAPABILITY=default MKL_CBWR=COMPATIBLE ONEDNN_MAX_CPU_ISA=SSE41
INSTALLED := .venv/.installed
# Packages in their lowest versions, which hide those of .venv where PYTHONPATH names the folder.
LOWEST := .venv/lowest
LOWEST_TESTS := $(patsubst %,tests/test_%.py,every_family families glm_and_qwen3_5 lowest_versions modeling recipe)

.PHONY: setup demo test test-lowest test-lowest-torch docs golden clean

setup: $(INSTALLED)

demo: setup
	$(BIN)/slimqwen demo

test: setup
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/codespell
	$(BIN)/mypy
	$(BIN)/pytest -q -n 2 --dist worksteal
	$(OTHER_ROUNDING) $(BIN)/pytest -q -n 2 --dist worksteal -m "rounding and not slow"
	$(MAKE) --no-print-directory test-lowest

test-lowest: $(LOWEST)/.installed
	LOWEST_WITHOUT=torch PYTHONPATH=$(LOWEST) $(BIN)/pytest -q -n 2 --dist worksteal -m "not slow" $(LOWEST_TESTS)

$(LOWEST)/.installed: $(INSTALLED) pyproject.toml tests/lowest_versions.py
	rm -rf $(LOWEST)
	$(BIN)/python tests/lowest_versions.py --without torch > .venv/lowest.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --target $(LOWEST) -r .venv/lowest.txt
	@touch $@

# Its PyTorch is the build that the package index offers: on Linux that of CUDA, with its packages, unless the index has a CPU build.
test-lowest-torch:
	$(PYTHON) -m venv .venv-lowest
	.venv-lowest/bin/python tests/lowest_versions.py > .venv-lowest/lowest.txt
	.venv-lowest/bin/python -m pip install --quiet --disable-pip-version-check -r .venv-lowest/lowest.txt -e '.[dev]'
	LOWEST_WITHOUT= .venv-lowest/bin/pytest -q -m "not slow"

docs: setup
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict
	@echo "Open site/index.html, or with search: $(BIN)/mkdocs serve"

golden: setup
	PYTHONPATH=tests $(BIN)/python -m golden

clean:
	rm -rf .venv .venv-lowest runs/demo site build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache
	find slimqwen tests -name __pycache__ -prune -exec rm -rf {} +

# The stamp is written last: an interrupted installation is taken up again, a finished one is not repeated.
$(INSTALLED): pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { \
	  echo "slimqwen needs Python 3.11 or newer, and there is no '$(PYTHON)': install it (Debian: apt install python3 python3-venv) or name one with make setup PYTHON=..." >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "slimqwen needs Python 3.11 or newer, and '$(PYTHON)' is $$($(PYTHON) --version 2>&1): name a newer one with make setup PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	  echo "'$(PYTHON)' cannot make virtual environments: install its venv module (Debian: apt install python3-venv) and run make again" >&2; exit 1; }
	@echo "Installing slimqwen and its dependencies into .venv (2.0 GB; some minutes, once)"
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@
