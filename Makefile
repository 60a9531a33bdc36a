# Both commands work on a fresh machine; the first to run also installs (Python 3.11 or newer, about 5 GB).
#   make demo   train a small LiteVAE on synthetic images, score it, draw out/demo/reconstruction.png
#   make test   run the quick tests on the CPU; make test-all adds the slow ones
#   make gpu    run the tests that need a GPU, then bench.py, which also writes out/bench.json
PYTHON ?= python3
BIN := .venv/bin
DEMO_FLAGS ?=

.PHONY: demo test test-all gpu lint

demo: .venv/installed
	rm -rf out/demo
	$(BIN)/python train.py @recipes/demo.args $(DEMO_FLAGS)
	$(BIN)/python eval.py out/demo/ckpt.pt --data synthetic --limit 64 --res 128 --metrics psnr,ssim \
	    --json out/demo/scores.json --grid out/demo/reconstruction.png
	@echo "wrote out/demo/reconstruction.png"

test: .venv/installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --max-worker-restart 0

test-all: .venv/installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --max-worker-restart 0 -m "not gpu"

gpu: .venv/installed-dev
	$(BIN)/python -m pytest -m gpu
	$(BIN)/python bench.py --json out/bench.json

lint: .venv/installed-dev
	$(BIN)/ruff check .

.venv/installed: requirements.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

.venv/installed-dev: requirements-dev.txt .venv/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch $@
