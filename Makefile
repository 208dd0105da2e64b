# Needs only Python >= 3.11; each target sets up .venv by itself, once.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Modules are compiled when first imported, as most of the 25,000 never are.
INSTALL := -m pip --disable-pip-version-check --quiet install --no-compile

.PHONY: demo test coverage lint docs clean

demo: $(VENV)/.for-use
	$(BIN)/mobilevit demo

# Two files at a time, with one thread each.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

# The device floor is tested where there is no PyTorch, on files that are exported where there is.
DEVICE := $(VENV)-device
DEVICE_FILES := runs/device-files

test: $(VENV)/.for-development $(DEVICE)/.ready
	$(PYTEST) --ignore=tests/device
	$(BIN)/python tests/device/make_files.py $(DEVICE_FILES)
	MOBILEVIT_DEVICE_FILES=$(DEVICE_FILES) $(DEVICE)/bin/python -m pytest --confcutdir=tests/device tests/device

# Apart from `test`, as converters run through much of PyTorch's own Python, which takes three times as long when watched.
coverage: $(VENV)/.for-development
	$(PYTEST) --cov --cov-report=term --cov-fail-under=80 --ignore=tests/device --ignore=tests/exporting --ignore=tests/benchmarking

lint: $(VENV)/.for-development
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/codespell $$(git ls-files)

docs: $(VENV)/.for-development
	$(BIN)/mkdocs build --strict

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.for-use: pyproject.toml | $(BIN)/python
	@echo "installing PyTorch and mobilevit into $(VENV): some minutes, once"
	$(BIN)/python $(INSTALL) -e ".[export,onnx,openvino,serve]"
	@touch $@

$(VENV)/.for-development: pyproject.toml | $(BIN)/python
	@echo "installing PyTorch, mobilevit and its test tools into $(VENV): some minutes, once"
	$(BIN)/python $(INSTALL) -e ".[test,docs]"
	@touch $@ $(VENV)/.for-use

$(DEVICE)/.ready: pyproject.toml
	@echo "installing the device floor, without PyTorch, into $(DEVICE): a minute, once"
	$(PYTHON) -m venv $(DEVICE)
	$(DEVICE)/bin/python $(INSTALL) -e ".[test-device]"
	@touch $@

clean:
	rm -rf $(VENV) $(DEVICE) build dist site .coverage* .mypy_cache .pytest_cache .ruff_cache
