# Two commands matter: `make demo` runs the main job, `make test` runs every test. Both need only Debian's python3 (>= 3.11) with
# venv and pip. They install everything else into .venv and the cache (DEVKIT_CACHE, ~/.cache/comfyui-volume-worker).
# ENGINE_SOURCE=DIR or ENGINE_REF=v0.34.0 runs these, bench and image-test on another ComfyUI (devkit/engine/README.md).

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
WORKFLOW ?= devkit/workflows/text_to_image.json
PORT ?= 8000
BENCH ?=
JOBS ?= 3

.DEFAULT_GOAL := help
.PHONY: help demo serve test test-fast lint image-test format bench clean

help:  ## List the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

# Replaced when the lock changes; the stamp is written last, so an interrupted install is done again.
$(VENV)/installed: requirements-dev.lock
	@echo "==> installing the worker's and the tests' Python packages into $(VENV)"
	@$(PYTHON) -c 'import sys; sys.exit("Python >= 3.11 is needed, this is " + sys.version) if sys.version_info < (3, 11) else None'
	@$(PYTHON) -m venv --clear $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --require-hashes -r requirements-dev.lock
	@$(BIN)/python -c 'import sysconfig; open(sysconfig.get_path("purelib") + "/project.pth", "w").write("$(CURDIR)\n")'
	@touch $@

demo: $(VENV)/installed  ## Run one workflow on a local worker and save its picture (WORKFLOW=file.json for your own)
	@$(BIN)/python -m devkit.demo --workflow $(WORKFLOW)

serve: $(VENV)/installed  ## Keep the demo's worker running for your own requests (PORT=8000)
	@$(BIN)/python -m devkit.demo --serve --port $(PORT)

test: $(VENV)/installed  ## Run every test, on the real ComfyUI, in three processes (JOBS=3); prints the 20 slowest
	@$(BIN)/python -m pytest --numprocesses=$(JOBS) --dist=loadfile --no-loadscope-reorder --durations=20

test-fast: $(VENV)/installed  ## Run the tests that need neither ComfyUI nor servers: under a minute, before each commit
	@$(BIN)/python -m pytest -q -m "not engine and not volume and not slow"

lint: $(VENV)/installed  ## Check style and types
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

image-test: $(VENV)/installed  ## Build the image and a child image, and start them (needs root, buildah, debootstrap; 5 minutes)
	@$(BIN)/python -m pytest tests/image/check_image.py -s --timeout 900

format: $(VENV)/installed  ## Format the code
	@$(BIN)/ruff format .
	@$(BIN)/ruff check --fix .

bench: $(VENV)/installed  ## Compare the worker with its bare parts (BENCH=--short for a quick run, BENCH=links for one)
	@$(BIN)/python -m bench $(BENCH)

clean:  ## Remove what these commands wrote in this folder (the engine's cache stays)
	rm -rf $(VENV) .demo .pytest_cache .mypy_cache .ruff_cache .hypothesis
