"""What a record says of the arithmetic that rounded its numbers."""

import json
import os
import subprocess
import sys

import pytest
import torch

from kd_utils.config.project_paths import CODE_ROOT
from kd_utils.records import arithmetic

SHOW = """
import json, sys, torch
from kd_utils.records.arithmetic import arithmetic
print(json.dumps(arithmetic("cpu")))
"""


def elsewhere(**environment):
    """The arithmetic of another process, whatever an earlier test's sweep left in this one."""
    inherited = {key: value for key, value in os.environ.items() if key != "MKL_NUM_THREADS"}
    done = subprocess.run(
        [sys.executable, "-c", SHOW],
        env={**inherited, "PYTHONPATH": str(CODE_ROOT), "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(done.stdout)


def test_two_processes_of_one_machine_agree_and_no_random_number_is_drawn():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    here = arithmetic.arithmetic("cpu")
    assert torch.equal(torch.get_rng_state(), before)
    assert elsewhere(OMP_NUM_THREADS=str(torch.get_num_threads())) == here
    assert set(here) == {"cpu", "extensions", "capability", "blas", "threads", "probe"}


@pytest.mark.skipif(not torch.backends.mkl.is_available(), reason="torch has no MKL here")
def test_sums_that_round_otherwise_are_told_apart_where_every_name_is_the_same():
    """As on a machine that calls itself the same and is another."""
    plain, other = elsewhere(), elsewhere(MKL_CBWR="COMPATIBLE")
    assert plain.pop("probe") != other.pop("probe")
    assert plain == other


def test_another_number_of_threads_or_other_extensions_are_another_arithmetic(monkeypatch):
    assert elsewhere(OMP_NUM_THREADS="2")["threads"] == 2
    assert elsewhere(ATEN_CPU_CAPABILITY="default")["capability"] == "DEFAULT"
    text = "model name\t: AMD EPYC\ncpu family\t: 25\nmodel\t\t: 1\nstepping\t: {}\nflags\t\t: fpu {} fma\n"
    said = iter([text.format(1, "avx2"), text.format(2, "avx2 avx512f")] * 2)
    monkeypatch.setattr(arithmetic.Path, "read_text", lambda path: next(said))
    assert arithmetic.cpu_name() == "AMD EPYC, family 25, model 1, stepping 1"
    assert arithmetic.cpu_name().endswith("stepping 2")
    assert arithmetic._extensions() == ["avx2", "fma"]
    assert arithmetic._extensions() == ["avx2", "avx512f", "fma"]


def test_the_libraries_of_matrix_products_are_named():
    shown = (
        "Library Version 2024.2-Product\n - Intel(R) MKL-DNN v3.7.1 (Git Hash 1)\nBLAS_INFO=mkl, B"
    )
    assert arithmetic._blas(f"Math Kernel {shown}") == (
        "mkl (Math Kernel Library Version 2024.2, MKL-DNN v3.7.1)"
    )
    assert arithmetic._blas("") == "unknown ()"
