# Everything runs in .venv, which `make setup` creates; it does nothing when the requirements have not changed.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
STAMP := .venv/.installed
AUDIT := .venv-audit
TPU := .venv-tpu
TESTS_OF_TPU := tests/test_xla.py tests/runtime/test_compiled_step.py tests/runtime/test_precision.py \
	tests/runtime/test_policies_on_xla.py tests/learn tests/tpu_plugin

.PHONY: help setup train train-quick train-show-config train-sweep evaluate check-device test test-all test-slow test-plans crosscheck bench torture soak config lint format \
	docs tensorboard clean
.PHONY: fuzz lock audit  # of what comes from outside: input, packages
.PHONY: setup-tpu test-tpu bench-tpu plan-tpu  # of torch_tpu, which needs an environment of its own
.DEFAULT_GOAL := help

help:  ## list the targets
	@grep -E '^[a-z-]+:.*## ' Makefile | awk -F ':.*## ' '{printf "  make %-18s %s\n", $$1, $$2}'

setup: $(STAMP)  ## create .venv and install the pinned requirements (4 to 6 minutes, 9 GB)

# requirements.lock is for one platform; on any other, pip chooses what requirements.txt leaves open.
HAS_LOCK := $(BIN)/python -c "import platform as p, sys; \
	sys.exit((p.system(), p.machine(), sys.version_info[:2]) != ('Linux', 'x86_64', (3, 11)))"

$(STAMP): requirements.txt requirements.lock
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11))" || { echo "Python 3.11 or later is needed: make PYTHON=..."; exit 2; }
	@echo "Installing the requirements in .venv: about five minutes and 9 GB, without a word until it is done"
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@if $(HAS_LOCK); then $(BIN)/pip install --quiet --disable-pip-version-check --require-hashes -r requirements.lock; \
	else $(BIN)/pip install --quiet --disable-pip-version-check -r requirements.txt; fi
	touch $(STAMP)

train: setup  ## the main job: a small Gemma learns arithmetic by GRPO (ARGS="--max_steps 20" adds flags)
	$(BIN)/python train.py --use_grpo --num_completions_per_prompt 4 $(ARGS)

train-quick: setup  ## run_training.py for ten small steps (ARGS="model=gemma3_270m" adds settings; so below)
	$(BIN)/python run_training.py +experiment=quick_test $(ARGS)

train-show-config: setup  ## the settings of run_training.py, of any command given as ARGS
	$(BIN)/python run_training.py --cfg job $(ARGS)

train-sweep: setup  ## the main job with three learning rates, and a table of what came out
	$(BIN)/python run_training.py --multirun optimizer.learning_rate=1e-3,2e-3,4e-3 $(ARGS)

evaluate: setup  ## evaluate.py: how many held-out questions a model answers (ARGS="--model_path outputs/mine")
	$(BIN)/python evaluate.py $(ARGS)

check-device: setup  ## which device is computed on here, after a small calculation on it
	@$(BIN)/python -c "import utils; \
	utils.run_script(lambda: [print(f'{n:<12} {v}') for n, v in utils.verify_tpu_setup().items()])"

# Two processes, each of which keeps whole files, so that what the tests of a file share is made once.
IN_PARALLEL := -n 2 --dist loadfile
# A process is XLA or not for life, so the tests through XLA are a call of their own.
HAS_XLA := $(BIN)/python -c "import importlib.util as u, sys; sys.exit(u.find_spec('torch_xla') is None)"
NO_XLA := echo "torch_xla is not installed here: the tests through XLA are left out"

test: setup  ## the essential tests of every room: on the CPU, then through XLA on the CPU (some 12 minutes on two cores)
	TUNIX_DEVICE=cpu $(BIN)/python -m pytest $(IN_PARALLEL)
	@if $(HAS_XLA); then TUNIX_DEVICE=xla $(BIN)/python -m pytest $(IN_PARALLEL) -m "xla and not slow and not thorough"; \
	else $(NO_XLA); fi

test-all: setup  ## everything that CI runs: all tests but whole jobs and whole plans (about 35 minutes on two cores)
	TUNIX_DEVICE=cpu $(BIN)/python -m pytest $(IN_PARALLEL) -m "not slow and not xla"
	@if $(HAS_XLA); then TUNIX_DEVICE=xla $(BIN)/python -m pytest $(IN_PARALLEL) -m "xla and not slow"; else $(NO_XLA); fi

test-slow: setup  ## whole jobs and every mesh, on the CPU and through XLA (about half an hour)
	TUNIX_DEVICE=cpu $(BIN)/python -m pytest -m "slow and not xla" -s --ignore tests/preflight/test_preflight.py
	TUNIX_DEVICE=xla $(BIN)/python -m pytest -m "slow and xla" -s

test-plans: setup  ## every recipe compiled for its slice, and the extrapolation checked (an hour; later runs are cached)
	TUNIX_DEVICE=cpu $(BIN)/python -m pytest -m slow -s tests/preflight/test_preflight.py

TORCH_FOR_CPU := https://download.pytorch.org/whl/cpu
# torch_tpu pairs with another torch than torch-xla. Torch for the CPU comes from PyTorch's own index, if from nowhere else.
$(TPU)/.installed: requirements-tpu.txt
	test -x $(TPU)/bin/python || $(PYTHON) -m venv $(TPU)
	$(TPU)/bin/pip install --quiet --disable-pip-version-check --retries 1 --require-hashes -r requirements-tpu.txt \
	--extra-index-url $(TORCH_FOR_CPU)
	touch $@

