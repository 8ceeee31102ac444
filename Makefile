# make demo   set everything up, trace the demo prompt, and print the page to open
# make test   set everything up and run the linters and all tests
# make check  lint, types, contracts and the quick tests: before every commit
# make wheel  build the wheel, install it alone in a new environment, and run the demo there
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin

.PHONY: demo check test wheel lint figures clean

demo: $(VENV)/.installed
	$(BIN)/qkattr demo --out demo

QUICK := tests/model/test_forward.py tests/model/test_linear.py tests/sources tests/qk tests/graph tests/api \
	tests/analyses tests/house/test_house.py tests/house/test_import.py

check: lint $(VENV)/.tests
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not slow" $(QUICK)

test: lint $(VENV)/.tests
	$(BIN)/python -m pytest -n 2 --dist loadfile

wheel:
	.ci/wheel $(PYTHON)

lint: $(VENV)/.tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports --no-cache

figures: $(VENV)/.tests
	$(BIN)/pip install --quiet matplotlib
	$(BIN)/python docs/outputs.py

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet -e .
	touch $@

$(VENV)/.tests: $(VENV)/.installed
	$(BIN)/pip install --quiet torch==2.13.0
	$(BIN)/pip install --quiet -e ".[test]" pyright ruff
	touch $@

clean:
	rm -rf $(VENV) demo
