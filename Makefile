# make demo: install, draw twelve pictures, say where the sheet is.   make test: install, run the tests.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
DEMO ?= mmwudao-out/demo

.PHONY: help install demo test test-slow lint bench gpu-bench gpu-check clean

help:
	@echo "make install    create $(VENV) with the versions in constraints.txt"
	@echo "make demo       install, then draw pictures from three sentences"
	@echo "make test       install, then the tests (test-slow: also the slow ones)"
	@echo "make lint       ruff and mypy"
	@echo "make bench      the speed measurements in bench/, on the CPU"
	@echo "make gpu-bench  the same on a GPU, kept in bench/results/gpu.json"
	@echo "make gpu-check  the tests that need a CUDA device"

install: $(STAMP)

$(STAMP): setup.cfg pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else "error: mmwudao needs Python 3.11 or newer, and $(PYTHON) is %d.%d: make PYTHON=python3.11 $(MAKECMDGOALS)" % sys.version_info[:2])'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV) ..."
	@# --no-compile: bytecode is written for what is imported, not for all of PyTorch
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile -c constraints.txt -e ".[test,lint]"
	@touch $@

demo: install
	@$(BIN)/mmwudao generate "戴墨镜的笑脸" "a red apple" "ein schlafendes Gesicht" -n 4 --seed 0 -o $(DEMO)

test: install
	$(BIN)/python -m pytest -m "not slow"

test-slow: install
	$(BIN)/python -m pytest

lint: install
	$(BIN)/python -m ruff check .
	$(BIN)/python -m mypy

bench: install
	$(BIN)/python bench/run_all.py cpu

gpu-bench: install
	$(BIN)/python bench/run_all.py gpu -o bench/results/gpu.json

gpu-check: install
	@if $(BIN)/python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then \
		$(BIN)/python -m pytest -m gpu; \
	else \
		echo "no CUDA device on this machine: the tests marked gpu were not run"; \
	fi

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache
