"""Run All: notebooks 01 to 04, in order, with their own defaults, in a project root of their own.

05 and 06 are executed with small parameters by `test_notebooks.py`.
"""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_run_all_works_with_the_notebooks_own_defaults(tmp_path):
    notebooks = sorted((ROOT / "notebooks").glob("0[1-4]_*.ipynb"))
    assert len(notebooks) == 4
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "--nbval-lax", "-p", "no:cacheprovider", *notebooks],
        cwd=ROOT,
        check=False,
        capture_output=True,
        text=True,
        # One thread: on a busy machine two that wait for each other take many times as long.
        env={**inherited, "KD_ROOT": str(tmp_path), "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
