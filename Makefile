PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin

.PHONY: help install quickstart test bench clean

help:            ## Say what each target does
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 14

install: $(VENV)/.installed  ## Make .venv with everything pinned in constraints.txt

$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "yuan needs Python 3.10 or newer, and this is " + sys.version.split()[0] + "; try: make PYTHON=python3.11")'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test]'
	@touch $@

quickstart: install  ## Text to answers on this machine in a few minutes
	@PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python examples/quickstart.py

test: install    ## Run every test
	$(BIN)/python -m pytest

bench: install   ## Measure speed (ratios within one run)
	$(BIN)/python -m tests.benchmarks

clean:           ## Remove the virtual environment and what the quickstart made
	rm -rf $(VENV) quickstart
