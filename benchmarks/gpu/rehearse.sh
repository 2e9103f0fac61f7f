#!/usr/bin/env bash
# The parts on a CPU, at tiny sizes, as a bare machine would run them: Python 3.12 with the packages of bare.txt alone, the
# kit in .gpu/, a tree without .git and without runs/. Prints what each part prints; fails if one of them does.
#
#   bash benchmarks/gpu/rehearse.sh [PART ...]        (`make gpu-rehearsal`)
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
kit="$here/.gpu"
bare="$here/.venv-bare"
[ -f "$kit/1/kit.json" ] || { echo "no kit in .gpu/: run make gpu-kit"; exit 1; }
if [ ! -f "$bare/.ready" ]; then
    "${PYTHON312:-python3.12}" -m venv "$bare"
    "$bare/bin/python" -m pip install -qq --disable-pip-version-check -r "$here/benchmarks/gpu/bare.txt"
    # Newer versions of what is there bring some of what the machine lacks.
    "$bare/bin/python" -m pip uninstall -qq -y pydantic pydantic-core annotated-types typing-inspection
    touch "$bare/.ready"
fi
tree="$(mktemp -d)"
trap 'rm -rf "$tree"' EXIT
cd "$here"
git ls-files -z --cached --others --exclude-standard | grep -zv '^runs/' | xargs -0 cp --parents -t "$tree"
failed=0
for part in "${@:-correct shapes smol-full}"; do
    for name in $part; do
        echo "== $name"
        env -u PYTHONPATH -u VIRTUAL_ENV KD_KIT="$kit" KD_SITE="$tree/.site" KD_SHARED="$tree/nothing" PYTHON="$bare/bin/python" \
            bash "$tree/benchmarks/gpu/run.sh" "$name" --out "$tree/out" --tiny --seconds 900 || failed=1
    done
done
exit $failed
