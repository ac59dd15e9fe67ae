# make demo       set up a fresh machine, then pretrain on the embedded `shapes` set and show what was learned
# make test       set up a fresh machine, then every test, a real four-node SLURM included
# make check      ruff, mypy and the fast tests
# make bench      what is fast, and how much faster than what else there is; on a GPU where there is one
# make soak       a run on a real four-node SLURM, disturbed in every way: make soak SEED=0 DISTURBANCES=25
# make cluster-up / cluster-down    a real SLURM of four nodes on this machine, to try things on
.PHONY: setup demo test check bench soak cluster-up cluster-down
python := .venv/bin/python

setup:
	@./setup.sh run

demo: setup
	@$(python) launchers/pretrain.py shapes --run demo --cluster local

test:
	@./setup.sh test
	@.venv/bin/ruff check .
	@.venv/bin/mypy
	@$(python) -m pytest -q

check:
	@./setup.sh test
	@.venv/bin/ruff check .
	@.venv/bin/mypy
	@$(python) -m pytest -q -m "not slow and not slurm"

bench:
	@./setup.sh bench
	@$(python) benchmarks $(if $(QUICK),--quick)

soak:
	@./setup.sh test
	@$(python) -m tests.soak --seed $(or $(SEED),0) --disturbances $(or $(DISTURBANCES),25)

cluster-up:
	@./setup.sh test
	@$(python) -m slurm.devcluster up

cluster-down:
	@$(python) -m slurm.devcluster down
