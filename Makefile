# Two commands for a fresh machine: make train (ARGS="..." replaces the arguments) and make test.
PYTHON ?= python3
ARGS ?= --epochs 50
RUN = torch torchvision numpy tqdm matplotlib scikit-learn
BUILD = "setuptools>=77" wheel ninja
TEST = pytest pytest-xdist ruff
SANITIZED = build/sanitize/lib

.PHONY: train test torture cases sanitize clean

train: .venv/built
	.venv/bin/python infogan.py $(ARGS)

test: .venv/tested
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/python -m pytest -n 2 --dist worksteal  # of one thread each, half of the tests first

torture: .venv/tested
	TORTURE=1 .venv/bin/python -m pytest tests/test_torture.py

cases: .venv/tested
	CASES=1 .venv/bin/python -m pytest tests/test_pytorch_cases.py

# each file marks a finished step, so that an interrupted one starts again
.venv/installed: Makefile
	$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed: make PYTHON=python3.11" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv .venv
	.venv/bin/pip install --quiet $(RUN) $(BUILD)
	touch $@

.venv/built: .venv/installed setup.py pyproject.toml $(wildcard csrc/*.* csrc/gan_kernels/*.py)
	.venv/bin/pip install --quiet --no-build-isolation --no-deps .
	.venv/bin/python -I -c 'import gan_kernels; print(gan_kernels.build_info())'
	touch $@

.venv/tested: .venv/built
	.venv/bin/pip install --quiet $(TEST)
	touch $@

# The kernels' tests, malformed input and emulated CUDA among them, under the address and
# undefined-behaviour sanitizers. Their run time has to be loaded before Python's own libraries; leaks are Python's.
sanitize: .venv/tested
	GAN_KERNELS_SANITIZE=1 GAN_KERNELS_CUDA=0 .venv/bin/python setup.py -q build \
		--build-base build/sanitize --build-lib $(SANITIZED)
	LD_PRELOAD="$$($(CC) -print-file-name=libasan.so) $$($(CC) -print-file-name=libubsan.so)" \
		ASAN_OPTIONS=detect_leaks=0:verify_asan_link_order=0 UBSAN_OPTIONS=print_stacktrace=1 \
		GAN_KERNELS_SANITIZE=1 PYTHONPATH=$(SANITIZED) .venv/bin/python -m pytest -p no:cacheprovider \
		tests/test_info_loss.py tests/test_gradient_penalty.py -k "not compile"

clean:
	rm -rf .venv build
