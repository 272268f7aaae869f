# Two commands for a newcomer: `make demo` and `make test`. Each sets itself up in .venv.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
TORCH := torch==2.13.0
RUN := demo
DEVICE ?= cuda
WORKERS ?= 2

.PHONY: demo test test-all test-device lint types doctest docs check bench clean

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt $(TORCH)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[demo,test,dev,docs]"
	touch $(READY)

demo: $(READY)
	$(BIN)/fxsparse demo

test: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests -m "not slow" -n $(WORKERS) --dist worksteal -q

test-all: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests -n $(WORKERS) --dist worksteal -q --hypothesis-profile=fresh

test-device: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests --device $(DEVICE) -q

doctest: $(READY)
	$(BIN)/python -m pytest fxsparse README.md docs -q --ignore=fxsparse/nn/shared_triton_kernels.py  # imports triton

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY)
	$(BIN)/mypy

docs: $(READY)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

check: lint types doctest docs test

bench: $(READY)
	for file in benchmarks/*.py; do $(BIN)/python $$file || exit 1; done

clean:
	rm -rf $(VENV) site build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
