# Every target that needs Python makes its own environment in .venv from nothing but Python 3.11+ and make.
PYTHON ?= python3
BIN := .venv/bin
BASE := .venv/.base
DEV := .venv/.dev
DEMO := $(if $(LONG),demo-long,$(if $(FAST),demo-fast,demo))
export HF_HUB_OFFLINE := 1
export TOKENIZERS_PARALLELISM := false

.PHONY: demo ablation test test-slow lint types layers requirements bench clean

$(BASE): pyproject.toml constraints.txt requirements/no-deps.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q --disable-pip-version-check --upgrade pip
	$(BIN)/pip install -q torch==2.13.0
	$(BIN)/pip install -q -c constraints.txt -e .
	$(BIN)/pip install -q --no-deps -r requirements/no-deps.txt
	touch $(BASE)

$(DEV): $(BASE) requirements/test-no-deps.txt
	$(BIN)/pip install -q -c constraints.txt -e '.[dev]'
	$(BIN)/pip install -q --no-deps -r requirements/test-no-deps.txt
	touch $(DEV)

demo: $(BASE)  ## from nothing to a model that answers about pictures; FAST=1: four minutes, LONG=1: at most ninety
	@sed -n '/^#/!q; s/^# \{0,1\}//p' recipes/demo/demo.yaml
	$(BIN)/triptych scenes runs/demo/data -n 8000 --test 200
	$(BIN)/triptych train recipes/demo/$(DEMO).yaml $(ARGUMENTS)
	$(BIN)/triptych report runs/$(DEMO)
	@echo "talk with it: $(BIN)/triptych chat runs/$(DEMO)/instruct/model --image 12"

ablation: $(BASE)  ## what each stage of the demo is worth: one table over two seeds
	$(BIN)/triptych scenes runs/demo/data -n 8000 --test 200
	COLUMNS=160 $(BIN)/triptych train recipes/demo/ablation.yaml $(ARGUMENTS)

test: $(DEV) lint types  ## lint, types, layers, tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadfile -m "not slow" $(ARGUMENTS)

test-slow: $(DEV)  ## the tests that take minutes
	$(BIN)/python -m pytest -q -m slow $(ARGUMENTS)

lint: $(DEV)  ## ruff and the direction of imports
	$(BIN)/ruff check src tests benchmarks
	$(BIN)/ruff format --check src tests benchmarks
	$(BIN)/lint-imports

types: $(DEV)
	$(BIN)/mypy

requirements: $(DEV)  ## which requirement rows the tests show
	@$(BIN)/python -m tests.requirements_report $(ARGUMENTS)

bench: $(DEV)  ## speed and memory against other tools, and docs/benchmarks.md; ARGUMENTS="names of rows" for a part
	@$(BIN)/python -m benchmarks $(ARGUMENTS); status=$$?; $(BIN)/python -m benchmarks.report && exit $$status

clean:  ## everything that can be made again; runs/ is yours
	rm -rf .venv build dist .pytest_cache .mypy_cache .ruff_cache .import_linter_cache src/*.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