PLUGIN = $$(echo $(abspath $(TPU))/lib/python3*/site-packages/xla_plugins/xla_cpu_pjrt)
$(TPU)/shim.so: tests/tpu_plugin/shim.c $(TPU)/.installed
	gcc -O1 -Wall -shared -fPIC -I"$(PLUGIN)/include" -o $@ $< -ldl

# torch_tpu on this CPU: the plugin that stands for a TPU, and a sitecustomize.py that makes torch_tpu see a chip. Programs
# that wait for each other's results hold threads of the plugin's pool, of which there are as many as cores unless NPROC
# says more: with two all of them come to wait for ever.
ON_PLUGIN = NPROC=16 TUNIX_DEVICE=tpu TPU_LIBRARY_PATH=$(abspath $(TPU)/shim.so) PYTHONPATH=$(abspath tests/tpu_plugin) OMP_NUM_THREADS=1 \
	TUNIX_PJRT_PLUGIN="$(PLUGIN)/xla_cpu_pjrt.so"

setup-tpu: $(TPU)/.installed  ## .venv-tpu, the environment of a TPU VM that computes through torch_tpu (3 GB)

test-tpu: $(TPU)/shim.so  ## the tests through torch_tpu, a plugin for the CPU behind it (ARGS="-m slow": the default job to its end)
	$(ON_PLUGIN) $(TPU)/bin/python -m pytest -m "xla and not slow" $(TESTS_OF_TPU) $(ARGS)

bench-tpu: $(TPU)/shim.so  ## a learning pass through torch_tpu by fused, eager and compiled operations, in turns
	$(ON_PLUGIN) $(TPU)/bin/python -m benchmarks.torch_tpu_modes $(ARGS)

plan-tpu: $(TPU)/shim.so  ## plan_tpu.py from torch_tpu's graphs, without a TPU (ARGS="--config configs/quick_test.json --topology v5e:1x1")
	@$(ON_PLUGIN) $(TPU)/bin/python plan_tpu.py $(ARGS)

fuzz: setup  ## rows, settings, flags, answers and checkpoints at random, 10,000 cases each (CASES=500: fewer)
	TUNIX_DEVICE=cpu TUNIX_FUZZ_CASES=$(or $(CASES),10000) $(BIN)/python -m pytest -s -m thorough tests/fuzz $(ARGS)

$(AUDIT)/.installed: Makefile
	test -x $(AUDIT)/bin/python || $(PYTHON) -m venv $(AUDIT)
	$(AUDIT)/bin/pip install --quiet --disable-pip-version-check uv==0.13.9 pip-audit==2.10.1
	touch $@

lock: $(AUDIT)/.installed  ## write requirements.lock and requirements-tpu.txt anew (ARGS=--upgrade: all to the newest)
	UV_CUSTOM_COMPILE_COMMAND="make lock" $(AUDIT)/bin/uv pip compile --quiet --no-annotate --generate-hashes $(ARGS) \
	--python-version 3.11 --python-platform x86_64-manylinux_2_31 requirements.txt -o requirements.lock
	UV_CUSTOM_COMPILE_COMMAND="make lock" $(AUDIT)/bin/uv pip compile --quiet --no-annotate --generate-hashes $(ARGS) \
	--python-version 3.11 --python-platform x86_64-manylinux_2_31 --extra-index-url $(TORCH_FOR_CPU) \
	--index-strategy unsafe-best-match requirements-tpu.in -o requirements-tpu.txt

audit: $(AUDIT)/.installed  ## known vulnerabilities of the packages in requirements.lock, by PyPI's list; needs a network
	$(AUDIT)/bin/pip-audit --strict --progress-spinner off --disable-pip --require-hashes -r requirements.lock

crosscheck: setup  ## the same batches through Google's Tunix on JAX, TRL and this library (six minutes; ARGS="--cases gspo")
	$(BIN)/python -m crosscheck $(ARGS)

bench: setup  ## seconds a GRPO step beside TRL and Tunix, in turns (ARGS="--preset long --rounds 1")
	$(BIN)/python -m benchmarks.grpo_step $(ARGS)

torture: setup  ## a job killed by SIGKILL at 100 random moments ends as one that is not (ARGS="--kills 10"; TUNIX_DEVICE=xla too)
	TUNIX_DEVICE=$${TUNIX_DEVICE:-cpu} OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.torture $(ARGS)

soak: setup  ## 10,000 steps of a small job: memory, files, threads, time of a step and disk stay as they are
	TUNIX_DEVICE=cpu OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.soak $(ARGS)

config: setup  ## write conf/ and config_example.json anew from the defaults and recipes in tunix_torch/config/
	TUNIX_DEVICE=cpu $(BIN)/python -m tunix_torch.compat.generate

lint: setup  ## formatting and lint
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

format: setup  ## mend formatting and what lint can mend
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

docs: setup  ## the documentation as a site, in site/index.html (ARGS=serve: shown, and built anew, while it is written)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs $(or $(ARGS),build)

tensorboard: setup  ## curves of the runs under ./outputs, on http://localhost:6006
	$(BIN)/tensorboard --logdir outputs

clean:  ## remove caches; keeps .venv, outputs and the tiny model
	rm -rf .pytest_cache .ruff_cache .hypothesis build *.egg-info
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
