# Two commands do all set-up: `make demo` and `make test`. The first run installs what is missing; the next start at once.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: help demo test lint format soak bench-scale wheel lock clean

help: ## show what can be made
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' Makefile | expand -t 22

$(READY): pyproject.toml requirements-dev.txt tools/setup
	@tools/setup $(VENV)

demo: $(READY) ## a Service, three backends, one killed under load: in private namespaces, without root
	@tools/need nft ip nginx
	@$(BIN)/userspace-proxy demo

test: $(READY) ## all checks and all tests, as root and as a plain user alike
	@tools/need nft iptables ip conntrack nginx
	@tools/test $(VENV)

soak: $(READY) ## the tests that take minutes
	@tools/need nft iptables ip conntrack nginx
	@timeout 3600 $(BIN)/python -m pytest -m soak

lint: $(READY) ## formatting, style, types, import directions
	@tools/lint $(VENV)

format: $(READY)
	@$(BIN)/ruff format .
	@$(BIN)/ruff check --fix .

bench-scale: $(READY) ## 10,000 Services: time to ready, one change to traffic, memory
	@tools/need nft ip
	@timeout 300 $(BIN)/python -m benchmarks.scale

wheel: $(READY) ## dist/*.whl, for pipx install
	$(BIN)/python -m pip wheel --quiet --no-deps --wheel-dir dist .

clean:
	rm -rf $(VENV) dist .mypy_cache .ruff_cache .pytest_cache .hypothesis

lock: $(READY) ## requirements-dev.txt anew, from the ranges in pyproject.toml
	@$(BIN)/python -m pip install --quiet uv
	@$(BIN)/uv pip compile --quiet --upgrade --universal --python-version 3.11 --extra dev --no-emit-index-url --no-emit-find-links --no-header pyproject.toml -o requirements-dev.txt
