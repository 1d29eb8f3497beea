# Each target first sets up .venv: once, and again after a change of setup.py or constraints.txt.
PYTHON ?= python3
VENV := $(CURDIR)/.venv
INSTALLED := $(VENV)/installed
# puts .venv's programs on the PATH, ninja among them: DeepSpeed calls ninja to build its operators
export PATH := $(VENV)/bin:$(PATH)
# processes keep compiled modules: otherwise each process of the tests would compile the package again
unexport PYTHONDONTWRITEBYTECODE

SHELL_SCRIPTS := .ci/run $(wildcard slurm/*.sh)

.PHONY: train test test-all test-every-case test-slurm test-browser check bench chaos clean

# trains on the embedded corpus, on the GPUs of this host or its CPU
train: $(INSTALLED)
	deepspeed --quiet launch/train.py --deepspeed ds_configs/zero3.json

# One thread per process: more threads would wait for each other. Triton's interpreter runs GPU kernels on the CPU.
# worksteal keeps the tests of a module together, so its fixture starts processes once.
TEST := OMP_NUM_THREADS=1 TRITON_INTERPRET=1 pytest -n 2 --dist worksteal

# leaves out slow tests and those that start several processes; -m replaces the expression of pyproject.toml
test: $(INSTALLED)
	$(TEST) -m 'not gpu and not slurm and not browser and not slow and not distributed'

# also runs launchers, several processes and every command of the pages
test-all: $(INSTALLED)
	$(TEST)

# the cases of large tests that test-all leaves out: its cases hold every pair or triple of values
test-every-case: $(INSTALLED)
	$(TEST) -m 'rare and not gpu'

# root starts a SLURM cluster; other users skip these tests with the reason
test-slurm: $(INSTALLED)
	OMP_NUM_THREADS=1 pytest -m slurm -rs tests/slurm

# root installs a browser; other users skip these tests with the reason
test-browser: $(INSTALLED)
	OMP_NUM_THREADS=1 pytest -m browser -rs tests/report tests/serving

check: $(INSTALLED)
	ruff check .
	ruff format --check .
	mypy
	python tests/plain_english.py
	shellcheck $(SHELL_SCRIPTS)

bench: $(INSTALLED)
	python launch/benchmark.py

# compares a run that is killed twenty times with an uninterrupted run; takes some minutes
chaos: $(INSTALLED)
	OMP_NUM_THREADS=1 PYTHONPATH=tests python tests/chaos.py

clean:
	rm -rf $(VENV)

# a failed set-up leaves no stamp file, so the next call continues it
$(INSTALLED): setup.py constraints.txt
	$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and 'error: Python 3.11 or later is needed: PYTHON=...')"
	test -x $(VENV)/bin/pip || $(PYTHON) -m venv $(VENV)
	@echo "installing PyTorch, DeepSpeed and what else is needed into $(VENV): some minutes"
	$(VENV)/bin/pip install --disable-pip-version-check --use-pep517 --constraint constraints.txt --editable '.[dev]'
	touch $@
