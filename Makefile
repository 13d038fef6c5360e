# The index of what one can do here. `make help` prints it from the comments below.
.DEFAULT_GOAL := help
SHELL := /bin/bash

PYTHON ?= python3
PROFILE ?= $(shell command -v nvidia-smi >/dev/null 2>&1 && echo cuda || echo cpu)
SEED ?= 0
SEEDS ?= 20000
ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
PYTEST := $(BIN)/python -m pytest
STAMP := $(VENV)/installed-$(PROFILE)

.PHONY: help setup serve test test-unit test-sim test-engine test-ray test-e2e prove check sim bench flamegraph fmt lint types imports proto proto-check chart config clean

help: ## Print this list
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(STAMP) ## Make .venv with exactly the pinned packages (PROFILE=cpu|cuda, PYTHON=python3.12, TORCH_INDEX=URL)

$(STAMP): requirements/$(PROFILE).txt requirements/dev.txt requirements/deploy.txt requirements/ray.txt pyproject.toml deploy/setup.sh
	@PYTHON="$(PYTHON)" PROFILE="$(PROFILE)" VENV="$(VENV)" TORCH_INDEX="$(TORCH_INDEX)" deploy/setup.sh
	@touch $@

serve: setup ## Serve the demo model on this machine (ARGS="--model ... --prefill 2")
	@exec $(BIN)/baton up $(ARGS)

test: setup ## Run every test, suite by suite (ARGS="tests/scheduler -k lease" runs only those)
ifdef ARGS
	$(PYTEST) $(ARGS)
else
	@failed=0; for suite in unit sim engine ray e2e; do \
		echo "== $$suite"; $(MAKE) --no-print-directory test-$$suite || failed=1; \
	done; exit $$failed
endif

test-unit: setup ## Run what needs no vLLM and no cluster, on all cores
	$(PYTEST) --suite=unit --numprocesses auto --slowest=build/slowest/unit.txt

test-sim: setup ## Run the simulation's tests, 2,000 seeds included, on all cores
	$(PYTEST) --suite=sim --numprocesses auto --slowest=build/slowest/sim.txt

test-engine: setup ## Run what imports or starts vLLM in one process
	$(PYTEST) --suite=engine --slowest=build/slowest/engine.txt

test-ray: setup ## Run what needs a Ray cluster: one on this machine, with stand-ins and fake engines
	$(PYTEST) --suite=ray --slowest=build/slowest/ray.txt

test-e2e: setup ## Run real clusters: fake engines, and one with real ones
	$(PYTEST) --suite=e2e --slowest=build/slowest/e2e.txt

prove: setup ## Run what takes an hour: 20,000 seeds, chaos with real engines, tables beside peers
	@deploy/prove.sh

check: setup ## Formatting, lint, types, import contracts, generated code
	@failed=0; for step in format-check lint types imports proto-check; do \
		echo "== $$step"; $(MAKE) --no-print-directory $$step || failed=1; \
	done; exit $$failed

.PHONY: format-check
format-check: setup
	$(BIN)/ruff format --check .

lint: setup ## Lint with ruff
	$(BIN)/ruff check .

types: setup ## Check types with mypy, strict
	$(BIN)/mypy

imports: setup ## Check which package may import which
	$(BIN)/lint-imports

fmt: setup ## Format, and fix what can be fixed
	$(BIN)/ruff check --fix --quiet . || true
	$(BIN)/ruff format .

proto: setup ## Generate code from protos/**/*.proto
	$(BIN)/python -m grpc_tools.protoc -I . --python_out=. --pyi_out=. --grpc_python_out=. $$(find protos -name '*.proto' | sort)

proto-check: setup ## Fail when the generated code is not what the protos give
	$(BIN)/python -m pytest -q tests/test_repository.py -k generated

chart: setup ## Write anew what the Helm chart carries: Grafana's dashboards, and what may be set of Baton
	$(BIN)/python deploy/dashboards/build.py
	$(BIN)/python deploy/helm/settings.py

sim: setup ## Simulate requests under faults, on all cores (SEED=17 repeats one; SEEDS=20000 runs that many from 0)
	$(BIN)/python -m simulation $(if $(filter command line,$(origin SEED)),--seed $(SEED),--seeds $(SEEDS)) $(ARGS)

bench: setup ## Measure Baton beside plain vLLM, vllm-router, Dynamo (ARGS="overhead --rounds 5", ARGS=front-door; docs/benchmarks.md)
	@$(BIN)/python -m pip install --quiet --no-deps -r requirements/bench.txt || echo "vllm-router could not be installed: left out"
	$(BIN)/python -m bench $(ARGS)

flamegraph: setup ## Leave flame graphs of the front proxy and the scheduler under load in build/flames (ARGS="--seconds 60")
	@$(BIN)/python -m bench flamegraph $(ARGS)

config: setup ## Print the settings that differ from the defaults, and where each came from (ARGS=--all: every one)
	@$(BIN)/baton config $(ARGS)

clean: ## Remove the environment and every cache
	rm -rf $(VENV) .baton .cache .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis build dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
