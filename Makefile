# `make demo` and `make test` need nothing but Python 3.11 or later: both begin with `make setup`.
# PYTHON=/path/to/python picks the interpreter; without it the first of python3, python3.11, ... that is new enough.

VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
CANDIDATES := $(or $(PYTHON),python3 python3.11 python3.12 python3.13 python)
IS_NEW_ENOUGH := -c 'import sys; sys.exit(sys.version_info < (3, 11))'

.PHONY: setup demo test lint format wheel readme bench clean slow-kill slow-faults slow-benchmarks slow-original slow-full-size slow-performance slow-estimate slow-parity slow-fuzz slow-properties slow-distributed slow-elastic bench-gpu

setup: $(INSTALLED)

# Installs again only after pyproject.toml or constraints.txt changed, or where an installation was interrupted.
$(INSTALLED): pyproject.toml constraints.txt
	@if [ ! -x $(BIN)/pip ]; then \
	    for python in $(CANDIDATES); do \
	        if "$$python" $(IS_NEW_ENOUGH) 2>/dev/null; then found=$$python; break; fi; \
	    done; \
	    if [ -z "$$found" ]; then \
	        echo "error: Python 3.11 or later is needed; none of these is: $(CANDIDATES)." \
	            "Install one, or name it: make setup PYTHON=/path/to/python3.11" >&2; \
	        exit 1; \
	    fi; \
	    echo "$$("$$found" --version) -> $(VENV)"; \
	    "$$found" -m venv $(VENV) || exit 1; \
	elif ! $(BIN)/python $(IS_NEW_ENOUGH); then \
	    echo "error: $(VENV) holds $$($(BIN)/python --version), and 3.11 is needed. Remove $(VENV)." >&2; \
	    exit 1; \
	fi
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

demo: setup  ## tune the tiny base with LoRA and P-Tuning v2, and show answers before and after
	$(BIN)/python embedded/demo.py

# One thread a process: two of them are faster so than one with two threads.
test: setup  ## everything but what is marked slow or gpu
	OMP_NUM_THREADS=1 $(BIN)/pytest -q -n 2 --dist loadfile --no-loadscope-reorder

lint: setup  ## style, types and layers
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports --no-cache

format: setup  ## what lint can mend by itself
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

wheel: setup  ## build dist/*.whl and try it from another folder
	rm -f dist/chatglm_tuning-*.whl
	$(BIN)/python -m build --wheel --no-isolation
	bash .ci/try-wheel dist/chatglm_tuning-*.whl

readme: setup  ## run every command of the READMEs on the tiny base
	$(BIN)/pytest -q tests/test_readme.py -m 'slow or not slow'

bench: setup  ## steps on a mid-sized random model, ours beside a baseline, in three minutes
	$(BIN)/python benchmarks/small.py

# Long proofs (marked slow): one target each, named slow-WHAT.

slow-kill: setup  ## kill -9 runs of every method again and again (CHATGLM_TUNING_KILLS runs each), resume, compare bytes
	$(BIN)/pytest -q -s -m slow tests/training/test_resume.py tests/cli/test_predict.py tests/export/test_crash.py

slow-distributed: setup  ## gradients of three processes, resumption under FSDP2 and, where it is installed, DeepSpeed
	$(BIN)/pytest -q -m slow tests/training/test_distributed.py tests/training/test_deepspeed.py

slow-elastic: setup  ## kill -9 workers under torchrun again and again (CHATGLM_TUNING_KILLS each), compare with undisturbed runs
	$(BIN)/pytest -q -s -m slow tests/training/test_elastic.py

slow-faults: setup  ## every fault with both methods, and a disk that fills up at many places
	$(BIN)/pytest -q -s -m 'slow or not slow' tests/training/test_faults.py tests/training/test_crash_safety.py

slow-benchmarks: setup  ## the scripts of benchmarks/ on tiny models, that for a GPU among them
	$(BIN)/pytest -q -m slow tests/test_benchmarks.py

slow-original: setup  ## the original's commands on the real tokenizer and real rows (needs ../shared)
	$(BIN)/pytest -q -s -m slow tests/training/test_original_commands.py

# TOKENIZER: a folder with the released ice_text.model, tokenizer_config.json and config.json; 13 GB on the disk.
FULL_SIZE := output/full-size
TOKENIZER ?= ../shared/chatglm-6b
slow-full-size: setup  ## write a full-size random model, load it in int4 in 5 GiB and 1.5 times the time of reading
	test -f $(FULL_SIZE)/pytorch_model.bin.index.json \
	    || $(BIN)/python benchmarks/make_random_model.py --tokenizer $(TOKENIZER) --output $(FULL_SIZE)
	$(BIN)/python benchmarks/load_full_size.py --model $(FULL_SIZE) --quantization_bit 4 --limit_gib 5 --limit_ratio 1.5

# MODEL: a full-size model in the released layout; DATA: rows of ADGEN. The nine rows take from some minutes (AMX) to two hours.
slow-performance: setup  ## the full-size table of docs/performance.md, its JSON and its picture
	$(BIN)/python benchmarks/full_size.py --model $(or $(MODEL),$(FULL_SIZE)) --data $(DATA)

slow-estimate: setup  ## estimated memory beside the measured peaks of training runs
	$(BIN)/pytest -q -m slow tests/test_estimate.py

slow-parity: setup  ## parity with the released model, with every way of computing a step switched on and off
	$(BIN)/pytest -q -s -m slow tests/test_paths.py

slow-fuzz: setup  ## any bytes to every reader under libFuzzer (CHATGLM_TUNING_FUZZ_SECONDS in all, 600; Linux)
	$(BIN)/pytest -q -s -m slow tests/fuzz

# EXAMPLES: times as many as in the ordinary suite, and others each time.
EXAMPLES ?= 20
slow-properties: setup  ## texts, rows, flags and packed weights drawn by hypothesis, many of them
	CHATGLM_TUNING_EXAMPLES=$(EXAMPLES) $(BIN)/pytest -q -n 2 tests/properties

bench-gpu: setup  ## everything that a machine with a GPU can show: parity, speed, memory, decoding
	bash benchmarks/gpu.sh

clean:  ## caches and what was built; not the environment
	rm -rf build dist output .pytest_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
