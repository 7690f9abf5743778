# make run, make test: each makes the environment in .venv if it is missing, and does the rest.
PYTHON ?= python3
CONSTRAINTS ?= constraints.txt
BIN := .venv/bin
export PATH := $(CURDIR)/$(BIN):$(PATH)

.PHONY: help run test docs readme release clean

help:  ## what there is
	@grep -E '^[a-z]+:.*##' Makefile | sed -E 's/:[^#]*## /\t/' | expand -t 10
	@echo; echo 'make run ARGS="-f params/quran.yaml"   other parameters; data/runs/quran'
	@echo 'make test ARGS="notebooks jobs"        some of the checks'
	@echo 'PYTHON=python3.12, CONSTRAINTS= (the newest versions instead of the tested ones)'

.venv/.ready: settings.ini setup.py $(CONSTRAINTS)
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q --disable-pip-version-check $(addprefix -c ,$(CONSTRAINTS)) -e ".[dev]"
	touch $@

run: .venv/.ready  ## fine-tune on Vietnamese law, print a table of before and after; data/runs/law
	$(BIN)/bgem3-job train $(or $(ARGS),-f law) --force

test: .venv/.ready  ## everything CI checks
	$(BIN)/python tools/test.py $(ARGS)

docs: .venv/.ready  ## the site: _docs with Quarto on the PATH, else a smoke build in _site
	$(BIN)/python tools/docs.py

readme: .venv/.ready  ## README.md from nbs/index.ipynb
	$(BIN)/python tools/readme.py

release: .venv/.ready  ## VERSION=0.2.0: set it, build and check the packages, commit, tag; pushes nothing
	$(BIN)/python tools/release.py --check $(VERSION)
	$(BIN)/python tools/test.py packages
	$(BIN)/python tools/release.py $(VERSION)

clean:  ## remove what was built; the environment and data/runs stay
	rm -rf build dist *.egg-info _proc _docs _site .pytest_cache
