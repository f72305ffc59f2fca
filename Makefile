# make demo    install and run the demonstration: five cell lines in three experiments
# make test    install and run the tests, with line coverage of those that are fast
# make test-lowest
#              the tests with the lowest versions that pyproject.toml admits, for Python 3.11, but for those that take
#              long and depend on the version of torch alone
# make lint    ruff and mypy
# make bench   measure speed and memory beside scvi-tools, Harmony and the floor (DATA=folder for real data)
# make docs    build the documentation into docs/_build/html, offline, and follow its links; the tutorials as they were saved
# make docs-all
#              the same, with all tutorials run again (make test runs the fast ones, named in tests/test_tutorials.py)
# make dist    build the wheel and the source archive, check them, and run the demonstration from the wheel alone
# make clean   remove everything that make made
#
# Needs only python >= 3.11; choose another one with `make demo PYTHON=python3.13`.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# The lowest torch brings three gigabytes of CUDA libraries, so test-lowest takes the torch of constraints.txt unless it
# is told otherwise: make test-lowest TORCH=2.6.0.
TORCH ?= $(patsubst torch==%,%,$(shell grep '^torch==' constraints.txt))

.PHONY: demo test test-lowest lint bench docs docs-all dist clean

demo: $(VENV)/.installed-demo
	$(BIN)/scvae demo --overwrite

test: $(VENV)/.installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist loadscope -m "not slow" --cov --cov-report term-missing:skip-covered
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist loadscope --no-loadscope-reorder -m slow \
		tests/test_tutorials.py tests # which take longest, and so come first

test-lowest: $(VENV)-lowest/.installed-$(TORCH)
	OMP_NUM_THREADS=1 $(VENV)-lowest/bin/python -m pytest --numprocesses 2 --dist loadscope -m "not slow"

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/.installed-dev $(VENV)-peers/.installed
	$(BIN)/python tests/benchmarks/bench.py --peer $(VENV)-peers/bin/python $(if $(DATA),--data $(DATA))

docs: $(VENV)/.installed-docs
	OMP_NUM_THREADS=1 $(BIN)/python -m sphinx -W --keep-going -q -b html docs docs/_build/html
	$(BIN)/python docs/check.py docs/_build/html

docs-all: $(VENV)/.installed-docs $(VENV)/.installed-demo
	OMP_NUM_THREADS=1 PYTHONWARNINGS=ignore SCVAE_DOCS_NOTEBOOKS=force $(BIN)/python -m sphinx -W --keep-going -q -E -b html docs docs/_build/html
	$(BIN)/python docs/check.py docs/_build/html

# The wheel is installed where nothing of the repository is, and run in a folder where nothing is.
dist: $(VENV)-dist/.installed
	rm -rf dist
	$(VENV)-dist/bin/python -m build --no-isolation
	$(VENV)-dist/bin/python -m twine check --strict dist/*
	$(PYTHON) -m venv --clear $(VENV)-wheel
	$(VENV)-wheel/bin/python -m pip install -c constraints.txt "$$(echo dist/*.whl)[demo]"
	folder=$$(mktemp -d) && cd $$folder && $(CURDIR)/$(VENV)-wheel/bin/scvae demo && rm -r $$folder

clean:
	rm -rf $(VENV) $(VENV)-dist $(VENV)-lowest $(VENV)-peers $(VENV)-wheel build dist scvae_demo htmlcov .coverage .coverage.* \
		.pytest_cache .mypy_cache .ruff_cache .hypothesis
	rm -rf docs/_build docs/api docs/benchmarks docs/fragments docs/tutorials docs/contributing.md
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamp is written last: an installation that was interrupted is taken up again by the next make.
$(VENV)/.installed-%: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install -c constraints.txt -e '.[$*]'
	touch $@

$(VENV)-lowest/.installed-%: pyproject.toml constraints-lowest.txt
	$(PYTHON) -m venv --clear $(VENV)-lowest
	sed 's/^torch==.*/torch==$*/' constraints-lowest.txt > $(VENV)-lowest/constraints.txt
	$(VENV)-lowest/bin/python -m pip install -c $(VENV)-lowest/constraints.txt -e '.[dev]'
	touch $@

$(VENV)-peers/.installed: constraints.txt
	$(PYTHON) -m venv $(VENV)-peers
	$(VENV)-peers/bin/python -m pip install $(shell grep -h '^torch==' constraints.txt)
	$(VENV)-peers/bin/python -m pip install scvi-tools==1.4.2 scanpy harmonypy scib-metrics
	touch $@

$(VENV)-dist/.installed: constraints.txt
	$(PYTHON) -m venv --clear $(VENV)-dist
	$(VENV)-dist/bin/python -m pip install -c constraints.txt build hatch-fancy-pypi-readme hatchling twine
	touch $@

.PRECIOUS: $(VENV)/.installed-% $(VENV)-lowest/.installed-%

$(BIN)/python:
	@$(PYTHON) -c 'import sys; v = sys.version_info; v >= (3, 11) or sys.exit( \
		"scvae needs Python 3.11 or newer; $(PYTHON) is %d.%d. Name another: make PYTHON=/path/to/python3.11" % v[:2])'
	$(PYTHON) -m venv $(VENV)
