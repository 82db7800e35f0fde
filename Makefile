# Two commands set everything up on a machine that has Python: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
STAMP := $(VENV)/installed
OLDEST := .venv-oldest
WHEEL := .venv-wheel

# Files stay whole on a worker, which makes what a file's tests share once, and begin in the order of their names.
TESTS := pytest -n auto --dist loadfile --no-loadscope-reorder

.PHONY: demo test test-quick test-oldest test-wheel docs lint clean

demo: $(STAMP)  ## the main job on real images with the built-in backbone
	$(VENV)/bin/dyntune demo --out demo

test: $(STAMP)  ## style, types and all tests
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	OMP_NUM_THREADS=1 $(VENV)/bin/$(TESTS)
	@echo 'make test-quick leaves out style, types and the slow tests: killed processes, pools, whole studies.'

test-quick: $(STAMP)  ## the tests that are not slow
	OMP_NUM_THREADS=1 $(VENV)/bin/$(TESTS) -m 'not slow'

test-oldest: $(OLDEST)/installed  ## all tests with the lowest versions that pyproject.toml admits
	OMP_NUM_THREADS=1 $(OLDEST)/bin/$(TESTS)

test-wheel: $(STAMP)  ## build the wheel, and run the demo with it alone in a fresh environment
	rm -rf dist $(WHEEL)
	$(VENV)/bin/python -m build
	$(VENV)/bin/twine check --strict dist/*
	$(PYTHON) -m venv $(WHEEL)
	$(WHEEL)/bin/python -m pip install --quiet dist/*.whl
	$(WHEEL)/bin/dyntune demo --epochs 1 --no-speed --out $(WHEEL)/demo

docs: $(STAMP)  ## the documentation as a site, in site/index.html
	$(VENV)/bin/mkdocs build --quiet --strict
	@echo 'site/index.html; for the search: $(VENV)/bin/mkdocs serve'

lint: $(STAMP)  ## put the code into shape
	$(VENV)/bin/ruff format .
	$(VENV)/bin/ruff check --fix .

clean:
	rm -rf $(VENV) $(OLDEST) $(WHEEL) demo build dist site .pytest_cache .mypy_cache .ruff_cache .hypothesis

$(STAMP): pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit("Dyntune needs Python 3.11 or newer; set PYTHON=..." if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --upgrade pip
	$(VENV)/bin/python -m pip install --quiet --editable '.[dev]'
	touch $(STAMP)

$(OLDEST)/installed: pyproject.toml scripts/lowest.py
	$(PYTHON) -m venv --clear $(OLDEST)
	$(OLDEST)/bin/python -m pip install --quiet uv
	$(OLDEST)/bin/python scripts/lowest.py > $(OLDEST)/constraints.txt
	$(OLDEST)/bin/uv pip install --quiet --python $(OLDEST)/bin/python --constraint $(OLDEST)/constraints.txt --editable '.[dev]'
	touch $@
