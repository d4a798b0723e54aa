# What a developer runs. The environment is .venv (bash launch/test.sh makes it), or the Python that PYTHON names.
PYTHON ?= $(shell [ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)

.PHONY: help lint format test gpu faults campaign zion method bench docs

help:
	@echo 'make lint    ruff, formatting and types'
	@echo 'make format  puts imports and layout right'
	@echo 'make test    the everyday tests'
	@echo 'make gpu     what only a GPU runs: tests, then training throughput as JSON under out/bench'
	@echo 'make zion    the real scene at full length with three seeds, where it lies beside the checkout'
	@echo 'make method  recipes compared by held-out KL and by what their backbones are worth (docs/results.md)'
	@echo 'make faults  training and packing killed, starved and damaged in every way; figures as JSON in out/faults'
	@echo 'make campaign every test marked slow: that one, and hundreds of kills'
	@echo 'make bench   packing and training throughput, as tables, pictures and JSON under out/bench'
	@echo 'make docs    docs/configuration.md from the options, tables of docs/scaling.md from the model'

lint:
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m pyright
	$(PYTHON) docs/make_reference.py --check
	$(PYTHON) docs/make_scaling.py --check

format:
	$(PYTHON) -m ruff check --fix .
	$(PYTHON) -m ruff format .

test:
	bash launch/test.sh

# The memory test by itself: it looks at the whole device. Throughput with few repeats, so that all ends in 8 minutes.
gpu:
	mkdir -p out/bench
	$(PYTHON) -m pytest -m gpu -n 4 tests/test_gpu.py tests/test_geokr_apex.py -k "not 2000"
	$(PYTHON) -m pytest -m gpu tests/test_gpu.py -k 2000
	@$(PYTHON) -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || \
	  { echo 'make gpu: no CUDA device here, so nothing more to run'; exit 0; } && \
	  $(PYTHON) -m pytest tests/triton_checks.py && \
	  $(PYTHON) benchmarks/throughput.py --steps 15 --repeats 3 --json out/bench/gpu.json

zion:
	$(PYTHON) -m pytest -s -m slow tests/test_zion.py

method:
	$(PYTHON) benchmarks/method.py --out out/method --jobs 2 --recipe plain model.condition_on_colour=false

faults:
	GEOKR_FAULTS_JSON=out/faults/faults.json OMP_NUM_THREADS=1 $(PYTHON) -m pytest -m "slow or not slow" tests/faults

campaign:
	$(PYTHON) -m pytest -s -m slow

bench:
	mkdir -p out/bench
	$(PYTHON) benchmarks/packing.py --stage all --json out/bench/packing.json
	$(PYTHON) benchmarks/tile_codecs.py --json out/bench/codecs.json
	$(PYTHON) benchmarks/throughput.py --stage all --json out/bench/throughput.json --picture out/bench/throughput.png
	$(PYTHON) benchmarks/throughput.py --stage peers --json out/bench/peers.json --picture out/bench/peers.png
	$(PYTHON) benchmarks/throughput.py --stage profile --trace out/bench/profile

docs:
	$(PYTHON) docs/make_reference.py
	$(PYTHON) docs/make_scaling.py
