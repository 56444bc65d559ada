# Two commands: `make demo` and `make test`. Plain python3 >= 3.11 with venv and pip is all that is needed.
PYTHON ?= $(shell for p in python3.13 python3.12 python3.11 python3 python; do \
	command -v $$p >/dev/null 2>&1 && $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo $$p; break; }; done)
VENV ?= .venv
# CI adds ray and gpu (Triton's interpreter, no GPU needed): without them their tests say why they are skipped
EXTRAS ?= dev
RUN := $(VENV)/bin
PIP := $(RUN)/python -m pip --disable-pip-version-check -q

.PHONY: demo test test-all check bench docs size clean
.DEFAULT_GOAL := help

help:
	@echo "make demo   the whole tour on real text, from rows to served variants, in a few minutes"
	@echo "make test   the tests"
	@echo "make check  lint, types, layers"
	@echo "make bench  the benchmarks (long)"

$(VENV)/.base: pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "Plures needs Python 3.11 or newer on the PATH"; exit 2; }
	test -x $(RUN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install $$($(RUN)/python tools/torch_index.py) -c constraints.txt -e '.[demo]'
	touch $@

$(VENV)/.dev: $(VENV)/.base
	$(PIP) install -c constraints.txt -e '.[$(EXTRAS)]'
	touch $@

demo: $(VENV)/.base
	$(RUN)/plures demo

test: $(VENV)/.dev
	$(RUN)/python -m pytest -m "not slow and not gpu" -n 2 --dist loadfile

test-all: $(VENV)/.dev
	$(RUN)/python -m pytest -m "not gpu" -n 2 --dist loadfile

check: $(VENV)/.dev
	$(RUN)/ruff check src tests benchmarks tools
	$(RUN)/mypy
	$(RUN)/lint-imports
	$(RUN)/python tools/write_docs.py --check

docs: $(VENV)/.dev
	$(RUN)/python tools/write_docs.py

# those that need no environment of another library; the others say in their first lines how they are run
BENCHES := train_step dpo_prefix store_bytes serve_decode serve_capacity serve_http serve_fair select_rows select_flow \
	select_many select_helps merge_lowrank merge_tenants pack_measure fleet_mos bench_demo equal_budget

bench: $(VENV)/.dev
	for name in $(BENCHES); do $(RUN)/python benchmarks/$$name.py || exit 1; done

size:
	@wc -l $$(git ls-files 'src/*.py') | sort -n | tail -15

clean:
	rm -rf demo build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
