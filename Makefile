## make reproduce   the study, end to end: executed notebooks, HTML copies, figures and the claims table under output/
## make retrain     the same from nothing, shipped runs ignored
##                  both take DATASET=digits (minutes), PROFILE=smoke (does it run at all) or another of notebooks/profiles
## make test        linter and the whole test suite on three processes, nbval over the notebooks included
## make faults      runs that are killed, starved of disk and fed damaged files, and finish as if nothing had happened
## make mutants     breaks the kit on purpose: does a test notice each of many seeded faults?
## make bench       speed on this machine
## make address URL=https://github.com/OWNER/NAME     a fork's address in badges, set-up cells, README and pyproject.toml
##
## Needs Python 3.10 or newer (make PYTHON=python3.12 ...). The first call makes .venv from requirements.lock: about 6 GB
## on Linux, 5 of them torch with CUDA. Without a GPU, PyTorch's CPU-only wheels are enough and far smaller; pip prefers them
## where it also looks into their index:
##     PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu make reproduce
PYTHON  ?= python3
DATASET ?= fashion_mnist
PROFILE ?=
RUN     := .venv/bin/python
PIP     := $(RUN) -m pip install --quiet --disable-pip-version-check --constraint requirements.lock

# Recipes run in other folders too, so a relative FRLKIT_DATA is made absolute here.
ifdef FRLKIT_DATA
export FRLKIT_DATA := $(abspath $(FRLKIT_DATA))
endif

.PHONY: help reproduce retrain bench test faults mutants address
help:
	@sed -n 's/^## \{0,1\}//p' Makefile

reproduce: .venv/ready
	$(RUN) -m frlkit reproduce --dataset $(DATASET) --profile "$(PROFILE)"

retrain: .venv/ready
	$(RUN) -m frlkit reproduce --dataset $(DATASET) --profile "$(PROFILE)" --retrain

bench: .venv/ready-test
	$(RUN) benchmarks/epoch.py
	$(RUN) benchmarks/colour.py

faults: .venv/ready-test
	$(RUN) tests/faults/campaign.py

mutants: .venv/ready-test
	$(RUN) tests/mutants.py

# Needs no packages, so no .venv either.
address:
	@$(PYTHON) -m frlkit.origin "$(URL)"

test: .venv/ready-test
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m pytest -n 3 --dist worksteal

.venv/ready: requirements.txt requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed: make PYTHON=...")'
	@echo "setting up .venv: some minutes and, on Linux, about 6 GB, most of it for GPUs; without one, stop and use"
	@echo "  PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu make ..."
	@$(PYTHON) -m venv .venv
	@$(PIP) --requirement requirements.txt
	@$(PIP) --no-deps --editable .
	@touch $@

# torchattacks (the attacks' oracle) pins an old requests that JupyterLab cannot use, adv-lib (a baseline of the benchmark)
# wants a plotting server, hence --no-deps.
.venv/ready-test: .venv/ready
	@$(PIP) --editable ".[test]"
	@$(PIP) --no-deps torchattacks adv-lib
	@touch $@
