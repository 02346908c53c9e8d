# One command for every chore. Each sets up what it needs in .venv, from the pins in requirements/.
PYTHON ?= python3
BIN := .venv/bin
export PYTHONUTF8 := 1

.DEFAULT_GOAL := help
.PHONY: help demo test test-fast test-integrations torture simulate fuzz test-debian test-newest check format generate pins bench gpu wheels clean

help: ## Show this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 16

demo: .venv/.run ## Start a server, train MNIST through it, print the test error
	@mkdir -p out
	$(BIN)/optserve mnist --json out/mnist.json --plot out/mnist.png

test: .venv/.dev wheels ## Run the whole test suite, containers and the real MNIST included
	@scripts/podman.sh
	$(BIN)/pytest -n 2 --dist loadgroup -m "not mnist and not containers and not quiet"
	@# These use both cores by themselves, or measure.
	$(BIN)/pytest -m "mnist or containers or quiet"

test-fast: .venv/.dev ## Run the tests that need neither containers nor minutes nor a quiet machine
	$(BIN)/pytest -n 2 --dist loadgroup -m "not mnist and not containers and not quiet"

test-integrations: .venv/.integrations .venv/federated/.installed ## Run the tests with JAX, optax, Keras, transformers, Accelerate, Flower and Jupyter
	$(BIN)/pytest -n 2 --dist loadgroup -m integrations tests/integrations

torture: .venv/.dev ## Kill a server 1,000 times within its calls to the disk
	OPTSERVE_KILLS=1000 $(BIN)/pytest -n 2 tests/durability/test_kill.py

simulate: .venv/.dev ## Play 100,000 seeds of the simulation; SEEDS=<number> of them, FROM=<first>
	$(BIN)/python -m tests.simulation --seeds $(or $(SEEDS),100000) --from $(or $(FROM),0)

fuzz: .venv/.dev ## Feed a server 5,000,000 malformed frames
	OPTSERVE_FUZZ=5000000 $(BIN)/pytest -n 2 tests/service/test_fuzz.py

test-debian: .venv/.dev ## Run the tests of server and client under the Python of Debian 12, in a container
	@scripts/podman.sh
	scripts/test-debian.sh

test-newest: ## Run the fast tests on the newest release of everything
	$(PYTHON) -m venv .venv-newest
	.venv-newest/bin/pip install -q --upgrade -e ".[server,numba,plots]" safetensors pytest pytest-xdist pytest-timeout hypothesis \
		greenlet psutil h2 torch==2.13.0 grpcio-tools mypy-protobuf
	.venv-newest/bin/pytest -n 2 --dist loadgroup -m "not mnist and not containers and not quiet" --deselect \
		tests/project/test_contract.py::test_what_is_committed_is_what_the_contract_generates

check: .venv/.integrations ## Check format, lint, types, import layers and the contract
	$(BIN)/ruff format --check --quiet
	$(BIN)/ruff check --quiet
	$(BIN)/pyright
	$(BIN)/lint-imports --no-logo
	$(BIN)/buf lint
	$(BIN)/buf format --diff --exit-code
	@scripts/breaking.sh

format: .venv/.dev ## Format the code and mend what can be mended
	$(BIN)/ruff check --fix
	$(BIN)/ruff format
	$(BIN)/buf format --write

generate: .venv/.dev ## Generate the Python stubs, and what follows from each method, from the contract
	scripts/generate.sh

pins: .venv/.dev ## Resolve requirements/*.in anew
	scripts/pins.sh

bench: .venv/.bench ## Print the benchmark table, peers in one run; BASE=<revision>: step times beside that one's
	@mkdir -p out
ifdef BASE
	$(BIN)/python -m benchmarks.revisions $(BASE) --json out/revisions.json
else
	$(BIN)/python -m benchmarks --json out/bench.json --plot out/bench.png
endif

gpu: .venv/.dev ## Run the tests and benchmarks that need a GPU; PYTHON of an environment with CuPy: scripts/gpu.sh
	scripts/gpu.sh

wheels: dist/wheels/.stamp ## Collect the image's wheels, for builds without a package index

dist/wheels/.stamp: requirements/run.txt scripts/wheels.sh | .venv/.dev
	scripts/wheels.sh
	@touch $@

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/.run: requirements/run.txt pyproject.toml | .venv/bin/python
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements/run.txt
	@touch $@

.venv/.dev: requirements/dev.txt pyproject.toml | .venv/bin/python
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements/dev.txt
	@touch $@ .venv/.run

.venv/.integrations: requirements/integrations.txt | .venv/.dev
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements/integrations.txt
	@touch $@

# Flower asks for older releases of libraries that optserve uses.
.venv/federated/.installed: requirements/federated.txt | .venv/bin/python
	$(PYTHON) -m venv .venv/federated
	.venv/federated/bin/pip install --quiet --disable-pip-version-check -r requirements/federated.txt
	@touch $@

.venv/.bench: requirements/bench.txt | .venv/.dev
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements/bench.txt
	@touch $@

clean: ## Remove everything that was made
	rm -rf .venv .venv-newest dist out build .pytest_cache .ruff_cache .hypothesis client/node/node_modules
