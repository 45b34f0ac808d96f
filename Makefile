# Two commands for a fresh machine: make train (ARGS="..." replaces the arguments) and make test.
PYTHON ?= python3
ARGS ?= --epochs 50
RUN = torch torchvision numpy tqdm matplotlib scikit-learn
TEST = pytest ruff

.PHONY: train test clean

train: .venv/installed
	.venv/bin/python infogan.py $(ARGS)

test: .venv/tested
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/python -m pytest

# each file marks a finished installation, so that an interrupted one starts again
.venv/installed: Makefile
	$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed: make PYTHON=python3.11" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv .venv
	.venv/bin/pip install --quiet $(RUN)
	touch $@

.venv/tested: .venv/installed
	.venv/bin/pip install --quiet $(TEST)
	touch $@

clean:
	rm -rf .venv build
