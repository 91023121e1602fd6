# `make demo` and `make test` do everything on a fresh machine: Python 3.10+, a C++20 compiler and make are enough.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SOURCES := $(shell find csrc -type f) setup.py pyproject.toml
PIP := $(BIN)/python -m pip --disable-pip-version-check

.PHONY: demo test lint format sanitize sanitize-gpu fuzz bench cuda bench-gpu clean

demo: $(VENV)/.built
	$(BIN)/python examples/compress_minilm.py --out demo_out

test: $(VENV)/.built
	$(BIN)/pytest

lint: $(VENV)/.built
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $$(find csrc tests -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

format: $(VENV)/.built
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .
	$(BIN)/clang-format -i $$(find csrc tests -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

# The op tests with the C++ under AddressSanitizer and UndefinedBehaviorSanitizer.
sanitize: $(VENV)/.built
	$(BIN)/python tests/native/sanitized.py pytest tests/ops

# The CUDA kernels' tests on a GPU, under compute-sanitizer.
sanitize-gpu: $(VENV)/.built
	compute-sanitizer --tool memcheck --error-exitcode 1 $(BIN)/pytest tests/cuda -k 'test_cuda'
	compute-sanitizer --tool racecheck --error-exitcode 1 $(BIN)/pytest tests/cuda -k 'test_cuda'

# A hundred thousand damaged checkpoints, the C++ under AddressSanitizer.
fuzz: $(VENV)/.built
	$(BIN)/python tests/native/sanitized.py python tests/fuzz_checkpoint.py --count 100000

bench: $(VENV)/.built
	$(BIN)/engine bench

# The CUDA C++ kernels for one card, by nvcc alone: no GPU and no torch with CUDA is needed. ARCHITECTURE is sm_90a or the card's.
cuda: $(VENV)/.installed
	$(BIN)/python bench/build_cuda.py $(if $(ARCHITECTURE),--architecture $(ARCHITECTURE))

# On a machine with an NVIDIA GPU, with the torch that is installed there (CUDA, 2.11 or later) and Triton; nothing is
# downloaded. Checks and times every op that has a kernel, in 8 minutes, and writes bench/results/<device>.json, line by line.
# nvcc builds the CUDA C++ kernels in a minute, or `make cuda` has, elsewhere; without them their ops are errors and the
# others are measured. `make bench-gpu ONLY="int8_linear int8_quantize" JSON=some.json` runs some ops alone.
bench-gpu:
	-$(PYTHON) bench/build_cuda.py
	$(PYTHON) bench/from_checkout.py $(if $(ONLY),--only $(ONLY)) $(if $(JSON),--out $(JSON))

clean:
	rm -rf build demo_out *.egg-info engine/*.so $(VENV)/.built

$(VENV)/.installed: requirements-dev.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) install -q -r requirements-dev.txt
	touch $@

# Without isolation: an isolated build would download a torch of its own.
$(VENV)/.built: $(VENV)/.installed $(SOURCES)
	$(PIP) install -q --no-build-isolation --no-deps -e .
	touch $@
