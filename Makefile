# One environment in .venv, made on first use. Everything else runs in it.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# One thread a process and no spinning: several ranks share the cores of this machine.
export OMP_NUM_THREADS ?= 1
export OMP_WAIT_POLICY ?= passive
RANKS ?= 2
ARGS ?=
NAME ?= granularity
# Files of tests that run at once; many tests start several processes.
TEST_JOBS ?= 2

.PHONY: install train test parity parity-slow compare bench bench-gpu bench-gpu-train bench-checkpoint bench-convert bench-nodes bench-overlap bench-plan bench-skew bench-scaling check format help clean

help:
	@echo "make install   create .venv with pinned dependencies"
	@echo "make train     train the default model on $(RANKS) processes, experts split over them   (ARGS='train.steps=50')"
	@echo "make test      the whole test suite, parity included"
	@echo "make parity    only the parity suite; prints its table"
	@echo "make parity-slow  its rows of 8 processes"
	@echo "make compare   an experiment of docs/experiments.md   (NAME=granularity ARGS='--jobs 2')"
	@echo "make bench     speed and memory against transformers, written to docs/benchmarks.md"
	@echo "make bench-gpu  a layer's experts on this GPU against its peers   (ARGS=--dry-run: on a CPU; PEERS=path: bundle.py's)"
	@echo "make bench-gpu-train  training steps of whole models on this GPU, against transformers and torchtitan   (ARGS=--dry-run)"
	@echo "make bench-nodes  flat against two-hop exchange over a slow link between two nodes, in namespaces; as root"
	@echo "make bench-overlap  how much of a slow exchange computation hides, in namespaces; as root"
	@echo "make bench-checkpoint  saving and loading against the disk, and from a kill to training again   (ARGS=--write)"
	@echo "make bench-convert  import and export of Hugging Face folders against safetensors copying them   (ARGS=--write)"
	@echo "make bench-plan   what the planner predicts for 16, 256 and 2,048 GPUs   (ARGS=--write: into docs/benchmarks.md)"
	@echo "make bench-skew   least-loaded dispatch under skewed loads, 4 processes   (ARGS=--write: into docs/benchmarks.md)"
	@echo "make bench-scaling  weak and strong scaling of every kind of parallelism over 1, 2, 4 processes"
	@echo "make check     formatting, lint, types, spelling"
	@echo "make format    format the code"

install: $(READY)

# torch first and exactly: any looser request would bring the CUDA build.
$(READY): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade "setuptools>=77" wheel -c constraints.txt
	$(BIN)/python -c "import torch" 2>/dev/null || $(BIN)/python -m pip install --quiet -c constraints.txt "$$(grep '^torch==' constraints.txt)"
	$(BIN)/python -m pip install --quiet --no-build-isolation -c constraints.txt -e ".[dev]"
	touch $(READY)

train: $(READY)
	$(BIN)/torchrun --standalone --nproc-per-node $(RANKS) train.py parallel.ep=$(RANKS) parallel.shard=1 resume=auto $(ARGS)

test: $(READY)
	$(BIN)/python -m pytest -q -n $(TEST_JOBS) --dist loadfile $(ARGS)

parity: $(READY)
	$(BIN)/python -m pytest -q tests/parity $(ARGS)

parity-slow: $(READY)
	$(BIN)/python -m pytest -q -m slow tests/parity $(ARGS)

# One comparison with three seeds: make compare NAME=granularity ARGS='--jobs 2 --write'
compare: $(READY)
	$(BIN)/python scripts/compare.py $(NAME) $(ARGS)

bench: $(READY)
	$(BIN)/python -m pip install --quiet --no-build-isolation -c constraints.txt -e ".[bench]"
	$(BIN)/python benchmarks/against_transformers.py $(ARGS)

# .venv has a CPU build of torch: name the Python of a GPU machine with GPU_PYTHON. Nothing is installed into that one.
GPU_PYTHON ?= $(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON))
bench-gpu:
	PYTHONPATH=kernels$(if $(PYTHONPATH),:$(PYTHONPATH)) PEERS=$(PEERS) $(GPU_PYTHON) -m benchmarks.gpu.run $(ARGS)

bench-gpu-train:
	PYTHONPATH=kernels:data$(if $(PYTHONPATH),:$(PYTHONPATH)) $(GPU_PYTHON) -m benchmarks.gpu_train.run $(ARGS)

bench-checkpoint: $(READY)
	$(BIN)/python benchmarks/checkpoint.py $(ARGS)

bench-convert: $(READY)
	$(BIN)/python benchmarks/convert.py $(ARGS)

bench-plan: $(READY)
	$(BIN)/python benchmarks/planned_scaling.py $(ARGS)

bench-skew: $(READY)
	$(BIN)/python benchmarks/skewed_load.py $(ARGS)

bench-scaling: $(READY)
	$(BIN)/python benchmarks/scaling.py $(ARGS)

bench-overlap: $(READY)
	$(BIN)/python benchmarks/overlap.py $(ARGS)

bench-nodes: $(READY)
	$(BIN)/python benchmarks/two_nodes.py $(ARGS)

check: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/codespell

format: $(READY)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf .cache runs multirun .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist *.egg-info
