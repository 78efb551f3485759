# make demo: set up, then base model -> SFT -> nine DPO trials -> comparison, about seven minutes on two CPU cores
# make test: set up, then lint (ruff, mypy) and all tests
PYTHON ?= python3
# Without a GPU, make TORCH='torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu' saves 3 GB.
TORCH ?= torch==2.13.0

PY := .venv/bin/python
TINY := local_runs/tiny

.PHONY: demo test lint setup
.DELETE_ON_ERROR:

setup: .venv/ready

.venv/ready: requirements.txt tests/requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "error: Python 3.11 or newer is needed (make PYTHON=...)")'
	$(PYTHON) -m venv .venv
	$(PY) -m pip install -q $(TORCH)
	$(PY) -m pip install -q -r requirements.txt -r tests/requirements.txt
	@touch $@

demo: setup
	$(PY) examples/tiny/make.py $(TINY)
	$(PY) local_experiment.py examples/tiny/sft.yaml
	$(PY) local_experiment.py examples/tiny/dpo.yaml . \
	    --config hyperparameters.model_ckpt=$$(cat local_runs/tiny-sft/best_checkpoint)
	$(PY) inference.py --model base=$(TINY)/base --model sft=$$(cat local_runs/tiny-sft/best_checkpoint) \
	    --model dpo=$$(cat local_runs/tiny-dpo/best_checkpoint) --reference sft \
	    --dataset $(TINY)/questions --dataset $(TINY)/conversations \
	    --output_file local_runs/tiny-comparison.html --output_file local_runs/tiny-comparison.csv
	@echo "To open in a browser:"
	@echo "  the grid of DPO trials     $(CURDIR)/local_runs/tiny-dpo/report.html"
	@echo "  your own vote on answers   $(CURDIR)/local_runs/tiny-comparison.html"

# For the tests of load_in_4bit. Within .venv itself, every start of Python would import it for a second.
.venv/bitsandbytes: .venv/ready
	-$(PY) -m pip install -q --no-deps --target $@ bitsandbytes==0.50.2

lint: setup
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

test: lint .venv/bitsandbytes
	$(PY) -m pytest
