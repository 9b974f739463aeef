# In a fresh clone `make quickstart` and `make test` do all that is needed; `make help` lists the rest.

PYTHON ?= $(shell python3.11 -c "" 2>/dev/null && echo python3.11 || echo python3)
BIN := .venv/bin
PIP := python -m pip install --quiet --disable-pip-version-check -c constraints.txt
INSTALL := $(BIN)/$(PIP)
# The checks of arrays that tests/conftest.py turns on are for `make test`.
UNCHECKED := JAXTYPING_DISABLE=1 JAX_NUMPY_RANK_PROMOTION=allow

# What `make compat` runs: the tests that compute, with whatever calls JAX and what lies around it.
# Left out: the command line, pages and packaging, which newer packages hardly touch.
COMPAT := 3.12 3.13
COMPAT_TESTS := data downstream evals interop methods models plan run train cli/test_backend.py $(addprefix test_,$(addsuffix .py,config \
  diagnostics ema files house_rules losses microbatch optim spmd step))

.DEFAULT_GOAL := help
.PHONY: help quickstart test tests long flaky mutations compat peers docs audit lint types contracts format clean

help:  ## list the targets
	@sed -nE 's/^([a-z]+):.*## (.*)/  make \1\t\2/p' Makefile | expand -t 20

quickstart: .venv/.core  ## pretrain on a CPU in minutes; the report is runs/quickstart/report.html
	$(BIN)/python run_pretrain.py --config=configs/simclr_digits.py --workdir=runs/quickstart

test: lint contracts  ## lint, import contracts, then types and the tests side by side, several minutes in all
	@$(MAKE) --no-print-directory -j2 types tests

tests: .venv/.dev
	$(BIN)/python -m pytest -n 2 --dist worksteal -p no:randomly -m "not long"

long: .venv/.dev  ## the slower tests: killed and corrupt runs, several processes, fuzzing, benchmarks, commands of the docs
	$(UNCHECKED) $(BIN)/python -m pytest -n 2 --dist worksteal -p no:randomly -m long

flaky: .venv/.dev  ## the tests of `make test` five times in random order
	@cache=$$(mktemp -d); trap 'rm -rf "$$cache"' EXIT; for seed in 1 2 3 4 5; do \
	  JAX_COMPILATION_CACHE_DIR=$$cache \
	    $(BIN)/python -m pytest -n 2 --dist worksteal -m "not long" --randomly-seed=$$seed || exit 1; \
	done

mutations: .venv/.dev  ## break the package on purpose, a place at a time: a test must fail each time
	$(BIN)/python .ci/mutations.py

compat: $(COMPAT:%=compat-%)  ## the tests that compute, on Python 3.12 and 3.13 with the newest JAX, Flax and Optax

peers: .venv-peers/.done  ## beside torchvision and lightly, and by the TPU's compiler; installs torch and libtpu, which are big
	$(UNCHECKED) .venv-peers/bin/python -m pytest -n 2 --dist loadfile tests/peers tests/tpu

docs: .venv/.dev  ## the documentation as a site, build/docs/index.html; a warning is an error
	$(BIN)/sphinx-build -W --keep-going -q -b html docs build/docs

audit: .venv/.dev  ## known vulnerabilities of the pinned versions, as far as the index tells them
	$(BIN)/python .ci/audit.py

lint: .venv/.dev  ## style
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: .venv/.dev  ## static types
	$(BIN)/mypy

contracts: .venv/.dev  ## who may import what
	$(BIN)/lint-imports --no-logo

format: .venv/.dev  ## rewrite the files in the style that lint asks for
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## remove caches and builds; environments and runs/ stay
	rm -rf build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
	find . -path './.venv*' -prune -o -name __pycache__ -type d -exec rm -rf {} +

.venv/.core: setup.py constraints.txt | .venv/bin/pip
	@echo "Installing ssl_jax into .venv (once)"
	$(INSTALL) -e ".[pictures]"
	@touch $@

.venv/.dev: setup.py constraints.txt | .venv/bin/pip
	@echo "Installing ssl_jax with what its tests need into .venv (once; TensorFlow is big)"
	$(INSTALL) -e ".[dev]"
	@touch .venv/.core $@

.venv-peers/.done: setup.py constraints.txt | .venv-peers/bin/pip
	@echo "Installing ssl_jax, torch, lightly and libtpu into .venv-peers (once)"
	.venv-peers/bin/$(PIP) -e ".[peers,plan]"
	.venv-peers/bin/$(PIP) --no-deps lightly  # its networks and losses need none of its dependencies but torch
	@touch $@

# An environment and the tests for one Python, found on the path or among pyenv's; a Python that is
# not there is skipped. `rm -r .venv-compat-*` brings the newest versions again.
compat-%:
	@python=$$(for each in python$* $$(pyenv whence --path python$* 2>/dev/null); do \
	  $$each -c "" 2>/dev/null && echo $$each && break; done); \
	[ "$$python" ] || { echo "compat: skipped Python $*: there is no python$* on the path"; exit 0; }; \
	set -e; $(MAKE) --no-print-directory .venv-compat-$*/.done COMPAT_PYTHON=$$python; \
	.venv-compat-$*/bin/python -m pip list --disable-pip-version-check | grep -E "^(flax|jax|jaxlib|numpy|optax|orbax-checkpoint) "; \
	.venv-compat-$*/bin/python -m pytest -n 2 --dist worksteal -m "not long" --ignore=tests/run/test_wandb.py $(COMPAT_TESTS:%=tests/%)

.venv-compat-%/.done: setup.py
	@echo "Installing ssl_jax and the newest of what its tests need into $(@D) (once)"
	$(COMPAT_PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet --disable-pip-version-check -e ".[test]"
	@touch $@

# pip is the last that venv makes, so a venv that was broken off is made anew.
.venv/bin/pip .venv-peers/bin/pip:
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11))" 2>/dev/null || { echo \
	  "ssl_jax needs Python 3.11 or newer, which $(PYTHON) is not: say where it is by make PYTHON=/path/to/python." >&2; exit 1; }
	$(PYTHON) -m venv $(@D:/bin=)
