# Two commands: `make demo` shows it, `make test` proves it. Both need Python >= 3.11 and a network the first time.
PYTHON ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11; do \
	"$$p" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo "$$p" && break; done)
VENV := .venv
BIN := $(VENV)/bin
LOWEST := .venv-lowest
LMMS := .venv-lmms
PYTEST_ARGS ?= -n auto --dist worksteal
export HF_HUB_OFFLINE = 1
export PIP_DISABLE_PIP_VERSION_CHECK = 1

.PHONY: demo test check lowest lmms-eval format clean

demo: $(VENV)/.demo
	$(BIN)/trio run

test: $(VENV)/.dev
	$(BIN)/python -m pytest $(PYTEST_ARGS)

check: $(VENV)/.dev
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m ruff check .
	$(BIN)/python -m mypy

# The contract tests on the lowest supported transformers.
lowest: $(LOWEST)/.installed
	$(LOWEST)/bin/python -c 'import transformers as t; assert t.__version__.startswith("5.17."), t.__version__'
	$(LOWEST)/bin/python -m pytest -m contract $(PYTEST_ARGS)

# The plugin for lmms-eval, run by lmms-eval.
lmms-eval: $(LMMS)/.installed
	$(LMMS)/bin/python -c 'import lmms_eval, transformers as t; assert t.__version__.startswith("5."), t.__version__'
	$(LMMS)/bin/python -m pytest tests/integrations

format: $(VENV)/.dev
	$(BIN)/python -m ruff format .
	$(BIN)/python -m ruff check --fix .

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer was not found; name one: make PYTHON=/path/to/python3" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable .
	@touch $@

$(VENV)/.dev: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	@touch $@ $(VENV)/.demo

# Environments that hold only what differs (transformers and what it pins; lmms-eval and what it needs) and see the rest
# through a .pth file: torch is not installed twice.
define beside
	$(BIN)/python -m venv --clear $(1)
	$(BIN)/python -c 'import sysconfig; print("import site; site.addsitedir(%r)" % sysconfig.get_path("purelib"))' \
		> "$$($(1)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/main.pth"
endef

$(LOWEST)/.installed: $(VENV)/.dev
	$(call beside,$(LOWEST))
	$(LOWEST)/bin/python -m pip install --quiet 'transformers==5.17.*'
	@touch $@

$(LMMS)/.installed: $(VENV)/.dev
	$(call beside,$(LMMS))
	$(LMMS)/bin/python -m pip install --quiet 'lmms-eval==0.7.*'
	@touch $@

clean:
	rm -rf $(VENV) $(LOWEST) $(LMMS) dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
