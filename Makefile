# Every habit of the project, by name.
SHELL := /bin/bash
.DEFAULT_GOAL := help
PY := .venvs/dev/bin/python
CORES := $(shell nproc)

.PHONY: help venv test test-llama test-long test-docker test-matrix lint types shell lock clean

help: ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 18

venv: ## the development environment, made once per lock file
	@scripts/venv.sh dev

test: venv lint types shell ## the tier that guards every change: under 15 minutes on two cores, no GPU
	OMP_NUM_THREADS=1 $(PY) -m pytest -n $(CORES) --dist loadgroup

test-llama: venv ## GGUF files proven in llama.cpp itself, compiled from its pinned sources where the cache has none
	$(PY) -m sparktune.setup.export.llama_build
	OMP_NUM_THREADS=1 $(PY) -m pytest tests/setup -m 'llama_cpp and not slow' --timeout 3600

test-long: venv ## the nightly tier: everything but what needs a GPU
	OMP_NUM_THREADS=1 $(PY) -m pytest -m 'not gpu' --timeout 3600

test-docker: venv ## the image on a real engine (root; Debian's docker.io, debootstrap, docker-registry)
	OMP_NUM_THREADS=1 $(PY) -m pytest tests/docker -m 'docker and not slow' --durations 30

test-matrix: venv ## the model-dependent tests on the other supported transformers
	scripts/test_matrix.sh 5.17.0

lint: venv ## ruff
	$(PY) -m ruff check .

types: venv ## mypy over setup/
	$(PY) -m mypy

shell: venv ## shellcheck over every script
	.venvs/dev/bin/shellcheck -x $$(git ls-files '*.sh' .ci/run)

lock: ## resolve the lock files again
	UV=.venvs/dev/bin/uv requirements/lock.sh

clean: ## remove environments and tool caches (never results or output)
	rm -rf .venvs .pytest_cache .mypy_cache .ruff_cache build dist src/*.egg-info
