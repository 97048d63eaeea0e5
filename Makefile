# One command a job; each sets itself up in .venv first (needs only git, make and Python >= 3.10).
# Other settings: make PYTHON=/path/to/python3, make VENV=folder, make test TESTS=tests/runtime

VENV ?= .venv
TESTS ?=
WORKERS ?= 2
PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check --no-input install --quiet

.DEFAULT_GOAL := help
.PHONY: help demo test test-arm test-packages containers check docs notebooks dist clean clean-all
.DELETE_ON_ERROR:
.NOTPARALLEL:

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-13s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(VENV)/.base ## Segment pictures and a clip into demo-output/ (light: no torch)
	@$(PY) -m espmedsam_edge demo --out demo-output

test: $(VENV)/.dev $(VENV)/.rtx ## Run the tests (one folder: make test TESTS=tests/runtime)
	@OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 $(PY) -m pytest -n $(WORKERS) --dist loadgroup $(TESTS)

test-arm: | $(PY) ## Run the device side's tests as on ARM, emulated (Debian, x86-64; downloads)
	@$(PY) tools/arm_tests.py $(TESTS)

test-packages: | $(PY) ## Install what tests of the browser, servers and GStreamer need (Debian, Ubuntu; as root)
	@sh tools/test_packages.sh $(VENV)

containers: $(VENV)/.dev ## Run the lines of docker/ in fresh virtual environments (as root; minutes, downloads)
	@ESPMEDSAM_CONTAINERS=1 $(PY) -m pytest -n 0 tests/deploy/test_containers.py

check: $(VENV)/.dev ## Check lint, format, types, the import rules and security
	$(VENV)/bin/ruff check
	$(VENV)/bin/ruff format --check
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports
	$(VENV)/bin/bandit --quiet --recursive --configfile pyproject.toml espmedsam_edge
	$(PY) tools/audit.py

docs: $(VENV)/.dev ## Make the site in build/site, from docs/ (fails at a broken link)
	@NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build  # not --quiet: warnings would neither be shown nor fail

notebooks: $(VENV)/.dev ## Run the notebooks, in build/notebooks (minutes)
	@for name in checkpoint_to_video add_a_modality; do \
		rm -rf build/notebooks/$$name && mkdir -p build/notebooks/$$name || exit; \
		$(VENV)/bin/jupytext --quiet --to ipynb --execute --run-path build/notebooks/$$name \
			--output build/notebooks/$$name/$$name.ipynb notebooks/$$name.py || exit; done

dist: | $(PY) ## Build the wheels of the program and of its weights in dist/
	@$(PY) -m pip --disable-pip-version-check wheel --quiet --no-deps --wheel-dir dist . ./packages/weights
	@ls dist

clean: ## Remove caches, build folders and demo-output
	rm -rf demo-output build dist packages/weights/build .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find espmedsam_edge tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

clean-all: clean ## Remove the virtual environment as well
	rm -rf $(VENV) $(VENV)-triton *.egg-info

# A stamp is newer than pyproject.toml when its packages are in place, so a second run calls no pip.
$(PY):
	@sh tools/venv.sh $(VENV)

$(VENV)/.base: pyproject.toml | $(PY)
	@echo "Installing the program and its base packages into $(VENV) (once)"
	@$(PIP) --editable '.[demo]'
	@touch $@

$(VENV)/.dev: pyproject.toml | $(PY)
	@echo "Installing what tests and development need into $(VENV), torch among it (once; some gigabytes)"
	@$(PIP) --editable '.[dev]'
	@$(PIP) --no-deps --upgrade --target $(VENV)/typings tensorrt-stubs==10.13.0.35.1 || echo "No tensorrt-stubs: one test is skipped."
	@touch $@ $(VENV)/.base

$(VENV)/.rtx: pyproject.toml | $(VENV)/.dev
	@$(PIP) --editable '.[rtx]' || echo "TensorRT-RTX is not available here (message above); its tests will be skipped."
	@$(PIP) --editable '.[rtx-check]' || echo "ONNX Runtime's TensorRT-RTX is not available here; its tests will be skipped."
	@touch $@
