# These are the commands of the project. `make help` lists them.
.DEFAULT_GOAL := help
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c

PYTHON ?= python3
BIN := .venv/bin
LOCK := --universal --python-version 3.11 --generate-hashes --no-emit-index-url --no-header --quiet --no-annotate

.PHONY: help setup images demo demo-seeds study bench-merge bench-train bench-score bench-pack bench-reselect docs docs-generate test test-slow check format lint types imports lock clean

help: ## list the commands
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

setup: .venv/ready ## make .venv with the pinned dependencies (the other commands do this too)

.venv/ready: requirements/dev.txt requirements/uv.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "semiscale needs Python 3.11 or newer; set PYTHON=" >&2; exit 2; }
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv || { echo "could not make .venv: install python3-venv" >&2; exit 2; }
	@$(BIN)/python -m pip install --quiet --require-hashes -r requirements/uv.txt
	@# Write the bytecode once. If Python may not write it, every process compiles torch again, for two seconds.
	@# The default time-out of uv is too short for a busy machine, where a file may take a minute.
	UV_COMPILE_BYTECODE_TIMEOUT=0 $(BIN)/uv pip sync --quiet --python $(BIN)/python --require-hashes --compile-bytecode \
	  --build-constraints requirements/dev.txt requirements/dev.txt
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --no-build-isolation --editable .
	@touch $@

demo: setup ## run the whole pipeline on real images, on this machine
	@$(BIN)/python pipeline.py demo

demo-seeds: setup ## run the demo over five fresh seeds, with their controls (a quarter of an hour)
	@$(BIN)/python -m benchmarks.demo_seeds

study: setup ## run the pipeline over SEEDS=3 on the images in DATA=folder, with their controls (half an hour of a core)
	@$(BIN)/python -m benchmarks.study $(or $(DATA),$(error study: set DATA= to a folder of images; see benchmarks/study.py)) $(if $(SEEDS),--seeds $(SEEDS))

bench-merge: setup ## compare the merge with DuckDB and Polars; ROWS=1000000000 or FULL=1 for the paper's billion images
	@$(BIN)/python -m benchmarks.merge $(if $(ROWS),--rows $(ROWS)) $(if $(K),--images-per-class $(K)) $(if $(FULL),--full)

bench-pack: setup ## measure packing: processor time of an image, of a request, of the layout (two minutes)
	@$(BIN)/python -m benchmarks.pack

bench-reselect: setup ## measure selecting again from the scores of IMAGES=100000000
	@$(BIN)/python -m benchmarks.reselect $(if $(IMAGES),--images $(IMAGES))

bench-train: .venv/bench ## compare the training with data in memory, torchvision's recipe and timm (ten minutes)
	@$(BIN)/python -m benchmarks.train $(if $(PHOTOS),--photos $(PHOTOS)) $(if $(ARCHITECTURE),--architecture $(ARCHITECTURE))

bench-score: .venv/bench ## compare scoring with the bare model and decoder, Ray Data and a DataLoader (ten minutes)
	@$(BIN)/python -m benchmarks.score $(if $(PHOTOS),--photos $(PHOTOS))

.venv/bench: requirements/bench.txt .venv/ready
	UV_COMPILE_BYTECODE_TIMEOUT=0 $(BIN)/uv pip install --quiet --python $(BIN)/python --require-hashes --compile-bytecode \
	  --build-constraints requirements/dev.txt -r requirements/bench.txt
	@touch $@

images: setup ## build both container images; PUSH=registry/prefix pushes them and notes their digests; BUILD= for docker build
	@$(BIN)/python pipeline.py images $(if $(PUSH),--push $(PUSH)) -- $(BUILD)

docs: setup ## build the documentation strictly into docs/_build/html; every warning is an error
	@$(BIN)/python -m sphinx -W --keep-going -n -q -b html docs docs/_build/html
	@echo "docs/_build/html/index.html"

docs-generate: setup ## write the schema of the run file and the READMEs of the components
	@$(BIN)/python docs/generate.py

check: lint types imports ## check format, lint, types, import rules and tests
	$(BIN)/python -m pytest -q -n 2 --dist loadfile -m "not slow and not docker"

test: setup ## run the tests that CI runs by default
	@$(MAKE) --no-print-directory check

test-slow: setup ## run the tests that take minutes, and those that need Docker
	$(BIN)/python -m pytest -q -m "slow or docker"

format: setup ## rewrite the code in the project's format
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

lint: setup
	$(BIN)/ruff format --check --quiet .
	$(BIN)/ruff check --quiet .
	$(BIN)/python -m tests.style.check_words

types: setup
	$(BIN)/mypy

imports: setup
	$(BIN)/lint-imports --no-cache

lock: setup ## pin the requirements again
	@for image in uv dev bench cuda cpu; do \
	  $(BIN)/uv pip compile $(LOCK) requirements/$$image.in -o requirements/$$image.txt \
	    $$(case $$image in bench|cuda|cpu) echo "-c requirements/dev.txt";; esac); done

clean: ## remove the environment, the built documentation and runs/: what the demo made, and every other run there
	rm -rf .venv runs docs/_build docs/_generated
