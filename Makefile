# make demo: environment, build, and a U-Net trained on generated images.  make test: every test.  make help: the rest.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
DEMO ?= demo

# For the GPU that is here alone, or one architecture where there is none: all of them (see docs/building.md) take minutes.
GPU := $(shell nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | head -1 | tr -d .)
export UNET_FAST_CUDA_ARCHS ?= $(patsubst 90,90a,$(or $(GPU),90))

.PHONY: help demo test lint format bench lock clean
.DEFAULT_GOAL := help

help:
	@echo "make demo    build into $(VENV), train on synthetic images, evaluate, predict; results in $(DEMO)/"
	@echo "make test    build into $(VENV) and run every test (TESTS=tests/test_layers.py: only those)"
	@echo "make lint    ruff and clang-format, changing nothing;  make format: the same, mending"
	@echo "make bench   the fused ops against stock Keras on this machine's CPU"
	@echo "make lock    newer releases of what this is developed with, pinned in requirements-dev.lock; licences in docs/"
	@echo "make clean   remove the build and $(VENV)"

# The releases that the lock names, and no file but those whose hashes it has. What the build needs is among them, and the
# build uses it (no isolation): pip would otherwise unpack a second TensorFlow just for building.
$(VENV)/.locked: requirements-dev.lock
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --require-hashes --requirement requirements-dev.lock
	touch $@

SOURCES := $(shell find csrc -type f) CMakeLists.txt setup.py pyproject.toml
$(VENV)/.installed: $(VENV)/.locked $(SOURCES)
	$(BIN)/pip install --quiet --no-deps --no-build-isolation --editable .
	touch $@

# Newer releases into the lock: of what is needed to run, to develop and to build.
lock: $(VENV)/.locked
	$(BIN)/pip install --quiet uv
	$(BIN)/python tests/supply_chain.py requirements | $(BIN)/uv pip compile - --universal --python-version 3.10 \
	  --upgrade --generate-hashes --no-header --no-annotate --quiet --output-file requirements-dev.lock
	$(BIN)/python tests/supply_chain.py licences > docs/licences.md

demo: $(VENV)/.installed
	$(BIN)/unet-fast train --data synthetic --out $(DEMO)/run --filters 8 --depth 3 --padding same --size 128 --steps 300 --batch 4 --lr 3e-3
	$(BIN)/unet-fast evaluate --run $(DEMO)/run
	$(BIN)/python examples/synthetic_images.py $(DEMO)/new_images.tif
	$(BIN)/unet-fast predict --run $(DEMO)/run --input $(DEMO)/new_images.tif --output $(DEMO)/segmentation.tif
	@echo
	@echo "Look at $(DEMO)/run/overlays.png (image, truth, prediction) and $(DEMO)/run/curves.png;"
	@echo "the segmentation of images the model has never seen is $(DEMO)/segmentation.tif."

TESTS ?=
test: $(VENV)/.installed
	$(BIN)/pytest $(or $(TESTS),-n 2 --dist loadfile)

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	find csrc -name '*.cc' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh' | xargs $(BIN)/clang-format --dry-run -Werror

format: $(VENV)/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	find csrc -name '*.cc' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh' | xargs $(BIN)/clang-format -i

bench: $(VENV)/.installed
	$(BIN)/python benchmarks/cpu_step.py

clean:
	rm -rf build $(VENV) unet_fast/*.so
