# Needs only Python >= 3.11 (with venv and pip), git and make. Variables, given as `make demo NAME=value`:
#   PYTHON          the interpreter that makes .venv
#   PIP_OPTIONS     for pip, such as another build of torch:
#                   PIP_OPTIONS="--extra-index-url https://download.pytorch.org/whl/cpu" (or …/cu130)
#   CONSTRAINTS     the pinned set of packages
#   EXTRAS          of the package, as pyproject.toml names them; given ones are added to what is installed
#   WORKERS         of the tests; by default two, each with whole files, in their order: the longest has few tests
#   PYTEST_OPTIONS  for pytest, such as "-k parity"
#   BENCH_OPTIONS   for the scripts in benchmarks/, such as --quick
PYTHON ?= python3
PIP_OPTIONS ?=
CONSTRAINTS ?= constraints.txt
EXTRAS ?= cpu,train,tasks,dev
WORKERS ?= -n 2 --dist loadfile --no-loadscope-reorder
PYTEST_OPTIONS ?=
BENCH_OPTIONS ?=

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# Present while packages are being installed: what an interrupted pip left is not to be trusted.
UNFINISHED := $(VENV)/.unfinished

export PIP_DISABLE_PIP_VERSION_CHECK = 1

# Python 3.8, as JetPack 5 has it.
ON_DEVICES := on_device integrations/python/classify.py

.DEFAULT_GOAL := help
.PHONY: help install demo test test-all lint format types bench wheel clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

install: $(STAMP) ## everything into .venv (the other targets do this themselves)

# Without this, make would do nothing where a first `make install` has been.
ifeq ($(origin EXTRAS),command line)
.PHONY: $(STAMP)
endif

# torch comes first and at its pin: with no torch installed, a range would take the newest CUDA build instead.
$(STAMP): pyproject.toml $(CONSTRAINTS)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	    echo "thinet-deploy needs Python 3.11 or newer, and '$(PYTHON)' is not one. Say which: make PYTHON=python3.12 …" >&2; \
	    exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' || { \
	    echo "'$(PYTHON)' cannot make virtual environments. On Debian and Ubuntu: apt install python3-venv" >&2; \
	    exit 1; }
	@if [ -e $(UNFINISHED) ] || ! $(BIN)/python -m pip --version >/dev/null 2>&1; then \
	    echo "Making $(VENV) …"; \
	    $(PYTHON) -m venv --clear $(VENV); \
	fi
	@touch $(UNFINISHED)
	@echo "Installing into $(VENV): some hundred megabytes, once …"
	$(BIN)/python -m pip install --quiet $(PIP_OPTIONS) "$$(grep '^torch==' $(CONSTRAINTS))"
	$(BIN)/python -m pip install --quiet $(PIP_OPTIONS) --constraint $(CONSTRAINTS) --editable '.[$(EXTRAS)]'
	@rm -f $(UNFINISHED)
	@touch $(STAMP)

demo: $(STAMP) ## the main job on the built-in digits, for the target `cpu`, into runs/demo
	$(BIN)/thinet-deploy build --target cpu --controls all --out runs/demo

test: $(STAMP) ## the tests, without those marked slow
	$(BIN)/python -m pytest $(WORKERS) $(PYTEST_OPTIONS)

test-all: $(STAMP) ## all tests, also the slow ones
	$(BIN)/python -m pytest -m "slow or not slow" $(WORKERS) $(PYTEST_OPTIONS)

lint: $(STAMP) ## ruff, formatting, and that what runs on devices is Python 3.8
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/vermin --target=3.8- --violations --no-tips $(addprefix thinet_deploy/,$(ON_DEVICES))

format: $(STAMP) ## let ruff fix and format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: $(STAMP) ## mypy --strict
	$(BIN)/mypy

bench: $(STAMP) ## every script in benchmarks/
	@for script in benchmarks/[a-z]*.py; do \
	    echo "== $$script"; \
	    $(BIN)/python "$$script" $(BENCH_OPTIONS) || exit 1; \
	done

wheel: $(STAMP) ## the wheel, into dist/, its file list compared with the tree
	rm -rf dist
	$(BIN)/python -m build --outdir dist . >dist.log 2>&1 || { cat dist.log; exit 1; }
	@rm -f dist.log
	$(BIN)/python tests/wheel_check.py dist/*.whl

clean: ## remove what was built, but neither .venv nor runs/
	rm -rf build dist dist.log *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
