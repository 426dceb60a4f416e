# reproduce: the study, end to end · retrain: from nothing (PROFILE=smoke: tiny)
# test: the whole suite · faults: runs that are killed, starved of disk, fed damaged files
# mutants: does a test notice each of many seeded faults · bench: speed
PYTHON  ?= python3
DATASET ?= fashion_mnist
PROFILE ?=
RUN     := .venv/bin/python
PIP     := $(RUN) -m pip install --quiet --disable-pip-version-check --constraint requirements.lock

# Recipes run in other folders too, so a relative FRLKIT_DATA is made absolute here.
ifdef FRLKIT_DATA
export FRLKIT_DATA := $(abspath $(FRLKIT_DATA))
endif

.PHONY: reproduce retrain bench test faults mutants
reproduce: .venv/ready
	$(RUN) -m frlkit reproduce --dataset $(DATASET) --profile "$(PROFILE)"

retrain: .venv/ready
	$(RUN) -m frlkit reproduce --dataset $(DATASET) --profile "$(PROFILE)" --retrain

bench: .venv/ready-test
	$(RUN) benchmarks/epoch.py

faults: .venv/ready-test
	$(RUN) tests/faults/campaign.py

mutants: .venv/ready-test
	$(RUN) tests/mutants.py

test: .venv/ready-test
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m pytest

.venv/ready: requirements.txt requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed: make PYTHON=...")'
	@echo "setting up .venv (a few minutes the first time)"
	@$(PYTHON) -m venv .venv
	@$(PIP) --requirement requirements.txt
	@$(PIP) --no-deps --editable .
	@touch $@

# torchattacks (the attacks' oracle) pins an old requests that JupyterLab cannot use, hence --no-deps.
.venv/ready-test: .venv/ready
	@$(PIP) --editable ".[test]"
	@$(PIP) --no-deps torchattacks
	@touch $@
