# Two commands for newcomers: `make demo` and `make test`. VENV=dir reuses an environment.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# nproc counts as many as OMP_NUM_THREADS says, where that is set.
NPROC := $(shell env -u OMP_NUM_THREADS nproc 2>/dev/null || sysctl -n hw.ncpu 2>/dev/null || echo 2)
export MAX_JOBS ?= $(NPROC)

# Each worker has one thread (tests/conftest.py); beyond eight, starting them costs what they save.
PYTEST := $(BIN)/python -m pytest --numprocesses $(NPROC) --maxprocesses 8 --dist worksteal

CXX_SOURCES := $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh' 2>/dev/null)

.DEFAULT_GOAL := help
.PHONY: help install demo test test-slow test-all docs fuzz lint format schema pipelines clean

help: ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 12

install: $(BIN)/python ## the environment, and this checkout in it
	@PYTHON=$(BIN)/python scripts/install.sh

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

demo: $(BIN)/python ## scan the bundled latents, write report.html; TORCH=1 also guards a generation
	@PYTHON=$(BIN)/python scripts/install.sh $(if $(TORCH),all,onnx)
	@$(BIN)/latentguard scan examples/latents.pt --policy family --report report.html --heatmap --fail-on never
	$(if $(TORCH),@$(BIN)/python -W ignore examples/generate.py)

test: install ## the tests that take minutes together
	$(PYTEST) -m "not slow"

test-slow: install ## the tests that take minutes each
	$(PYTEST) -m slow

test-all: install ## all tests, the slow ones among them
	$(PYTEST)

docs: $(BIN)/python ## the documentation site, in build/site
	@PYTHON=$(BIN)/python scripts/install.sh docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo "build/site/index.html"

FUZZ_SECONDS ?= 120
fuzz: install ## compare readings with each format's own library, FUZZ_SECONDS=120 for each format
	$(BIN)/python -W ignore tests/fuzz/run.py --seconds $(FUZZ_SECONDS)

lint: install ## ruff, mypy, clang-format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(if $(CXX_SOURCES),$(BIN)/clang-format --dry-run -Werror $(CXX_SOURCES))

format: install ## rewrite Python and C++ in the house style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(if $(CXX_SOURCES),$(BIN)/clang-format -i $(CXX_SOURCES))

schema: install ## rewrite the policies' JSON Schema
	$(BIN)/latentguard policy schema > policies/policy.schema.json

pipelines: install ## rewrite docs/pipelines.md, what a guard does on each pipeline class of diffusers
	$(BIN)/python -W ignore tests/guard/every_pipeline.py

clean: ## build outputs and caches, not the environment
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache report.html
	find latentguard -name '*.so' -delete
	find . -name __pycache__ -not -path './$(VENV)/*' -type d -prune -exec rm -rf {} +

-include kernels.mk
