PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin

.PHONY: help install quickstart test bench clean

help:            ## Say what each target does
	@sed -n 's/^\([a-z]*\):.*##/\1\t/p' Makefile | expand -t 14

install: $(VENV)/.installed  ## Make .venv with everything pinned in constraints.txt

# The stamp is written last: after an interrupted install the next one goes on, with a new .venv where that has no pip yet.
$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "error: yuan needs Python 3.10 or newer, and $(PYTHON) is " + sys.version.split()[0] + "; try: make install PYTHON=python3.11")'
	@echo "installing into $(VENV): PyTorch and the rest take some minutes to download"
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test]'
	@touch $@

quickstart: install  ## Text to answers on this machine in a few minutes
	@$(BIN)/python examples/quickstart.py

# Where a worker dies, pytest-xdist would start another and then wait for ever: without, the run ends and names the test.
test: install    ## Run every test
	$(BIN)/python -m pytest -n auto --maxprocesses 8 --dist loadfile --max-worker-restart 0

bench: install   ## Measure speed (ratios within one run) and memory beside the estimate
	$(BIN)/python -m tests.benchmarks
	$(BIN)/python -m tests.benchmarks.memory

clean:           ## Remove what the quickstart made, its trained model included
	rm -rf quickstart runs/quickstart output.txt
