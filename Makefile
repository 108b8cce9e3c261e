# Needs Python 3.11 or newer and make. `make setup` makes .venv with the `cloister` command in it.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# torch brings its own CUDA packages, or none: its builds differ by machine, so they are not in the lock.
TORCH_CUDA := triton cuda-bindings cuda-pathfinder cuda-toolkit $(addprefix nvidia-,cublas cuda-cupti cuda-nvrtc cuda-runtime cudnn-cu13 cufft cufile curand cusolver cusparse cusparselt-cu13 nccl-cu13 nvjitlink nvshmem-cu13 nvtx)
STAMP := $(VENV)/.installed

.PHONY: setup demo test test-all bench lint protos lock clean

setup: $(STAMP)

$(STAMP): pyproject.toml requirements.lock
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "cloister needs Python 3.11 or newer, this is " + sys.version.split()[0])'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check torch==2.13.0
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --require-hashes -r requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	touch $(STAMP)

demo: setup
	$(BIN)/cloister demo $(ARGS)

test: setup
	$(BIN)/python -m pytest

test-all: setup
	$(BIN)/python -m pytest -m "not gpu"

bench: setup
	$(BIN)/python -m bench

lint: setup
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy shared client server tests bench && $(BIN)/lint-imports

protos: setup
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python -m grpc_tools.protoc -I protos --python_out=shared --grpc_python_out=shared --mypy_out=shared protos/cloister_shared/v1/*.proto

lock:
	$(BIN)/uv pip compile pyproject.toml --universal --python-version 3.11 --extra dev --generate-hashes --quiet \
	  --no-annotate --no-emit-package torch --no-emit-package cloister $(addprefix --no-emit-package ,$(TORCH_CUDA)) --output-file requirements.lock

clean:
	rm -rf $(VENV) .cloister dist
