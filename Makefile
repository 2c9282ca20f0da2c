PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed

.PHONY: demo ablation test lint clean

demo: $(STAMP)
	$(BIN)/python tools/demo.py --out runs/demo

ablation: $(STAMP)
	$(BIN)/python tools/make_scenes.py runs/demo/scenes
	$(BIN)/python tools/ablate.py configs/ablation/scenes.yaml

test: $(STAMP)
	$(BIN)/python -m pytest

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(STAMP): requirements.txt setup.cfg
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -r requirements.txt
	$(BIN)/python -m pip install --quiet -e '.[dev]'
	touch $@

clean:
	rm -rf .venv runs build *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
