# Three commands do everything on a fresh machine: `make demo` (the main job), `make demo-language` and `make test`.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
CONSTRAINTS := constraints.txt

.PHONY: venv lint notebooks test test-all test-lowest test-matrix demo demo-language bench gpu gpu-suites mutants docs clean

venv: $(STAMP)

# torch first and pinned: any other version would pull a different build through the other packages.
$(STAMP): pyproject.toml $(CONSTRAINTS)
	$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed: make PYTHON=python3.11 ...") if sys.version_info < (3, 11) else None'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c $(CONSTRAINTS) torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c $(CONSTRAINTS) -e '.[benchmarks,test,dev]'
	touch $(STAMP)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# One torch thread a worker: two workers on two cores, and the same sums everywhere. Caches start empty, as they do on a
# fresh machine: what a library does or says there for the first time shows in every run.
test: $(STAMP)
	cache=$$(mktemp -d) && trap 'rm -rf "$$cache"' EXIT HUP INT TERM && \
	XDG_CACHE_HOME="$$cache" OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n auto --dist worksteal

# The tests with every Python from 3.11 to 3.13 that is on the path or in pyenv, each in an environment of its own.
test-all:
	.ci/pythons 3.11 3.12 3.13

# The tests with the lowest versions that pyproject.toml claims. `make test-lowest PINNED=torch` takes torch from
# constraints.txt: its oldest builds are some gigabytes.
test-lowest: .venv-lowest/constraints.txt
	$(MAKE) test VENV=.venv-lowest CONSTRAINTS=.venv-lowest/constraints.txt

.venv-lowest/constraints.txt: pyproject.toml .ci/lowest
	mkdir -p .venv-lowest
	$(PYTHON) .ci/lowest $(PINNED) > $@

# The tests with other kernels of torch, threads, seeds and orders: over an hour, and not in CI.
test-matrix: $(STAMP)
	.ci/matrix $(BIN)/python

demo: $(STAMP)
	HF_HUB_OFFLINE=1 $(BIN)/python -m benchmarks.demo --suite vision --out out/demo

demo-language: $(STAMP)
	HF_HUB_OFFLINE=1 $(BIN)/python -m benchmarks.demo --suite language --out out/demo-language

# Every table in benchmarks/results. Where CPU seconds are compared, all libraries have one thread.
bench: $(STAMP) out/demo/temperatures.csv out/demo-language/temperatures.csv
	HF_HUB_OFFLINE=1 $(BIN)/python -m benchmarks.solver
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m benchmarks.sampling
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m benchmarks.merging
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m benchmarks.speed
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m benchmarks.tails
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m benchmarks.tails_null
	HF_HUB_OFFLINE=1 $(BIN)/python -m benchmarks.tails_suites
	HF_HUB_OFFLINE=1 $(BIN)/python -m benchmarks.row_blocks
	HF_HUB_OFFLINE=1 $(BIN)/python -m benchmarks.rules
	HF_HUB_OFFLINE=1 $(BIN)/python -m benchmarks.rules --suite language
	HF_HUB_OFFLINE=1 $(BIN)/python -m benchmarks.suites
	HF_HUB_OFFLINE=1 $(BIN)/python -m benchmarks.calibration --suites vision --out benchmarks/results/calibration_vision.md
	HF_HUB_OFFLINE=1 $(BIN)/python -m benchmarks.calibration --suites language --out benchmarks/results/calibration_language.md \
		--validation 80 --test 200 --members 8
	HF_HUB_OFFLINE=1 $(BIN)/python -m benchmarks.functional
	HF_HUB_OFFLINE=1 $(BIN)/python -m benchmarks.evidence
	HF_HUB_OFFLINE=1 $(BIN)/python -m benchmarks.ranking
	HF_HUB_OFFLINE=1 $(BIN)/python -m benchmarks.functional_evidence
	HF_HUB_OFFLINE=1 $(BIN)/python -m benchmarks.bmm
	HF_HUB_OFFLINE=1 $(BIN)/python -m benchmarks.bmm_few
	HF_HUB_OFFLINE=1 $(BIN)/python -m benchmarks.bmm_sampling
	HF_HUB_OFFLINE=1 $(BIN)/python -m benchmarks.shift
	HF_HUB_OFFLINE=1 $(BIN)/python -m benchmarks.shift --suite language
	HF_HUB_OFFLINE=1 $(BIN)/python -m benchmarks.decoder

# On a machine with a GPU: the tests that need one, then benchmarks/results/gpu.md. Where the
# packages are installed already, no network is needed: `make gpu BIN=/usr/bin` takes that folder's python, and nothing
# is installed.
gpu: $(if $(filter file,$(origin BIN)),$(STAMP))
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest tests -m gpu -n 4 --dist worksteal
	HF_HUB_OFFLINE=1 $(BIN)/python -m benchmarks.gpu

# Both suites and the decoder at full size and over training seeds on a GPU.
gpu-suites: $(if $(filter file,$(origin BIN)),$(STAMP))
	HF_HUB_OFFLINE=1 $(BIN)/python -m benchmarks.suites --full --device cuda
	HF_HUB_OFFLINE=1 $(BIN)/python -m benchmarks.decoder --full --device cuda

# Single edits of the core and whether the tests notice them; half an hour, so not part of CI.
mutants: $(STAMP)
	HF_HUB_OFFLINE=1 $(BIN)/python -m benchmarks.mutants

# Runs the notebooks and keeps their outputs: experts of the suites are made first where they are missing.
notebooks: $(STAMP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c $(CONSTRAINTS) -e '.[notebooks]'
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.notebooks

# The documentation site, site/index.html. Sources are read, not imported: its environment has no torch.
docs: .venv-docs/.installed
	NO_MKDOCS_2_WARNING=1 .venv-docs/bin/mkdocs build --strict --site-dir site

.venv-docs/.installed: pyproject.toml
	test -x .venv-docs/bin/python || $(PYTHON) -m venv .venv-docs
	.venv-docs/bin/python -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["docs"], sep="\n")' \
		| .venv-docs/bin/python -m pip install --quiet --disable-pip-version-check -r /dev/stdin
	touch $@

# The benchmark of shift looks at the demos' merges.
out/demo/temperatures.csv: | $(STAMP)
	$(MAKE) demo

out/demo-language/temperatures.csv: | $(STAMP)
	$(MAKE) demo-language

clean:
	rm -rf $(VENV) .venv-3.* .venv-lowest .venv-docs site build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
