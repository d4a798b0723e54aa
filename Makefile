# What a developer runs. The environment is .venv (bash launch/test.sh makes it), or the Python that PYTHON names.
PYTHON ?= $(shell [ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)

.PHONY: help lint format test faults campaign zion bench docs

help:
	@echo 'make lint    ruff, formatting and types'
	@echo 'make format  puts imports and layout right'
	@echo 'make test    every test'
	@echo 'make zion    the real scene at full length with three seeds, where it lies beside the checkout'
	@echo 'make faults  training killed, starved and damaged in every way; figures in out/faults/faults.json'
	@echo 'make campaign every test marked slow: that one, and hundreds of kills'
	@echo 'make bench   packing and training throughput, as tables, pictures and JSON under out/bench'
	@echo 'make docs    docs/configuration.md from the options'

lint:
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m pyright
	$(PYTHON) docs/make_reference.py --check

format:
	$(PYTHON) -m ruff check --fix .
	$(PYTHON) -m ruff format .

test:
	bash launch/test.sh

zion:
	$(PYTHON) -m pytest -s -m slow tests/test_zion.py

faults:
	GEOKR_FAULTS_JSON=out/faults/faults.json OMP_NUM_THREADS=1 $(PYTHON) -m pytest -m "slow or not slow" tests/faults

campaign:
	$(PYTHON) -m pytest -s -m slow

bench:
	mkdir -p out/bench
	$(PYTHON) benchmarks/packing.py --json out/bench/packing.json
	$(PYTHON) benchmarks/throughput.py --stage all --json out/bench/throughput.json --picture out/bench/throughput.png
	$(PYTHON) benchmarks/throughput.py --stage peers --json out/bench/peers.json --picture out/bench/peers.png
	$(PYTHON) benchmarks/throughput.py --stage profile --trace out/bench/profile

docs:
	$(PYTHON) docs/make_reference.py
