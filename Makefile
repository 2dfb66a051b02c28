# make demo | test | fuzz | lint | typecheck | format | parity | topology | clean
#
#   PYTHON=python3.12   the interpreter that makes the environment (3.11 or later)
#   VENV=.venv          where the environment lives
#   DATA=PATH           demo: a file or folder of text instead of the standard library's sources
#   PROMPT=TEXT         demo: what the model continues at the end; \n is a new line
#   PIP_FLAGS=...       for every pip install, e.g. "-c constraints.txt"
#   TESTS=tests/x.py    test: these only
#   FUZZ_SECONDS=60     fuzz: for each parser; `python -m tests.fuzz --help` has the rest
#   PYTEST_FLAGS=...    test: replaces "-n 2 --dist loadfile"

PYTHON ?= python3
VENV ?= .venv
DATA ?=
ifeq ($(DATA),)
PROMPT ?= class Reader:\n    """Reads a file."""\n\n    def __init__(self,
else
PROMPT ?= The
endif
PIP_FLAGS ?=
TESTS ?=
FUZZ_SECONDS ?= 60
PYTEST_FLAGS ?= -n 2 --dist loadfile

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet $(PIP_FLAGS)
INSTALLED := $(VENV)/.installed
INSTALLED_PARITY := $(VENV)/.installed-parity
INSTALLED_TPU := $(VENV)/.installed-tpu

.DELETE_ON_ERROR:
.PHONY: demo test fuzz parity topology lint typecheck format venv clean

# The demo starts afresh: what an earlier one left in runs/demo is removed.
demo: $(INSTALLED)
	rm -rf runs/demo
	$(BIN)/python train.py --config=configs/debug.py --workdir=runs/demo $(if $(DATA),--data="$(DATA)")
	$(BIN)/python -m mmx_jax.convert export runs/demo runs/demo/export
	@echo
	@echo 'The model continues a text that it has not seen:'
	@echo
	@printf '%b' '$(PROMPT)'
	@$(BIN)/python infer.py --checkpoint=runs/demo/export --prompt="$$(printf '%b' '$(PROMPT)')" \
	  --temperature=0.6 --top_p=0.9 --repetition_penalty=1.1 --max_new_tokens=120
	@echo
	@echo 'The loss curve is in runs/demo/loss.png. What to try next:'
	@echo '  another text:        $(BIN)/python infer.py --checkpoint=runs/demo/export --prompt="import " --temperature=0.8'
	@echo '  learn from your own: make demo DATA=path/to/texts'
	@echo '  train it further:    $(BIN)/python train.py --config=configs/debug.py --workdir=runs/tuned \'
	@echo '                         --init_from=runs/demo --data=path/to/texts --set training.learning_rate=1e-3'

test: $(INSTALLED)
	$(BIN)/python -m pytest $(PYTEST_FLAGS) $(TESTS)

# Damaged files of every kind that is read: each must end in success or in one of the project's own errors.
fuzz: $(INSTALLED)
	JAX_PLATFORMS=cpu $(BIN)/python -m tests.fuzz --seconds=$(FUZZ_SECONDS)

parity: $(INSTALLED_PARITY)
	$(BIN)/python -m pytest -m parity $(TESTS)

# Compile for TPUs without access to one: some minutes.
topology: $(INSTALLED_TPU)
	JAX_PLATFORMS=cpu $(BIN)/python -m pytest $(PYTEST_FLAGS) -m "topology or topology_subset" $(TESTS)

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

typecheck: $(INSTALLED)
	$(BIN)/basedpyright --pythonpath $(BIN)/python

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

venv: $(INSTALLED)

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "mmx_jax needs Python 3.11 or later, and $(PYTHON) is: $$($(PYTHON) --version 2>&1)"; \
	  echo "name another one: make $(MAKECMDGOALS) PYTHON=/path/to/python3.11"; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); \
	  echo "$(PYTHON) cannot make virtual environments (on Debian and Ubuntu: apt install python3-venv)"; exit 1; }

# Installed again only when the dependencies may have changed. Plain `jax` on Linux is the CPU build.
$(INSTALLED): pyproject.toml | $(BIN)/python
	$(PIP) --editable '.[data,log,dev]'
	@touch $@

# torch by itself and first: asked for in one go with transformers, a newer CUDA build could be chosen.
$(INSTALLED_PARITY): $(INSTALLED)
	$(PIP) torch==2.13.0
	$(PIP) --editable '.[parity]'
	@touch $@

# libtpu compiles on any host; what runs is told by JAX_PLATFORMS. This version is that of the pages and of the plan; jax
# may ask for an earlier one to run on a TPU.
$(INSTALLED_TPU): $(INSTALLED)
	$(PIP) libtpu==0.0.52
	@touch $@

clean:
	rm -rf $(VENV) runs/demo build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './.git/*' -type d -prune -exec rm -rf {} +
