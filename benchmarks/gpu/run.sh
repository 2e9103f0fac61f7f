#!/usr/bin/env bash
# One part on a machine with a GPU, from the kit in .gpu/ (`make gpu-kit`); docs/gpu.md says what each part gives.
#
#   bash benchmarks/gpu/run.sh correct|shapes|smol-full --out DIR [--seconds N]
#
# Needs a python3 (or PYTHON) with torch and transformers; no network, no .git. What is missing comes from the kit.
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
python="${PYTHON:-python3}"
kit="${KD_KIT:-$here/.gpu}"
site="${KD_SITE:-$kit/site}"
if [ -f "$kit/1/kit.json" ]; then
    variables="$("$python" "$here/benchmarks/gpu/kit.py" install --kit "$kit" --site "$site")"
    eval "$variables"
elif "$python" -c "import sys; from importlib.util import find_spec; sys.exit(not all(map(find_spec, sys.argv[1:])))" \
    altair gguf papermill pydantic torch transformers; then
    echo "no kit in $kit: running with what is installed here" >&2
else
    echo "error: no kit in $kit, and $python lacks packages: make one with make gpu-kit and copy its pieces 1, 2, ... there" >&2
    exit 1
fi
unset NVIDIA_TF32_OVERRIDE TORCH_ALLOW_TF32_CUBLAS_OVERRIDE # float32 means float32
export PYTHONPATH="$site:$here${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1
exec "$python" "$here/benchmarks/gpu/parts.py" "$@"
