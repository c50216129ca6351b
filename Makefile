# make demo | test | test-oldest-hub | test-nnunet | lint | examples | bench | viewer | wheel: each works alone, from a clean clone, and makes .venv first.
VENV ?= .venv
PYTHON ?= python3
BIN = $(VENV)/bin
READY = $(VENV)/.ready
OLDEST_HUB = $(VENV)/oldest-hub
NNUNET = $(VENV)/nnunet

.PHONY: demo test test-oldest-hub test-nnunet lint examples bench viewer wheel

demo: $(READY)
	$(BIN)/gvsl-zoo demo --output demo

test: $(READY)
	$(BIN)/python -m pytest -n 2 --dist loadfile

test-oldest-hub: $(READY) $(OLDEST_HUB)
	PYTHONPATH=$(OLDEST_HUB) $(BIN)/python -m pytest tests/test_hub.py tests/test_hub_server.py tests/test_sources.py tests/test_share.py

test-nnunet: $(READY) $(NNUNET)
	PYTHONPATH=$(abspath $(NNUNET)) $(BIN)/python -m pytest tests/test_nnunet.py tests/test_surgery.py

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

examples: $(READY)
	for example in examples/*.py; do echo "$$example"; $(BIN)/python $$example || exit 1; done

bench: $(READY)
	$(BIN)/python -m benchmarks.load
	$(BIN)/python -m benchmarks.ncc
	$(BIN)/python -m benchmarks.augment
	$(BIN)/python -m benchmarks.feed
	$(BIN)/python -m benchmarks.step
	$(BIN)/python -m benchmarks.sliding
	$(BIN)/python -m benchmarks.backbones
	$(BIN)/python -m benchmarks.register
	$(BIN)/python -m benchmarks.correspond
	$(BIN)/python scripts/model_table.py

viewer:  # the page of `gvsl-zoo view`; needs Node.js
	npm --prefix viewer ci --ignore-scripts --no-audit --no-fund
	npm --prefix viewer run build

wheel: $(READY) viewer
	$(BIN)/python -m build --wheel --no-isolation

$(OLDEST_HUB): $(READY)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --target $@ huggingface_hub==1.0.0

$(NNUNET): $(READY) tests/nnunet.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target $@ -r tests/nnunet.txt

$(READY): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[test,viz]"
	touch $@
