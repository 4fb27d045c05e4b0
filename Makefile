# Everything runs in .venv, which is made on first use and again when pyproject.toml or constraints.txt change.

BIN := .venv/bin
READY := .venv/.ready
SCRIPTS := .ci/run .ci/make-venv launch/env.sh launch/torchrun.sh launch/sites.sh launch/slurm.sbatch

.DEFAULT_GOAL := help
.PHONY: help demo test lint bench venv clean

help:  ## this list
	@grep -E '^[a-z]+:.*##' Makefile | sed -E 's/^([a-z]+):.*## */  make \1\t/' | expand -t 14

demo: $(READY)  ## train a small MoE on real text on this machine's CPU (minutes) and draw its loss
	@$(BIN)/pretrain demo

test: lint  ## lint, then the whole CPU test suite
	@OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses 3 --dist loadfile

lint: $(READY)  ## ruff, mypy, shellcheck
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/shellcheck $(SCRIPTS)

bench: $(READY)  ## measure training speed on this machine against its peers
	@$(BIN)/pretrain bench

venv: $(READY)  ## only set up .venv

$(READY): pyproject.toml constraints.txt
	@.ci/make-venv
	@touch $@

clean:  ## remove .venv, caches and build products (runs stay)
	rm -rf .venv build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
