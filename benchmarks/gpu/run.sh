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
else
    echo "no kit in $kit: running with what is installed here (make gpu-kit makes one)" >&2
fi
unset NVIDIA_TF32_OVERRIDE TORCH_ALLOW_TF32_CUBLAS_OVERRIDE # float32 means float32
export PYTHONPATH="$site:$here${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1
exec "$python" "$here/benchmarks/gpu/parts.py" "$@"
