# `make demo` and `make test` each work alone on a fresh machine with Python 3.11 or later and a C++ compiler.
PYTHON ?= python3
# Any torch >= 2.9 serves fastvae; the set-up pins one so that every checkout is alike. For the small CPU build:
# make test TORCH='torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu'
TORCH ?= torch==2.13.0

VENV := .venv
BIN := $(VENV)/bin
BUILD_INPUTS := pyproject.toml setup.py $(wildcard csrc/*)
CPP_SOURCES := $(wildcard csrc/*.cpp csrc/*.h tests/csrc/*.cpp tests/csrc/*.h)
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: demo test slow sanitize bench docs format clean
.DELETE_ON_ERROR:

demo: $(VENV)/.train
	$(BIN)/fastvae demo

test: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(CPP_SOURCES)
	$(BIN)/mypy
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

slow: $(VENV)/.dev
	$(BIN)/python -m pytest -m slow

# Every C++ entry point under the compiler's sanitizers; FUZZ='--seconds 600 --seed 1000' looks longer, elsewhere.
sanitize: $(VENV)/.dev
	$(BIN)/python -m pytest -m slow tests/csrc

bench: $(VENV)/.dev
	$(BIN)/python -m bench
	$(BIN)/python -m bench.tables --write README.md docs/mixtures.md docs/move-your-vae.md docs/speed.md

# The site, in build/docs; a warning is an error.
docs: $(VENV)/.docs
	$(BIN)/python -m sphinx -q -W --keep-going -E -c docs . build/docs

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP_SOURCES)

clean:
	rm -rf $(VENV) build dist runs *.egg-info fastvae/_C*.so .mypy_cache .pytest_cache .ruff_cache .benchmarks
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# torch comes first and pinned: the installs below find it there and leave it alone.
$(VENV)/.torch:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet $(TORCH)
	touch $@

$(VENV)/.train: $(VENV)/.torch $(BUILD_INPUTS)
	$(BIN)/python -m pip install --quiet -e '.[train]'
	touch $@

$(VENV)/.docs: $(VENV)/.torch $(BUILD_INPUTS)
	$(BIN)/python -m pip install --quiet -e '.[docs]'
	touch $@ $(VENV)/.train

# Everything the demo needs is in here too.
$(VENV)/.dev: $(VENV)/.torch $(BUILD_INPUTS)
	$(BIN)/python -m pip install --quiet -e '.[dev]'
	touch $@ $(VENV)/.train
