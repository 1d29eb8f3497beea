# Each goal sets up .venv first, once: again only when setup.py or constraints.txt has changed.
PYTHON ?= python3
VENV := $(CURDIR)/.venv
INSTALLED := $(VENV)/installed
# its programs by name, ninja among them, which DeepSpeed calls to build its operators
export PATH := $(VENV)/bin:$(PATH)

SHELL_SCRIPTS := .ci/run $(wildcard slurm/*.sh)

.PHONY: train test test-slurm test-browser check bench chaos clean

# the embedded corpus, on whatever this machine has
train: $(INSTALLED)
	deepspeed --quiet launch/train.py --deepspeed ds_configs/zero3.json

# one thread a process: more of them would only wait for each other; kernels for GPUs by Triton's interpreter
test: $(INSTALLED)
	OMP_NUM_THREADS=1 TRITON_INTERPRET=1 pytest -n 2

# a cluster is started for it, by root; skipped with the reason elsewhere
test-slurm: $(INSTALLED)
	OMP_NUM_THREADS=1 pytest -m slurm -rs tests/slurm

# a browser is installed for it, by root; skipped with the reason elsewhere
test-browser: $(INSTALLED)
	OMP_NUM_THREADS=1 pytest -m browser -rs tests/report

check: $(INSTALLED)
	ruff check .
	ruff format --check .
	mypy
	shellcheck $(SHELL_SCRIPTS)

bench: $(INSTALLED)
	python launch/benchmark.py

# some minutes: a run killed twenty times, compared with one that is left alone
chaos: $(INSTALLED)
	OMP_NUM_THREADS=1 PYTHONPATH=tests python tests/chaos.py

clean:
	rm -rf $(VENV)

# a set-up that fails leaves no stamp, and is taken up again by the next call
$(INSTALLED): setup.py constraints.txt
	$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and 'error: Python 3.11 or later is needed: PYTHON=...')"
	test -x $(VENV)/bin/pip || $(PYTHON) -m venv $(VENV)
	@echo "installing PyTorch, DeepSpeed and what else is needed into $(VENV): some minutes"
	$(VENV)/bin/pip install --disable-pip-version-check --use-pep517 --constraint constraints.txt --editable '.[dev]'
	touch $@
