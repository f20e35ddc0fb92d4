# make demo [OUTPUT=directory]                                  set up and run the whole job on a small model
# make convert [SOURCE=directory or hub id] [OUTPUT=directory]   set up and convert a checkpoint
# make test                                                     set up and run the tests
# make test-slow, make test-gpu                                 set up and run the slow tests; the tests on a GPU
# make test-5.17.0                                              set up and test with that version of transformers
# make docs                                                     set up and build the documentation in site/

PYTHON ?= python3
VENV ?= .venv
TESTS ?= tests/mqa_hf tests/conversion tests/finetune
SOURCE ?= HuggingFaceTB/SmolLM2-135M-Instruct
PIP = install --quiet --disable-pip-version-check

.PHONY: demo convert test test-slow test-gpu lint docs
.PRECIOUS: .venv-%/installed-dev

demo: $(VENV)/installed-demo
	$(VENV)/bin/mqa-hf demo $(if $(OUTPUT),"$(OUTPUT)")

convert: $(VENV)/installed
	$(VENV)/bin/mqa-hf convert "$(SOURCE)" "$(or $(OUTPUT),converted)"

test: $(VENV)/installed-dev
	$(VENV)/bin/pytest -q -n auto

test-slow test-gpu: $(VENV)/installed-dev
	$(VENV)/bin/pytest -q -m $(@:test-%=%)

# The tests that depend most on transformers, with another version of it.
test-%: .venv-%/installed-dev
	.venv-$*/bin/pytest -q -n auto $(TESTS)

lint: $(VENV)/installed-dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

docs: $(VENV)/installed
	$(VENV)/bin/pip $(PIP) --constraint constraints.txt --editable ".[docs,evaluation,training]"
	rm -rf build/docs
	$(VENV)/bin/pip $(PIP) --no-deps --target build/docs .
	$(VENV)/bin/typer mqa_hf.cli utils docs --name mqa-hf --title Commands --output docs/cli.md
	NO_MKDOCS_2_WARNING=1 MQA_HF_VERSION=$$($(VENV)/bin/mqa-hf --version | cut -d' ' -f2) $(VENV)/bin/mkdocs build --quiet --strict --site-dir site
	! grep -rlE '<(script|link)[^>]+(src|href)="https?://' site --include=*.html  # the site needs no network

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip $(PIP) --constraint constraints.txt --editable .
	touch $@

$(VENV)/installed-demo: $(VENV)/installed
	$(VENV)/bin/pip $(PIP) --constraint constraints.txt --editable ".[demo]"
	touch $@

$(VENV)/installed-dev: $(VENV)/installed
	$(VENV)/bin/pip $(PIP) --constraint constraints.txt --editable ".[dev]"
	touch $@

.venv-%/installed-dev: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-$*
	grep -v transformers constraints.txt > .venv-$*/constraints.txt
	.venv-$*/bin/pip $(PIP) --constraint .venv-$*/constraints.txt --editable ".[dev]" transformers==$*
	touch $@
