# make demo: install and run the main job on the bundled model and texts.  make test: everything that CI checks.
PYTHON ?= python3
BIN := .venv/bin
.DEFAULT_GOAL := help
.PHONY: help demo test test-slow check study study-asked docs clean

help:
	@echo "make demo       install into .venv, run studies/demo.yaml, print the decision (about 3 minutes)"
	@echo "make test       install into .venv, then ruff, mypy, import-linter and pytest"
	@echo "make test-slow  the same with the long tests"
	@echo "make study      run studies/NAME.yaml on the texts in DATA: make study NAME=which-part-leaks DATA=../shared/data"
	@echo "                and one policy of it alone: ... ONLY=\"part block=3 part=attention.query\""
	@echo "make docs       run what the pages show, then build them into build/site, without network; links are checked"
	@echo "make clean      remove .venv, caches and the demo's records"

# torch first and alone: asked for with its version, pip takes the CPU build where one is offered
.venv/.installed-%: pyproject.toml constraints.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@echo "installing (the first time takes a minute or two) ..."
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-warn-script-location -c constraints.txt torch
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-warn-script-location -c constraints.txt -e '.$(if $(filter-out core,$*),[$*])'
	@touch $@

demo: .venv/.installed-core
	@$(BIN)/dpguard run studies/demo.yaml

test: .venv/.installed-test check
	$(BIN)/python -m pytest -n 2 -m "not slow"

test-slow: .venv/.installed-test check
	$(BIN)/python -m pytest -n 2

check: .venv/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# TASK (cola, rotten_tomatoes, sst2 ...), MODEL (a folder or hub name), BATCH, TARGETS and RANK as the study's header says; ONLY
# one policy as the report names it, with the control, in a folder of its own; again to resume
DATA ?= $(DPGUARD_DATA)
task = $(or $(TASK),$(shell sed -n 's/.*{DPGUARD_TASK:-\([a-z0-9_]*\)}.*/\1/p' "studies/$(NAME).yaml" 2>/dev/null | head -1))

study-asked:
	@test -f "studies/$(NAME).yaml" || { echo "no studies/$(NAME).yaml; expected NAME=one of: $(patsubst studies/%.yaml,%,$(wildcard studies/*.yaml))"; exit 2; }
	@test -n "$(DATA)" || ! grep -q '{DPGUARD_DATA}' "studies/$(NAME).yaml" || { echo "DATA=FOLDER is missing; expected the folder with $(or $(task),TASK).train.jsonl and $(or $(task),TASK).validation.jsonl"; exit 2; }

study: study-asked .venv/.installed-minilm,lora
	@export DPGUARD_DATA="$(DATA)" DPGUARD_TASK="$(TASK)" DPGUARD_MODEL="$(MODEL)" DPGUARD_BATCH="$(BATCH)" DPGUARD_TARGETS="$(TARGETS)" DPGUARD_RANK="$(RANK)"; \
	only="$(ONLY)"; part=$$(printf %s "$$only" | tr -cs 'A-Za-z0-9.' -); \
	out="$(or $(OUT),reports/$(NAME)$(addprefix -,$(task))$(if $(RANK),-rank-$(RANK))$(if $(BATCH),-batch-$(BATCH))$(if $(MODEL),-$(notdir $(MODEL)))$(if $(ONLY),-only-$$part))"; \
	$(BIN)/dpguard run "studies/$(NAME).yaml" --out "$$out" $${only:+--only "$$only"} && \
	$(BIN)/dpguard records export "$$out" && $(BIN)/dpguard records export "$$out" --what scores && \
	$(BIN)/dpguard records share "$$out"

docs: .venv/.installed-test
	@$(BIN)/python -m pytest tests/docs -k "not site_builds"
	@NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --clean

clean:
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache .import_linter_cache build reports/demo
