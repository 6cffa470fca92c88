# Two commands do all set-up: `make demo` and `make test`. The first run installs what is missing; the next start at once.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

VENV := .venv
BIN := $(VENV)/bin
# A plain user's PATH lacks the administrator's folders, where nft and ip are.
export PATH := $(PATH):/usr/sbin:/sbin

.PHONY: help demo test test-cluster test-ipvs lint format reference docs drawings soak bench bench-quick bench-scale bench-connections bench-tables compare test-report wheel lock clean

help: ## show what can be made
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' Makefile | expand -t 22

demo: ## three backends, one killed under load, in two modes: in private namespaces, without root
	@PACKAGES=run tools/setup $(VENV) nft ip nginx
	@exec env -u PYTHONDONTWRITEBYTECODE $(BIN)/userspace-proxy demo

test: ## all checks and all tests, as root and as a plain user alike: eight minutes on two cores
	@tools/setup $(VENV) nft iptables ip conntrack nginx haproxy wrk iperf3 openssl
	@tools/test $(VENV)

test-cluster: ## beside a real control plane: KUBE_BIN=folder with etcd, kube-apiserver, kube-controller-manager and, if at hand, kube-proxy
	@test -x "$(KUBE_BIN)/kube-apiserver" || { echo "KUBE_BIN names no folder with kube-apiserver and its like" >&2; exit 1; }
	@tools/setup $(VENV) nft iptables ip conntrack nginx openssl
	@KUBE_BIN=$(abspath $(KUBE_BIN)) timeout 900 $(BIN)/python -m pytest -m cluster tests/cluster

# The files are listed, because collecting all tests takes a minute on an emulated machine.
IPVS_TESTS := tests/modes/ipvs tests/net/test_ipvs_mode.py tests/net/test_ipvs_refusals.py tests/net/test_ipvs_load.py tests/examples/test_lessons.py tests/net/contract/test_table.py
test-ipvs: ## ipvs mode in a virtual machine with IPVS: 6 minutes if it has to be emulated
	@tools/setup $(VENV)
	@VM_TIMEOUT_S=1200 tools/vm $(VENV) env TESTS_PATIENCE=6 $(BIN)/python -m pytest -m ipvs --timeout 600 $(IPVS_TESTS)

soak: ## the tests that take minutes, and 400 mutants of the data plane: two hours
	@tools/setup $(VENV) nft iptables ip conntrack nginx haproxy wrk iperf3 openssl
	@timeout 14400 $(BIN)/python -m pytest -m soak

test-report: ## the report of `compare` and the drawings of `trace` in chromium: phone and desktop, light and dark
	@tools/setup $(VENV) nft ip chromium
	@timeout 300 $(BIN)/python -m pytest -m browser tests/browser

lint: ## formatting, style, types, import directions
	@tools/setup $(VENV)
	@tools/lint $(VENV)

format: ## format the code and fix what ruff can fix
	@tools/setup $(VENV)
	@$(BIN)/ruff format .
	@$(BIN)/ruff check --fix .

reference: ## the generated pages of docs/reference: flags, and the fields of the contract
	@tools/setup $(VENV)
	@$(BIN)/python -m tools.flags docs/reference
	@$(BIN)/python -m tools.contract docs/reference/contract.md

docs: ## the documentation as a site in site/, from docs/ and the lessons; links are checked
	@tools/setup $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-docs.txt
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict  # with --quiet, mkdocs 1.6 lets broken links pass

drawings: ## docs/drawings/*.svg, of a packet followed in each mode; MODES="ipvs" for some of them
	@tools/setup $(VENV) nft iptables ip conntrack nginx
	@timeout 120 $(BIN)/python -m tools.drawings docs/drawings $(or $(MODES),userspace nftables iptables ipvs)

BENCH_TOOLS := nft iptables ip conntrack nginx nginx-stream haproxy wrk iperf3 strace

compare: ## all modes side by side, 10 minutes, and a report in compare.html; ARGS="--quick" takes 2
	@tools/setup $(VENV) $(BENCH_TOOLS)
	@exec $(BIN)/userspace-proxy compare --html compare.html $(ARGS)

bench: ## beside HAProxy, nginx and kernel DNAT, 17 minutes; ARGS="--docs docs/explanation/performance.md" writes that page's figures
	@tools/setup $(VENV) $(BENCH_TOOLS)
	@timeout 2400 $(BIN)/python -m benchmarks.compare $(ARGS)

bench-quick: ## the same within 90 seconds, with more noise
	@tools/setup $(VENV) $(BENCH_TOOLS)
	@timeout 180 $(BIN)/python -m benchmarks.compare --rounds 2 --seconds 0.25 --disturbed-rounds 1 --disturbed-engines 1 --name quick $(ARGS)

bench-scale: ## 10,000 Services, from files and from an API server: time to ready, one change to traffic, memory
	@tools/setup $(VENV) nft ip
	@timeout 300 $(BIN)/python -m benchmarks.scale $(ARGS)

bench-connections: ## 30,000 open connections at four workers: memory of each, idle CPU
	@tools/setup $(VENV) nft ip
	@timeout 300 $(BIN)/python -m benchmarks.connections $(ARGS)

bench-tables: ## 10,000 Services in the tables of each kernel mode: load, one change, removal
	@tools/setup $(VENV) nft iptables ip
	@timeout 600 $(BIN)/python -m benchmarks.tables $(ARGS)

wheel: ## dist/*.whl, for pipx install
	@tools/setup $(VENV)
	$(BIN)/python -m pip wheel --quiet --no-deps --wheel-dir dist .

clean: ## remove all build results
	rm -rf $(VENV) dist site .mypy_cache .ruff_cache .pytest_cache .hypothesis

UV_LOCK = $(BIN)/uv pip compile --quiet --upgrade --universal --python-version 3.11 \
    --no-emit-index-url --no-emit-find-links --no-header pyproject.toml
lock: ## resolve requirements-*.txt again from the ranges in pyproject.toml
	@tools/setup $(VENV)
	@$(BIN)/python -m pip install --quiet uv
	@$(UV_LOCK) --extra dev -o requirements-dev.txt
	@$(UV_LOCK) --no-annotate --constraint requirements-dev.txt -o requirements.txt
	@$(UV_LOCK) --extra docs --constraint requirements-dev.txt -o requirements-docs.txt
