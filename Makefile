# Every target makes the virtual environment .venv when there is none; see scripts/setup_env.py.
PYTHON ?= python3
BIN := .venv/bin
PYTEST_ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help demo chat test check format setup bench-cpu clean

help: ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "make %-10s %s\n", $$1, $$2}'

demo: ## a real 135M-parameter chat model answers in this terminal
	@$(PYTHON) scripts/setup_env.py demo
	$(BIN)/octavo generate --temperature 0 --max-tokens 160 --prompt "What is 2+2?" \
	    --prompt "Name three primary colors." --prompt "Explain in two sentences why the sky is blue."
	@echo "Now talk to it:  $(BIN)/octavo chat"

chat: ## talk to the demo model
	@$(PYTHON) scripts/setup_env.py demo
	$(BIN)/octavo chat

test: ## the whole test suite, without a GPU
	@$(PYTHON) scripts/setup_env.py dev
	$(BIN)/python -m pytest -m "not gpu" --numprocesses auto --maxprocesses 4 --dist loadfile $(PYTEST_ARGS)
	@# The kernels for GPUs, in Triton's interpreter: a process of its own, because the choice is made at import.
	if $(BIN)/python -c "import triton" 2>/dev/null; then TRITON_INTERPRET=1 $(BIN)/python -m pytest tests/kernels \
	    --numprocesses auto --maxprocesses 4 --dist worksteal $(PYTEST_ARGS); fi

check: ## formatting, lint, import order, types, spelling
	@$(PYTHON) scripts/setup_env.py dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/lint-imports
	$(BIN)/basedpyright
	$(BIN)/typos

format: ## rewrite the sources as `make check` wants them
	@$(PYTHON) scripts/setup_env.py dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

setup: ## only make .venv with everything in it
	@$(PYTHON) scripts/setup_env.py dev

bench-cpu: ## Octavo on the CPU workloads; benchmarks/cpu/README.md tells how to add peers
	@$(PYTHON) scripts/setup_env.py dev
	$(BIN)/python benchmarks/cpu/run.py --engines octavo --output build/bench-cpu

clean: ## remove .venv and every cache
	rm -rf .venv .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
