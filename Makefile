# The project's commands. `make test` in a fresh clone needs Python 3.11 to 3.13 with venv, and make; nothing else.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

SUPPORTED := import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))
REFUSAL := make: needs Python 3.11, 3.12 or 3.13, and $(PYTHON) is none of them; name one: make PYTHON=python3.12 $(MAKECMDGOALS)

.PHONY: help venv demo test lint docs wheel requirements clean

help:  ## list these targets
	@sed -n 's/^\([a-z]*\):.*## /\1\t/p' Makefile | expand -t 14

venv: $(VENV)/.installed  ## install the pinned packages and this one into .venv (PYTHON=... picks the interpreter)

demo: venv  ## train, fuse, quantize and run on the embedded digits; leaves runs/demo/report.html
	$(BIN)/python experiments/demo.py

test: venv  ## run the tests
	$(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder

lint: venv  ## check style, formatting and types
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy tf_repvgg

docs: venv  ## build the documentation into site/, without a network; warnings are errors
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

wheel: venv  ## build a source distribution and a wheel into dist/
	$(BIN)/python -m build --no-isolation

requirements:  ## update the pins in requirements.txt from requirements.in
	tmp=$$(mktemp -d) && trap 'rm -rf "$$tmp"' EXIT && \
	$(PYTHON) -m venv "$$tmp" && "$$tmp/bin/pip" install --quiet uv && \
	"$$tmp/bin/uv" pip compile --quiet --no-config --universal --python-version 3.11 --generate-hashes --upgrade \
		--custom-compile-command "make requirements" requirements.in --output-file requirements.txt

clean:  ## remove .venv, caches and everything built, but not runs/
	rm -rf $(VENV) build dist site *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find . -name __pycache__ -prune -exec rm -rf {} +

# Two stamps, each touched when its step has succeeded. Changed pins or an interrupted installation rebuild the venv;
# a changed pyproject.toml only reinstalls this package.
$(VENV)/.pinned: requirements.txt
	@$(PYTHON) -c '$(SUPPORTED)' 2>/dev/null || { echo '$(REFUSAL)' >&2; exit 1; }
	$(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check --require-hashes -r requirements.txt
	@touch $@

$(VENV)/.installed: $(VENV)/.pinned pyproject.toml
	$(BIN)/python -m pip install --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@
