# Everything runs in .venv, which holds exactly what requirements.lock pins.
PYTHON ?= python3
TORCH  ?= 2.13.0
ARGS   ?=
BIN    := .venv/bin
# A process a core, with a file's tests in one; products this small are not worth a second thread.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

# Nothing here downloads a model: the Atlas checkpoint ships with the package.
export HF_HUB_OFFLINE := 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.DEFAULT_GOAL := help
.PHONY: help install demo up test unit lint check bench protos baseline format lock clean python-version

help: ## Print this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-9s %s\n", $$1, $$2 }' Makefile

install: .venv/.installed ## Create .venv, or bring it up to date

demo: install ## Correct an old atlas through the service; its history opens in MLflow's UI
	$(BIN)/python examples/demo.py $(ARGS)

up: install ## Run a server on this machine, with Atlas, its own ledger and MLflow store
	$(BIN)/python -m errata.server $(ARGS)

test: install ## Run all tests (ARGS="-k name" chooses, ARGS="-n 0 -s" shows what they print)
	$(PYTEST) $(ARGS)

unit: install ## Run the tests that need no Atlas checkpoint
	$(PYTEST) -m "not slow" $(ARGS)

lint: install ## Check format, lint, types and the arrows between packages
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports --cache-dir .import_linter_cache

check: lint test ## The gate: lint, then test

bench: install ## Compare Errata with plain ways to the same numbers, side by side (ARGS=--quick: only that it runs)
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/bench.py $(ARGS)

protos: install ## Generate the code beside proto/errata/v1/*.proto anew
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m grpc_tools.protoc -Iproto --python_out=proto --grpc_python_out=proto \
	  --mypy_out=quiet:proto --mypy_grpc_out=quiet:proto proto/errata/v1/*.proto

baseline: install ## Accept the API as it is: what later changes must not break
	$(BIN)/buf build proto --exclude-source-info -o proto/baseline.binpb

format: install ## Format and apply safe lint fixes
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# Run it where pip finds a CPU build of torch. The CUDA libraries that other builds require are left out, so that
# the lock fits both.
lock: python-version ## Write requirements.lock anew from pyproject.toml
	@set -e; venv=$$(mktemp -d); trap 'rm -rf "$$venv"' EXIT; \
	$(PYTHON) -m venv "$$venv"; \
	"$$venv/bin/pip" install --quiet "torch==$(TORCH)" ".[cli,server,dev]"; \
	{ echo "# Everything that \`make install\` installs. Written by \`make lock\`."; \
	  "$$venv/bin/pip" freeze --all --exclude pip --exclude errata \
	  | grep -vE '^(nvidia|cuda|triton)' | sed 's/+cpu$$//'; } > requirements.lock.new; \
	mv requirements.lock.new requirements.lock

clean: ## Remove what make made: .venv, caches, builds, out/
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache dist build out
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# --clear: a package that the lock no longer names must not stay behind.
.venv/.locked: requirements.lock | python-version
	$(PYTHON) -m venv --clear .venv
	$(BIN)/pip install --quiet -r requirements.lock
	@touch $@

.venv/.installed: .venv/.locked pyproject.toml
	$(BIN)/pip install --quiet --no-deps --no-build-isolation -e .
	@touch $@

python-version:
	@command -v $(PYTHON) >/dev/null || { echo "Errata needs Python 3.11 or newer; there is no '$(PYTHON)' on PATH." >&2; exit 1; }
	@$(PYTHON) -c 'import sys; v = "%d.%d" % sys.version_info[:2]; sys.exit(0 if sys.version_info >= (3, 11) else "Errata needs Python 3.11 or newer; $(PYTHON) is " + v + ". Name another: make PYTHON=python3.11")'
