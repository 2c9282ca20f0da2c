PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
PEERS := .venv/.peers
OLDEST := .venv-oldest
# One process a core and one thread a process: the tests' tensors are tiny.
PYTEST := -m pytest --numprocesses auto --maxprocesses 4 --dist worksteal

.PHONY: demo ablation gpu test test-fast test-oldest lint clean

# 5 to 8 minutes on 2 idle cores, most of it training; an interrupted demo resumes.
demo: $(STAMP)
	$(BIN)/python tools/demo.py --out runs/demo

ablation: $(STAMP)
	$(BIN)/python tools/make_scenes.py runs/demo/scenes
	$(BIN)/python tools/ablate.py configs/ablation/scenes.yaml

# On a machine with a CUDA device, by the Python that has PyTorch for it: the CUDA tests, then every timing.
gpu:
	$(PYTHON) -m pytest -m cuda
	$(PYTHON) tools/gpu.py --json runs/gpu.json

test: $(PEERS)
	OMP_NUM_THREADS=1 $(BIN)/python $(PYTEST)

test-fast: $(PEERS)
	OMP_NUM_THREADS=1 $(BIN)/python $(PYTEST) -m "not slow"

test-oldest: $(OLDEST)/.installed
	OMP_NUM_THREADS=1 $(OLDEST)/bin/python $(PYTEST) -m "not slow" -W ignore::DeprecationWarning

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(STAMP): requirements.txt setup.cfg
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -r requirements.txt
	$(BIN)/python -m pip install --quiet -e '.[dev]'
	touch $@

# Other libraries to compare with; without them their tests skip.
$(PEERS): $(STAMP) requirements-peers.txt
	$(BIN)/python -m pip install --quiet --no-deps -r requirements-peers.txt || echo "no other libraries: their tests skip"
	touch $@

$(OLDEST)/.installed: requirements-oldest.txt setup.cfg
	$(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip install --quiet -r requirements-oldest.txt
	$(OLDEST)/bin/python -m pip install --quiet -e '.[test]'
	touch $@

clean:
	rm -rf .venv $(OLDEST) runs build *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
