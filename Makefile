# Each target sets itself up on a fresh machine with Python >= 3.10 and a C++17 compiler.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# 4.57 checks the names of the older transformers: make test VENV=.venv-tf4 TRANSFORMERS='==4.57.*'
TRANSFORMERS ?=
# What is installed, and in which versions.
EXTRAS ?= test,lint,docs,triton
CONSTRAINTS ?= constraints.txt
# What `test` runs (default: all), and the files for the oldest versions; other files use newer accelerate or transformers.
TESTS ?=
OLDEST := backward bias blocks build capturable compile distributed documented drop_in engine grad_scaler gradients hooks \
	hub init_lora launches layers lora_trainers optimizer parity precision prior sharding state trainers \
	transformers_trainer
# What `simulate` compiles for.
ARCH ?= 90

SOURCES = $(shell git ls-files '*.h' '*.inc' '*.cpp' '*.cu' '*.cuh')

.SECONDARY:
.PHONY: demo docs test test-oldest test-trainers dist dist-check wheels simulate gpu lint format clean

demo: $(READY)  ## the paper's experiment in miniature, on tiny models and real digit images
	$(BIN)/python -m examples.digit_sums

docs: $(READY)  ## the documentation site, in build/docs; any warning is an error
	$(BIN)/sphinx-build -q -E -W --keep-going -n -b html -d build/doctrees docs build/docs

test: $(READY)  ## all tests
	$(BIN)/python -m pytest -q -n logical --maxprocesses 4 --dist loadfile $(TESTS)

# Without the Triton kernels: torch 2.9 pins a Triton that is too old for them.
test-oldest:  ## with the oldest supported versions, the tests of OLDEST; PYTHON is to be Python 3.10
	$(MAKE) test VENV=.venv-oldest CONSTRAINTS=constraints-oldest.txt EXTRAS=test TESTS='$(OLDEST:%=tests/test_%.py)'

dist: .venv-dist/.ready  ## the sdist, and a wheel built from it, in dist/
	rm -rf dist
	.venv-dist/bin/python -m build

dist-check: dist  ## installs both in fresh environments, with and without a compiler, and runs the README's first step there
	$(PYTHON) tests/fresh.py dist/*.whl dist/*.tar.gz

wheels: .venv-dist/.ready  ## the wheels of a release, in dist/; needs docker
	.venv-dist/bin/python -m cibuildwheel --output-dir dist

.venv-dist/.ready: Makefile
	test -x $(@D)/bin/python || $(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install -q --upgrade pip 'build>=1.2' 'cibuildwheel>=3'
	touch $@

# Trainers with an environment of their own: those of tests/trainers/requirements. One, or all of them.
TRAINER ?= $(basename $(notdir $(wildcard tests/trainers/requirements/*.txt)))

test-trainers: $(TRAINER:%=test-trainer-%)  ## make test-trainers TRAINER=llamafactory: inside a trainer, in its own environment

test-trainer-%: .venv-%/.ready $(READY)
	$(<D)/bin/python -m pytest -q tests/trainers/test_$(subst -,_,$*)*.py

# With the extensions that the main environment has built in place; on the path, since a trainer may start processes.
.venv-%/.ready: tests/trainers/requirements/%.txt tests/trainers/requirements/common.in constraints.txt
	test -x $(@D)/bin/python || $(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install -q --upgrade pip
	$(@D)/bin/python -m pip install -q -c constraints.txt torch numpy
	$(@D)/bin/python -m pip install -q --no-compile -c constraints.txt torch -r $< -r tests/trainers/requirements/common.in
	echo '$(CURDIR)' > "$$($(@D)/bin/python -c 'import site; print(site.getsitepackages()[0])')/drift_kernels.pth"
	touch $@

simulate: $(READY)  ## all kernels of the cuda backend, as nvcc compiles them for ARCH, on a simulated device: no GPU
	DRIFT_KERNELS_SIMULATE=$(ARCH) $(BIN)/python -m pytest -q tests/test_simulator.py tests/test_simulator_faults.py

# With the python3 that is there, and what it has: such a machine often has no network.
gpu:  ## make gpu OUT=folder: on a machine with a GPU, builds, tests and measures there; ends within 10 minutes
	@test -n "$(OUT)" || { echo "usage: make gpu OUT=folder" >&2; exit 2; }
	$(PYTHON) -m benchmarks.gpu "$(OUT)"

lint: $(READY)  ## ruff, mypy, clang-format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(SOURCES)

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(SOURCES)

# torch first and pinned: nothing else may then pull another one.
$(READY): pyproject.toml setup.py $(CONSTRAINTS) $(shell find csrc -type f)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --upgrade pip
	$(BIN)/python -m pip install -q -c $(CONSTRAINTS) torch numpy 'transformers$(TRANSFORMERS)'
	$(BIN)/python -m pip install -q -c $(CONSTRAINTS) -e '.[$(EXTRAS)]' 'transformers$(TRANSFORMERS)'
	touch $@

clean:
	rm -rf build dist .venv-dist .venv-oldest $(VENV) $(TRAINER:%=.venv-%) drift_kernels/*.so *.egg-info
