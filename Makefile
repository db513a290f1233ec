# Every target sets up what it needs; `make demo` or `make test` may be the first command on a fresh machine.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
SRC ?= synthetic
NAME ?= demo
CIFAR ?= cifar-100-python.tar.gz
CIFAR_TEST ?= null

.DEFAULT_GOAL := help
.PHONY: help demo compare notebooks test test-long test-gpu test-all soak check format clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 12

demo: $(READY) ## the whole way in 15 minutes on 2 cores: shards, tokenizer, pre-training, fine-tuning, report; SRC=FOLDER|TAR for your own images
	$(BIN)/python -m beit_pretrain demo src='$(SRC)' name='$(NAME)'

compare: $(READY) ## what pre-training is worth, over 3 seeds, on CIFAR-100: CIFAR=TAR CIFAR_TEST=TAR, or CIFAR=cifar-100-python.tar.gz CIFAR_TEST=null
	$(BIN)/python -m beit_pretrain compare src='$(CIFAR)' held_out='$(CIFAR_TEST)' $(WORDS)

notebooks: $(READY) ## run notebooks/, one after the other, 13 minutes on 2 cores, into runs/notebooks/*.ipynb with their pictures
	mkdir -p runs/notebooks
	for name in notebooks/*.ipynb; do $(BIN)/jupyter-execute --output='../runs/notebooks/{notebook_name}' $$name || exit 1; done

test: $(READY) ## the tests, 5 to 13 minutes on 2 cores, two at a time
	$(BIN)/python -m pytest -m "not long" -n 2 --dist loadfile

# Without a GPU its tests run on the CPU, where they can: so that they are right when there is one.
test-long: $(READY) ## the tests that `make test` leaves out: whole processes, signals, generated code
	GPU_TESTS_ON_CPU=1 $(BIN)/python -m pytest -m "(long or gpu) and not soak" -n 2 --dist loadfile

test-gpu: $(READY) ## the tests that need a GPU; PYTHON -m pytest -m gpu where torch is installed otherwise
	$(BIN)/python -m pytest -m gpu

soak: $(READY) ## what takes minutes each: kills, processes, disks, NaN, full-size segmentation; ends with a table; not in test-all
	$(BIN)/python -m pytest -m soak --timeout=1800

test-all: test test-long ## all tests

check: $(READY) ## lint, format, types, which package imports which
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(READY) ## format the code
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean: ## remove the environment and what runs wrote
	rm -rf $(VENV) runs notebooks/runs .pytest_cache .mypy_cache .ruff_cache

# uv installs in a fifth of pip's time, but is not required.
$(READY): pyproject.toml constraints.txt
	@if command -v uv >/dev/null 2>&1; then \
	  test -x $(BIN)/python || uv venv --quiet --python $(PYTHON) $(VENV); \
	  uv pip install --quiet --python $(BIN)/python -c constraints.txt -e '.[dev]'; \
	else \
	  test -x $(BIN)/python || $(PYTHON) -m venv $(VENV); \
	  $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'; \
	fi
	@touch $(READY)
