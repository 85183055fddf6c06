# Every target builds the environment it needs; `make help` lists them.
VENV   ?= .venv
PYTHON ?= python3
JOBS   ?= 2
EXTRAS ?= ray,hf,deepspeed,megatron,dev

# The environment's own tools first, and every cache inside it: nothing is written into the home folder.
export PATH := $(abspath $(VENV))/bin:$(PATH)
export TORCHINDUCTOR_CACHE_DIR := $(abspath $(VENV))/cache/inductor
export TORCH_EXTENSIONS_DIR := $(abspath $(VENV))/cache/extensions
export TRITON_CACHE_DIR := $(abspath $(VENV))/cache/triton
export RAY_USAGE_STATS_ENABLED := 0

READY := $(VENV)/.ready
PIP   := $(VENV)/bin/python -m pip --disable-pip-version-check --quiet

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-quick check bench test-gpu bench-gpu clean

help: ## Show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

setup: $(READY) ## Build the environment in $(VENV), if it is missing or older than pyproject.toml or constraints.txt

# torch comes first and alone, so that pip settles on the pinned build before anything else asks for it. DeepSpeed builds with
# what is there, and none of its C++ ahead of time.
$(READY): pyproject.toml constraints.txt
	@echo "Building the environment in $(VENV): a few minutes, once."
	@$(PYTHON) -c 'import sys; sys.exit("sparsetrain needs Python >= 3.11, and $(PYTHON) is " + sys.version.split()[0] + "; name another one: make PYTHON=python3.12" if sys.version_info < (3, 11) else 0)'
	@$(PYTHON) -m venv --clear $(VENV)
	@$(PIP) install --constraint constraints.txt torch
	@$(PIP) install --constraint constraints.txt hatchling editables setuptools
	@DS_BUILD_OPS=0 $(PIP) install --constraint constraints.txt --no-build-isolation --editable ".[$(EXTRAS)]"
	@$(PIP) check
	@touch $@

demo: $(READY) ## Pre-train and fine-tune a sparse language model on real text: two Ray workers, about five minutes
	@sparsetrain train configs/demo.yaml --overwrite

test: $(READY) ## Run every test that needs no GPU
	@pytest -q -n $(JOBS) --dist loadgroup --durations 20 -m 'not gpu'

test-quick: $(READY) ## Run the tests of the inner loop: no Ray, nothing slow
	@pytest -q -n $(JOBS) --dist loadgroup -m 'not gpu and not ray and not slow'

check: $(READY) ## Lint, type-check and check the floors
	@ruff check .
	@ruff format --check .
	@mypy
	@lint-imports

bench: $(READY) ## Time everything that a figure is claimed for, against its peer, in interleaved pairs
	@python kernels/bench/run.py

test-gpu: $(READY) ## Run the tests that need a CUDA device
	@pytest -q -m gpu

bench-gpu: $(READY) ## Run the benchmarks on a CUDA device
	@python kernels/bench/run.py --device cuda

clean: ## Remove the environment and every cache; runs stay
	@rm -rf $(VENV) .cache .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
